"""Experiments as users ask for them: the catalog, with what the journal and the watcher know on top.

A snapshot that is captured but not stored yet, or that failed, is in no repository; users of this
machine see it all the same, in its state. Here live lists with filters, the meaning of every form of id
(`EXP:best`, `latest`, a prefix, …) and the status of a run.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

from replicate.access import scheme_of
from replicate.errors import (
    Ambiguous,
    InvalidArgument,
    NotFound,
    RepositoryMissing,
    RepositoryUnreachable,
)
from replicate.ids import Reference, parse_reference, short
from replicate.records import (
    CheckpointRecord,
    ExperimentSummary,
    ProcessIdentity,
    SnapshotState,
    Status,
    best_checkpoint,
    latest_checkpoint,
    utc_now,
)
from replicated.catalog import Catalog, CatalogEntry
from replicated.catalog_rows import whole_row
from replicated.filters import parse_filter, sort_summaries
from replicated.format.metadata import EndEdit, decode_edit
from replicated.journal import Job, Journal, Run
from replicated.listed import Listed
from replicated.live_runs import LiveRuns
from replicated.processes import current_boot_id, is_alive
from replicated.remarks import remark
from replicated.repositories import OpenRepositories
from replicated.repository import Repository
from replicated.store.unreachable import UnreachableStore

Chosen = Literal["", "best", "latest", "code", "step"]

#: Fewer than these are looked up one by one.
_FEW: Final = 500


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a reference means: an experiment, and a checkpoint of it unless none is meant."""

    summary: ExperimentSummary
    checkpoint: CheckpointRecord | None
    #: Whether the reference named the experiment, so that the checkpoint was chosen for the user.
    named_experiment: bool
    chosen: Chosen


