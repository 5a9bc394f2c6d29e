"""What the repository holds of the directories that were captured before: a cache, one SQLite file each.

`capture` finds here which files need not be read, `ingest` which nodes need not be made again and, once
they are stored, writes what it made. Two processes have it open at once: one reads while the other
writes. Nothing depends on it: whatever is wrong with the file is a miss and a line in the log, never an
error. Invariant: a row that is loaded is, byte for byte, a row that was stored.
"""

from __future__ import annotations

import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgpack

from replicated.cache_files import Cache, CacheFiles
from replicated.format.manifest import RootNode
from replicated.snapshot.entries import PlainRow, pack_root, pack_rows, unpack_root

#: "RPLT".
APPLICATION_ID: Final = 0x52504C54
SCHEMA_VERSION: Final = 1

#: Rows that nobody has asked for in so many days are pruned.
KEPT_DAYS: Final = 90
#: A file that changed less than this before it was listed may change again without a change of its
#: times: kernels stamp files with the clock of their last tick, 10 ms at most, and file servers are
#: coarser still.
RACY_NS: Final = 20_000_000
#: The same where times are whole seconds (ext3, ext4 with small inodes) or even two (FAT).
COARSE_RACY_NS: Final = 2_100_000_000
_SECOND_NS: Final = 10**9

_SCHEMA = """
-- One directory each; all by its absolute path, because trees that overlap share directories.
CREATE TABLE directories (
    path BLOB NOT NULL UNIQUE,
    -- The day since 1970 when somebody wanted it, not exactly: see _STAMP_DAYS.
    used INTEGER NOT NULL,
    -- CRC-32 of path and all columns that follow.
    checksum INTEGER NOT NULL,
    -- MessagePack: device, inode, node, totals, generation; of any size, unlike SQLite's integers.
    facts BLOB NOT NULL,
    -- These three as in CachedDirectory.
    rows BLOB NOT NULL,
    sources BLOB NOT NULL,
    children BLOB NOT NULL
);
CREATE INDEX directories_by_use ON directories (used);
-- One selection of a project each: by the key that its capture makes of directory, paths and rules.
CREATE TABLE trees (
    key BLOB PRIMARY KEY,
    used INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    -- MessagePack: snapshot, generation, root.
    facts BLOB NOT NULL
) WITHOUT ROWID;
"""

#: A row's `used` is left as it is for so long: reading would otherwise rewrite the whole cache daily.
_STAMP_DAYS = 7
#: A transaction holds about so many bytes, and a deletion so many rows: others wait for one at most.
_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 1000
#: A capture waits for its answer; a directory that is listed anew costs less than this.
_BUSY_TIMEOUT_S = 1.0
_DAY_NS = 86_400 * 10**9
_MAX_STALE = 1 << 14


class CachedDirectory(NamedTuple):
    """One directory as it was when it was stored."""

    device: int
    inode: int
    #: As `entries.pack_rows`, racy ones smudged: they never equal those of a later listing.
    rows: bytes
    #: As `entries.pack_sources`: only KNOWN and LINK.
    sources: bytes
    #: Packed [(name, mode, mtime_ns, node), ...] of its directories.
    children: bytes
    #: Id of its stored node; empty when that is not known.
    node: bytes
    #: Files, directories, symbolic links and bytes below it.
    totals: tuple[int, int, int, int]
    #: `Index.generation` at that time.
    generation: int


class CachedTree(NamedTuple):
    """A whole tree as it was when it was stored."""

    #: The snapshot that stored it.
    snapshot: str
    root: RootNode
    #: `Index.generation` at that time.
    generation: int


