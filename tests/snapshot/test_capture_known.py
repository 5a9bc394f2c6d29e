"""What the repository or another capture has is not read again, and what may have changed always is."""

import itertools
import mmap
import os
import time
from pathlib import Path

import pytest

from replicated.snapshot.entries import HELD, KNOWN, LINK, PACKED, SPOOLED, SameTree
from replicated.snapshot.freeze import SMALL_FILE_BYTES

FIRST, SECOND, THIRD = "1" * 64, "2" * 64, "3" * 64


def write(path: Path, data: bytes = b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def tree(project, settle):
    """A project of some files, none of them racy."""
    for name in ["a", "sub/b", "sub/deep/c", "other/d"]:
        write(project / name, os.urandom(5000))
    (project / "link").symlink_to("a")
    (project / "sub/empty").mkdir()
    settle(project)
    return project


@pytest.fixture
def stored(captures, tree):
    """The project after a capture of all of it has been stored."""
    captured, _ = captures.capture(tree, identifier=FIRST, cached=True)
    captures.store(captured, FIRST)
    return tree


def kinds(entries):
    return {os.fsdecode(path): entry.source[0] for path, entry in entries.items() if entry.source}


def is_same_tree(captures, captured, identifier):
    return isinstance(captures.records(captured, identifier)[1][0], SameTree)


def rewatch(captures):
    """Forget what the watches know, as a restart of the daemon does."""
    captures.capturer._seen.clear()


def test_files_that_are_stored_are_not_read(captures, stored, monkeypatch):
    rewatch(captures)

    def read(*_):
        raise AssertionError("a file is read")

    monkeypatch.setattr(os, "readv", read)
    captured, entries = captures.capture(stored, identifier=SECOND, cached=True)
    assert kinds(entries) == {
        "a": KNOWN,
        "sub/b": KNOWN,
        "sub/deep/c": KNOWN,
        "other/d": KNOWN,
        "link": LINK,
    }
    assert (captured.file_count, captured.size_bytes) == (4, 20000)
    assert (captured.frozen_bytes, captured.has_spool) == (0, False)
    assert captures.spool.identifiers() == []
    assert captures.content(entries[b"a"]) == (stored / "a").read_bytes()


@pytest.mark.parametrize("change", ["write", "replace", "touch", "same size and mtime"])
def test_a_file_that_changed_is_read_and_its_neighbours_are_not(captures, stored, change):
    file = stored / "sub/b"
    info = file.stat()
    write(stored / "sub/z", b"new")
    if change == "write":
        file.write_bytes(b"changed")
    elif change == "replace":
        write(stored / "new", b"changed").replace(file)
    elif change == "touch":
        os.utime(file)
    else:
        file.write_bytes(bytes(info.st_size))
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    rewatch(captures)
    captured, entries = captures.capture(stored, identifier=SECOND, cached=True)
    assert kinds(entries) == {
        "a": KNOWN,
        "sub/b": PACKED,
        "sub/deep/c": KNOWN,
        "sub/z": PACKED,
        "other/d": KNOWN,
        "link": LINK,
    }
    assert captures.content(entries[b"sub/b"], SECOND) == file.read_bytes()
    assert list(entries).index(b"sub/b") < list(entries).index(b"sub/z")
    assert captured.frozen_bytes == file.stat().st_size + 3


def test_a_link_that_changed_is_read_again(captures, stored):
    (stored / "link").unlink()
    (stored / "link").symlink_to("other")
    rewatch(captures)
    _, entries = captures.capture(stored, identifier=SECOND, cached=True)
    assert entries[b"link"].target == b"other"
    assert entries[b"a"].source[0] == KNOWN


def write_racy(path, data):
    """Write a file whose times are not before the clock, however long a test takes."""
    later_ns = time.time_ns() + 3600 * 10**9
    os.utime(write(path, data), ns=(later_ns, later_ns))


def test_a_file_that_changed_just_before_its_capture_is_read_again(captures, project):
    write_racy(project / "file", b"one")
    captured, _ = captures.capture(project, identifier=FIRST, cached=True)
    captures.store(captured, FIRST)
    rewatch(captures)
    _, entries = captures.capture(project, identifier=SECOND, cached=True)
    assert kinds(entries) == {"file": PACKED}


def test_a_mapped_file_is_read_though_its_stat_is_the_same(captures, stored):
    mapped = frozenset({b"sub/b", b"a"})
    captured, entries = captures.capture(stored, identifier=SECOND, cached=True, mapped=mapped)
    assert not is_same_tree(captures, captured, SECOND)
    assert kinds(entries) == {
        "a": PACKED,
        "sub/b": PACKED,
        "sub/deep/c": KNOWN,
        "other/d": KNOWN,
        "link": LINK,
    }


def test_a_single_file_of_a_stored_tree_is_known(captures, stored):
    _, entries = captures.capture(stored, "sub/b", "link", identifier=SECOND, cached=True)
    assert kinds(entries) == {"sub/b": KNOWN, "link": LINK}
    records = captures.records(captures.capture(stored, "sub/b", identifier=THIRD, cached=True)[0], THIRD)[1]
    assert [record.is_complete for record in records] == [False, False]


def test_another_directory_in_its_place_is_read(captures, stored, settle):
    (stored / "sub").rename(stored.parent / "aside")
    for name in ["b", "deep/c"]:
        write(stored / "sub" / name, os.urandom(5000))
    settle(stored)
    _, entries = captures.capture(stored, identifier=SECOND, cached=True)
    assert (kinds(entries)["sub/b"], kinds(entries)["sub/deep/c"]) == (PACKED, PACKED)
    assert captures.content(entries[b"sub/b"], SECOND) == (stored / "sub/b").read_bytes()


# Captures that are not stored yet


def test_files_of_a_capture_that_is_not_stored_are_shared(captures, tree):
    _, first = captures.capture(tree, identifier=FIRST)
    write(tree / "sub/new", b"new")
    captured, second = captures.capture(tree, identifier=SECOND)
    contents = {path: captures.content(entry, FIRST) for path, entry in first.items() if entry.type == "file"}
    assert captured.spooled_bytes == 3
    assert captured.frozen_bytes == 3  # the rest is kept, and counted, for the first
    captures.capturer.forget(FIRST)
    for path, content in contents.items():
        assert captures.content(second[path], SECOND) == content
    assert captures.content(second[b"sub/new"], SECOND) == b"new"
    assert captures.spool.is_complete(SECOND)


def test_a_chain_of_captures_shares_one_file(captures, tree):
    contents = {path: (tree / os.fsdecode(path)).read_bytes() for path in (b"a", b"sub/b", b"other/d")}
    identifiers = [f"{number:064}" for number in range(6)]
    captures.capture(tree, identifier=identifiers[0])
    for before, identifier in itertools.pairwise(identifiers):
        captured, entries = captures.capture(tree, identifier=identifier)
        assert captured.spooled_bytes == 0
        captures.capturer.forget(before)
    for path, content in contents.items():
        assert captures.content(entries[path], identifiers[-1]) == content


def test_a_capture_that_has_gone_shares_nothing(captures, tree):
    captures.capture(tree, identifier=FIRST)
    captures.capturer.forget(FIRST)
    captured, entries = captures.capture(tree, identifier=SECOND)
    assert captured.spooled_bytes == 20000
    assert captures.content(entries[b"a"], SECOND) == (tree / "a").read_bytes()


def test_a_racy_file_of_another_capture_is_read_again(captures, project):
    write_racy(project / "file", b"one")
    captures.capture(project, identifier=FIRST)
    captured, entries = captures.capture(project, identifier=SECOND)
    assert captured.spooled_bytes == 3
    assert entries[b"file"].source[2] == "packed"


def test_a_changed_file_is_not_shared(captures, tree):
    captures.capture(tree, identifier=FIRST)
    write(tree / "a", b"changed")
    _, entries = captures.capture(tree, identifier=SECOND)
    assert captures.content(entries[b"a"], SECOND) == b"changed"


def test_a_big_copy_and_a_held_file_are_shared(captures, tree, settle):
    data = os.urandom(2 * SMALL_FILE_BYTES)
    held = write(tree / "held", data)
    written = write(tree / "written", data)
    settle(tree)
    with written.open("r+b"):
        _, first = captures.capture(tree, "held", "written", identifier=FIRST)
        captured, second = captures.capture(tree, identifier=SECOND)
    assert (kinds(first), kinds(second)["held"], kinds(second)["written"]) == (
        {"held": HELD, "written": SPOOLED},
        HELD,
        SPOOLED,
    )
    assert captured.spooled_bytes == 20000
    assert captures.held.count == 1
    captures.capturer.forget(FIRST)
    held.unlink()
    assert captures.content(second[b"held"], SECOND) == data
    assert captures.content(second[b"written"], SECOND) == data


# Watched trees


def test_an_unchanged_tree_is_told_by_its_root(captures, stored):
    for identifier in (SECOND, THIRD):
        captured, _ = captures.capture(stored, identifier=identifier, cached=True)
        assert is_same_tree(captures, captured, identifier)
        assert (captured.file_count, captured.size_bytes, captured.frozen_bytes) == (4, 20000, 0)


@pytest.fixture
def stored_part(captures, tree):
    """The project after a capture of two of its directories has been stored."""
    captured, _ = captures.capture(tree, "sub", "other", identifier=FIRST, cached=True)
    captures.store(captured, FIRST)
    return tree


def test_chosen_directories_that_are_unchanged_are_told_by_their_root(captures, stored_part):
    for identifier in (SECOND, THIRD):
        captured, _ = captures.capture(stored_part, "other", "sub", identifier=identifier, cached=True)
        assert is_same_tree(captures, captured, identifier)
        assert (captured.file_count, captured.size_bytes) == (3, 15000)


@pytest.mark.parametrize("others", [(), ("sub",), ("sub", "other", "a")])
def test_another_choice_is_another_tree(captures, stored_part, others):
    captured, entries = captures.capture(stored_part, *others, identifier=SECOND, cached=True)
    assert not is_same_tree(captures, captured, SECOND)
    _, full = captures.capture(stored_part, *others, identifier=THIRD)
    assert list(entries) == list(full)


@pytest.mark.parametrize(
    "change",
    [
        lambda top: write(top / "sub/deep/c", b"changed"),
        lambda top: write(top / "other/new", b"new"),
        lambda top: ((top / "sub").rename(top / "gone"), write(top / "sub/b", b"another")),
        lambda top: write(top / ".replicateignore", b"deep/\n"),
        lambda top: (top / "other").chmod(0o700),
    ],
)
def test_changes_in_and_around_chosen_directories_are_found(captures, stored_part, change):
    change(stored_part)
    captured, entries = captures.capture(stored_part, "sub", "other", identifier=SECOND, cached=True)
    assert not is_same_tree(captures, captured, SECOND)
    _, full = captures.capture(stored_part, "sub", "other", identifier=THIRD)
    assert [(path, entry.size, entry.mode) for path, entry in entries.items()] == [
        (path, entry.size, entry.mode) for path, entry in full.items()
    ]


def test_what_was_chosen_against_the_rules_stays_chosen_when_its_directory_changes(captures, tree, settle):
    write(tree / "sub/.env", b"secret")
    settle(tree)
    captured, entries = captures.capture(tree, ".", "sub/.env", identifier=FIRST, cached=True)
    assert b"sub/.env" in entries
    captures.store(captured, FIRST)
    write(tree / "sub/new", b"new")
    _, entries = captures.capture(tree, ".", "sub/.env", identifier=SECOND, cached=True)
    assert {b"sub/.env", b"sub/new"} <= set(entries)


def test_what_was_mapped_when_it_was_captured_is_looked_at_the_next_time(captures, tree):
    captured, _ = captures.capture(tree, identifier=FIRST, cached=True, mapped=frozenset({b"sub/b"}))
    captures.store(captured, FIRST)
    # The mapping has gone, and with it the last stores, which changed no time.
    captured, entries = captures.capture(tree, identifier=SECOND, cached=True)
    assert not is_same_tree(captures, captured, SECOND)
    assert kinds(entries)["sub/b"] == PACKED


def test_stores_through_a_new_mapping_into_a_watched_tree_are_found(captures, stored):
    with (stored / "sub/b").open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        mapped[0] = (mapped[0] + 1) % 256
        mapped.flush()
    _, entries = captures.capture(stored, identifier=SECOND, cached=True)
    assert kinds(entries)["sub/b"] == PACKED
    assert captures.content(entries[b"sub/b"], SECOND) == (stored / "sub/b").read_bytes()


def test_only_changed_directories_of_a_watched_tree_are_listed(captures, stored, monkeypatch):
    write(stored / "sub/deep/new", b"new")
    listed = []
    real_scandir = os.scandir

    def scandir(path):
        listed.append(os.readlink(f"/proc/self/fd/{path}"))
        return real_scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    captured, entries = captures.capture(stored, identifier=SECOND, cached=True)
    monkeypatch.undo()
    assert listed == [str(stored / "sub/deep")]
    assert (captured.file_count, captured.size_bytes) == (5, 20003)
    assert kinds(entries) == {
        "a": KNOWN,
        "sub/b": KNOWN,
        "sub/deep/c": KNOWN,
        "sub/deep/new": PACKED,
        "other/d": KNOWN,
        "link": LINK,
    }
    modes = {path: (tree.mode, tree.mtime_ns) for path, tree in entries.items() if tree.type == "directory"}
    assert modes == {
        path: (
            (stored / os.fsdecode(path)).stat().st_mode & 0o7777,
            (stored / os.fsdecode(path)).stat().st_mtime_ns,
        )
        for path in (b"", b"sub", b"sub/deep", b"sub/empty", b"other")
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda top: write(top / "sub/b", b"changed"),
        lambda top: (top / "sub/deep/c").unlink(),
        lambda top: (top / "other").rename(top / "sub/other"),
        lambda top: (top / "sub").chmod(0o700),
        lambda top: (top / "sub/empty").rmdir(),
        lambda top: write(top / ".replicateignore", b"c\n"),
        lambda top: write(top / "sub/.replicateignore", b"deep/\n"),
        lambda top: write(top / "sub/deep/pyvenv.cfg"),
        lambda top: (top / "a").replace(top / "sub/b"),
    ],
)
def test_a_watched_walk_finds_what_a_full_one_finds(captures, stored, change):
    change(stored)
    watched, watched_entries = captures.capture(stored, identifier=SECOND, cached=True)
    full, full_entries = captures.capture(stored, identifier=THIRD)
    assert list(watched_entries) == list(full_entries)
    for path, entry in full_entries.items():
        other = watched_entries[path]
        assert (other.type, other.mode, other.mtime_ns, other.size, other.target) == (
            entry.type,
            entry.mode,
            entry.mtime_ns,
            entry.size,
            entry.target,
        )
    assert (watched.file_count, watched.size_bytes) == (full.file_count, full.size_bytes)


def test_an_ignore_file_that_goes_brings_back_what_it_left_out(captures, tree, settle):
    ignore = write(tree / "sub/.replicateignore", b"c\n")
    settle(tree)
    captured, entries = captures.capture(tree, identifier=FIRST, cached=True)
    assert b"sub/deep/c" not in entries
    captures.store(captured, FIRST)
    assert is_same_tree(captures, captures.capture(tree, identifier=SECOND, cached=True)[0], SECOND)
    ignore.unlink()
    _, entries = captures.capture(tree, identifier=THIRD, cached=True)
    assert b"sub/deep/c" in entries


def test_rules_of_an_unlisted_directory_hold_below_it(captures, tree, settle):
    write(tree / "sub/.replicateignore", b"*.log\n")
    settle(tree)
    captures.store(captures.capture(tree, identifier=FIRST, cached=True)[0], FIRST)
    write(tree / "sub/deep/x.log")
    write(tree / "sub/deep/x.txt")
    _, entries = captures.capture(tree, identifier=SECOND, cached=True)
    assert b"sub/deep/x.txt" in entries
    assert b"sub/deep/x.log" not in entries


def test_a_tree_with_rules_that_no_capture_shows_is_walked(captures, tree, settle):
    ignore = write(tree / ".replicateignore", b".*\nc\n")
    settle(tree)
    captures.store(captures.capture(tree, identifier=FIRST, cached=True)[0], FIRST)
    ignore.unlink()
    _, entries = captures.capture(tree, identifier=SECOND, cached=True)
    assert b"sub/deep/c" in entries