class Experiments:
    """Answers questions about the experiments of any repository. Thread-safe."""

    def __init__(
        self,
        journal: Journal,
        repositories: OpenRepositories,
        catalogs: Path,
    ) -> None:
        self._journal = journal
        self._repositories = repositories
        self._directory = catalogs
        self._lock = threading.Lock()
        self._catalogs: dict[tuple[str, bool], tuple[Repository, Catalog]] = {}

    def close(self) -> None:
        """Close the catalogs."""
        with self._lock:
            for _, catalog in self._catalogs.values():
                catalog.close()
            self._catalogs.clear()

    def list_experiments(
        self, repository: str, filters: Sequence[str] = (), sort: str = "", limit: int = 0
    ) -> list[ExperimentSummary]:
        """As `list_summaries`, with all that is recorded of each."""
        view = self._view(repository)
        wanted = [listed.id for listed in self._list(view, filters, sort, limit)]
        if len(wanted) < _FEW:
            found = [self._find_summary(view, identifier) for identifier in wanted]
            return [summary for summary in found if summary is not None]
        summaries: dict[str, ExperimentSummary] = {s.record.id: s for s in self._summaries(view)}
        return [summaries[identifier] for identifier in wanted if identifier in summaries]

    def list_summaries(
        self, repository: str, filters: Sequence[str] = (), sort: str = "", limit: int = 0
    ) -> list[Listed]:
        """Experiments that pass all filters, in order; the newest `limit` of that order if not 0."""
        return self._list(self._view(repository), filters, sort, limit)

    def checkpoints(self, repository: str, reference: str) -> list[CheckpointRecord]:
        """The checkpoints of the experiment that a reference names, oldest first."""
        view = self._view(repository)
        return self._checkpoints(view, self._resolve(view, reference).summary.record.id)

    def resolve(self, repository: str, text: str) -> Resolution:
        """What an id, in any form that users may write, means.

        Raises `InvalidArgument`, `NotFound` or `Ambiguous`.
        """
        return self._resolve(self._view(repository), text)

    def _resolve(self, view: _View, text: str) -> Resolution:
        reference = parse_reference(text)
        if reference.is_latest:
            listed = self._list(view)
            if not listed:
                raise NotFound("there is no experiment yet", hint="call replicate.init() in a script")
            return self._choose(view, self._summary(view, listed[-1].id), reference, text)
        experiments, checkpoints = self._find_ids(view, reference.prefix)
        identifier = only_id(reference, experiments, checkpoints)
        if identifier in experiments:
            return self._choose(view, self._summary(view, identifier), reference, text)
        summary = self._summary(view, checkpoints[identifier])
        for checkpoint in self._checkpoints(view, checkpoints[identifier]):
            if checkpoint.id == identifier:
                return Resolution(summary, checkpoint, named_experiment=False, chosen="")
        raise NotFound(f"checkpoint {short(identifier)} was removed in this moment")

    def _choose(self, view: _View, summary: ExperimentSummary, reference: Reference, text: str) -> Resolution:
        return choose_checkpoint(summary, reference, text, lambda: self._checkpoints(view, summary.record.id))

    def _catalog(self, url: str, repository: Repository) -> Catalog:
        # Of one that is out of reach there may be two: as it was opened, and as it is remembered.
        key = (url, isinstance(repository.store, UnreachableStore))
        with self._lock:
            known = self._catalogs.get(key)
            if known is not None:
                if known[0] is repository:
                    return known[1]
                known[1].close()  # the repository was deleted and made anew
            catalog = Catalog(repository, self._directory)
            self._catalogs[key] = repository, catalog
            return catalog

    def _view(self, repository: str) -> _View:
        # The journal first: a job that is stored in between is then seen in both and not in neither.
        jobs = _Overlay(self._journal.unfinished(repository), self._journal.runs(), self._journal.stalls())
        try:
            opened = self._repositories.get(repository)
        except RepositoryMissing:
            if not jobs.experiments and not jobs.checkpoints:
                raise
            # Moved, unmounted or deleted: what waits to be stored in it is known all the same.
            return _View(None, None, jobs)
        except RepositoryUnreachable as error:
            return self._remembered(repository, error)
        catalog = self._catalog(repository, opened)
        try:
            self._repositories.patiently(repository, "refresh", catalog.refresh)
        except RepositoryUnreachable as error:
            return self._remembered(repository, error)
        return _View(catalog, LiveRuns(opened), jobs)

    def _remembered(self, url: str, error: RepositoryUnreachable) -> _View:
        """What this machine knows of a repository in a bucket that cannot be reached; raises `error`."""
        # What it has stored itself may not have been read back yet.
        jobs = _Overlay(self._journal.remembered(url), self._journal.runs(), self._journal.stalls())
        known = None if scheme_of(url) is None else self._repositories.remembered(url, error)
        catalog = None if known is None else self._catalog(url, known)
        is_empty = catalog is None or catalog.newest_place() is None
        is_nothing_known = is_empty and not jobs.experiments and not jobs.checkpoints
        if scheme_of(url) is None or isinstance(error, RepositoryMissing) or is_nothing_known:
            raise error
        remark(f"shown is what this machine knows of {url}, which cannot be reached now: {error.message}")
        return _View(catalog, None, jobs)

    def _list(self, view: _View, filters: Sequence[str] = (), sort: str = "", limit: int = 0) -> list[Listed]:
        now = utc_now()
        predicates = [parse_filter(text, now) for text in filters]
        rows = view.catalog.summaries() if view.catalog else []
        special = view.jobs.special_ids()
        found = [Listed(row, view.status_of, now) for row in rows if row.id not in special]
        for identifier in (special & {row.id for row in rows}) | view.jobs.experiments.keys():
            summary = self._find_summary(view, identifier)
            if summary is not None:
                found.append(Listed(whole_row(summary), view.status_of, now))
        found.sort(key=lambda listed: listed.place)
        if predicates:
            found = [listed for listed in found if all(accept(listed) for accept in predicates)]
        ordered = sort_summaries(found, sort) if sort else found
        if not limit:
            return ordered
        return ordered[-limit:] if not sort else ordered[:limit]

    def _summaries(self, view: _View) -> list[ExperimentSummary]:
        """Every experiment, oldest first."""
        entries = list(view.catalog.entries()) if view.catalog else []
        known = {entry.record.id for entry in entries}
        pending = [_pending_entry(job) for job in view.jobs.experiments.values() if job.id not in known]
        summaries = [self._summarise(view, entry) for entry in [*entries, *pending]]
        return sorted(summaries, key=lambda s: (s.record.created, s.record.id))

    def _find_summary(self, view: _View, experiment_id: str) -> ExperimentSummary | None:
        entry = next(view.catalog.entries(experiment_id), None) if view.catalog else None
        if entry is None and (job := view.jobs.experiments.get(experiment_id)) is not None:
            entry = _pending_entry(job)
        return None if entry is None else self._summarise(view, entry)

    def _summary(self, view: _View, experiment_id: str) -> ExperimentSummary:
        summary = self._find_summary(view, experiment_id)
        if summary is not None:
            return summary
        # Of an experiment that is stored, in a repository that is missing, the journal still has the record.
        job = self._journal.find(experiment_id)
        if job is None or job.state == "removed":
            raise NotFound(f"experiment {short(experiment_id)} was removed")
        return self._summarise(view, _pending_entry(job))

    def _summarise(self, view: _View, entry: CatalogEntry) -> ExperimentSummary:
        identifier = entry.record.id
        state, error = entry.state, entry.error
        job = view.jobs.experiments.get(identifier)
        if job is not None and job.state == "failed":
            state, error = "failed", job.error
        count, latest, best = entry.checkpoint_count, entry.latest, entry.best
        if identifier in view.jobs.checkpoints:
            merged = self._checkpoints(view, identifier)
            count, latest, best = len(merged), latest_checkpoint(merged), best_checkpoint(merged)
        status, ended = self._status(view, entry)
        # By id, because an edit that is stored in this moment is in both.
        stalls = {**entry.stalls, **view.jobs.stalls.get(identifier, {})}
        return ExperimentSummary(
            record=entry.record,
            status=status,
            state=state,
            error=error,
            ended=ended,
            checkpoint_count=count,
            latest=latest,
            best=best,
            duration_s=_duration(entry, status, ended, latest),
            stall_s=sum(stalls.values()) / 1e9 if stalls else None,
        )

    def _status(self, view: _View, entry: CatalogEntry) -> tuple[Status, datetime | None]:
        record = entry.record
        run = view.jobs.runs.get(record.id)
        if run is not None:
            # The watcher is about to record the end of a process that is gone.
            return ("running" if is_alive(run.process) else "killed"), None
        edit = view.jobs.ends.get(record.id)
        if edit is not None:
            return edit.status, edit.time
        return recorded_status(entry, view.live_runs)

    def _checkpoints(self, view: _View, experiment_id: str) -> list[CheckpointRecord]:
        stored = view.catalog.checkpoints(experiment_id) if view.catalog else []
        return _merge(stored, view.jobs.checkpoints.get(experiment_id, []))

    def _find_ids(self, view: _View, prefix: str) -> tuple[set[str], dict[str, str]]:
        experiments, checkpoints = view.catalog.find_ids(prefix) if view.catalog else (set(), {})
        experiments.update(found for found in view.jobs.experiments if found.startswith(prefix))
        for experiment_id, pending in view.jobs.checkpoints.items():
            checkpoints.update((c.id, experiment_id) for c in pending if c.id.startswith(prefix))
        return experiments, checkpoints


