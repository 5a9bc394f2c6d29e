"""The journal: what this daemon was asked to record and what became of it, in one SQLite file.

Owner of the state database. Every accepted request is one row, committed before the client is answered,
so that the death of the daemon does not lose it. What has to survive a power cut as well is on the disk
when its method returns; the rest follows at once, behind the caller, since a disk that is busy with a
checkpoint makes an fsync take as long as it likes (docs/decisions/0004). Rows go captured → stored,
captured → failed, and any → removed (by the user); `removed` rows stay as tombstones so that a training
script whose experiment was deleted is told so. Also holds the runs that this machine watches.
Thread-safe: one connection behind one lock, held for one transaction at a time and never across other I/O.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from replicate import wire
from replicate._pb import daemon_pb2 as pb
from replicate.errors import StateUnwritable
from replicate.ids import ExperimentId
from replicate.records import CheckpointRecord, ExperimentRecord, ProcessIdentity
from replicated.sqlite import open_database

JobKind = Literal["experiment", "checkpoint", "edit"]
JobState = Literal["captured", "stored", "failed", "removed"]

#: "RPLJ", so that `file` and a curious reader can tell what it is.
APPLICATION_ID = 0x52504C4A
SCHEMA_VERSION = 2
#: Rows of finished jobs are kept this long for `status` and for retried requests, then forgotten.
KEEP_FINISHED_NS = 30 * 24 * 3600 * 10**9

_SCHEMA = """
CREATE TABLE jobs (
    -- Order of acceptance: the jobs of one repository are stored in this order.
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    -- Id of the experiment, checkpoint or edit; chosen by the client, so a repeated request is one row.
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL CHECK (kind IN ('experiment', 'checkpoint', 'edit')),
    experiment_id TEXT NOT NULL,
    repository TEXT NOT NULL,
    -- Serialized replicate.v1.Experiment or Checkpoint; for an edit, its JSON.
    record BLOB NOT NULL,
    -- Whether files were captured; where they are is in the entries.
    has_files INTEGER NOT NULL,
    file_count INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    -- Whether the spool was fsynced before the answer (capture: copy).
    is_durable INTEGER NOT NULL,
    -- Boot in which it was captured: after another boot, a spool that was not fsynced is not believed.
    boot_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('captured', 'stored', 'failed', 'removed')),
    -- Why it failed; of a captured one, what it waits for though its files are stored; empty otherwise.
    error TEXT NOT NULL DEFAULT '',
    created_ns INTEGER NOT NULL,
    -- 0 until it is stored, failed or removed.
    finished_ns INTEGER NOT NULL DEFAULT 0,
    -- What was captured, as in snapshot/entries.py, with the stat and the rung of each file; empty: the
    -- spool holds it. Emptied when the job is finished.
    entries BLOB NOT NULL DEFAULT x'',
    -- Of the files' bytes: what is kept frozen until it is stored, and of that, what lies in the spool.
    frozen_bytes INTEGER NOT NULL DEFAULT 0,
    spooled_bytes INTEGER NOT NULL DEFAULT 0,
    -- Bytes a second that may be sent for it; 0: no limit.
    upload_limit INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX jobs_by_state ON jobs (state, repository, seq);
CREATE INDEX jobs_by_experiment ON jobs (experiment_id);
CREATE TABLE runs (
    experiment_id TEXT PRIMARY KEY,
    repository TEXT NOT NULL,
    pid INTEGER NOT NULL,
    start_ticks INTEGER NOT NULL,
    boot_id TEXT NOT NULL
) WITHOUT ROWID;
-- How long calls held up the training, as far as it was told and is in no edit yet.
CREATE TABLE stalls (
    experiment_id TEXT PRIMARY KEY,
    stall_ns INTEGER NOT NULL
) WITHOUT ROWID;
"""

_UPGRADES = {
    1: """
