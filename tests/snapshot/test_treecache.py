"""The tree cache: what goes in comes out, for two processes at once, and whatever is wrong is a miss."""

import logging
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from replicated.format.manifest import RootNode
from replicated.snapshot import treecache
from replicated.snapshot.treecache import (
    KEPT_DAYS,
    CachedDirectory,
    CachedTree,
    TreeCache,
)

ID = "0123456789abcdef" * 2
DAY_NS = 86_400 * 10**9
NOW_NS = 20_000 * DAY_NS

Open = Callable[..., TreeCache]


def directory(number: int = 0, size: int = 100) -> CachedDirectory:
    content = random.Random(number).randbytes(size)
    return CachedDirectory(
        device=64769,
        inode=number,
        rows=b"r" + content,
        sources=b"s" + content,
        children=b"c" + content,
        node=bytes([number % 256]) * 32,
        totals=(number, 2, 3, 4),
        generation=7,
    )


TREE = CachedTree("a1b2", RootNode(b"n" * 32, 0o755, 17, 1, 2, 3, 4), 7)


@pytest.fixture
def open_cache(tmp_path: Path) -> Iterator[Open]:
    """Opens the cache of one repository, or another one of it."""
    opened: list[TreeCache] = []

    def open_one(
        name: str = "trees", url: str = "file:///models", clock: Callable[[], int] = lambda: NOW_NS
    ) -> TreeCache:
        opened.append(TreeCache(tmp_path / name, ID, url, clock=clock))
        return opened[-1]

    yield open_one
    for cache in opened:
        cache.close()


def databases(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "trees").glob("*.db"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# What goes in


def test_what_was_not_stored_is_not_found(open_cache: Open) -> None:
    cache = open_cache()
    assert cache.load(b"/project") is None
    assert cache.load_tree(b"key") is None


unsigned = st.integers(0, 2**64 - 1)
directories = st.builds(
    CachedDirectory,
    unsigned,
    unsigned,
    st.binary(),
    st.binary(),
    st.binary(),
    st.binary(max_size=32),
    st.tuples(unsigned, unsigned, unsigned, unsigned),
    st.integers(0, 2**40),
)
times = st.integers(-(2**70), 2**70)
roots = st.builds(
    RootNode, st.binary(), st.integers(0, 0o7777), times, unsigned, unsigned, unsigned, unsigned
)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.dictionaries(st.binary(), directories), st.binary(), st.text(max_size=40), roots)
def test_what_was_stored_is_found_as_it_was(
    open_cache: Open, stored: dict[bytes, CachedDirectory], key: bytes, snapshot: str, root: RootNode
) -> None:
    cache = open_cache()
    cache.store(stored.items(), (key, CachedTree(snapshot, root, 3)))
    again = open_cache()
    for path, expected in stored.items():
        assert again.load(path) == expected
    assert again.load_tree(key) == CachedTree(snapshot, root, 3)


def test_the_last_one_stored_is_found(open_cache: Open) -> None:
    cache = open_cache()
    cache.store([(b"/a", directory(1, 100_000)), (b"/b", directory(2))], (b"key", TREE))
    cache.store([(b"/a", directory(3))], (b"key", TREE._replace(snapshot="c3d4")))
    assert cache.load(b"/a") == directory(3)
    assert cache.load(b"/b") == directory(2)
    assert cache.load_tree(b"key") == TREE._replace(snapshot="c3d4")


def test_many_directories_are_all_found(open_cache: Open) -> None:
    cache = open_cache()
    stored = {b"/%d" % number: directory(number, 4000) for number in range(2500)}
    cache.store(iter(stored.items()), (b"key", TREE))
    assert {path: cache.load(path) for path in stored} == stored


def test_a_copy_of_the_repository_has_a_cache_of_its_own(open_cache: Open) -> None:
    open_cache().store([(b"/a", directory())], (b"key", TREE))
    other = open_cache(url="s3://copy")
    assert other.load(b"/a") is None
    assert other.load_tree(b"key") is None