def only_id(reference: Reference, experiments: Collection[str], checkpoints: Collection[str]) -> str:
    """The one id that a reference names, of those of experiments and checkpoints that begin like it.

    Raises `NotFound`, `Ambiguous`, and `InvalidArgument` when something is selected of a checkpoint.
    """
    found = sorted({*experiments, *checkpoints})
    if not found:
        raise NotFound(
            f"no experiment or checkpoint starts with: {reference.prefix}",
            hint="`replicate ls` lists the experiments",
            fields={"prefix": reference.prefix},
        )
    if len(found) > 1:
        shown = ", ".join(identifier[: len(reference.prefix) + 4] for identifier in found[:5])
        raise Ambiguous(
            f"{len(found)} ids start with {reference.prefix}: {shown}",
            hint="give more characters",
            fields={"prefix": reference.prefix},
        )
    if reference.selector and found[0] not in experiments:
        raise InvalidArgument(
            f"{short(found[0])} is a checkpoint, so it has no :{reference.selector}",
            hint="give the id of its experiment",
        )
    return found[0]


def choose_checkpoint(
    summary: ExperimentSummary,
    reference: Reference,
    text: str,
    list_checkpoints: Callable[[], Sequence[CheckpointRecord]],
) -> Resolution:
    """The checkpoint of an experiment that a reference selects; raises `NotFound`."""
    selector = reference.selector
    checkpoint: CheckpointRecord | None = None
    chosen: Chosen = selector
    if selector == "":
        checkpoint = summary.best or summary.latest
        chosen = "best" if summary.best else "latest" if summary.latest else ""
    elif selector == "best":
        checkpoint = summary.best
    elif selector == "latest":
        checkpoint = summary.latest
    elif selector == "step":
        matching = [c for c in list_checkpoints() if c.step == reference.step]
        checkpoint = latest_checkpoint(matching)
    if checkpoint is None and selector in ("best", "latest", "step"):
        raise NotFound(
            f"experiment {short(summary.record.id)} has no such checkpoint: {text}",
            hint="no checkpoint has a primary metric" if selector == "best" and summary.latest else "",
        )
    return Resolution(summary, checkpoint, named_experiment=True, chosen=chosen)


