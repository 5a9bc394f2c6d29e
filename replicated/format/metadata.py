"""Experiments, checkpoints, edits and snapshots as the JSON objects of a repository, and back."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from replicate.ids import ExperimentId, SnapshotId
from replicate.records import EndStatus, ProcessIdentity
from replicated.format.manifest import RootNode


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of one experiment or checkpoint, complete in the repository."""

    id: SnapshotId
    root: RootNode


@dataclass(frozen=True, slots=True)
class EndEdit:
    """The end of a run, as its process said or as the daemon saw."""

    status: EndStatus
    ended: datetime


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life of a running experiment."""

    experiment_id: ExperimentId
    time: datetime
    host: str
    process: ProcessIdentity | None = None
