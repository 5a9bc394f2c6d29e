"""What a repository holds, in a local SQLite database that answers lists without opening every object.

A cache of the records in the repository: brought up to date by comparing names (records are written
once, so a known name need not be read again), deleted and made anew when it is damaged. It knows
nothing of what is still in the journal or of what runs: `experiments` puts that on top.

Thread-safe: one lock lets one refresh go on at a time and is held while the repository is read; who has it
may take that of the tables.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

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
)
from replicated.catalog_file import catalog_unusable
from replicated.catalog_news import KeptNews
from replicated.catalog_rows import (
    EditRow,
    ExperimentRow,
    ReadCheckpoint,
    SummaryRow,
    checkpoint_row,
    damaged_checkpoint,
    damaged_experiment,
    edit_row,
    experiment_row,
)
from replicated.catalog_tables import Tables, batches, decode_checkpoint
from replicated.record_log import RecordLog
from replicated.repository import Repository

_log = logging.getLogger(__name__)

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
        #: Where listing all records would take many requests; guarded by the lock above.
        is_costly = repository.store.capabilities.has_costly_requests
        self._records = RecordLog(repository) if is_costly else None
        #: Of the repository when the experiments were compared last; guarded by the lock above.
        self._token: object = None
        #: Of what belongs to each experiment, as far as the tables have it; guarded by the lock above.
        self._detail_tokens: dict[str, object] = {}
        # A copy of a repository has its id but not its contents, hence the URL.
        place = blake3(repository.url.encode()).hexdigest()[:16]
        self._tables = Tables(directory / f"{repository.id[:16]}-{place}.db")
        self._news = KeptNews(self._tables, repository.url)

    def close(self) -> None:
        """Close the database."""
        self._tables.close()

    def refresh(self) -> None:
        """Take in what was written to, and removed from, the repository since the last time."""
        self._refresh(self._refresh_all)

    def refresh_experiments(self) -> None:
        """As `refresh`, but only which experiments there are; costs little when that did not change."""
        self._refresh(self._compare_experiments if self._records is None else self._take_news)

    def refresh_experiment(self, experiment_id: str) -> None:
        """As `refresh`, but only the checkpoints of one experiment, and its end."""
        if self._records is None:
            self._refresh(lambda: self._compare_details(ExperimentId(experiment_id)))
        else:
            self._refresh(self._take_news)

    @property
    def version(self) -> tuple[int, int]:
        """Another one once anything was changed, by this process or another."""
        return self._tables.version

    def list_places(self) -> list[Place]:
        """All experiments, oldest first."""
        return list(
            map(Place._make, self._tables.query("SELECT id, created_ns FROM experiments ORDER BY 2, 1"))
        )

    def newest_place(self) -> Place | None:
        """The newest experiment."""
        rows = self._tables.query("SELECT id, created_ns FROM experiments ORDER BY 2 DESC, 1 DESC LIMIT 1")
        return Place._make(rows[0]) if rows else None

    def list_names(self) -> list[tuple[str, Place]]:
        """The names of experiments with where they are, oldest first; a name can be there several times."""
        rows = self._tables.query(
            "SELECT name, id, created_ns FROM experiments WHERE name != '' ORDER BY 3, 2"
        )
        return [(name, Place(*place)) for name, *place in rows]

    def list_tags(self) -> list[tuple[str, int]]:
        """All tags, each with the `created_ns` of the newest experiment that has it."""
        return self._tables.query(
            "SELECT tag, max(created_ns) FROM tags JOIN experiments ON id = experiment_id GROUP BY tag"
        )

    def list_tagged(self, tag: str) -> list[Place]:
        """The experiments that have a tag, oldest first."""
        rows = self._tables.query(
            "SELECT id, created_ns FROM tags JOIN experiments ON id = experiment_id "
            "WHERE tag = ? ORDER BY 2, 1",
            tag,
        )
        return list(map(Place._make, rows))

    def entries(self, identifier: str | None = None) -> Iterator[CatalogEntry]:
        """All experiments, oldest first; or the one of that id, if it is there."""
        condition, arguments = ("", ()) if identifier is None else ("WHERE {} = ?", (identifier,))
        rows = self._tables.query(
            "SELECT id, record, state, error, summary FROM summaries JOIN experiments USING (id) "
            f"{condition.format('id')} ORDER BY summaries.created_ns, id",
            *arguments,
        )
        edits = self._tables.query(
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
        for experiment_id, record, state, error, summary in rows:
            message = pb.ExperimentSummary.FromString(summary)
            status, ended_ns = ends.get(experiment_id, (None, 0))
            yield CatalogEntry(
                record=wire.decode_experiment(pb.Experiment.FromString(record)),
                state=state,
                error=error,
                checkpoint_count=message.checkpoint_count,
                latest=wire.decode_checkpoint(message.latest) if message.HasField("latest") else None,
                best=wire.decode_checkpoint(message.best) if message.HasField("best") else None,
                end_status=status,
                ended=wire.decode_time(ended_ns) if status else None,
                stalls=stalls.get(experiment_id, {}),
            )

    def summaries(self) -> list[SummaryRow]:
        """What lists show of all experiments, oldest first."""
        return list(
            map(
                SummaryRow._make,
                self._tables.query(
                    "SELECT created_ns, id, summary, is_ended, process, latest_ns "
                    "FROM summaries ORDER BY created_ns, id"
                ),
            )
        )

    def checkpoints(self, experiment_id: str) -> list[CheckpointRecord]:
        """The checkpoints of an experiment, oldest first."""
        return [read.record for read in self._tables.checkpoints(experiment_id)]

    def checkpoint(self, checkpoint_id: str) -> CheckpointRecord | None:
        """The checkpoint of that id, if it is there."""
        rows = self._tables.query("SELECT record FROM checkpoints WHERE id = ?", checkpoint_id)
        return decode_checkpoint(rows[0][0]) if rows else None

    def newest_checkpoint_ns(self, experiment_id: str) -> int:
        """When the newest checkpoint of an experiment was created; 0 when it has none."""
        rows = self._tables.query(
            "SELECT max(created_ns) FROM checkpoints WHERE experiment_id = ?", experiment_id
        )
        return int(rows[0][0] or 0)

    def find_ids(self, prefix: str) -> tuple[set[str], dict[str, str]]:
        """Experiments, and checkpoints with their experiments, whose ids begin with `prefix`."""
        bounds = (prefix, prefix + "g")  # "g" sorts after every hexadecimal digit
        experiments = self._tables.query("SELECT id FROM experiments WHERE id >= ? AND id < ?", *bounds)
        checkpoints = self._tables.query(
            "SELECT id, experiment_id FROM checkpoints WHERE id >= ? AND id < ?", *bounds
        )
        return {row[0] for row in experiments}, dict(checkpoints)

    # What follows is called with the second lock held.

    def _refresh(self, compare: Callable[[], object]) -> None:
        with self._refreshing:
            try:
                try:
                    compare()
                except sqlite3.OperationalError:
                    raise
                except sqlite3.DatabaseError as error:
                    _log.warning("the catalog is damaged and made anew: %s", error)
                    self._token = None
                    self._detail_tokens.clear()
                    self._tables.start_anew()
                    compare()
            except sqlite3.OperationalError as error:
                raise catalog_unusable(self._tables.file, error) from error

    def _refresh_all(self) -> None:
        if self._records is not None:
            self._take_news()
            return
        self._compare_experiments()
        suspects = {
            row[0]
            for row in self._tables.query("SELECT DISTINCT experiment_id FROM checkpoints WHERE is_suspect")
        }
        tokens: dict[str, object] = {}
        for (identifier,) in self._tables.query("SELECT id FROM summaries"):
            # Taken first: what is written while the experiment is read shows the next time.
            token = self._repository.details_token(ExperimentId(identifier))
            is_known = token is not None and token == self._detail_tokens.get(identifier)
            if not is_known or identifier in suspects:
                is_known = self._compare_details(ExperimentId(identifier)) and token is not None
            if is_known:
                tokens[identifier] = token
        self._detail_tokens = tokens

    def _compare_experiments(self) -> None:
        token = self._repository.experiments_token()
        suspects = {row[0] for row in self._tables.query("SELECT id FROM experiments WHERE is_suspect")}
        wanted = suspects
        if token is None or token != self._token:
            present = set(self._repository.list_experiment_ids())
            known = {row[0] for row in self._tables.query("SELECT id FROM experiments")}
            if known and not present:
                # An empty mount point looks like this too.
                self._repository.check_present()
            self._tables.remove_experiments(known - present)
            wanted = (present - known) | (suspects & present)
        for batch in batches(sorted(wanted)):
            rows = self._read_all(batch, self._read_experiment)
            with self._tables.transaction():
                self._tables.derive(self._tables.put_experiments(rows))
        self._token = token

    def _read_experiment(self, identifier: str, problem: ReplicateError | None) -> ExperimentRow | None:
        try:
            if problem is not None:
                raise problem
            return experiment_row(*self._repository.load_experiment_with_snapshot(ExperimentId(identifier)))
        except NotFound:
            return None  # removed since it was listed
        except ReplicateError as damage:
            if problem is None and isinstance(damage, RepositoryUnreachable):
                raise
            return damaged_experiment(identifier, damage)

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

    # Where the log of the repository tells what is new

    def _take_news(self) -> None:
        assert self._records is not None, "the repository is one whose log is read"
        for news in self._records.read(self._news):
            self._news.take(news)

    def _compare_details(self, experiment_id: ExperimentId) -> bool:
        """Take in the checkpoints and edits of an experiment; whether all of its edits could be read."""
        checkpoints, gone = self._read_new_checkpoints(experiment_id)
        edits, are_all = self._read_new_edits(experiment_id)
        if checkpoints or gone or edits:
            with self._tables.transaction():
                self._tables.change(("DELETE FROM checkpoints WHERE id = ?", [(one,) for one in gone]))
                self._tables.remember_checkpoints(checkpoints)
                self._tables.remember_edits(edits)
                self._tables.derive([experiment_id])
        return are_all

    def _read_new_checkpoints(self, experiment_id: ExperimentId) -> tuple[list[ReadCheckpoint], set[str]]:
        """The checkpoints that are new, and the ids of those that are gone."""
        present = set(self._repository.list_checkpoint_ids(experiment_id))
        known = dict(
            self._tables.query(
                "SELECT id, is_suspect FROM checkpoints WHERE experiment_id = ?", experiment_id
            )
        )
        wanted = {identifier for identifier in present if known.get(identifier, True)}

        def read(identifier: str, problem: ReplicateError | None) -> ReadCheckpoint | None:
            return self._read_checkpoint(experiment_id, CheckpointId(identifier), problem)

        new = [
            found
            for identifier, found in self._read_all(sorted(wanted), read).items()
            # What was suspect and still is has not changed.
            if found is not None and not (found.row.is_suspect and identifier in known)
        ]
        return new, known.keys() - present

    def _read_checkpoint(
        self, experiment_id: ExperimentId, identifier: CheckpointId, problem: ReplicateError | None
    ) -> ReadCheckpoint | None:
        try:
            if problem is not None:
                raise problem
            record = self._repository.load_checkpoint(experiment_id, identifier)
            return ReadCheckpoint(record, checkpoint_row(record))
        except NotFound:
            return None
        except ReplicateError as damage:
            if problem is None and isinstance(damage, RepositoryUnreachable):
                raise
            return damaged_checkpoint(experiment_id, identifier, damage)

    def _read_new_edits(self, experiment_id: ExperimentId) -> tuple[list[EditRow], bool]:
        present = set(self._repository.list_edit_ids(experiment_id))
        if not present:
            return [], True
        known = {
            row[0]
            for row in self._tables.query("SELECT id FROM edits WHERE experiment_id = ?", experiment_id)
        }
        rows: list[EditRow] = []
        are_all = True
        for identifier in present - known:
            try:
                edit = self._repository.load_edit(experiment_id, identifier)
            except ReplicateError as error:
                _log.warning("edit %s: %s", short(identifier), error)
                are_all = False
                continue
            if edit is not None:
                rows.append(edit_row(identifier, experiment_id, edit))
        return rows, are_all
