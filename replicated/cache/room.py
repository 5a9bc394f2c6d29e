"""Room for the cache: what it takes of the disk, and what is evicted so that it takes no more than it may.

Called by `ledger` in its transactions, of which it gets the connection. Invariant: what is evicted is gone
from the disk before the transaction is committed that lets others have its room.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import suppress
from typing import Final

from replicated.cache.disk import BLOCK_BYTES, open_locked, remove, size_of, whole_blocks
from replicated.cache.schema import DIRECTORY_NAME, numbers, path_of

#: Of the file system, this part is left to others: one in so many bytes.
SPARE_PARTS: Final = 20

#: So many files go in one transaction: others wait for it.
MAX_VICTIMS: Final = 64

#: What a transaction changes of the database, beside the rows of chunks: in whole pages, and how many a file
#: can cost that goes: it is in a table and three indexes.
_TRANSACTION_PAGES = 24 + 4 * MAX_VICTIMS
#: What it adds to it at most, beside rows of chunks.
_ADDED_BYTES = 8 * BLOCK_BYTES
#: A row of a chunk, in pages that are not full.
_ROW_BYTES = 64
#: The index of the log in shared memory: one in so many bytes of the log, and at least.
_LOG_INDEX_PARTS = 128
_MIN_LOG_INDEX_BYTES = 32 << 10
#: What a directory takes.
_DIRECTORY_BYTES = BLOCK_BYTES


def size_of_log(connection: sqlite3.Connection) -> int:
    """How long the write-ahead log of a database is."""
    (_, _, path) = connection.execute("PRAGMA database_list").fetchone()
    return size_of(f"{path}-wal")


class Room:
    """The room that one transaction has."""

    def __init__(self, connection: sqlite3.Connection, root: str, limit_bytes: int, rows: int) -> None:
        """`rows` are those that the transaction adds or changes beside those of files that it evicts."""
        self._connection = connection
        self._root = root
        self._limit_bytes = limit_bytes
        self._rows = rows

    def evict(self, needed_bytes: int) -> int:
        """Remove what was not used for longest, until so much more may be taken of the disk.

        What is still lacking: more than 0 when all that is left is in use, or when it is too much for one
        transaction.
        """
        (held_bytes,) = numbers(self._connection.execute("SELECT held_bytes FROM identity").fetchone())
        excess = held_bytes + self._own_bytes() + needed_bytes - self._limit_bytes
        if needed_bytes:
            excess = max(excess, self._lacking_bytes(needed_bytes))
        if excess <= 0:
            return excess
        victims: list[tuple[int]] = []
        query = "SELECT id, digest IS NULL, room_bytes FROM files ORDER BY used, id"
        for row in self._connection.execute(query):
            file, is_for_chunks, room_bytes = numbers(row)
            if remove(path_of(self._root, file), is_for_chunks=bool(is_for_chunks)):
                victims.append((file,))
                excess -= room_bytes
                if excess <= 0 or len(victims) == MAX_VICTIMS:
                    break
        self._connection.executemany("DELETE FROM files WHERE id = ?", victims)
        return excess

    def sweep(self) -> None:
        """Remove what nobody knows of, and forget what is not there: after a crash, or somebody's work."""
        directory, name = os.path.split(self._root)
        for other in os.listdir(directory):
            if DIRECTORY_NAME.fullmatch(other) and other != name:
                shutil.rmtree(os.path.join(directory, other), ignore_errors=True)
        os.makedirs(self._root, mode=0o700, exist_ok=True)
        unknown = set(os.listdir(self._root))
        rows = self._connection.execute("SELECT id, digest IS NULL, is_complete FROM files").fetchall()
        for file, is_for_chunks, is_complete in map(numbers, rows):
            path = path_of(self._root, file)
            is_there = os.path.basename(path) in unknown
            unknown.discard(os.path.basename(path))
            if is_there and not is_complete:
                is_there = self._settle(file, path, is_for_chunks=bool(is_for_chunks))
            if not is_there:
                self._connection.execute("DELETE FROM files WHERE id = ?", (file,))
        for name in unknown:
            with suppress(OSError):
                os.unlink(os.path.join(self._root, name))
        self._connection.execute(
            "UPDATE identity SET held_bytes = (SELECT coalesce(sum(room_bytes), 0) FROM files)"
        )

    def _settle(self, file: int, path: str, *, is_for_chunks: bool) -> bool:
        """Give back the room that somebody who died has reserved; whether the file is still there."""
        if not is_for_chunks:
            return not remove(path, is_for_chunks=False)
        descriptor = open_locked(path, os.O_RDONLY)
        if descriptor is not None:
            room_bytes = whole_blocks(os.fstat(descriptor).st_size)
            self._connection.execute("UPDATE files SET room_bytes = ? WHERE id = ?", (room_bytes, file))
            os.close(descriptor)
        return True

    def _own_bytes(self) -> int:
        """What the database takes of the disk at most, when this transaction has ended."""
        (pages,) = numbers(self._connection.execute("PRAGMA page_count").fetchone())
        database_bytes = pages * BLOCK_BYTES + self._rows * _ROW_BYTES + _ADDED_BYTES
        # In the worst case each row changes a page of its own, and nothing of the log may be overwritten.
        changed_bytes = (_TRANSACTION_PAGES + self._rows * 17 // 16) * BLOCK_BYTES
        log_bytes = size_of_log(self._connection) + min(changed_bytes, database_bytes)
        index_bytes = max(log_bytes // _LOG_INDEX_PARTS, _MIN_LOG_INDEX_BYTES)
        return database_bytes + log_bytes + index_bytes + 2 * _DIRECTORY_BYTES

    def _lacking_bytes(self, needed_bytes: int) -> int:
        """What must be freed on the file system so that a part of it is left to others."""
        info = os.statvfs(os.path.dirname(self._root))
        return needed_bytes + info.f_blocks * info.f_frsize // SPARE_PARTS - info.f_bavail * info.f_frsize