class TreeCache:
    """The cache of one repository; see the module's text.

    Any method may be called from any thread, also after `close`: then nothing is found or kept.
    """

    def __init__(
        self,
        directory: Path,
        repository_id: str,
        url: str,
        *,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        files = CacheFiles(
            directory,
            repository_id,
            url,
            application_id=APPLICATION_ID,
            user_version=SCHEMA_VERSION,
            schema=_SCHEMA,
            busy_timeout_s=_BUSY_TIMEOUT_S,
        )
        self._cache = Cache(files, "tree cache")
        self._clock = clock
        #: Paths that were loaded and whose day is to be written; belongs to who has the connection.
        self._stale: set[bytes] = set()

    def load(self, path: bytes) -> CachedDirectory | None:
        """What is known of the directory at this absolute path."""
        return self._cache.read(lambda connection: self._load(connection, path), is_next=True)

    def load_tree(self, key: bytes) -> CachedTree | None:
        """The tree that was stored last under this key."""
        return self._cache.read(lambda connection: _load_tree(connection, key))

    def store(
        self,
        directories: Iterable[tuple[bytes, CachedDirectory]],
        tree: tuple[bytes, CachedTree] | None = None,
    ) -> None:
        """Keep these directories by their absolute paths and, once they are all kept, this tree by its key.

        In several transactions if they are many; others may see, and trouble may leave, some of them.
        """
        today = self._today()
        for batch in _batches(directories):
            columns = (_columns(path, directory, today) for path, directory in batch)
            if not self._cache.write(partial(_insert, directories=columns)):
                return
        self._cache.write(lambda connection: self._insert_last(connection, tree, today))

    def prune(self, now_ns: int) -> None:
        """Forget what nobody has asked for in `KEPT_DAYS` days."""
        oldest = now_ns // _DAY_NS - KEPT_DAYS
        while self._cache.write(lambda connection: _delete(connection, oldest)):
            pass

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._cache.close()

    def _load(self, connection: sqlite3.Connection, path: bytes) -> CachedDirectory | None:
        found = connection.execute(
            "SELECT used, checksum, facts, rows, sources, children FROM directories WHERE path = ?", (path,)
        ).fetchone()
        if found is None:
            return None
        used, checksum, facts, rows, sources, children = found
        if checksum != _checksum(path, facts, rows, sources, children):
            raise sqlite3.DatabaseError(f"the row of a directory is damaged: {os.fsdecode(path)}")
        if not 0 <= self._today() - used < _STAMP_DAYS and len(self._stale) < _MAX_STALE:
            self._stale.add(path)
        device, inode, *others = _unpack(facts)
        return CachedDirectory(device, inode, rows, sources, children, *others)

    def _insert_last(
        self, connection: sqlite3.Connection, tree: tuple[bytes, CachedTree] | None, today: int
    ) -> bool:
        if self._stale:
            connection.executemany(
                "UPDATE directories SET used = ? WHERE path = ?", ((today, path) for path in self._stale)
            )
            self._stale.clear()
        if tree is not None:
            key, (snapshot, root, generation) = tree
            facts = _pack((snapshot, generation, pack_root(root)))
            connection.execute(
                "INSERT OR REPLACE INTO trees VALUES (?, ?, ?, ?)", (key, today, _checksum(key, facts), facts)
            )
        return True

    def _today(self) -> int:
        return self._clock() // _DAY_NS


def smudge(rows: Sequence[PlainRow], listed_ns: int) -> bytes:
    """Rows for the cache: those of files that may have changed since `listed_ns` equal no listing.

    A change so soon after the last one that both have the same time cannot be seen in the times.
    """
    return pack_rows([(*row[:5], 0) if is_racy(row[4], row[5], listed_ns) else row for row in rows])


def is_racy(mtime_ns: int, ctime_ns: int, listed_ns: int) -> bool:
    """Whether a file with these times may have changed after `listed_ns` without a change of its times."""
    newest = max(mtime_ns, ctime_ns)
    if newest >= listed_ns - RACY_NS:
        return True
    # The ctime cannot be set by anybody: a whole one says how fine the times of this file system are.
    return ctime_ns % _SECOND_NS == 0 and newest >= listed_ns - COARSE_RACY_NS


def _load_tree(connection: sqlite3.Connection, key: bytes) -> CachedTree | None:
    found = connection.execute("SELECT checksum, facts FROM trees WHERE key = ?", (key,)).fetchone()
    if found is None:
        return None
    checksum, facts = found
    if checksum != _checksum(key, facts):
        raise sqlite3.DatabaseError(f"the row of a tree is damaged: {key.hex()}")
    snapshot, generation, root = _unpack(facts)
    return CachedTree(snapshot, unpack_root(root), generation)


def _insert(connection: sqlite3.Connection, directories: Iterable[tuple[Any, ...]]) -> bool:
    # An update of the row that is there leaves it in its place, among those of its tree.
    connection.executemany(
        "INSERT INTO directories VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (path) DO UPDATE SET"
        " used = excluded.used, checksum = excluded.checksum, facts = excluded.facts,"
        " rows = excluded.rows, sources = excluded.sources, children = excluded.children",
        directories,
    )
    return True


def _columns(path: bytes, directory: CachedDirectory, today: int) -> tuple[Any, ...]:
    device, inode, rows, sources, children, *others = directory
    blobs = (_pack((device, inode, *others)), rows, sources, children)
    return (path, today, _checksum(path, *blobs), *blobs)


def _delete(connection: sqlite3.Connection, oldest: int) -> bool:
    """Delete some of the rows that were used before that day; whether there may be more."""
    deleted = 0
    for table, key in (("directories", "path"), ("trees", "key")):
        deleted += connection.execute(
            f"DELETE FROM {table} WHERE {key} IN (SELECT {key} FROM {table} WHERE used < ? LIMIT ?)",
            (oldest, _BATCH_ROWS),
        ).rowcount
    return deleted > 0


def _batches(
    directories: Iterable[tuple[bytes, CachedDirectory]],
) -> Iterator[list[tuple[bytes, CachedDirectory]]]:
    iterator = iter(directories)
    for first in iterator:
        batch = []
        size = 0
        for path, directory in chain([first], iterator):
            batch.append((path, directory))
            size += len(directory.rows) + len(directory.sources) + len(directory.children)
            if size >= _BATCH_BYTES or len(batch) >= _BATCH_ROWS:
                break
        yield batch


def _checksum(*parts: bytes) -> int:
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum


def _pack(values: object) -> bytes:
    packed: bytes = msgpack.packb(values, use_bin_type=True)
    return packed


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, raw=False, use_list=False)
