"""The files of a cache in SQLite, of which the newest counts: a damaged one is given up for the next number.

A name is never used twice: a process that still has an old file open would remove the write-ahead log of
its successor when it closes. Used by `index` and `snapshot/treecache`, which say what is in the files and
what becomes of errors.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from replicated.sqlite import BUSY_TIMEOUT_S, DatabaseUnusable, open_database


class CacheFiles:
    """The files `<prefix><number>.db` in a directory."""

    def __init__(
        self,
        directory: Path,
        prefix: str,
        *,
        application_id: int,
        user_version: int,
        schema: str,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
    ) -> None:
        self.directory: Final = directory
        self._prefix = prefix
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

    def _numbers(self) -> Iterator[int]:
        for name in os.listdir(self.directory):
            number = name.removeprefix(self._prefix).removesuffix(".db")
            if name == f"{self._prefix}{number}.db" and number.isdecimal():
                yield int(number)

    def _remove_older_than(self, number: int) -> None:
        for older in self._numbers():
            if older < number:
                for suffix in ("", "-wal", "-shm"):
                    Path(f"{self.path(older)}{suffix}").unlink(missing_ok=True)
