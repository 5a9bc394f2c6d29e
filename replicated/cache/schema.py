"""The tables of the ledger, and what is read from them before it is believed.

Used by `ledger` and `room`. Invariant: what a damaged database says is found out or is harmless: contents
are checked wherever they are read.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Sequence
from typing import Final

#: "RPLC".
APPLICATION_ID: Final = 0x52504C43
SCHEMA_VERSION: Final = 1

SCHEMA: Final = """
CREATE TABLE identity (
    -- Where the files are.
    directory TEXT NOT NULL,
    -- The rooms of all files.
    held_bytes INTEGER NOT NULL,
    -- Goes on with every use that is written down: no machine's clock can put the order in doubt.
    now INTEGER NOT NULL,
    -- The key up to which `chunks` was last looked through for places in files that are gone.
    cleaned INTEGER NOT NULL
);
INSERT INTO identity VALUES (lower(hex(randomblob(8))), 0, 0, -9223372036854775808);
CREATE TABLE files (
    -- Its name, in hexadecimal digits; never used again for another file.
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    -- BLAKE3 of the content of a plain file; NULL for one that holds chunks, or that nobody may open again.
    digest BLOB UNIQUE,
    -- The most that it takes of the disk.
    room_bytes INTEGER NOT NULL,
    used INTEGER NOT NULL,
    -- Nothing is added to it any more. A plain file is verified, and had this length and these times then.
    is_complete INTEGER NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL
);
CREATE INDEX files_by_use ON files (used);
CREATE TRIGGER file_added AFTER INSERT ON files BEGIN
    UPDATE identity SET held_bytes = held_bytes + new.room_bytes;
END;
CREATE TRIGGER file_resized AFTER UPDATE OF room_bytes ON files BEGIN
    UPDATE identity SET held_bytes = held_bytes + new.room_bytes - old.room_bytes;
END;
CREATE TRIGGER file_removed AFTER DELETE ON files BEGIN
    UPDATE identity SET held_bytes = held_bytes - old.room_bytes;
END;
-- Places in files that are gone are removed bit by bit, in the order of the keys: those of one file are all
-- over the table, and to remove them at once would write most of its pages.
CREATE TABLE chunks (
    -- The first 8 bytes of the chunk's id, as `chunks` makes a number of them. Should two chunks have the
    -- same, the hash tells, and one of them is not kept.
    key INTEGER PRIMARY KEY,
    file INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    length INTEGER NOT NULL
);
"""

#: What keys of chunks lie between.
MIN_KEY: Final = -(1 << 63)
MAX_KEY: Final = (1 << 63) - 1

DIRECTORY_NAME: Final = re.compile(r"[0-9a-f]{16}")


def numbers(row: Sequence[object] | None) -> tuple[int, ...]:
    """A row of numbers; raises `sqlite3.DatabaseError`, as for any damage, when it is missing or is none."""
    found = tuple(value for value in row or () if isinstance(value, int))
    if not found or len(found) != len(row or ()):
        raise sqlite3.DatabaseError("it holds what is not a number")
    return found


def load_root(connection: sqlite3.Connection, directory: str) -> str:
    """Where the files are of the ledger in `directory`; as `numbers` when that is damaged."""
    row = connection.execute("SELECT directory FROM identity").fetchone()
    if row is None or not isinstance(row[0], str) or not DIRECTORY_NAME.fullmatch(row[0]):
        raise sqlite3.DatabaseError("it does not say where its files are")
    return os.path.join(directory, row[0])


def path_of(root: str, file: int) -> str:
    """The path of a file."""
    return f"{root}/{file:x}"
