"""The ledger of the cache: which files it has, how much room each may take, and which was used last.

One SQLite database for all processes that share the cache. The files lie in a directory beside it whose name
the database knows, so that those of a lost database belong to nobody and are swept. What is in the files is
the matter of `chunks` and `plain`, how room is made that of `room`. Nothing depends on the cache: whatever is
wrong with it is a line in the log and a miss.

Invariant: what the cache takes of the disk, the database included, is never above the limit. Room is
reserved, and that committed, before anything is written to it. A file that is being written is locked, and
the lock ends with the process: one that can be had says that the writer died.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Final, NamedTuple, TypeVar, cast

from replicated.cache.disk import BLOCK_BYTES, make_file, open_locked, remove, whole_blocks
from replicated.cache.room import Room, size_of_log
from replicated.cache.schema import (
    APPLICATION_ID,
    MAX_KEY,
    MIN_KEY,
    SCHEMA,
    SCHEMA_VERSION,
    load_root,
    numbers,
    path_of,
)
from replicated.cache_files import RETRY_S, Cache, CacheFiles
from replicated.sqlite import DatabaseUnusable

#: Uses of files are written down this much later, together.
STAMP_S: Final = 5.0

#: Nobody waits longer than this for another process: then there is a miss, which costs no more.
_BUSY_TIMEOUT_S = 2.0
#: How many pages the write-ahead log gets before it is written back: SQLite's own default.
_MAX_LOG_PAGES = 1000
_MIN_LOG_PAGES = 16
#: One in so many bytes of the limit is for that log, where that is less.
_LOG_PARTS = 64
#: For every place that is added so many are looked at: then at most every fourth is of no use.
_CLEANED_PER_ADDED = 4
#: Files that are tried when one is looked for to write on.
_MAX_TRIED = 8
#: The unit of `st_blocks`.
_STAT_BLOCK_BYTES = 512

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Place(NamedTuple):
    """Where a chunk lies."""

    file: int
    offset: int
    length: int
    key: int


class KeptFile(NamedTuple):
    """A plain file, and what it was like when it was verified."""

    id: int
    path: str
    size: int
    mtime_ns: int
    ctime_ns: int


class OpenFile(NamedTuple):
    """A file that this process writes; the lock goes with the descriptor."""

    id: int
    path: str
    descriptor: int
    #: Where the next bytes belong.
    end: int
    room_bytes: int


class _Done(NamedTuple):
    """What a transaction that was committed had to say; unlike None, which says that there was none."""

    answer: object


class Ledger:
    """The ledger of one directory. Thread-safe."""

    def __init__(
        self, directory: Path, limit_bytes: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """What is there is brought below the limit."""
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._files = CacheFiles(
            directory,
            "content",
            "",
            application_id=APPLICATION_ID,
            user_version=SCHEMA_VERSION,
            schema=SCHEMA,
            busy_timeout_s=_BUSY_TIMEOUT_S,
        )
        #: Two connections, so that whoever looks something up does not wait for those who wait to write.
        self._reading = Cache(self._files, "content cache")
        self._writing = Cache(self._files, "content cache")
        log_pages = max(limit_bytes // _LOG_PARTS // BLOCK_BYTES, _MIN_LOG_PAGES)
        self._log_pages = min(log_pages, _MAX_LOG_PAGES)
        # These six belong to whoever has the lock of the connection.
        self._found: tuple[sqlite3.Connection | None, str] = (None, "")
        self._tuned: sqlite3.Connection | None = None
        self._root = ""
        self._swept = ""
        self._stamped = 0
        self._shorten_at = clock()
        #: Guards what is touched; a leaf.
        self._lock = threading.Lock()
        self._touched: set[int] = set()
        self._stamp_at = clock() + STAMP_S
        #: After trouble, nothing is written before.
        self._retry_at = clock()
        try:
            # What was read is nobody else's business.
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._replace_oversized()
        except (OSError, sqlite3.Error, DatabaseUnusable) as error:
            _log.warning("cannot open the content cache in %s: %s", directory, error)
        self._evict(0)

    def _replace_oversized(self) -> None:
        """Begin anew when the database alone takes most of the room: the limit was lowered by far."""
        newest = self._files.newest()
        if newest >= 0 and self._files.path(newest).stat().st_size > self._limit_bytes // 2:
            self._files.open(newest + 1)[1].close()

    def close(self) -> None:
        """Write down what was used, and close; may be called twice. Afterwards there is nothing."""
        if self._touched:
            self._write(lambda connection: self._room(connection).evict(0))
        self._reading.close()
        self._writing.close()

    # Looking up

    def find_chunks(self, keys: Iterable[int]) -> list[tuple[str, list[Place]]]:
        """The files that have some of these chunks by their paths, with the places in each, in order."""

        def find(connection: sqlite3.Connection) -> list[tuple[str, list[Place]]]:
            found: list[Place] = []
            for key in keys:
                row = connection.execute(
                    "SELECT file, offset, length FROM chunks "
                    "WHERE key = ? AND EXISTS (SELECT 1 FROM files WHERE id = file)",
                    (key,),
                ).fetchone()
                if row is not None:
                    file, offset, length = numbers(row)
                    found.append(Place(file, offset, length, key))
            root = self._root_for_reading(connection)
            found.sort()
            files = groupby(found, key=lambda place: place.file)
            return [(path_of(root, file), list(places)) for file, places in files]

        return self._reading.read(find) or []

    def find_plain(self, digest: bytes) -> KeptFile | None:
        """The plain file of this hash, if it is complete."""

        def find(connection: sqlite3.Connection) -> KeptFile | None:
            row = connection.execute(
                "SELECT id, size, mtime_ns, ctime_ns FROM files WHERE digest = ? AND is_complete", (digest,)
            ).fetchone()
            if row is None:
                return None
            number, *facts = numbers(row)
            return KeptFile(number, path_of(self._root_for_reading(connection), number), *facts)

        return self._reading.read(find)

    def touch(self, files: Iterable[int]) -> None:
        """These are being used, and go last when room is made."""
        with self._lock:
            self._touched.update(files)
            if self._clock() < self._stamp_at or not self._touched:
                return
            self._stamp_at = self._clock() + STAMP_S
        self._write(lambda connection: self._room(connection).evict(0))

    # Files that are written

    def create(self, room_bytes: int, digest: bytes | None = None) -> OpenFile | None:
        """A new empty file with this room, for chunks or for the plain file of a hash.

        None when there is no room or trouble, and when there is one of this hash or somebody is making it.
        """
        self._evict(room_bytes)
        opened: list[int] = []

        def make(connection: sqlite3.Connection) -> OpenFile | None:
            if digest is not None and not self._is_free(connection, digest):
                return None
            if self._room(connection).evict(room_bytes) > 0:
                return None
            number = connection.execute(
                "INSERT INTO files VALUES (NULL, ?, ?, (SELECT now + 1 FROM identity), 0, 0, 0, 0)",
                (digest, room_bytes),
            ).lastrowid
            assert number is not None, "a row was inserted"
            path = path_of(self._root, number)
            opened.append(make_file(path))
            return OpenFile(number, path, opened[0], 0, room_bytes)

        return self._write_opening(make, opened)

    def reopen(self, room_bytes: int, least_bytes: int) -> OpenFile | None:
        """A file for chunks that somebody has left off writing, with this room and at least so much free."""
        opened: list[int] = []

        def take(connection: sqlite3.Connection) -> OpenFile | None:
            rows = connection.execute(
                "SELECT id, room_bytes FROM files WHERE digest IS NULL AND NOT is_complete "
                "ORDER BY used DESC LIMIT ?",
                (_MAX_TRIED,),
            ).fetchall()
            for number, old_bytes in map(numbers, rows):
                path = path_of(self._root, number)
                descriptor = open_locked(path, os.O_RDWR)
                if descriptor is None:
                    continue
                end = os.fstat(descriptor).st_size
                if room_bytes - end >= least_bytes and old_bytes <= room_bytes:
                    opened.append(descriptor)
                    if self._room(connection).evict(room_bytes - old_bytes) > 0:
                        return None
                    connection.execute("UPDATE files SET room_bytes = ? WHERE id = ?", (room_bytes, number))
                    return OpenFile(number, path, descriptor, end, room_bytes)
                connection.execute("UPDATE files SET is_complete = 1 WHERE id = ?", (number,))
                os.close(descriptor)
            return None

        return self._write_opening(take, opened)

    def add_chunks(self, file: OpenFile, places: Sequence[Place]) -> bool:
        """Make known what was written to a file; False when that cannot be done, or the file is no more."""

        def add(connection: sqlite3.Connection) -> bool:
            room = self._room(connection, len(places))
            if not self._is_known(connection, file) or room.evict(0) > 0:
                return False
            connection.executemany(
                "INSERT OR REPLACE INTO chunks (file, offset, length, key) VALUES (?, ?, ?, ?)", places
            )
            self._clean(connection, _CLEANED_PER_ADDED * len(places))
            return True

        with self._lock:
            self._touched.add(file.id)
        return self._write(add) or False

    def close_chunks(self, file: OpenFile) -> None:
        """Close a file for chunks. When it is not full, another process may go on with it."""
        room_bytes = min(file.room_bytes, whole_blocks(os.fstat(file.descriptor).st_size))
        is_complete = room_bytes > file.room_bytes * 3 // 4
        self._update(file, "room_bytes = ?, is_complete = ?", (room_bytes, is_complete))
        os.close(file.descriptor)

    def close_plain(self, file: OpenFile) -> bool:
        """Close a plain file that is verified and on the disk; whether it can be opened from now on."""
        info = os.fstat(file.descriptor)
        is_done = self._update(
            file,
            "room_bytes = ?, size = ?, mtime_ns = ?, ctime_ns = ?, is_complete = 1",
            (info.st_blocks * _STAT_BLOCK_BYTES, info.st_size, info.st_mtime_ns, info.st_ctime_ns),
        )
        if not is_done:
            self.discard(file)
            return False
        os.close(file.descriptor)
        return True

    def discard(self, file: OpenFile) -> None:
        """Close and remove a file that did not get complete."""
        # The bytes first: whoever finds the room free may use it.
        with suppress(OSError):
            os.ftruncate(file.descriptor, 0)
        with suppress(OSError):
            os.unlink(file.path)
        self._write(
            lambda connection: (
                self._is_known(connection, file)
                and connection.execute("DELETE FROM files WHERE id = ?", (file.id,)) is not None
            )
        )
        os.close(file.descriptor)

    def forget_chunks(self, places: Iterable[Place]) -> int:
        """Let chunks be missing of which other bytes were found; how many were still known."""

        def forget(connection: sqlite3.Connection) -> int:
            return sum(
                connection.execute(
                    "DELETE FROM chunks WHERE file = ? AND offset = ? AND length = ? AND key = ? "
                    "AND EXISTS (SELECT 1 FROM files WHERE id = file)",
                    place,
                ).rowcount
                for place in places
            )

        return self._write(forget) or 0

    def forget_file(self, file: int) -> bool:
        """Let a file be missing that is damaged or gone; whether it was still known."""

        def forget(connection: sqlite3.Connection) -> bool:
            row = connection.execute("SELECT digest IS NULL FROM files WHERE id = ?", (file,)).fetchone()
            if row is None:
                return False
            if remove(path_of(self._root, file), is_for_chunks=bool(row[0])):
                connection.execute("DELETE FROM files WHERE id = ?", (file,))
            else:
                # In use, so it takes its room until it is not. It is the first that is evicted then.
                connection.execute(
                    "UPDATE files SET digest = NULL, is_complete = 1, used = -1 WHERE id = ?", (file,)
                )
            return True

        return self._write(forget) or False

    def pause(self, error: OSError) -> None:
        """Keep nothing for some seconds after such an error."""
        _log.warning("cannot keep anything in the content cache in %s: %s", self._directory, error)
        self._retry_at = self._clock() + RETRY_S

    # Transactions

    def _evict(self, needed_bytes: int) -> None:
        """Let there be room for so much if that is possible, in transactions for which others can wait."""
        before: float = float("inf")
        while True:
            left = self._write(lambda connection: self._room(connection).evict(needed_bytes)) or 0
            if not 0 < left < before:
                return
            before = left

    def _write(self, action: Callable[[sqlite3.Connection], T]) -> T | None:
        """What `action` says in a transaction of its own; None, and a line in the log, when it failed."""
        if self._clock() < self._retry_at:
            return None

        def transact(connection: sqlite3.Connection) -> _Done:
            self._tend_log(connection)
            connection.execute("BEGIN IMMEDIATE")
            self._root = load_root(connection, str(self._directory))
            if self._root != self._swept:
                self._room(connection).sweep()
                self._swept = self._root
            self._stamped = self._stamp(connection)
            return _Done(action(connection))

        try:
            done = self._writing.write(transact)
        except OSError as error:
            self.pause(error)
            return None
        if done is None:  # and a line in the log says why
            self._retry_at = self._clock() + RETRY_S
            return None
        return cast(T, done.answer)

    def _tend_log(self, connection: sqlite3.Connection) -> None:
        """Keep the write-ahead log short: it counts. Outside of a transaction."""
        if connection is not self._tuned:
            connection.execute(f"PRAGMA wal_autocheckpoint = {self._log_pages}")
            connection.execute(f"PRAGMA journal_size_limit = {self._log_pages * BLOCK_BYTES}")
            self._tuned = connection
        # It grows while one of many processes always reads from it. This waits for them, who are quick.
        is_long = size_of_log(connection) > 2 * self._log_pages * BLOCK_BYTES
        if is_long and self._clock() >= self._shorten_at:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            if size_of_log(connection):
                # Somebody was stopped in the middle of reading.
                self._shorten_at = self._clock() + RETRY_S

    def _write_opening(
        self, action: Callable[[sqlite3.Connection], OpenFile | None], opened: Sequence[int]
    ) -> OpenFile | None:
        """As `_write`; what `action` has opened is closed when it comes to nothing."""
        file = self._write(action)
        if file is None:
            for descriptor in opened:
                os.close(descriptor)
        return file

    def _update(self, file: OpenFile, columns: str, values: Sequence[int]) -> bool:
        def update(connection: sqlite3.Connection) -> bool:
            if not self._is_known(connection, file):
                return False
            connection.execute(f"UPDATE files SET {columns} WHERE id = ?", (*values, file.id))
            return True

        return self._write(update) or False

    # In a transaction

    def _room(self, connection: sqlite3.Connection, rows: int = 0) -> Room:
        return Room(connection, self._root, self._limit_bytes, self._stamped + rows)

    def _stamp(self, connection: sqlite3.Connection) -> int:
        """Write down which files were used since the last time; how many."""
        with self._lock:
            touched, self._touched = self._touched, set()
        if touched:
            connection.execute("UPDATE identity SET now = now + 1")
            connection.executemany(
                "UPDATE files SET used = (SELECT now FROM identity) WHERE id = ?",
                ((file,) for file in sorted(touched)),
            )
        return len(touched)

    def _is_free(self, connection: sqlite3.Connection, digest: bytes) -> bool:
        """Whether nobody has made this plain file, or is making it; what a dead one has left is removed."""
        row = connection.execute("SELECT id, is_complete FROM files WHERE digest = ?", (digest,)).fetchone()
        if row is None:
            return True
        file, is_complete = numbers(row)
        if is_complete or not remove(path_of(self._root, file), is_for_chunks=False):
            return False
        connection.execute("DELETE FROM files WHERE id = ?", (file,))
        return True

    def _is_known(self, connection: sqlite3.Connection, file: OpenFile) -> bool:
        if file.path != path_of(self._root, file.id):
            return False  # its ledger was lost
        return connection.execute("SELECT 1 FROM files WHERE id = ?", (file.id,)).fetchone() is not None

    def _clean(self, connection: sqlite3.Connection, rows: int) -> None:
        """Look at some more places, and remove those in files that are gone."""
        (after,) = numbers(connection.execute("SELECT cleaned FROM identity").fetchone())
        row = connection.execute(
            "SELECT key FROM chunks WHERE key > ? ORDER BY key LIMIT 1 OFFSET ?", (after, rows)
        ).fetchone()
        last = MAX_KEY if row is None else numbers(row)[0]
        connection.execute(
            "DELETE FROM chunks WHERE key > ? AND key <= ? AND file NOT IN (SELECT id FROM files)",
            (after, last),
        )
        connection.execute("UPDATE identity SET cleaned = ?", (MIN_KEY if row is None else last,))

    def _root_for_reading(self, connection: sqlite3.Connection) -> str:
        if connection is not self._found[0]:
            self._found = connection, load_root(connection, str(self._directory))
        return self._found[1]