def test_nothing_is_found_or_kept_once_it_is_closed(open_cache: Open, tmp_path: Path) -> None:
    cache = open_cache()
    cache.store([(b"/a", directory())])
    cache.close()
    cache.close()
    cache.store([(b"/b", directory())], (b"key", TREE))
    cache.prune(NOW_NS + 1000 * DAY_NS)
    assert cache.load(b"/a") is None
    assert cache.load_tree(b"key") is None
    again = open_cache()
    assert again.load(b"/a") == directory()
    assert again.load(b"/b") is None


# Two processes

_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_treecache import ID, TREE, directory
from replicated.snapshot.treecache import TreeCache
cache = TreeCache(Path(sys.argv[1]), ID, "file:///models")
for round in range(int(sys.argv[2])):
    rows = [(b"/%d" % number, directory(round * 1000 + number, 6000)) for number in range(300)]
    cache.store(rows, (b"key", TREE._replace(generation=round)))
    print(round, flush=True)
cache.close()
"""


def begin_writer(tmp_path: Path, rounds: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path / "trees"), str(rounds), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_one_process_reads_what_another_writes_at_the_same_time(
    open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache()
    with begin_writer(tmp_path, 20) as writer:
        seen = set()
        while writer.poll() is None:
            tree = cache.load_tree(b"key")
            round_of_tree = -1 if tree is None else tree.generation
            for number in range(0, 300, 17):
                found = cache.load(b"/%d" % number)
                if found is None:
                    assert round_of_tree == -1
                    continue
                assert found == directory(found.inode, 6000)
                assert found.inode % 1000 == number
                assert found.inode // 1000 >= round_of_tree
                seen.add(found.inode // 1000)
        assert writer.returncode == 0
    assert len(seen) > 1
    assert cache.load(b"/7") == directory(19_007, 6000)
    assert not warnings(caplog)


def test_a_writer_that_is_killed_leaves_a_cache_that_can_be_used(
    open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache()
    with begin_writer(tmp_path, 1000) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "0\n"
        writer.kill()
    found = cache.load(b"/299")
    assert found is not None
    assert found == directory(found.inode, 6000)
    cache.store([(b"/299", directory(1))], (b"key", TREE))
    assert cache.load(b"/299") == directory(1)
    assert not warnings(caplog)


def test_who_finds_it_damaged_later_takes_the_new_one(
    open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = open_cache(), open_cache()
    first.store([(b"/a", directory(1))])
    assert second.load(b"/a") == directory(1)
    (database,) = databases(tmp_path)
    overwrite(database)
    assert first.load(b"/a") is None
    first.store([(b"/a", directory(2))])
    assert second.load(b"/a") is None  # finds the same damage
    assert second.load(b"/a") == directory(2)
    assert first.load(b"/a") == directory(2)
    (replaced,) = databases(tmp_path)
    assert replaced != database
    assert all("is damaged and made anew" in text for text in warnings(caplog))


# Trouble


def overwrite(database: Path) -> None:
    """Damage every page of a database, in the log as well, without its length."""
    for path in (database, Path(f"{database}-wal")):
        if path.exists():
            with path.open("r+b") as file:
                file.write(b"\xa5" * path.stat().st_size)
    # The index of the log would be believed, as other processes are at it.
    with Path(f"{database}-shm").open("r+b") as file:
        file.write(bytes(32768))


def test_a_flipped_bit_is_a_miss_and_never_another_row(
    open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = {b"/directory %d" % number: directory(number, 300) for number in range(8)}
    cache = open_cache()
    cache.store(stored.items(), (b"key", TREE))
    cache.close()
    (database,) = databases(tmp_path)
    sound = database.read_bytes()
    missed = 0
    for position in range(0, len(sound), 397):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << position % 8
        for path in databases(tmp_path):
            path.unlink()
        database.write_bytes(damaged)
        cache = open_cache()
        for path, expected in stored.items():
            found = cache.load(path)
            assert found in (None, expected)
            missed += found is None
        assert cache.load_tree(b"key") in (None, TREE)
        cache.store(stored.items(), (b"key", TREE))
        cache.store([(b"/another", directory(9))])
        cache.close()
        assert open_cache().load(b"/another") in (None, directory(9))
    assert missed
    assert warnings(caplog)


@pytest.mark.parametrize("damage", [b"", b"\0" * 8192, b"no database, but text that is long enough" * 200])
def test_a_file_that_is_no_database_is_replaced(
    open_cache: Open, tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache()
    cache.store([(b"/a", directory())])
    cache.close()
    (database,) = databases(tmp_path)
    database.write_bytes(damage)
    cache = open_cache()
    assert cache.load(b"/a") is None
    cache.store([(b"/a", directory())])
    assert open_cache().load(b"/a") == directory()
    assert len(databases(tmp_path)) == 1


def test_a_database_that_is_truncated_while_it_is_open_is_replaced(
    open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache()
    cache.store((b"/%d" % number, directory(number, 6000)) for number in range(2000))
    (database,) = databases(tmp_path)
    with database.open("r+b") as file:
        file.truncate(database.stat().st_size // 2)
    found = {number: cache.load(b"/%d" % number) for number in range(2000)}
    assert None in found.values()
    assert all(one is None or one == directory(number, 6000) for number, one in found.items())
    cache.store([(b"/a", directory())])
    assert cache.load(b"/a") == directory()
    assert any("is damaged and made anew" in text for text in warnings(caplog))


@pytest.mark.parametrize("version", [0, treecache.SCHEMA_VERSION + 1])
def test_a_database_of_another_version_is_not_read(open_cache: Open, tmp_path: Path, version: int) -> None:
    cache = open_cache()
    cache.store([(b"/a", directory())])
    cache.close()
    (database,) = databases(tmp_path)
    with sqlite3.connect(database) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    cache = open_cache()
    assert cache.load(b"/a") is None
    cache.store([(b"/a", directory())])
    assert cache.load(b"/a") == directory()


@pytest.mark.parametrize("what", ["the file", "the directory"])
def test_a_database_that_is_deleted_while_it_is_open_is_made_anew(
    open_cache: Open, tmp_path: Path, what: str
) -> None:
    cache = open_cache()
    cache.store([(b"/a", directory())], (b"key", TREE))
    if what == "the file":
        (database,) = databases(tmp_path)
        database.unlink()
    else:
        shutil.rmtree(tmp_path / "trees")
    assert cache.load_tree(b"key") is None
    assert cache.load(b"/a") is None
    cache.store([(b"/b", directory())], (b"key", TREE))
    again = open_cache()
    assert again.load(b"/b") == directory()
    assert again.load_tree(b"key") == TREE


def test_what_is_stored_after_a_deletion_is_found_by_others(open_cache: Open, tmp_path: Path) -> None:
    cache = open_cache()
    cache.store([(b"/a", directory())])
    (database,) = databases(tmp_path)
    database.unlink()
    cache.store([(b"/b", directory())])
    assert open_cache().load(b"/b") == directory()


def test_a_place_where_nothing_can_be_written_is_a_miss(
    open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "trees").write_text("in the way")
    cache = open_cache()
    assert cache.load(b"/a") is None
    assert cache.load_tree(b"key") is None
    cache.store([(b"/a", directory())], (b"key", TREE))
    cache.prune(NOW_NS)
    (text,) = warnings(caplog)
    assert text.startswith("cannot open the tree cache in")


def test_a_full_disk_keeps_what_was_there(
    open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache()
    cache.store([(b"/a", directory(1))], (b"key", TREE))
    connection = cache._cache._connection
    assert connection is not None
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    cache.store(
        ((b"/%d" % number, directory(number, 6000)) for number in range(100)),
        (b"key", TREE._replace(snapshot="c3d4")),
    )
    (text,) = warnings(caplog)
    assert text.startswith("cannot write the tree cache in")
    assert cache.load(b"/99") is None
    assert cache.load(b"/a") == directory(1)
    assert cache.load_tree(b"key") == TREE


def test_one_who_writes_for_long_does_not_keep_others_from_reading(
    open_cache: Open,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(treecache, "_BUSY_TIMEOUT_S", 0.001)
    cache = open_cache()
    cache.store([(b"/a", directory(1))], (b"key", TREE))
    (database,) = databases(tmp_path)
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("DELETE FROM directories")
    cache.store([(b"/a", directory(2))], (b"key", TREE._replace(snapshot="c3d4")))
    assert cache.load(b"/a") == directory(1)
    assert cache.load_tree(b"key") == TREE
    other.execute("ROLLBACK")
    other.close()
    (text,) = warnings(caplog)
    assert text.endswith("database is locked")
    cache.store([(b"/a", directory(2))])
    assert cache.load(b"/a") == directory(2)


def test_one_who_keeps_it_locked_costs_one_wait_and_not_one_for_each_directory(
    open_cache: Open,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(treecache, "_BUSY_TIMEOUT_S", 0.001)
    cache = open_cache()
    cache.store([(b"/a", directory(1))])
    cache.close()
    (database,) = databases(tmp_path)
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    cache = open_cache()
    for _ in range(100):
        assert cache.load(b"/a") is None
    assert len(warnings(caplog)) == 1
    other.execute("ROLLBACK")
    other.close()
    monkeypatch.setattr(time, "monotonic", lambda: float("inf"))
    assert cache.load(b"/a") == directory(1)


# Pruning


class Clock:
    def __init__(self) -> None:
        self.now_ns = NOW_NS

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, days: float) -> None:
        self.now_ns += int(days * DAY_NS)


def test_what_nobody_wanted_for_long_is_pruned(open_cache: Open) -> None:
    clock = Clock()
    cache = open_cache(clock=clock)
    cache.store(((b"/%d" % number, directory(number)) for number in range(2500)), (b"old", TREE))
    clock.advance(KEPT_DAYS)
    cache.store([(b"/new", directory())], (b"new", TREE))
    cache.prune(clock.now_ns)
    assert cache.load(b"/0") is not None
    cache.store([])
    clock.advance(1)
    cache.prune(clock.now_ns)
    kept = {number for number in range(2500) if cache.load(b"/%d" % number) is not None}
    assert kept == {0}
    assert cache.load(b"/new") is not None
    assert cache.load_tree(b"old") is None
    assert cache.load_tree(b"new") is not None


def test_what_is_wanted_every_day_is_kept(open_cache: Open) -> None:
    clock = Clock()
    cache = open_cache(clock=clock)
    cache.store([(b"/a", directory(1)), (b"/b", directory(2))])
    for _ in range(KEPT_DAYS + 8):
        clock.advance(1)
        assert cache.load(b"/a") == directory(1)
        cache.store([])
        cache.prune(clock.now_ns)
    assert cache.load(b"/a") == directory(1)
    assert cache.load(b"/b") is None


def test_reading_does_not_write_until_the_day_is_old(open_cache: Open, tmp_path: Path) -> None:
    clock = Clock()
    cache = open_cache(clock=clock)
    cache.store([(b"/a", directory(1)), (b"/b", directory(2))])
    (database,) = databases(tmp_path)

    def days() -> list[int]:
        with sqlite3.connect(database) as connection:
            found = [day for (day,) in connection.execute("SELECT used FROM directories ORDER BY path")]
        connection.close()
        return [day - NOW_NS // DAY_NS for day in found]

    clock.advance(6.9)
    cache.load(b"/a")
    cache.store([])
    assert days() == [0, 0]
    clock.advance(0.2)
    cache.load(b"/a")
    assert days() == [0, 0]
    cache.store([])
    assert days() == [7, 0]
    clock.advance(-30)  # it was wrong
    cache.load(b"/a")
    cache.store([])
    assert days() == [-23, 0]
