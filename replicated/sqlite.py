"""How every SQLite database of the daemon is opened: one set of pragmas, one check of what it is.

What a database holds and what to do when it cannot be used is its owner's matter (`journal`, `index`,
`catalog`). Invariant: a file that is not what was expected is never changed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path

#: How long a statement waits for another process: mounts and the daemon share caches, and a
#: transaction on them is short.
BUSY_TIMEOUT_S = 30.0


class DatabaseUnusable(Exception):
    """The file at `path` is not the database that was expected; `reason` says why, for people."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def open_database(
    path: Path,
    *,
    application_id: int,
    user_version: int,
    schema: str,
    durable: bool,
    upgrades: Mapping[int, str] | None = None,
    busy_timeout_s: float = BUSY_TIMEOUT_S,
) -> sqlite3.Connection:
    """A connection to the database at `path`, which is made with `schema` when it is new.

    `upgrades` has the statements that bring a database of an older version to the next one; without
    those for its version, an older database cannot be used.

    `with connection:` commits what was written within, or rolls it back when an exception passes;
    transactions that write begin as such, so that waiting for another process works. May be used from
    any thread, by one at a time. `durable`: a commit survives power loss, and the file is checked when
    opened; else the database is a cache, and power loss may lose commits but not mix them up. Statements
    wait for other processes for `busy_timeout_s`.

    Raises `DatabaseUnusable` when the file is damaged, cannot be opened, or belongs to another
    application or version; nothing is changed then.
    """
    connection = None
    try:
        connection = sqlite3.connect(
            path, timeout=busy_timeout_s, isolation_level="IMMEDIATE", check_same_thread=False
        )
        found = _check_identity(connection, path, application_id, user_version, upgrades or {})
        # In WAL mode NORMAL loses acknowledged commits at power cuts (tried: 36 of 40 on ext4).
        connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA foreign_keys = ON")
        if found is None:
            _create_schema(connection, application_id, user_version, schema)
        if durable:
            _check_pages(connection, path)
        if found is not None and found < user_version:
            _upgrade(connection, user_version, upgrades or {})
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise DatabaseUnusable(path, str(error)) from error
    except UnicodeDecodeError as error:
        # What the library says of a damaged schema quotes it.
        if connection is not None:
            connection.close()
        raise DatabaseUnusable(path, "it is damaged") from sqlite3.DatabaseError(str(error))
    except DatabaseUnusable:
        if connection is not None:
            connection.close()
        raise
    return connection


def _check_identity(
    connection: sqlite3.Connection,
    path: Path,
    application_id: int,
    user_version: int,
    upgrades: Mapping[int, str],
) -> int | None:
    """The version of the database that is there; None when it is new."""
    # In one transaction, because another process may be making the database at this moment.
    connection.execute("BEGIN")
    with connection:
        is_empty = _is_empty(connection)
        (found_application,) = connection.execute("PRAGMA application_id").fetchone()
        (found_version,) = connection.execute("PRAGMA user_version").fetchone()
    if is_empty and found_application == 0 and found_version == 0:
        return None
    if found_application != application_id:
        raise DatabaseUnusable(path, f"it belongs to another application: {found_application:#010x}")
    is_upgradable = all(version in upgrades for version in range(found_version, user_version))
    if found_version > user_version or not is_upgradable:
        age = "a newer" if found_version > user_version else "an older"
        raise DatabaseUnusable(path, f"it was written by {age} version: {found_version}")
    return int(found_version)


def _is_empty(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("SELECT count(*) = 0 FROM sqlite_master").fetchone()[0])


def _create_schema(
    connection: sqlite3.Connection, application_id: int, user_version: int, schema: str
) -> None:
    """Create the tables unless they are there; another process may be doing the same."""
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        if not _is_empty(connection):
            return
        # Not executescript, which would commit first and so end the transaction.
        for statement in _split_statements(schema):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {application_id}")
        connection.execute(f"PRAGMA user_version = {user_version}")


def _upgrade(connection: sqlite3.Connection, user_version: int, upgrades: Mapping[int, str]) -> None:
    """Bring an older database up to date; all of it in one transaction, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        for version in range(found, user_version):
            for statement in _split_statements(upgrades[version]):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {user_version}")


def _split_statements(schema: str) -> list[str]:
    statements: list[str] = []
    pending = ""
    for line in schema.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            statements.append(pending)
            pending = ""
    if pending.strip():
        statements.append(pending)
    return statements


def _check_pages(connection: sqlite3.Connection, path: Path) -> None:
    (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if answer != "ok":
        raise DatabaseUnusable(path, f"it is damaged: {answer}")
