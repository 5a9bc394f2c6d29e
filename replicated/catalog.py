"""What a repository holds, in a local SQLite database that answers lists without opening every object.

A cache of the records in the repository: brought up to date by comparing names (records are written
once, so a known name need not be read again), deleted and made anew when it is damaged. It knows
nothing of what is still in the journal or of what runs: `experiments` puts that on top. Thread-safe:
one lock a catalog, held during a refresh.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from blake3 import blake3

from replicate import wire
from replicate._pb import daemon_pb2 as pb
from replicate.errors import NotFound, RepositoryDamaged, RepositoryIncompatible, RepositoryUnreachable
from replicate.ids import CheckpointId, ExperimentId, SnapshotId, short
from replicate.records import (
    CheckpointRecord,
    EndStatus,
    ExperimentRecord,
    SnapshotState,
    best_checkpoint,
    latest_checkpoint,
    parse_time,
)
from replicated.format.metadata import EndEdit
from replicated.repository import Repository
from replicated.sqlite import DatabaseUnusable, open_database

#: "RPLC"
APPLICATION_ID = 0x52504C43
SCHEMA_VERSION = 3

_SCHEMA = """
CREATE TABLE experiments (
    id TEXT PRIMARY KEY,
    created_ns INTEGER NOT NULL,
    -- Serialized replicate.v1.Experiment.
    record BLOB NOT NULL,
    -- stored, or failed when the record says that files were saved and there is no snapshot.
    state TEXT NOT NULL,
    error TEXT NOT NULL DEFAULT '',
    -- Not what it should be when it was read: read again at every refresh.
    is_suspect INTEGER NOT NULL,
    -- Derived from the rows of `checkpoints` whenever those change, so that a list need not read them.
    checkpoint_count INTEGER NOT NULL DEFAULT 0,
    latest BLOB,
    best BLOB
) WITHOUT ROWID;
CREATE TABLE checkpoints (
    id TEXT PRIMARY KEY,
    experiment_id TEXT NOT NULL,
    created_ns INTEGER NOT NULL,
    -- Serialized replicate.v1.Checkpoint.
    record BLOB NOT NULL,
    is_suspect INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX suspect_experiments ON experiments (id) WHERE is_suspect;
CREATE INDEX suspect_checkpoints ON checkpoints (id) WHERE is_suspect;
CREATE INDEX checkpoints_by_experiment ON checkpoints (experiment_id, created_ns);
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
"""

_log = logging.getLogger(__name__)
_UNREADABLE_CREATED = "1970-01-01T00:00:00.000000Z"


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One experiment as the repository has it."""

    record: ExperimentRecord
    state: SnapshotState
    error: str
    checkpoint_count: int
    latest: CheckpointRecord | None
    best: CheckpointRecord | None
    #: The newest word on how the run ended; None when it has not ended or was resumed since.
    end_status: EndStatus | None
    ended: datetime | None
    #: How long calls held up the training, in nanoseconds, by the id of the edit that tells it.
    stalls: Mapping[str, int]


class Catalog:
    """The catalog of one repository."""

    def __init__(self, repository: Repository, directory: Path) -> None:
        self._repository = repository
        self._lock = threading.Lock()
        # A copy of a repository has its id but not its contents, hence the URL.
        place = blake3(repository.url.encode()).hexdigest()[:16]
        self._file = directory / f"{repository.id[:16]}-{place}.db"
        self._database = _open(self._file)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._database.close()

    def refresh(self) -> None:
        """Take in what was written to, and removed from, the repository since the last time."""
        with self._lock:
            try:
                self._refresh()
            except sqlite3.OperationalError as error:
                raise _unusable(self._file, error) from error
            except sqlite3.DatabaseError as error:
                _log.warning("the catalog is damaged and made anew: %s", error)
                self._database.close()
                _remove(self._file)
                self._database = _open(self._file)
                self._refresh()

    def entries(self, identifier: str | None = None) -> Iterator[CatalogEntry]:
        """All experiments, oldest first; or the one of that id, if it is there."""
        query = (
            "SELECT id, record, state, error, checkpoint_count, latest, best FROM experiments"
            f"{'' if identifier is None else ' WHERE id = ?'} ORDER BY created_ns, id"
        )
        with self._lock:
            rows = self._database.execute(query, () if identifier is None else (identifier,)).fetchall()
            edits = self._database.execute(
                "SELECT experiment_id, status, time_ns, id, stall_ns FROM edits ORDER BY time_ns"
            ).fetchall()
        # Later rows of the same experiment overwrite earlier ones: the newest edit counts.
        ends = {row[0]: (row[1], row[2]) for row in edits}
        stalls: dict[str, dict[str, int]] = {}
        for experiment_id, _, _, edit_id, stall_ns in edits:
            if stall_ns:
                stalls.setdefault(experiment_id, {})[edit_id] = stall_ns
        for experiment_id, record, state, error, count, latest, best in rows:
            status, ended_ns = ends.get(experiment_id, (None, 0))
            yield CatalogEntry(
                record=wire.decode_experiment(pb.Experiment.FromString(record)),
                state=state,
                error=error,
                checkpoint_count=count,
                latest=_checkpoint(latest),
                best=_checkpoint(best),
                end_status=status,
                ended=wire.decode_time(ended_ns) if status else None,
                stalls=stalls.get(experiment_id, {}),
            )

    def checkpoints(self, experiment_id: str) -> list[CheckpointRecord]:
        """The checkpoints of an experiment, oldest first."""
        with self._lock:
            rows = self._database.execute(
                "SELECT record FROM checkpoints WHERE experiment_id = ? ORDER BY created_ns, id",
                (experiment_id,),
            ).fetchall()
        return [wire.decode_checkpoint(pb.Checkpoint.FromString(row[0])) for row in rows]

    def find_ids(self, prefix: str) -> tuple[set[str], dict[str, str]]:
        """Experiments, and checkpoints with their experiments, whose ids begin with `prefix`."""
        bounds = (prefix, prefix + "g")  # "g" sorts after every hexadecimal digit
        with self._lock:
            experiments = self._database.execute(
                "SELECT id FROM experiments WHERE id >= ? AND id < ?", bounds
            ).fetchall()
            checkpoints = self._database.execute(
                "SELECT id, experiment_id FROM checkpoints WHERE id >= ? AND id < ?", bounds
            ).fetchall()
        return {row[0] for row in experiments}, dict(checkpoints)

    def _refresh(self) -> None:
        with self._database as database:
            database.execute("DELETE FROM experiments WHERE is_suspect")
            database.execute("DELETE FROM checkpoints WHERE is_suspect")
            present = set(self._repository.list_experiment_ids())
            known = {row[0] for row in database.execute("SELECT id FROM experiments")}
            for gone in known - present:
                for table, column in (
                    ("experiments", "id"),
                    ("checkpoints", "experiment_id"),
                    ("edits", "experiment_id"),
                ):
                    database.execute(f"DELETE FROM {table} WHERE {column} = ?", (gone,))
            for identifier in present - known:
                self._add_experiment(ExperimentId(identifier))
            for identifier in present:
                self._refresh_checkpoints(ExperimentId(identifier))
                self._refresh_edits(ExperimentId(identifier))

    def _add_experiment(self, identifier: ExperimentId) -> None:
        state: SnapshotState = "stored"
        error = ""
        try:
            record = self._repository.load_experiment(identifier)
            if record.paths and not self._repository.has_snapshot(SnapshotId(identifier)):
                state, error = "failed", "the files were never stored"
        except NotFound:
            return  # removed since it was listed
        except (RepositoryDamaged, RepositoryIncompatible) as damage:
            # Listed all the same, so that the user sees it; the others are not affected.
            _log.warning("experiment %s: %s", short(identifier), damage)
            record = ExperimentRecord(identifier, parse_time(_UNREADABLE_CREATED))
            state, error = "failed", damage.message
        self._database.execute(
            "INSERT INTO experiments (id, created_ns, record, state, error, is_suspect) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (
                identifier,
                wire.encode_time(record.created),
                wire.encode_experiment(record).SerializeToString(),
                state,
                error,
                state == "failed",
            ),
        )
        # Its checkpoints may be known already, if it is read again.
        self._derive(identifier)

    def _refresh_checkpoints(self, experiment_id: ExperimentId) -> None:
        present = set(self._repository.list_checkpoint_ids(experiment_id))
        known = {
            row[0]
            for row in self._database.execute(
                "SELECT id FROM checkpoints WHERE experiment_id = ?", (experiment_id,)
            )
        }
        if present == known:
            return
        self._database.executemany(
            "DELETE FROM checkpoints WHERE id = ?", [(gone,) for gone in known - present]
        )
        for identifier in present - known:
            is_suspect = False
            try:
                record = self._repository.load_checkpoint(experiment_id, CheckpointId(identifier))
            except NotFound:
                continue
            except (RepositoryDamaged, RepositoryIncompatible) as damage:
                _log.warning("checkpoint %s: %s", short(identifier), damage)
                record = CheckpointRecord(
                    CheckpointId(identifier),
                    experiment_id,
                    parse_time(_UNREADABLE_CREATED),
                    step=0,
                    state="failed",
                    error=damage.message,
                )
                is_suspect = True
            self._database.execute(
                "INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?)",
                (
                    identifier,
                    experiment_id,
                    wire.encode_time(record.created),
                    wire.encode_checkpoint(record).SerializeToString(),
                    is_suspect,
                ),
            )
        self._derive(experiment_id)

    def _derive(self, experiment_id: ExperimentId) -> None:
        rows = self._database.execute(
            "SELECT record FROM checkpoints WHERE experiment_id = ? ORDER BY created_ns, id", (experiment_id,)
        )
        checkpoints = [wire.decode_checkpoint(pb.Checkpoint.FromString(row[0])) for row in rows]
        latest, best = latest_checkpoint(checkpoints), best_checkpoint(checkpoints)
        self._database.execute(
            "UPDATE experiments SET checkpoint_count = ?, latest = ?, best = ? WHERE id = ?",
            (
                len(checkpoints),
                wire.encode_checkpoint(latest).SerializeToString() if latest else None,
                wire.encode_checkpoint(best).SerializeToString() if best else None,
                experiment_id,
            ),
        )

    def _refresh_edits(self, experiment_id: ExperimentId) -> None:
        present = set(self._repository.list_edit_ids(experiment_id))
        if not present:
            return
        known = {
            row[0]
            for row in self._database.execute(
                "SELECT id FROM edits WHERE experiment_id = ?", (experiment_id,)
            )
        }
        for identifier in present - known:
            try:
                edit = self._repository.load_edit(experiment_id, identifier)
            except (NotFound, RepositoryDamaged, RepositoryIncompatible) as error:
                _log.warning("edit %s: %s", short(identifier), error)
                continue
            if edit is None:
                continue
            self._database.execute(
                "INSERT INTO edits VALUES (?, ?, ?, ?, ?)",
                (
                    identifier,
                    experiment_id,
                    wire.encode_time(edit.time),
                    edit.status if isinstance(edit, EndEdit) else None,
                    edit.stall_ns if isinstance(edit, EndEdit) else 0,
                ),
            )


def _checkpoint(record: bytes | None) -> CheckpointRecord | None:
    return None if record is None else wire.decode_checkpoint(pb.Checkpoint.FromString(record))


def _open(file: Path) -> sqlite3.Connection:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _connect(file)
    except DatabaseUnusable as error:
        if isinstance(error.__cause__, sqlite3.OperationalError):
            raise _unusable(file, error.__cause__) from error
        _log.warning("the catalog is made anew: %s", error)
        _remove(file)
        return _connect(file)


def _remove(file: Path) -> None:
    for part in (file, file.with_name(file.name + "-wal"), file.with_name(file.name + "-shm")):
        part.unlink(missing_ok=True)


def _unusable(file: Path, error: Exception) -> RepositoryUnreachable:
    return RepositoryUnreachable(
        f"cannot use the catalog {file}: {error}",
        hint="check that there is space and that you may write there",
    )


def _connect(file: Path) -> sqlite3.Connection:
    return open_database(
        file, application_id=APPLICATION_ID, user_version=SCHEMA_VERSION, schema=_SCHEMA, durable=False
    )