ALTER TABLE jobs ADD COLUMN entries BLOB NOT NULL DEFAULT x'';
ALTER TABLE jobs ADD COLUMN frozen_bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN spooled_bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN upload_limit INTEGER NOT NULL DEFAULT 0;
CREATE TABLE stalls (
    experiment_id TEXT PRIMARY KEY,
    stall_ns INTEGER NOT NULL
) WITHOUT ROWID;
"""
}


#: Commits that follow each other are synced together.
_GATHER_S = 0.003
#: The log is taken into the database after about so many commits.
_COMMITS_IN_LOG = 250

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One accepted request."""

    id: str
    kind: JobKind
    experiment_id: ExperimentId
    repository: str
    record: bytes
    created_ns: int
    has_files: bool = False
    file_count: int = 0
    size_bytes: int = 0
    is_durable: bool = False
    boot_id: str = ""
    state: JobState = "captured"
    error: str = ""
    #: Of `size_bytes`: what is kept frozen until it is stored, and of that, what the spool's disk holds.
    frozen_bytes: int = 0
    spooled_bytes: int = 0
    #: Bytes a second that may be sent for it; 0: no limit.
    upload_limit: int = 0

    @property
    def subject_id(self) -> str:
        """The experiment, checkpoint or edit; one process's part of a checkpoint has an id of its own."""
        return self.id.partition("-")[0]

    @property
    def waits_for(self) -> str:
        """What a part of a checkpoint waits for whose files are stored; empty for all else."""
        return self.error if self.state == "captured" else ""

    def experiment(self) -> ExperimentRecord:
        """The record of an experiment's job."""
        return wire.decode_experiment(pb.Experiment.FromString(self.record))

    def checkpoint(self) -> CheckpointRecord:
        """The record of a checkpoint's job, as it was requested."""
        return wire.decode_checkpoint(pb.Checkpoint.FromString(self.record))


@dataclass(frozen=True, slots=True)
class Run:
    """A training process on this machine that has not ended as far as the journal knows."""

    experiment_id: ExperimentId
    repository: str
    process: ProcessIdentity


_COLUMNS = (
    "id, kind, experiment_id, repository, record, created_ns, has_files, file_count, size_bytes, "
    "is_durable, boot_id, state, error, frozen_bytes, spooled_bytes, upload_limit"
)


_ADD_STALL = (
    "INSERT INTO stalls VALUES (?, ?) "
    "ON CONFLICT (experiment_id) DO UPDATE SET stall_ns = stall_ns + excluded.stall_ns"
)
_RUN_COLUMNS = "experiment_id, repository, pid, start_ticks, boot_id"


