"""The database file of a catalog: its tables, and how it is opened or made anew.

What is put in and taken out is the matter of `catalog`, which is the only one to use this.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

from replicate.errors import RepositoryUnreachable
from replicated.sqlite import DatabaseUnusable, open_database

#: "RPLC"
APPLICATION_ID = 0x52504C43
SCHEMA_VERSION = 6
#: What of it is kept in memory; the first look at a large repository puts in hundreds of megabytes.
_CACHE_KIB = 16 << 10

_SCHEMA = """
CREATE TABLE experiments (
    id TEXT PRIMARY KEY,
    -- 0 when the record cannot be read.
    created_ns INTEGER NOT NULL,
    name TEXT NOT NULL,
    -- Serialized replicate.v1.Experiment.
    record BLOB NOT NULL,
    -- stored, or failed when the record says that files were saved and there is no snapshot.
    state TEXT NOT NULL,
    error TEXT NOT NULL DEFAULT '',
    -- Not what it should be when it was read: read again at every refresh.
    is_suspect INTEGER NOT NULL
) WITHOUT ROWID;
-- What lists show, derived whenever rows of the other tables change, and in the order of lists: they read
-- this table from its beginning to its end, and no other.
CREATE TABLE summaries (
    created_ns INTEGER NOT NULL,
    id TEXT NOT NULL UNIQUE,
    -- Serialized replicate.v1.ExperimentSummary, as in a SummaryBatch; it has a status and a duration only if
    -- `is_ended`.
    summary BLOB NOT NULL,
    is_ended INTEGER NOT NULL,
    -- Serialized replicate.v1.Process, unless `is_ended`.
    process BLOB,
    -- Of the latest checkpoint; NULL when there is none.
    latest_ns INTEGER,
    PRIMARY KEY (created_ns, id)
) WITHOUT ROWID;
CREATE TABLE checkpoints (
    id TEXT NOT NULL UNIQUE,
    experiment_id TEXT NOT NULL,
    created_ns INTEGER NOT NULL,
    -- Serialized replicate.v1.Checkpoint.
    record BLOB NOT NULL,
    is_suspect INTEGER NOT NULL,
    -- Those of an experiment lie side by side: they are written and read together.
    PRIMARY KEY (experiment_id, created_ns, id)
) WITHOUT ROWID;
CREATE TABLE tags (
    tag TEXT NOT NULL,
    experiment_id TEXT NOT NULL,
    PRIMARY KEY (tag, experiment_id)
) WITHOUT ROWID;
CREATE INDEX tags_by_experiment ON tags (experiment_id);
-- These two hold all that lists of names need, so that no record is read for them.
CREATE INDEX experiments_by_time ON experiments (created_ns, id);
CREATE INDEX experiments_by_name ON experiments (created_ns, id, name) WHERE name != '';
CREATE INDEX suspect_experiments ON experiments (id) WHERE is_suspect;
CREATE INDEX suspect_checkpoints ON checkpoints (id) WHERE is_suspect;
CREATE TABLE edits (
    id TEXT PRIMARY KEY,
    experiment_id TEXT NOT NULL,
    time_ns INTEGER NOT NULL,
    -- How the run ended; NULL when it was resumed.
    status TEXT,
    -- How long calls held up the training, as an end told; else 0.
    stall_ns INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX edits_by_experiment ON edits (experiment_id, time_ns);
-- What was taken from the log of the repository, where that is read instead of listing all records.
CREATE TABLE segments (
    name TEXT PRIMARY KEY
) WITHOUT ROWID;
-- Experiments and checkpoints that were removed: what else is said of them later is not taken in.
CREATE TABLE removed (
    id TEXT PRIMARY KEY
) WITHOUT ROWID;
-- One row once everything was listed.
CREATE TABLE listed (
    number INTEGER PRIMARY KEY
);
"""

_log = logging.getLogger(__name__)


def open_catalog_file(file: Path) -> sqlite3.Connection:
    """A connection to the database at `file`, which is made when there is none, or none that can be used.

    Raises `RepositoryUnreachable` when that is not possible.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _connect(file)
    except DatabaseUnusable as error:
        if isinstance(error.__cause__, sqlite3.OperationalError):
            raise catalog_unusable(file, error.__cause__) from error
        _log.warning("the catalog is made anew: %s", error)
        remove_catalog_file(file)
        return _connect(file)


def remove_catalog_file(file: Path) -> None:
    """Remove a database that is closed."""
    for part in (file, file.with_name(file.name + "-wal"), file.with_name(file.name + "-shm")):
        part.unlink(missing_ok=True)


def catalog_unusable(file: Path, error: Exception) -> RepositoryUnreachable:
    """What to raise when the database at `file` cannot be read or written."""
    return RepositoryUnreachable(
        f"cannot use the catalog {file}: {error}",
        hint="check that there is space and that you may write there",
    )


def _connect(file: Path) -> sqlite3.Connection:
    database = open_database(
        file, application_id=APPLICATION_ID, user_version=SCHEMA_VERSION, schema=_SCHEMA, durable=False
    )
    database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    return database
