"""What a repository holds, in a local SQLite database that answers lists without opening every object.

A cache of the records in the repository: brought up to date by comparing names (records are written
once, so a known name need not be read again), deleted and made anew when it is damaged. It knows
nothing of what is still in the journal or of what runs: `experiments` puts that on top.

Thread-safe: one lock guards the database and is held for a query or a transaction, another one lets one
refresh go on at a time and is held while the repository is read; who has the second may take the first.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from blake3 import blake3

from replicate import wire
from replicate._pb import daemon_pb2 as pb
from replicate.errors import NotFound, ReplicateError, RepositoryUnreachable
from replicate.ids import CheckpointId, ExperimentId, short
from replicate.records import (
    CheckpointRecord,
    EndStatus,
    ExperimentRecord,
    SnapshotState,
    best_checkpoint,
    latest_checkpoint,
    parse_time,
)
from replicated.catalog_file import catalog_unusable, open_catalog_file, remove_catalog_file
from replicated.format.metadata import EndEdit
from replicated.keys import snapshot_of
from replicated.repository import Repository

_log = logging.getLogger(__name__)
_UNREADABLE_CREATED = "1970-01-01T00:00:00.000000Z"

#: Records that are read before they are written into the database, so that it is not locked meanwhile.
_BATCH: Final = 500
#: A record that cannot be read hides no other; so many in a row mean that the repository is out of reach.
_MOST_UNREACHABLE: Final = 3

T = TypeVar("T")


class Place(NamedTuple):
    """An experiment in a list of names: no more than is needed to link to it."""

    id: str
    #: 0 when its record cannot be read.
    created_ns: int


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
        self._refreshing = threading.Lock()
        #: Of the repository when the experiments were compared last; guarded by the lock above.
        self._token: object = None
        self._lock = threading.Lock()
        # A copy of a repository has its id but not its contents, hence the URL.
        place = blake3(repository.url.encode()).hexdigest()[:16]
        self._file = directory / f"{repository.id[:16]}-{place}.db"
        self._database = open_catalog_file(self._file)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._database.close()

    def refresh(self) -> None:
        """Take in what was written to, and removed from, the repository since the last time."""
        self._refresh(self._refresh_all)

    def refresh_experiments(self) -> None:
        """As `refresh`, but only which experiments there are; costs little when that did not change."""
        self._refresh(self._compare_experiments)

    def refresh_experiment(self, experiment_id: str) -> None:
        """As `refresh`, but only the checkpoints of one experiment, and its end."""
        self._refresh(lambda: self._compare_details(ExperimentId(experiment_id)))

    @property
    def version(self) -> tuple[int, int]:
        """Another one once anything was changed, by this process or another."""
        with self._lock:
            (others,) = self._database.execute("PRAGMA data_version").fetchone()
            return others, self._database.total_changes

    def list_places(self) -> list[Place]:
        """All experiments, oldest first."""
        return list(map(Place._make, self._query("SELECT id, created_ns FROM experiments ORDER BY 2, 1")))

    def newest_place(self) -> Place | None:
        """The newest experiment."""
        rows = self._query("SELECT id, created_ns FROM experiments ORDER BY 2 DESC, 1 DESC LIMIT 1")
        return Place._make(rows[0]) if rows else None

    def list_names(self) -> list[tuple[str, Place]]:
        """The names of experiments with where they are, oldest first; a name can be there several times."""
        rows = self._query("SELECT name, id, created_ns FROM experiments WHERE name != '' ORDER BY 3, 2")
        return [(name, Place(*place)) for name, *place in rows]

    def list_tags(self) -> list[tuple[str, int]]:
        """All tags, each with the `created_ns` of the newest experiment that has it."""
        return self._query(
            "SELECT tag, max(created_ns) FROM tags JOIN experiments ON id = experiment_id GROUP BY tag"
        )

    def list_tagged(self, tag: str) -> list[Place]:
        """The experiments that have a tag, oldest first."""
        rows = self._query(
            "SELECT id, created_ns FROM tags JOIN experiments ON id = experiment_id "
            "WHERE tag = ? ORDER BY 2, 1",
            tag,
        )
        return list(map(Place._make, rows))

    def entries(self, identifier: str | None = None) -> Iterator[CatalogEntry]:
        """All experiments, oldest first; or the one of that id, if it is there."""
        condition, arguments = ("", ()) if identifier is None else ("WHERE {} = ?", (identifier,))
        rows = self._query(
            "SELECT id, record, state, error, checkpoint_count, latest, best FROM experiments "
            f"{condition.format('id')} ORDER BY created_ns, id",
            *arguments,
        )
        edits = self._query(
            "SELECT experiment_id, status, time_ns, id, stall_ns FROM edits "
            f"{condition.format('experiment_id')} ORDER BY time_ns",
            *arguments,
        )
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
        rows = self._query(
            "SELECT record FROM checkpoints WHERE experiment_id = ? ORDER BY created_ns, id", experiment_id
        )
        return [_decode_checkpoint(record) for (record,) in rows]

    def checkpoint(self, checkpoint_id: str) -> CheckpointRecord | None:
        """The checkpoint of that id, if it is there."""
        rows = self._query("SELECT record FROM checkpoints WHERE id = ?", checkpoint_id)
        return _decode_checkpoint(rows[0][0]) if rows else None

    def newest_checkpoint_ns(self, experiment_id: str) -> int:
        """When the newest checkpoint of an experiment was created; 0 when it has none."""
        rows = self._query("SELECT max(created_ns) FROM checkpoints WHERE experiment_id = ?", experiment_id)
        return int(rows[0][0] or 0)

    def find_ids(self, prefix: str) -> tuple[set[str], dict[str, str]]:
        """Experiments, and checkpoints with their experiments, whose ids begin with `prefix`."""
        bounds = (prefix, prefix + "g")  # "g" sorts after every hexadecimal digit
        experiments = self._query("SELECT id FROM experiments WHERE id >= ? AND id < ?", *bounds)
        checkpoints = self._query(
            "SELECT id, experiment_id FROM checkpoints WHERE id >= ? AND id < ?", *bounds
        )
        return {row[0] for row in experiments}, dict(checkpoints)

    def _query(self, statement: str, *arguments: object) -> list[Any]:
        with self._lock:
            return self._database.execute(statement, arguments).fetchall()

    def _change(self, *changes: tuple[str, Sequence[Sequence[object]]]) -> None:
        """Execute statements, each for rows of arguments: all of them or nothing."""
        with self._lock, self._database as database:
            for statement, rows in changes:
                database.executemany(statement, rows)

    # What follows is called with the second lock held.

    def _refresh(self, compare: Callable[[], None]) -> None:
        with self._refreshing:
            try:
                try:
                    compare()
                except sqlite3.OperationalError:
                    raise
                except sqlite3.DatabaseError as error:
                    _log.warning("the catalog is damaged and made anew: %s", error)
                    self._start_anew()
                    compare()
            except sqlite3.OperationalError as error:
                raise catalog_unusable(self._file, error) from error

    def _start_anew(self) -> None:
        self._token = None
        with self._lock:
            self._database.close()
            remove_catalog_file(self._file)
            self._database = open_catalog_file(self._file)

    def _refresh_all(self) -> None:
        self._compare_experiments()
        for place in self.list_places():
            self._compare_details(ExperimentId(place.id))

    def _compare_experiments(self) -> None:
        token = self._repository.experiments_token()
        suspects = {row[0] for row in self._query("SELECT id FROM experiments WHERE is_suspect")}
        wanted = suspects
        if token is None or token != self._token:
            present = set(self._repository.list_experiment_ids())
            known = {row[0] for row in self._query("SELECT id FROM experiments")}
            if known and not present:
                # An empty mount point looks like this too.
                self._repository.check_present()
            self._remove_experiments(known - present)
            wanted = (present - known) | (suspects & present)
        for batch in _batches(sorted(wanted)):
            self._put_experiments(self._read_all(batch, self._read_experiment))
        self._token = token

    def _remove_experiments(self, gone: Collection[str]) -> None:
        rows = [(identifier,) for identifier in gone]
        if rows:
            self._change(
                *(
                    (f"DELETE FROM {table} WHERE experiment_id = ?", rows)
                    for table in ("checkpoints", "edits")
                ),
                *_removal(rows),
            )

    def _put_experiments(self, rows: Mapping[str, _ExperimentRow | None]) -> None:
        """Put in what was read; what is not there any more goes, and what did not change is left alone."""
        marks = ",".join("?" * len(rows))
        known = {
            row[0]: _ExperimentRow(*row[1:])
            for row in self._query(
                f"SELECT id, created_ns, name, record, state, error FROM experiments WHERE id IN ({marks})",
                *rows,
            )
        }
        changed = {identifier: row for identifier, row in rows.items() if known.get(identifier) != row}
        present = {identifier: row for identifier, row in changed.items() if row is not None}
        if not changed:
            return
        self._change(
            *_removal([(identifier,) for identifier in changed]),
            (
                "INSERT OR REPLACE INTO experiments (id, created_ns, name, record, state, error, is_suspect) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(identifier, *row, row.state == "failed") for identifier, row in present.items()],
            ),
            (
                "INSERT OR IGNORE INTO tags VALUES (?, ?)",
                [(tag, identifier) for identifier, row in present.items() for tag in row.tags()],
            ),
        )
        for identifier in known.keys() & present.keys():
            self._derive(identifier)

    def _read_experiment(self, identifier: str, problem: ReplicateError | None) -> _ExperimentRow | None:
        state: SnapshotState = "stored"
        error = ""
        try:
            if problem is not None:
                raise problem
            record = self._repository.load_experiment(ExperimentId(identifier))
            if record.paths and not self._repository.has_snapshot(snapshot_of(identifier)):
                state, error = "failed", "the files were never stored"
        except NotFound:
            return None  # removed since it was listed
        except ReplicateError as damage:
            if problem is None and isinstance(damage, RepositoryUnreachable):
                raise
            # Listed all the same, so that the user sees it; the others are not affected.
            _log.warning("experiment %s: %s", short(identifier), damage)
            record = ExperimentRecord(ExperimentId(identifier), parse_time(_UNREADABLE_CREATED))
            state, error = "failed", damage.message
        return _ExperimentRow(
            wire.encode_time(record.created),
            record.name,
            wire.encode_experiment(record).SerializeToString(deterministic=True),
            state,
            error,
        )

    def _read_all(
        self, identifiers: Iterable[str], read: Callable[[str, ReplicateError | None], T]
    ) -> dict[str, T]:
        """What `read` gives for each; called again with the problem when a single record is out of reach."""
        found: dict[str, T] = {}
        unreachable = 0
        for identifier in identifiers:
            try:
                found[identifier] = read(identifier, None)
                unreachable = 0
            except RepositoryUnreachable as error:
                unreachable += 1
                if unreachable == _MOST_UNREACHABLE:
                    raise
                found[identifier] = read(identifier, error)
        return found

    def _compare_details(self, experiment_id: ExperimentId) -> None:
        self._compare_checkpoints(experiment_id)
        edits = self._read_new_edits(experiment_id)
        if edits:
            self._change(("INSERT OR REPLACE INTO edits VALUES (?, ?, ?, ?, ?)", edits))

    def _compare_checkpoints(self, experiment_id: ExperimentId) -> None:
        present = set(self._repository.list_checkpoint_ids(experiment_id))
        known = dict(
            self._query("SELECT id, is_suspect FROM checkpoints WHERE experiment_id = ?", experiment_id)
        )
        gone = known.keys() - present
        wanted = {identifier for identifier in present if known.get(identifier, True)}

        def read(identifier: str, problem: ReplicateError | None) -> _CheckpointRow | None:
            return self._read_checkpoint(experiment_id, CheckpointId(identifier), problem)

        is_changed = bool(gone)
        if gone:
            self._change(("DELETE FROM checkpoints WHERE id = ?", [(identifier,) for identifier in gone]))
        for batch in _batches(sorted(wanted)):
            rows = self._read_all(batch, read)
            new = [
                (identifier, experiment_id, *row)
                for identifier, row in rows.items()
                # What was suspect and still is has not changed.
                if row is not None and not (row.is_suspect and identifier in known)
            ]
            if new:
                self._change(("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?)", new))
                is_changed = True
        if is_changed:
            self._derive(experiment_id)

    def _read_checkpoint(
        self, experiment_id: ExperimentId, identifier: CheckpointId, problem: ReplicateError | None
    ) -> _CheckpointRow | None:
        is_suspect = False
        try:
            if problem is not None:
                raise problem
            record = self._repository.load_checkpoint(experiment_id, identifier)
        except NotFound:
            return None
        except ReplicateError as damage:
            if problem is None and isinstance(damage, RepositoryUnreachable):
                raise
            _log.warning("checkpoint %s: %s", short(identifier), damage)
            record = CheckpointRecord(
                identifier,
                experiment_id,
                parse_time(_UNREADABLE_CREATED),
                step=0,
                state="failed",
                error=damage.message,
            )
            is_suspect = True
        return _CheckpointRow(
            wire.encode_time(record.created), wire.encode_checkpoint(record).SerializeToString(), is_suspect
        )

    def _derive(self, experiment_id: str) -> None:
        checkpoints = self.checkpoints(experiment_id)
        latest, best = latest_checkpoint(checkpoints), best_checkpoint(checkpoints)
        self._change(
            (
                "UPDATE experiments SET checkpoint_count = ?, latest = ?, best = ? WHERE id = ?",
                [(len(checkpoints), _encode_checkpoint(latest), _encode_checkpoint(best), experiment_id)],
            )
        )

    def _read_new_edits(self, experiment_id: ExperimentId) -> list[tuple[str, str, int, str | None, int]]:
        present = set(self._repository.list_edit_ids(experiment_id))
        if not present:
            return []
        known = {row[0] for row in self._query("SELECT id FROM edits WHERE experiment_id = ?", experiment_id)}
        rows: list[tuple[str, str, int, str | None, int]] = []
        for identifier in present - known:
            try:
                edit = self._repository.load_edit(experiment_id, identifier)
            except ReplicateError as error:
                _log.warning("edit %s: %s", short(identifier), error)
                continue
            if edit is not None:
                status = edit.status if isinstance(edit, EndEdit) else None
                stall_ns = edit.stall_ns if isinstance(edit, EndEdit) else 0
                rows.append((identifier, experiment_id, wire.encode_time(edit.time), status, stall_ns))
        return rows


class _ExperimentRow(NamedTuple):
    """What is read of an experiment, as it stands in the database."""

    created_ns: int
    name: str
    record: bytes
    state: str
    error: str

    def tags(self) -> list[str]:
        return list(pb.Experiment.FromString(self.record).tags)


class _CheckpointRow(NamedTuple):
    """What is read of a checkpoint, as it stands in the database."""

    created_ns: int
    record: bytes
    is_suspect: bool


def _removal(rows: Sequence[tuple[str]]) -> list[tuple[str, Sequence[tuple[str]]]]:
    """The changes that remove experiments, but not what they hold."""
    return [
        ("DELETE FROM tags WHERE experiment_id = ?", rows),
        ("DELETE FROM experiments WHERE id = ?", rows),
    ]


def _batches(identifiers: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(identifiers), _BATCH):
        yield identifiers[start : start + _BATCH]


def _decode_checkpoint(record: bytes) -> CheckpointRecord:
    return wire.decode_checkpoint(pb.Checkpoint.FromString(record))


def _encode_checkpoint(record: CheckpointRecord | None) -> bytes | None:
    return None if record is None else wire.encode_checkpoint(record).SerializeToString()


def _checkpoint(record: bytes | None) -> CheckpointRecord | None:
    return None if record is None else _decode_checkpoint(record)
