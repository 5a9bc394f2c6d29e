"""How every SQLite database of the daemon is opened: one set of pragmas, one check of what it is."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DatabaseUnusable(Exception):
    """The file at `path` is not the database that was expected; `reason` says why, for people."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def open_database(
    path: Path, *, application_id: int, user_version: int, schema: str, durable: bool
) -> sqlite3.Connection:
    """A connection to the database at `path`, which is made with `schema` when it is new.

    In autocommit mode: use `transaction` for more than one statement. May be used from any thread, by
    one at a time. `durable`: a commit survives power loss (`synchronous=FULL`), and the file is checked
    when opened; else the database is a cache. Raises `DatabaseUnusable` when the file is damaged, of
    another application, or of another version; nothing is changed then.
    """
    raise NotImplementedError


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """A write transaction: committed at the end, rolled back when an exception passes."""
    raise NotImplementedError
