"""The files of a cache in SQLite, of which the newest counts: a damaged one is given up for the next number.

A name is never used twice: a process that still has an old file open would remove the write-ahead log of
its successor when it closes. `CacheFiles` is used by `index`, which says itself what becomes of errors;
`Cache` is for what nothing depends on: `snapshot/treecache` and `snapshot/keyframes`. Both say what is in
the files.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from blake3 import blake3

from replicated.sqlite import BUSY_TIMEOUT_S, DatabaseUnusable, open_database

#: So that one who asks for many things does not try to open the file for each of them.
RETRY_S: Final = 5.0

_log = logging.getLogger(__name__)

T = TypeVar("T")


class CacheFiles:
    """The files of one repository in a directory, which those of others share."""

    def __init__(
        self,
        directory: Path,
        repository_id: str,
        url: str,
        *,
        application_id: int,
        user_version: int,
        schema: str,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
    ) -> None:
        self.directory: Final = directory
        # A copy of a repository has its id but not its chunks, hence the URL.
        self._prefix = f"{repository_id[:16]}-{blake3(url.encode()).hexdigest()[:16]}-"
        self._application_id = application_id
        self._user_version = user_version
        self._schema = schema
        self._busy_timeout_s = busy_timeout_s

    def open(self, at_least: int = 0) -> tuple[int, sqlite3.Connection]:
        """Open the newest file, or the first from `at_least` on that can be used; older ones are removed.

        Raises `OSError`, and `DatabaseUnusable` for what passes, such as a full disk.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        number = max(at_least, self.newest())
        while True:
            try:
                connection = open_database(
                    self.path(number),
                    application_id=self._application_id,
                    user_version=self._user_version,
                    schema=self._schema,
                    durable=False,
                    busy_timeout_s=self._busy_timeout_s,
                )
            except DatabaseUnusable as error:
                # Subclasses say that something else is wrong (locked, disk full): the file is good. Without
                # a cause it is of another version.
                if type(error.__cause__) not in (sqlite3.DatabaseError, type(None)):
                    raise
                number += 1
                continue
            self._remove_older_than(number)
            return number, connection

    def newest(self) -> int:
        """The number of the newest file; -1 when there is none."""
        return max(self._numbers(), default=-1)

    def path(self, number: int) -> Path:
        """The file of that number."""
        return self.directory / f"{self._prefix}{number}.db"

    def identity(self, number: int) -> tuple[int, int] | None:
        """Device and inode of the file of that number; None when there is none."""
        return _identity(self.path(number))

    def is_newest(self, number: int, identity: tuple[int, int] | None) -> bool:
        """Whether an open file is the one that others would open: somebody may delete it, or make another."""
        return identity is not None and self.newest() <= number and identity == self.identity(number)

    def _numbers(self) -> Iterator[int]:
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return  # somebody has cleaned up
        for name in names:
            number = name.removeprefix(self._prefix).removesuffix(".db")
            if name == f"{self._prefix}{number}.db" and number.isdecimal():
                yield int(number)

    def _remove_older_than(self, number: int) -> None:
        for older in self._numbers():
            if older < number:
                for suffix in ("", "-wal", "-shm"):
                    Path(f"{self.path(older)}{suffix}").unlink(missing_ok=True)


class Cache:
    """The newest of the files, and one connection to it behind one lock.

    Whatever is wrong with it is a line in the log and None, never an error. Any method may be called from
    any thread, also after `close`: then there is nothing.
    """

    def __init__(self, files: CacheFiles, name: str) -> None:
        """`name` is for people."""
        self._files = files
        self._name = name
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        #: Of the open file: somebody may delete it, or make another one.
        self._number = 0
        self._identity: tuple[int, int] | None = None
        self._is_closed = False
        #: On the monotonic clock: when a file that could not be opened or read is tried again.
        self._retry_at = 0.0

    def read(self, action: Callable[[sqlite3.Connection], T], *, is_next: bool = False) -> T | None:
        """What `action` finds; it says by a plain `sqlite3.DatabaseError` that something is damaged.

        `is_next`: it is one of many, and the file need not be looked for again.
        """
        with self._lock:
            if not is_next or self._connection is None:
                self._reopen()
            return self._attempt("read", action)

    def write(self, action: Callable[[sqlite3.Connection], T]) -> T | None:
        """Do `action` in a transaction, all of it or nothing."""

        def transact(connection: sqlite3.Connection) -> T:
            with connection:
                return action(connection)

        with self._lock:
            self._reopen()
            return self._attempt("write", transact)

    def close(self) -> None:
        """Close the file; may be called twice."""
        with self._lock:
            self._is_closed = True
            self._disconnect()

    # What follows is called with the lock held.

    def _attempt(self, verb: str, action: Callable[[sqlite3.Connection], T]) -> T | None:
        """Do `action`; None when it fails. A damaged file is replaced by an empty one."""
        if self._connection is None:
            return None
        try:
            return action(self._connection)
        except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
            directory = self._files.directory
            # Subclasses say that something else is wrong (locked, disk full): the file is good. What the
            # library says of a damaged schema quotes it, which may be no text.
            if type(error) in (sqlite3.DatabaseError, UnicodeDecodeError):
                _log.warning("the %s in %s is damaged and made anew: %s", self._name, directory, error)
                self._connect(self._number + 1)
                return None
            _log.warning("cannot %s the %s in %s: %s", verb, self._name, directory, error)
            if verb == "read":
                # The next one would have to wait just as long.
                self._disconnect()
                self._retry_at = time.monotonic() + RETRY_S
            return None

    def _reopen(self) -> None:
        """Open the file unless it is open and still the one that others would open."""
        if self._is_closed or time.monotonic() < self._retry_at:
            return
        if self._identity is None or self._identity != _identity(self._files.path(self._number)):
            self._connect(0)

    def _connect(self, at_least: int) -> None:
        """Open the newest database, but none older than `at_least`."""
        self._disconnect()
        try:
            self._number, self._connection = self._files.open(at_least)
            self._identity = _identity(self._files.path(self._number))
        except (OSError, sqlite3.Error, DatabaseUnusable) as error:
            _log.warning("cannot open the %s in %s: %s", self._name, self._files.directory, error)
            self._disconnect()
            self._retry_at = time.monotonic() + RETRY_S

    def _disconnect(self) -> None:
        self._identity = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino
