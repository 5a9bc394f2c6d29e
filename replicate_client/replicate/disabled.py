"""The experiment that `init` gives when REPLICATE_DISABLED is set: everything is accepted, nothing recorded.

It asks no daemon, reads no file and checks no argument, so that a script can be debugged as if it did not
use replicate. What was not recorded cannot be read: that is an error which says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from replicate.config import DEFAULT_REPOSITORY, ProjectConfig
from replicate.errors import NotStored
from replicate.experiment import Checkpoint, Experiment
from replicate.ids import CheckpointId, ExperimentId, new_id
from replicate.records import (
    MAX_STEP,
    CheckpointRecord,
    EndStatus,
    ExperimentRecord,
    ExperimentSummary,
    PrimaryMetric,
    utc_now,
    validate_primary_metric,
)
from replicate.run import Run
from replicate.snapshot import Snapshot

_VARIABLE = "REPLICATE_DISABLED"


def is_disabled() -> bool:
    """Whether the user wants nothing to be recorded."""
    return os.environ.get(_VARIABLE, "") not in ("", "0")


def disabled_experiment(params: object, name: object, tags: object) -> Experiment:
    """An experiment that exists in this object only."""
    record = ExperimentRecord(
        id=ExperimentId(new_id()),
        created=utc_now(),
        name=name if isinstance(name, str) else "",
        tags=tuple(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, (list, tuple)) else (),
        params=dict(params) if isinstance(params, Mapping) else {},
    )
    return _DisabledExperiment(record)


def nothing_recorded() -> NotStored:
    """The error for asking after what would have been recorded."""
    return NotStored(
        f"nothing was recorded, because {_VARIABLE} is set", hint=f"unset {_VARIABLE} to record and to read"
    )


class _NothingSaved(Snapshot):
    """Reading what was never saved: there is nothing to list, open, check out or mount."""

    _is_recorded = False

    def _reference(self) -> str:
        raise nothing_recorded()


class _DisabledRun(Run):
    def __init__(self, experiment_id: ExperimentId) -> None:
        project = ProjectConfig(Path(), DEFAULT_REPOSITORY, repository_origin="default")
        super().__init__(project, experiment_id)

    def record_checkpoint(
        self,
        path: object,
        metrics: object,
        step: object,
        primary_metric: object,
        *,
        quiet: bool,
        rank: object = None,
        world_size: object = None,
    ) -> CheckpointRecord:
        number, _ = self._take_step(step if isinstance(step, int) and 0 <= step < MAX_STEP else None)
        return CheckpointRecord(
            id=CheckpointId(new_id()),
            experiment_id=self.experiment_id,
            created=utc_now(),
            step=number,
            metrics=dict(metrics) if isinstance(metrics, Mapping) else {},
            primary_metric=_primary_metric(primary_metric),
            state="stored",
        )

    def end(self, status: EndStatus, *, is_exiting: bool = False, timeout_s: float | None = None) -> None:
        self.ended = self.ended or status


def _primary_metric(given: object) -> PrimaryMetric | None:
    try:
        return validate_primary_metric(given, {given[0]: None})  # type: ignore[index]
    except (TypeError, ValueError, LookupError):
        return None


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
