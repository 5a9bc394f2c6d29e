"""What this machine remembers of the repositories that it has used, and how it stands with each.

Owner of one small SQLite file: which repository is behind a URL, so that its catalog can be shown and its
tree caches used while it is out of reach, and since when and why nothing can be stored in it, so that a
daemon that was restarted knows it as well. It can be deleted: then the repositories have to be reached once
more. When something is tried again is known to this process only.

Thread-safe: one lock, held for one transaction.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replicate.ids import new_id
from replicated.sqlite import DatabaseUnusable, open_database

#: "RPLS"
APPLICATION_ID: Final = 0x52504C53
SCHEMA_VERSION: Final = 1

_SCHEMA: Final = """
CREATE TABLE repositories (
    url TEXT PRIMARY KEY,
    -- The bytes of its repository.json when it was opened last; empty: it never was.
    settings BLOB NOT NULL DEFAULT x'',
    -- Since when nothing can be stored in it, and why; 0 when it can.
    since_ns INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
-- One row: the id under which this daemon, of this machine and home, tells that it lives.
CREATE TABLE daemon (id TEXT NOT NULL);
"""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why nothing can be stored in a repository."""

    reason: str
    since_ns: int
    #: When it is tried again; 0: it is being tried, or nothing waits.
    retry_at_ns: int = 0


class Standings:
    """What is remembered; see the module's text."""

    def __init__(self, file: Path, now_ns: Callable[[], int]) -> None:
        """Opens `file`, and begins anew with one that cannot be used."""
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._connection = _open(file)
        self._retries: dict[str, int] = {}

    def close(self) -> None:
        """Close the file; call once, after everybody else."""
        with self._lock:
            self._connection.close()

    def daemon_id(self) -> str:
        """Random, and the same as long as the file is there."""
        with self._lock, self._connection as connection:
            row = connection.execute("SELECT id FROM daemon").fetchone()
            if row is None:
                row = (new_id(),)
                connection.execute("INSERT INTO daemon VALUES (?)", row)
        return str(row[0])

    def settings(self, url: str) -> bytes:
        """What the repository's `repository.json` held when it was opened last; empty: it never was."""
        with self._lock:
            row = self._connection.execute(
                "SELECT settings FROM repositories WHERE url = ?", (url,)
            ).fetchone()
        return bytes(row[0]) if row else b""

    def remember(self, url: str, settings: bytes) -> None:
        """The repository was opened, and this is its `repository.json`."""
        if self.settings(url) != settings:
            self._set(url, "settings", settings)

    def note_trouble(self, url: str, reason: str, retry_in_s: float) -> None:
        """Nothing could be stored in a repository; it is tried again after so many seconds."""
        now_ns = self._now_ns()
        earlier = self.trouble(url)
        with self._lock:
            self._retries[url] = now_ns + int(retry_in_s * 1e9)
        if earlier is None:
            self._set(url, "since_ns", now_ns)
        if earlier is None or earlier.reason != reason:
            self._set(url, "reason", reason)

    def note_attempt(self, url: str) -> None:
        """It is being tried again."""
        with self._lock:
            self._retries.pop(url, None)

    def note_well(self, url: str) -> None:
        """Something could be stored, or nothing waits any more."""
        self.note_attempt(url)
        if self.trouble(url) is not None:
            self._set(url, "since_ns", 0)
            self._set(url, "reason", "")

    def trouble(self, url: str) -> Trouble | None:
        """Why nothing can be stored in a repository; None when it can, as far as is known."""
        return self.troubles().get(url)

    def troubles(self) -> dict[str, Trouble]:
        """The same of all repositories, by URL."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT url, reason, since_ns FROM repositories WHERE since_ns != 0"
            ).fetchall()
            return {
                url: Trouble(reason, since_ns, self._retries.get(url, 0)) for url, reason, since_ns in rows
            }

    def _set(self, url: str, column: str, value: object) -> None:
        try:
            with self._lock, self._connection as connection:
                connection.execute(
                    f"INSERT INTO repositories (url, {column}) VALUES (?, ?) "
                    f"ON CONFLICT (url) DO UPDATE SET {column} = excluded.{column}",
                    (url, value),
                )
        except sqlite3.OperationalError as error:
            # No space, for example: what is to be stored does not depend on it.
            _log.warning("what is known of repositories cannot be written down: %s", error)


def _open(file: Path) -> sqlite3.Connection:
    try:
        return _connect(file)
    except DatabaseUnusable as error:
        if isinstance(error.__cause__, sqlite3.OperationalError):
            raise
        _log.warning("what was known of repositories is lost: %s", error)
        for part in (file, file.with_name(file.name + "-wal"), file.with_name(file.name + "-shm")):
            part.unlink(missing_ok=True)
        return _connect(file)


def _connect(file: Path) -> sqlite3.Connection:
    return open_database(
        file, application_id=APPLICATION_ID, user_version=SCHEMA_VERSION, schema=_SCHEMA, durable=False
    )
