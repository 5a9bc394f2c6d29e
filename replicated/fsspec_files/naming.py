"""What the first part of a path means: which snapshots, laid over each other, an id shows.

Answered by the repository alone, where the daemon would add what is not stored yet. The full id of an
experiment asks for its record, and unless it ends with `:code` for those of its checkpoints; everything else
takes a catalog of all there is, which is kept on this machine and brought up to date. Invariant: what can
come to mean something else is looked up again, and the rest is not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from replicate.errors import NotFound, NotStored, RepositoryDamaged, RepositoryIncompatible
from replicate.ids import (
    CheckpointId,
    ExperimentId,
    Reference,
    SnapshotId,
    is_id,
    parse_reference,
    short,
)
from replicate.records import (
    CheckpointRecord,
    ExperimentSummary,
    best_checkpoint,
    latest_checkpoint,
)
from replicate.wire import encode_time
from replicated.browse import snapshot_ids
from replicated.catalog import Catalog, CatalogEntry, Place
from replicated.experiments import Resolution, choose_checkpoint, only_id
from replicated.format.metadata import Snapshot
from replicated.keys import snapshot_of
from replicated.repository import Repository

#: How old what a name means, and a list of experiments, may be; mounts of a repository show no newer things.
FRESH_S: Final = 1.0
_MAX_NAMES: Final = 4096
_MAX_EXPERIMENTS: Final = 64

_log = logging.getLogger(__name__)


class Meaning(NamedTuple):
    """What an id shows."""

    experiment_id: str
    #: Empty where only what `init` saved is meant.
    checkpoint_id: str
    #: Later ones are laid over earlier ones; none: no files were saved.
    snapshot_ids: tuple[SnapshotId, ...]
    #: Whether the same id can never show anything else.
    is_fixed: bool

    @property
    def fixed_id(self) -> str:
        """An id that shows the same for ever."""
        return self.checkpoint_id or f"{self.experiment_id}:code"


class Names:
    """The ids of one repository. Thread-safe."""

    def __init__(
        self,
        repository: Repository,
        catalogs: Path,
        load_snapshot: Callable[[SnapshotId], Snapshot],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`catalogs` is a directory for what is known of repositories, shared with other processes.

        `load_snapshot` does so for `repository`, and remembers.
        """
        self._repository = repository
        self._load_snapshot = load_snapshot
        #: Of the experiments that were asked for by full ids, by id; they are written once.
        self._checkpoints: dict[str, dict[CheckpointId, CheckpointRecord]] = {}
        self._catalogs = catalogs
        self._clock = clock
        #: Held while the repository is asked: who waits for it would ask the same.
        self._asking = threading.Lock()
        self._catalog: Catalog | None = None
        self._listed_at = -float("inf")
        #: Guards the one below; a leaf.
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, Meaning]] = {}

    def find(self, text: str, max_age_s: float = FRESH_S) -> Meaning:
        """What an id shows, by what was known at most `max_age_s` ago.

        Raises `InvalidArgument`, `NotFound`, `Ambiguous`, `NotStored` and what reading raises.
        """
        meaning = self._recall(text, max_age_s)
        if meaning is None:
            with self._asking:
                meaning = self._recall(text, max_age_s)
                if meaning is None:
                    asked_at = self._clock()
                    meaning = self._ask(text)
                    self._remember(text, asked_at, meaning)
        return meaning

    def list_experiments(self, max_age_s: float = FRESH_S) -> list[Place]:
        """All experiments, oldest first."""
        with self._asking:
            catalog = self._open_catalog()
            self._refresh_experiments(catalog, max_age_s)
            return catalog.list_places()

    def created_ns(self, meaning: Meaning) -> int:
        """When what an id shows was recorded."""
        experiment_id = ExperimentId(meaning.experiment_id)
        if not meaning.checkpoint_id:
            return encode_time(self._repository.load_experiment(experiment_id).created)
        checkpoint_id = CheckpointId(meaning.checkpoint_id)
        return encode_time(self._repository.load_checkpoint(experiment_id, checkpoint_id).created)

    def forget(self) -> None:
        """Look up anew what can have changed."""
        with self._lock:
            self._known = {text: known for text, known in self._known.items() if known[1].is_fixed}
        self._listed_at = -float("inf")

    def close(self) -> None:
        """Close the catalog; may be called twice."""
        with self._asking:
            if self._catalog is not None:
                self._catalog.close()
                self._catalog = None

    def _recall(self, text: str, max_age_s: float) -> Meaning | None:
        with self._lock:
            known = self._known.get(text)
        if known is None or (not known[1].is_fixed and self._clock() - known[0] >= max_age_s):
            return None
        return known[1]

    def _remember(self, text: str, asked_at: float, meaning: Meaning) -> None:
        with self._lock:
            self._known.pop(text, None)
            self._known[text] = asked_at, meaning
            if len(self._known) > _MAX_NAMES:
                del self._known[next(iter(self._known))]

    # With the first lock held

    def _ask(self, text: str) -> Meaning:
        reference = parse_reference(text)
        is_full = is_id(reference.prefix)
        if is_full:
            try:
                return self._ask_directly(ExperimentId(reference.prefix), reference, text)
            except _NoExperiment:
                pass  # then it is a checkpoint
        catalog = self._open_catalog()
        if is_full and not reference.selector:
            checkpoint = catalog.checkpoint(reference.prefix)
            if checkpoint is not None and checkpoint.state == "stored":
                entry = next(catalog.entries(checkpoint.experiment_id), None)
                if entry is not None and entry.state == "stored":
                    return _meaning(_resolve_checkpoint(entry, checkpoint), is_fixed=True)
        return self._ask_catalog(catalog, reference, text)

    def _ask_directly(self, experiment_id: ExperimentId, reference: Reference, text: str) -> Meaning:
        """What an experiment of a full id shows; raises `_NoExperiment` when there is none."""
        code = snapshot_of(experiment_id)
        if reference.selector == "code":
            try:
                self._load_snapshot(code)
                return Meaning(experiment_id, "", (code,), is_fixed=True)
            except NotStored:
                pass  # the record says why, if there is one
        try:
            record = self._repository.load_experiment(experiment_id)
        except NotFound as error:
            raise _NoExperiment from error
        checkpoints = [] if reference.selector == "code" else self._load_checkpoints(experiment_id)
        summary = ExperimentSummary(
            record,
            "unknown",
            "stored",
            latest=latest_checkpoint(checkpoints),
            best=best_checkpoint(checkpoints),
        )
        resolution = choose_checkpoint(summary, reference, text, lambda: checkpoints)
        return _meaning(resolution, is_fixed=reference.selector == "code")

    def _load_checkpoints(self, experiment_id: ExperimentId) -> list[CheckpointRecord]:
        """The checkpoints of an experiment, oldest first, but those whose records cannot be read."""
        present = self._repository.list_checkpoint_ids(experiment_id)
        known = self._checkpoints.pop(experiment_id, {})
        new = [checkpoint_id for checkpoint_id in present if checkpoint_id not in known]

        def load(checkpoint_id: CheckpointId) -> CheckpointRecord | None:
            try:
                return self._repository.load_checkpoint(experiment_id, checkpoint_id)
            except (NotFound, RepositoryDamaged, RepositoryIncompatible) as error:
                _log.warning("checkpoint %s: %s", short(checkpoint_id), error)
                return None

        with ThreadPoolExecutor(self._repository.store.capabilities.parallel_requests) as pool:
            loaded = {record.id: record for record in pool.map(load, new) if record is not None}
        found = {
            checkpoint_id: known.get(checkpoint_id) or loaded[checkpoint_id]
            for checkpoint_id in present
            if checkpoint_id in known or checkpoint_id in loaded
        }
        self._checkpoints[experiment_id] = found
        while len(self._checkpoints) > _MAX_EXPERIMENTS:
            del self._checkpoints[next(iter(self._checkpoints))]
        return sorted(found.values(), key=lambda record: (record.created, record.id))

    def _ask_catalog(self, catalog: Catalog, reference: Reference, text: str) -> Meaning:
        self._refresh_experiments(catalog)
        experiment_id = ""
        if reference.is_latest:
            newest = catalog.newest_place()
            if newest is None:
                raise NotFound("there is no experiment yet", hint="call replicate.init() in a script")
            experiment_id = newest.id
        else:
            experiments, checkpoints = catalog.find_ids(reference.prefix)
            if not (is_id(reference.prefix) and checkpoints):
                catalog.refresh()
                experiments, checkpoints = catalog.find_ids(reference.prefix)
            identifier = only_id(reference, experiments, checkpoints)
            if identifier not in experiments:
                return self._checkpoint(catalog, identifier, is_full=is_id(reference.prefix))
            experiment_id = identifier
        catalog.refresh_experiment(experiment_id)
        entry = _entry(catalog, experiment_id)
        resolution = choose_checkpoint(
            _summary(entry), reference, text, lambda: catalog.checkpoints(experiment_id)
        )
        return _meaning(resolution, is_fixed=False)

    @staticmethod
    def _checkpoint(catalog: Catalog, identifier: str, *, is_full: bool) -> Meaning:
        checkpoint = catalog.checkpoint(identifier)
        if checkpoint is None:
            raise NotFound(f"checkpoint {short(identifier)} was removed in this moment")
        resolution = _resolve_checkpoint(_entry(catalog, checkpoint.experiment_id), checkpoint)
        return _meaning(resolution, is_fixed=is_full)

    def _open_catalog(self) -> Catalog:
        if self._catalog is None:
            self._catalogs.mkdir(parents=True, exist_ok=True)
            self._catalog = Catalog(self._repository, self._catalogs)
        return self._catalog

    def _refresh_experiments(self, catalog: Catalog, max_age_s: float = 0.0) -> None:
        asked_at = self._clock()
        if asked_at - self._listed_at >= max_age_s:
            catalog.refresh_experiments()
            self._listed_at = asked_at


class _NoExperiment(Exception):
    """There is no experiment of that id."""


def _entry(catalog: Catalog, experiment_id: str) -> CatalogEntry:
    entry = next(catalog.entries(experiment_id), None)
    if entry is None:
        raise NotFound(
            f"experiment {short(experiment_id)} was removed",
            hint="`replicate ls` lists the experiments",
            fields={"id": experiment_id},
        )
    return entry


def _summary(entry: CatalogEntry) -> ExperimentSummary:
    return ExperimentSummary(
        entry.record, "unknown", entry.state, entry.error, latest=entry.latest, best=entry.best
    )


def _resolve_checkpoint(entry: CatalogEntry, checkpoint: CheckpointRecord) -> Resolution:
    return Resolution(_summary(entry), checkpoint, named_experiment=False, chosen="")


def _meaning(resolution: Resolution, *, is_fixed: bool) -> Meaning:
    record, checkpoint = resolution.summary.record, resolution.checkpoint
    found: tuple[SnapshotId, ...] = ()
    if record.paths or (checkpoint is not None and checkpoint.paths) or resolution.summary.state == "failed":
        found = tuple(snapshot_ids(resolution))
    return Meaning(record.id, "" if checkpoint is None else checkpoint.id, found, is_fixed)