class Journal:
    """The state database; see the module's text."""

    def __init__(self, file: Path) -> None:
        self._connection = open_database(
            file,
            application_id=APPLICATION_ID,
            user_version=SCHEMA_VERSION,
            schema=_SCHEMA,
            durable=True,
            upgrades=_UPGRADES,
        )
        # A commit then writes and does not sync: that is up to `_log`.
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute("PRAGMA wal_autocheckpoint = 0")
        self._log = _WriteAheadLog(file)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the database; call once, after every user of the journal has stopped."""
        self._log.close()
        with self._lock:
            self._connection.close()

    def add(self, job: Job, entries: bytes = b"", stall_ns: int = 0) -> None:
        """Commit a job unless its id is known; on return it survives the daemon, a durable one a power cut.

        With it, `entries` is what was captured, and `stall_ns` is added to the experiment's sum: negative
        when the job itself tells that sum from now on.
        """
        with self._writing(is_durable=job.is_durable):
            added = self._connection.execute(
                f"INSERT INTO jobs ({_COLUMNS}, entries) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) "
                "ON CONFLICT (id) DO NOTHING",
                (
                    job.id,
                    job.kind,
                    job.experiment_id,
                    job.repository,
                    job.record,
                    job.created_ns,
                    job.has_files,
                    job.file_count,
                    job.size_bytes,
                    job.is_durable,
                    job.boot_id,
                    job.state,
                    job.error,
                    job.frozen_bytes,
                    job.spooled_bytes,
                    job.upload_limit,
                    entries,
                ),
            )
            if stall_ns and added.rowcount == 1:
                self._connection.execute(_ADD_STALL, (job.experiment_id, stall_ns))

    def entries(self, identifier: str) -> bytes:
        """What was captured for a job, unless the spool holds it."""
        with self._lock:
            row = self._connection.execute("SELECT entries FROM jobs WHERE id = ?", (identifier,)).fetchone()
        return row[0] if row else b""

    def find(self, identifier: str) -> Job | None:
        """The job of that id."""
        found = self._select("WHERE id = ?", (identifier,))
        return found[0] if found else None

    def captured(self, repository: str | None = None) -> list[Job]:
        """Jobs that wait to be stored, in their order; of one repository, or of all."""
        if repository is None:
            return self._select("WHERE state = 'captured' ORDER BY seq")
        return self._select("WHERE state = 'captured' AND repository = ? ORDER BY seq", (repository,))

    def has_captured(self, identifiers: Iterable[str] = ()) -> bool:
        """Whether any job waits to be stored, of these experiments and checkpoints or of all."""
        wanted = list(identifiers)
        with self._lock:
            if not wanted:
                query = "SELECT EXISTS (SELECT 1 FROM jobs WHERE state = 'captured')"
                return bool(self._connection.execute(query).fetchone()[0])
            query = (
                "SELECT EXISTS (SELECT 1 FROM jobs WHERE state = 'captured' "
                "AND (id = ? OR experiment_id = ? OR (id > ? || '-' AND id < ? || '.')))"
            )
            return any(self._connection.execute(query, (one,) * 4).fetchone()[0] for one in wanted)

    def next_captured(self, repository: str) -> Job | None:
        """The oldest job that waits to be stored in a repository."""
        found = self._select(
            "WHERE state = 'captured' AND repository = ? AND error = '' ORDER BY seq LIMIT 1", (repository,)
        )
        return found[0] if found else None

    def waiting_parts(self, repository: str) -> list[Job]:
        """Parts of checkpoints that are stored in a repository and wait for those of other processes."""
        return self._select(
            "WHERE state = 'captured' AND repository = ? AND error != '' ORDER BY seq", (repository,)
        )

    def set_waiting(self, identifier: str, waits_for: str) -> None:
        """Commit that the files of a part are in the repository, and what it waits for now."""
        with self._writing():
            self._connection.execute(
                "UPDATE jobs SET error = ?, has_files = 0, frozen_bytes = 0, spooled_bytes = 0, "
                "entries = x'' WHERE id = ? AND state = 'captured'",
                (waits_for, identifier),
            )

    def unfinished(self, repository: str) -> list[Job]:
        """Jobs of a repository that readers of the repository alone cannot see: captured or failed."""
        return self._select(
            "WHERE state IN ('captured', 'failed') AND repository = ? ORDER BY seq", (repository,)
        )

    def remembered(self, repository: str) -> list[Job]:
        """Jobs of a repository that were not removed, those that are stored too, while they are kept."""
        return self._select("WHERE state != 'removed' AND repository = ? ORDER BY seq", (repository,))

    def failed(self) -> list[Job]:
        """Jobs that will never be stored, in their order."""
        return self._select("WHERE state = 'failed' ORDER BY seq")

    def of_experiment(self, experiment_id: str) -> list[Job]:
        """Every job of an experiment, in order."""
        return self._select("WHERE experiment_id = ? ORDER BY seq", (experiment_id,))

    def frozen(self) -> dict[str, tuple[int, int]]:
        """By repository: bytes that wait to be stored, and of them, those on the spool's disk."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT repository, sum(frozen_bytes), sum(spooled_bytes) FROM jobs "
                "WHERE state = 'captured' GROUP BY repository"
            ).fetchall()
        return {repository: (frozen, spooled) for repository, frozen, spooled in rows}

    def stalls(self) -> dict[str, int]:
        """Nanoseconds by experiment, of those that are in no edit yet."""
        with self._lock:
            return dict(self._connection.execute("SELECT experiment_id, stall_ns FROM stalls").fetchall())

    def set_durable(self, identifier: str) -> None:
        """Commit that all that was frozen for a job is in the spool and was fsynced."""
        with self._writing():
            self._connection.execute(
                "UPDATE jobs SET is_durable = 1, spooled_bytes = frozen_bytes WHERE id = ?", (identifier,)
            )

    def finish(self, identifier: str, state: JobState, now_ns: int, error: str = "") -> None:
        """Commit what became of a job; a removed job stays removed."""
        with self._writing():
            self._connection.execute(
                "UPDATE jobs SET state = ?, error = ?, finished_ns = ?, entries = x'' "
                "WHERE id = ? AND state != 'removed'",
                (state, error, now_ns, identifier),
            )

    def remove(self, identifiers: Iterable[str], now_ns: int) -> None:
        """Turn jobs into tombstones; durable on return."""
        with self._writing(is_durable=True):
            self._connection.executemany(
                "UPDATE jobs SET state = 'removed', error = '', finished_ns = ?, entries = x'' WHERE id = ?",
                [(now_ns, identifier) for identifier in identifiers],
            )

    def forget_finished(self, now_ns: int) -> None:
        """Drop rows of stored jobs that nobody will ask about any more."""
        with self._writing():
            self._connection.execute(
                "DELETE FROM jobs WHERE state IN ('stored', 'removed') AND finished_ns < ?",
                (now_ns - KEEP_FINISHED_NS,),
            )

    def start_run(self, run: Run) -> None:
        """Remember a training process to be watched, also by the next daemon."""
        process = run.process
        with self._writing():
            self._connection.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?, ?) ON CONFLICT (experiment_id) DO UPDATE SET "
                "repository = excluded.repository, pid = excluded.pid, start_ticks = excluded.start_ticks, "
                "boot_id = excluded.boot_id",
                (run.experiment_id, run.repository, process.pid, process.start_ticks, process.boot_id),
            )

    def end_run(self, experiment_id: str) -> Run | None:
        """Forget a run; what it was, to one of those who end it at the same time, None to the others."""
        with self._writing():
            row = self._connection.execute(
                f"SELECT {_RUN_COLUMNS} FROM runs WHERE experiment_id = ?", (experiment_id,)
            ).fetchone()
            self._connection.execute("DELETE FROM runs WHERE experiment_id = ?", (experiment_id,))
        return None if row is None else _run(row)

    def runs(self) -> list[Run]:
        """The runs that have not ended."""
        with self._lock:
            rows = self._connection.execute(f"SELECT {_RUN_COLUMNS} FROM runs").fetchall()
        return [_run(row) for row in rows]

    @contextmanager
    def _writing(self, *, is_durable: bool = False) -> Iterator[None]:
        """One transaction; raises `StateUnwritable` when it cannot be committed, and then nothing is.

        What could be committed and, though it has to be durable, not synced, raises it too.
        """
        with self._lock:
            try:
                with self._connection:
                    yield
            except sqlite3.OperationalError as error:
                raise _unwritable(error) from error
        if not is_durable:
            self._log.sync_soon()
            return
        try:
            self._log.sync()
        except OSError as error:
            raise _unwritable(error) from error

    def _select(self, where: str, values: Sequence[str] = ()) -> list[Job]:
        with self._lock:
            rows = self._connection.execute(f"SELECT {_COLUMNS} FROM jobs {where}", values).fetchall()
        return [_job(row) for row in rows]


