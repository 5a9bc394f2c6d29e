"""What is new in a capture, and the warning when that is unusually much."""

import os
import random

import pytest

from replicated.snapshot.additions import LARGEST, Addition, Additions
from replicated.snapshot.freeze import SMALL_FILE_BYTES

BIG = 2 * SMALL_FILE_BYTES


def write(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))


def test_the_largest_places_are_told_in_order():
    additions = Additions()
    sizes = random.Random(3).sample(range(1, 1000), 60)
    for number, size in enumerate(sizes):
        if number % 2:
            additions.add_big(b"%d" % number, size)
        else:
            additions.add_small(2, size - 1)
            additions.add_small(1, 1)
            additions.end_directory(b"%d" % number)
    assert (additions.size_bytes, additions.file_count) == (sum(sizes), 30 + 3 * 30)
    expected = [Addition(size, b"%d" % n, 0 if n % 2 else 3) for n, size in enumerate(sizes)]
    assert additions.largest == sorted(expected, reverse=True)[:LARGEST]


def test_a_directory_without_new_small_files_is_not_told():
    additions = Additions()
    additions.end_directory(b"empty")
    additions.add_big(b"a/big", 5)
    additions.end_directory(b"a")
    assert additions.largest == [Addition(5, b"a/big")]


def test_what_is_new_is_told_above_a_size_and_not_below(captures, project):
    write(project / "data" / "big", BIG)
    for number in range(3):
        write(project / "data" / f"{number}", 1000)
    write(project / "top", 10)
    (project / "link").symlink_to("top")
    total = BIG + 3010
    captured, _ = captures.capture(project, ".", warn_above=total - 1)
    assert (captured.unusual.size_bytes, captured.unusual.file_count) == (total, 5)
    assert captured.unusual.largest == [
        Addition(BIG, b"data/big"),
        Addition(3000, b"data", 3),
        Addition(10, b".", 1),
    ]
    assert captured.warnings == ()
    for number, limit in enumerate((total, 0)):
        captured, _ = captures.capture(project, ".", identifier=f"{number}" * 64, warn_above=limit)
        assert captured.unusual is None


def test_a_chosen_file_is_told_by_its_own_name_when_it_is_big(captures, project):
    write(project / "data" / "big", BIG)
    write(project / "data" / "small", 7)
    captured, _ = captures.capture(project, "data/big", "data/small", warn_above=1)
    assert captured.unusual.largest == [Addition(BIG, b"data/big"), Addition(7, b"data", 1)]


@pytest.mark.parametrize("rung", ["", "copy", "memory"])
def test_what_is_known_or_kept_for_another_snapshot_is_not_new(captures, project, settle, rung):
    write(project / "big", BIG)
    write(project / "small", 1000)
    settle(project)
    kept = captures.capture(project, ".", rung=rung, warn_above=1)[0]
    assert kept.unusual.size_bytes == BIG + 1000
    if not rung:
        assert captures.capture(project, ".", identifier="b" * 64, warn_above=1)[0].unusual is None
        captures.store(kept)
        known = captures.capture(project, ".", identifier="c" * 64, cached=True, warn_above=1)[0]
        assert known.unusual is None
        again = captures.capture(project, ".", identifier="d" * 64, cached=True, warn_above=1)[0]
        assert (again.unusual, again.size_bytes) == (None, BIG + 1000)


def test_holes_are_not_new_data(captures, project):
    with (project / "sparse").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 30)
        file.write(b"data")
    assert captures.capture(project, ".", warn_above=1 << 20)[0].unusual is None
