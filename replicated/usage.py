"""`replicate du`: what experiments would take as plain copies, and what they take.

logical: the sizes of all saved files, each snapshot counted on its own. unique: the content that is
different, before compression. stored: what it takes in packs; in total, the size of every object in the
repository.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from replicate.errors import NotStored
from replicate.ids import SnapshotId
from replicate.records import ExperimentSummary
from replicated.experiments import Experiments
from replicated.repositories import OpenRepositories
from replicated.repository import Repository


@dataclass(frozen=True, slots=True)
class Usage:
    """Sizes in bytes of one experiment, or of all (`id` empty)."""

    id: str
    logical_bytes: int
    unique_bytes: int
    stored_bytes: int
    snapshots: int


def measure(
    experiments: Experiments,
    repositories: OpenRepositories,
    repository: str,
    references: Iterable[str],
) -> tuple[list[Usage], Usage]:
    """The usage of each of these experiments (of all when none is given), and of the whole repository."""
    opened = repositories.get(repository)
    chosen = [experiments.resolve(repository, reference).summary for reference in references]
    everything = experiments.list_experiments(repository)
    per_experiment = [
        _measure_one(opened, experiments, repository, summary) for summary in chosen or everything
    ]
    seen: set[bytes] = set()
    logical = unique = snapshots = 0
    for summary in everything:
        for identifier in _snapshot_ids(experiments, repository, summary):
            try:
                snapshot = opened.load_snapshot(identifier)
            except NotStored:
                continue
            snapshots += 1
            logical += snapshot.root.size_bytes
            unique += sum(plain for _, plain, _ in opened.iter_chunks(snapshot, seen))
    total = Usage("", logical, unique, opened.total_stored_bytes(), snapshots)
    return per_experiment, total


def _measure_one(
    opened: Repository, experiments: Experiments, repository: str, summary: ExperimentSummary
) -> Usage:
    seen: set[bytes] = set()
    logical = unique = stored = snapshots = 0
    for identifier in _snapshot_ids(experiments, repository, summary):
        try:
            snapshot = opened.load_snapshot(identifier)
        except NotStored:
            continue
        snapshots += 1
        logical += snapshot.root.size_bytes
        for _, plain, packed in opened.iter_chunks(snapshot, seen):
            unique += plain
            stored += packed
    return Usage(summary.record.id, logical, unique, stored, snapshots)


def _snapshot_ids(experiments: Experiments, repository: str, summary: ExperimentSummary) -> list[SnapshotId]:
    identifiers = [SnapshotId(summary.record.id)] if summary.record.paths else []
    identifiers += [
        SnapshotId(checkpoint.id)
        for checkpoint in experiments.checkpoints(repository, summary.record.id)
        if checkpoint.paths
    ]
    return identifiers