def test_what_was_a_virtual_environment_is_captured_once_it_is_none(captures, tree, settle):
    mark = write(tree / "other/pyvenv.cfg")
    settle(tree)
    captured, entries = captures.capture(tree, identifier=FIRST, cached=True)
    assert b"other" not in entries
    captures.store(captured, FIRST)
    mark.unlink()
    _, entries = captures.capture(tree, identifier=SECOND, cached=True)
    assert b"other/d" in entries


def test_warnings_are_repeated_for_what_is_not_listed(captures, tree, settle):
    write(tree / "other/.env")
    settle(tree)
    first, _ = captures.capture(tree, identifier=FIRST, cached=True)
    captures.store(first, FIRST)
    second, _ = captures.capture(tree, identifier=SECOND, cached=True)
    assert is_same_tree(captures, second, SECOND)
    write(tree / "sub/new")
    third, _ = captures.capture(tree, identifier=THIRD, cached=True)
    assert not is_same_tree(captures, third, THIRD)
    assert first.warnings == second.warnings == third.warnings
    assert "other/.env" in first.warnings[0]


def test_a_directory_that_another_capture_stored_is_listed(captures, stored):
    """The cache then has it with other files than the tree: it is named `sub/b` alone."""
    write(stored / "sub/ignored.log")
    captured, _ = captures.capture(stored, identifier=SECOND, cached=True, ignore=("*.log",))
    captures.store(captured, SECOND)
    write(stored / "other/new")
    _, entries = captures.capture(stored, identifier=THIRD, cached=True)
    assert b"sub/ignored.log" in entries


def test_a_file_with_another_name_is_always_looked_at(captures, tree, settle):
    outside = tree.parent / "outside"
    os.link(tree / "other/d", outside)
    settle(tree)
    captures.store(captures.capture(tree, identifier=FIRST, cached=True)[0], FIRST)
    outside.write_bytes(b"changed")
    _, entries = captures.capture(tree, identifier=SECOND, cached=True)
    assert captures.content(entries[b"other/d"], SECOND) == b"changed"


def test_a_failed_capture_is_no_base(captures, stored, monkeypatch):
    write(stored / "other/new")
    secret = write(stored / "sub/unreadable")
    real_open = os.open

    def open_(path, *arguments, **options):
        if path == b"unreadable":
            raise PermissionError(13, "Permission denied")
        return real_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_)
    with pytest.raises(Exception, match="cannot read sub/unreadable: Permission denied"):
        captures.capture(stored, identifier=SECOND, cached=True)
    monkeypatch.undo()
    secret.unlink()
    _, entries = captures.capture(stored, identifier=THIRD, cached=True)
    assert b"other/new" in entries
    assert b"sub/unreadable" not in entries