def recorded_status(entry: CatalogEntry, live_runs: Container[str] | None) -> tuple[Status, datetime | None]:
    """How a run stands, and when it ended, by what is recorded: who watches runs may know better.

    `live_runs` is looked at only when its end is not recorded; None: nobody can say.
    """
    if entry.end_status is not None:
        return entry.end_status, entry.ended
    return _open_status(entry.record.id, entry.record.process, live_runs), None


def _open_status(
    experiment_id: str, process: ProcessIdentity | None, live_runs: Container[str] | None
) -> Status:
    """How a run stands whose end is not recorded."""
    if process is not None and process.boot_id == current_boot_id():
        # Of this machine, recorded by a daemon of another home.
        return "running" if is_alive(process) else "killed"
    return "running" if live_runs is not None and experiment_id in live_runs else "unknown"


@dataclass(frozen=True, slots=True)
class _View:
    """A repository as it is at one moment: what the journal knows, and the refreshed catalog."""

    #: None when the repository is missing.
    catalog: Catalog | None
    #: None when nobody can be asked.
    live_runs: LiveRuns | None
    jobs: _Overlay

    def status_of(self, experiment_id: str, process: ProcessIdentity | None) -> Status:
        """How a run stands of which neither the repository nor the journal knows the end."""
        return _open_status(experiment_id, process, self.live_runs)


class _Overlay:
    """What the journal knows beyond the repository: unfinished jobs by what they are, and live runs."""

    def __init__(self, jobs: Iterable[Job], runs: Iterable[Run], stalls: Mapping[str, int]) -> None:
        self.runs = {run.experiment_id: run for run in runs}
        #: How long calls held up the training of an experiment, by the id of what tells it.
        self.stalls = {identifier: {"": stall_ns} for identifier, stall_ns in stalls.items() if stall_ns}
        self.experiments: dict[str, Job] = {}
        self.checkpoints: dict[str, list[CheckpointRecord]] = {}
        #: The newest end that is not in the repository yet.
        self.ends: dict[str, EndEdit] = {}
        for job in jobs:
            if job.kind == "experiment":
                self.experiments[job.id] = job
            elif job.kind == "checkpoint":
                record = job.checkpoint()
                state = _visible_state(job)
                error = record.error if job.waits_for else job.error or record.error
                record = dataclasses.replace(record, state=state, error=error, waits_for=job.waits_for)
                self._add_checkpoint(record)
            else:
                edit = decode_edit(job.record)
                if isinstance(edit, EndEdit):
                    self.ends[job.experiment_id] = edit
                    if edit.stall_ns:
                        self.stalls.setdefault(job.experiment_id, {})[job.id] = edit.stall_ns

    def special_ids(self) -> set[str]:
        """The experiments of which the journal knows something that the repository does not."""
        return {*self.runs, *self.stalls, *self.experiments, *self.checkpoints, *self.ends}

    def _add_checkpoint(self, record: CheckpointRecord) -> None:
        """Of one that several processes of this machine make, the newest of the lowest rank counts."""
        found = self.checkpoints.setdefault(record.experiment_id, [])
        for number, other in enumerate(found):
            if other.id == record.id:
                if _rank(record) <= _rank(other):
                    found[number] = record
                return
        found.append(record)


def _rank(record: CheckpointRecord) -> int:
    return record.part.rank if record.part is not None else 0


def _visible_state(job: Job) -> SnapshotState:
    return "captured" if job.state == "removed" else job.state


def _pending_entry(job: Job) -> CatalogEntry:
    """An experiment that is not in the repository yet, as if it were."""
    return CatalogEntry(
        record=job.experiment(),
        state=_visible_state(job),
        error=job.error,
        checkpoint_count=0,
        latest=None,
        best=None,
        end_status=None,
        ended=None,
        stalls={},
    )


def _merge(stored: Sequence[CheckpointRecord], pending: Sequence[CheckpointRecord]) -> list[CheckpointRecord]:
    """Checkpoints of the repository and of the journal, oldest first, each once."""
    known = {checkpoint.id for checkpoint in stored}
    merged = [*stored, *(checkpoint for checkpoint in pending if checkpoint.id not in known)]
    return sorted(merged, key=lambda c: (c.created, c.id))


def _duration(
    entry: CatalogEntry, status: Status, ended: datetime | None, latest: CheckpointRecord | None
) -> float | None:
    """Seconds from the start to the end, or to now while running, or to the last sign otherwise."""
    if ended is None:
        ended = utc_now() if status == "running" else latest.created if latest else None
    return None if ended is None else max(0.0, (ended - entry.record.created).total_seconds())
