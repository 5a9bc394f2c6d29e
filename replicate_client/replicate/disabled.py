"""The experiment that `init` gives when REPLICATE_DISABLED is set: everything is accepted, nothing recorded.

It asks no daemon, reads no file and checks no argument, so that a script can be debugged as if it did not
use replicate.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from replicate.config import DEFAULT_REPOSITORY, ProjectConfig
from replicate.errors import NotStored
from replicate.experiment import Checkpoint, Experiment
from replicate.ids import CheckpointId, ExperimentId, new_id
from replicate.records import (
    CheckpointRecord,
    EndStatus,
    ExperimentRecord,
    ExperimentSummary,
    FileEntry,
    PrimaryMetric,
    utc_now,
)
from replicate.run import Run

_VARIABLE = "REPLICATE_DISABLED"


def is_disabled() -> bool:
    """Whether the user wants nothing to be recorded."""
    return os.environ.get(_VARIABLE, "") not in ("", "0")


def disabled_experiment(params: object, name: object, tags: Any) -> Experiment:
    """An experiment that exists in this object only."""
    record = ExperimentRecord(
        id=ExperimentId(new_id()),
        created=utc_now(),
        name=str(name or ""),
        tags=tuple(tags or ()),
        params=dict(params) if isinstance(params, dict) else {},
    )
    return _DisabledExperiment(record)


class _NothingSaved:
    """Reading what was never saved: there are no files, and nothing to open or mount."""

    def _reference(self) -> str:
        raise NotStored(f"nothing was recorded: {_VARIABLE} is set")

    def files(self) -> list[FileEntry]:
        return []

    def checkout(
        self, directory: object, quiet: bool = False, *, path: str = "", force: bool = False
    ) -> None:
        pass


class _DisabledRun(Run):
    def __init__(self, experiment_id: ExperimentId) -> None:
        project = ProjectConfig(Path(), DEFAULT_REPOSITORY, repository_origin="default")
        super().__init__(project, experiment_id)

    def record_checkpoint(
        self, path: object, metrics: object, step: object, primary_metric: Any, *, quiet: bool
    ) -> CheckpointRecord:
        number, _ = self._take_step(step if isinstance(step, int) else None)
        return CheckpointRecord(
            id=CheckpointId(new_id()),
            experiment_id=self.experiment_id,
            created=utc_now(),
            step=number,
            metrics=dict(metrics) if isinstance(metrics, dict) else {},
            primary_metric=PrimaryMetric(*primary_metric) if primary_metric else None,
            state="stored",
        )

    def end(self, status: EndStatus, *, is_exiting: bool = False, timeout_s: float | None = None) -> None:
        self.ended = self.ended or status


class _DisabledCheckpoint(_NothingSaved, Checkpoint):
    pass


class _DisabledExperiment(_NothingSaved, Experiment):
    _checkpoint_type = _DisabledCheckpoint

    def __init__(self, record: ExperimentRecord) -> None:
        summary = ExperimentSummary(record, status="running", state="stored")
        super().__init__(DEFAULT_REPOSITORY, summary, _DisabledRun(record.id))
        self._read = []

    def refresh(self) -> None:
        pass

    def delete(self) -> None:
        pass

    def is_running(self) -> bool:
        return self.status == "running"