class _WriteAheadLog:
    """Where commits are until they are taken into the database: what is synced here is durable.

    Both are slow on a busy disk, so a thread of its own does them, with a connection of its own.
    """

    def __init__(self, database: Path) -> None:
        self._database = database
        self._file = database.with_name(database.name + "-wal")
        self._commits = 0
        self._wanted = threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def sync(self) -> None:
        """Make durable what has been committed; raises `OSError`."""
        try:
            descriptor = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # all of it is in the database
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def sync_soon(self) -> None:
        """The same, without waiting."""
        self._wanted.set()

    def close(self) -> None:
        """Sync what is left; may be called twice."""
        self._is_closed = True
        self._wanted.set()
        self._thread.join()

    def _run(self) -> None:
        with closing(sqlite3.connect(self._database)) as connection:
            while not self._is_closed:
                self._wanted.wait()
                self._commits += 1
                self._wanted.clear()
                # Not at once: who has just committed is about to answer, and others may commit as well.
                time.sleep(_GATHER_S)
                try:
                    self.sync()
                    if self._commits >= _COMMITS_IN_LOG or self._is_closed:
                        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                        self._commits = 0
                except (OSError, sqlite3.Error) as error:
                    _logger.error("the journal cannot be synced: %s", error)


def job_id_of(record: CheckpointRecord) -> str:
    """The id of the job of a checkpoint; repeating the request gives the same one.

    Parts of several processes may be in one journal, and so may those of an earlier start of the same job.
    """
    if record.part is None:
        return record.id
    return f"{record.id}-{record.part.rank}-{wire.encode_time(record.created)}"


def _unwritable(error: Exception) -> StateUnwritable:
    return StateUnwritable(
        f"the daemon cannot write its journal: {error}",
        hint="free some space where REPLICATE_HOME (or ~/.local/state) lies",
    )


def _job(row: sqlite3.Row | tuple[object, ...]) -> Job:
    values = list(row)
    values[6] = bool(values[6])
    values[9] = bool(values[9])
    return Job(*values)


def _run(row: tuple[str, str, int, int, str]) -> Run:
    return Run(ExperimentId(row[0]), row[1], ProcessIdentity(row[2], row[3], row[4]))
