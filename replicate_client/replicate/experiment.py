"""Experiments and checkpoints as users hold them, and lists of them.

Thin objects over records: reading goes to the daemon through `query`, recording through a `Run`. They show
what was read last (`refresh` reads again), own checkpoints at once. They hold no lock, so that a child that
is forked at any moment can use them; any thread may.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, SupportsIndex, TypeVar, overload

from replicate import query
from replicate.errors import NotStored, ReplicateError
from replicate.ids import CheckpointId, ExperimentId, short
from replicate.missed import was_recorded_later
from replicate.phrases import plural
from replicate.records import (
    CheckpointRecord,
    ExperimentSummary,
    GitState,
    PrimaryMetric,
    SnapshotState,
    Status,
    System,
    Value,
    best_checkpoint,
    checkpoint_label,
    latest_checkpoint,
    paths_argument,
    utc_now,
)
from replicate.run import LeftToRankZero, Run
from replicate.snapshot import Snapshot

_Item = TypeVar("_Item")
_Items = TypeVar("_Items", bound="_TypedList[Any]")


class Checkpoint(Snapshot):
    """A moment of an experiment: metrics, and the files as they were then."""

    def __init__(self, repository: str, record: CheckpointRecord) -> None:
        self._repository = repository
        self._shown = record

    @property
    def _record(self) -> CheckpointRecord:
        if self._shown.state == "failed" and was_recorded_later(self._shown.id):
            self._shown = dataclasses.replace(self._shown, state="captured", error="")
        return self._shown

    @_record.setter
    def _record(self, record: CheckpointRecord) -> None:
        self._shown = record

    @property
    def id(self) -> CheckpointId:
        """64 hexadecimal characters."""
        return self._record.id

    @property
    def short_id(self) -> str:
        """The first 7 characters of the id."""
        return short(self._record.id)

    @property
    def experiment_id(self) -> ExperimentId:
        """Id of the experiment that it belongs to."""
        return self._record.experiment_id

    @property
    def created(self) -> datetime:
        """When `checkpoint` was called, in UTC."""
        return self._record.created

    @property
    def path(self) -> None | str | list[str]:
        """What was saved, relative to the project directory: None, one path, or a list."""
        return paths_argument(self._record.paths)

    @property
    def step(self) -> int:
        """Where in the training it was made."""
        return self._record.step

    @property
    def metrics(self) -> dict[str, Value]:
        """The values that were recorded."""
        return dict(self._record.metrics)

    @property
    def primary_metric(self) -> PrimaryMetric | None:
        """Name and goal of the metric by which checkpoints are ranked."""
        return self._record.primary_metric

    @property
    def state(self) -> SnapshotState:
        """`captured`: safe with the daemon; `stored`: in the repository; `failed`: see `error`."""
        if self._record.state == "captured":
            try:
                found = query.resolve(self._repository, self.id).checkpoint
            except ReplicateError:
                pass  # the daemon cannot be asked now: as far as we know
            else:
                if found is not None and found.id == self.id:
                    self._record = found
        return self._record.state

    @property
    def error(self) -> str:
        """Why it failed; empty otherwise."""
        return self._record.error

    def wait(self, timeout: float | None = None) -> Checkpoint:
        """Wait until it is stored; returns itself.

        Raises `TimeoutError` after `timeout` seconds and `NotStored` when it never will be.
        """
        if self._record.state == "captured":
            status = query.wait_stored([self.id], timeout)
            reason = next((failure.error for failure in status.failures if failure.id == self.id), None)
            self._record = dataclasses.replace(
                self._record, state="stored" if reason is None else "failed", error=reason or ""
            )
        self._refuse_failed()
        return self

    def _reference(self) -> str:
        self._refuse_failed()
        return self._record.id

    def _refuse_failed(self) -> None:
        if self._record.state == "failed":
            raise NotStored(
                f"checkpoint {checkpoint_label(self._record)} was not stored: {self._record.error}",
                fields={"id": self.id, "state": "failed"},
            )

    def __repr__(self) -> str:
        metrics = "".join(
            f" {name}={value:.4g}" if isinstance(value, float) else f" {name}={value!r}"
            for name, value in self._record.metrics.items()
            if value is None or isinstance(value, (bool, int, float, str))
        )
        state = "" if self._record.state == "stored" else f" {self._record.state}"
        return f"<Checkpoint {self.short_id} step {self.step}{metrics}{state}>"


class _TypedList(list[_Item]):
    """A list whose slices are of its own type."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> _Item: ...

    @overload
    def __getitem__(self: _Items, index: slice) -> _Items: ...

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return type(self)(found) if isinstance(index, slice) else found


class CheckpointList(_TypedList[Checkpoint]):
    """Checkpoints in the order in which they were made."""

    @property
    def metrics(self) -> Mapping[str, list[Value]]:
        """Metric → its value in each checkpoint, None where it was not recorded."""
        return _Columns([checkpoint.metrics for checkpoint in self])

    @property
    def step(self) -> list[int]:
        """The step of each checkpoint."""
        return [checkpoint.step for checkpoint in self]

    def primary_metric(self) -> str:
        """Name of the primary metric; raises `ValueError` when there is none or more than one."""
        return _single_primary_metric(self)

    def delete(self) -> None:
        """Delete these checkpoints from the repository."""
        _remove((one._repository, one.id) for one in self if one._is_recorded)


class Experiment(Snapshot):
    """A training run: what `init` recorded, and its checkpoints."""

    _checkpoint_type = Checkpoint

    def __init__(self, repository: str, summary: ExperimentSummary, run: Run) -> None:
        self._repository = repository
        self._run = run
        self._show(summary)
        #: As read from the daemon; None: not read yet.
        self._read: list[Checkpoint] | None = None
        #: Made through this object since then, and those that the daemon does not know.
        self._made: list[Checkpoint] = []

    @property
    def id(self) -> ExperimentId:
        """64 hexadecimal characters."""
        return self._summary.record.id

    @property
    def short_id(self) -> str:
        """The first 7 characters of the id."""
        return short(self.id)

    @property
    def name(self) -> str:
        """Empty when it was not given one."""
        return self._summary.record.name

    @property
    def tags(self) -> tuple[str, ...]:
        """Words to find it by."""
        return self._summary.record.tags

    @property
    def created(self) -> datetime:
        """When `init` was called, in UTC."""
        return self._summary.record.created

    @property
    def user(self) -> str:
        """Who ran it."""
        return self._summary.record.user

    @property
    def host(self) -> str:
        """Name of the machine that it ran on."""
        return self._summary.record.host

    @property
    def command(self) -> str:
        """The command line, as a shell takes it."""
        return self._summary.record.command

    @property
    def path(self) -> None | str | list[str]:
        """What `init` saved, relative to the project directory: None, one path, or a list."""
        return paths_argument(self._summary.record.paths)

    @property
    def params(self) -> dict[str, Value]:
        """The parameters that were recorded."""
        return dict(self._summary.record.params)

    @property
    def python_version(self) -> str:
        """For example `3.11.7`."""
        return self._summary.record.python_version

    @property
    def python_packages(self) -> dict[str, str]:
        """Name → version of the distributions whose modules were imported when it began."""
        return dict(self._summary.record.python_packages)

    @property
    def system(self) -> System:
        """The machine: os, cpu, cpu_count, memory (in bytes), gpus, driver."""
        return self._summary.record.system

    @property
    def git(self) -> GitState | None:
        """The Git work tree: commit, branch, dirty, diff; None when there was none."""
        return self._summary.record.git

    @property
    def status(self) -> Status:
        """`running`, `stopped`, `failed`, `killed` or `unknown`, as far as was read."""
        # What another rank than 0 ends is its own part only.
        ended = None if self._run.member_id else self._run.ended
        return ended or self._summary.status

    @property
    def duration(self) -> float | None:
        """Seconds from its begin to its end, or until now while it runs; None when not known."""
        if self._run.ended_at is not None:
            return (self._run.ended_at - self.created).total_seconds()
        if self._summary.status == "running":
            return (utc_now() - self.created).total_seconds()
        return self._summary.duration_s

    @property
    def stall_seconds(self) -> float:
        """How long calls of this library held up the training: those of this process, and what was read."""
        return self._stalled_elsewhere_s + self._run.stall.seconds

    @property
    def checkpoints(self) -> CheckpointList:
        """Its checkpoints, oldest first; read from the daemon the first time."""
        if self._read is None:
            self._read = self._read_checkpoints()
        merged = {checkpoint.id: checkpoint for checkpoint in (*self._made, *self._read)}
        return CheckpointList(sorted(merged.values(), key=lambda checkpoint: checkpoint.created))

    def checkpoint(
        self,
        path: object = None,
        metrics: Mapping[str, Any] | None = None,
        step: int | None = None,
        primary_metric: tuple[str, str] | None = None,
        quiet: bool = False,
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> Checkpoint:
        """Record metrics and freeze files; returns when the files are captured.

        `path` is a file or directory (or a list of them) relative to the project directory; `step`
        counts on from the last one when it is left out; `primary_metric` is `("loss", "minimize")` or
        `("accuracy", "maximize")`. Raises `TypeError`, `ValueError` and `FileNotFoundError` for wrong
        arguments. Trouble with the daemon or the storage does not raise: the state of the checkpoint
        is then `failed`, and a line says so once.

        In a distributed job the files of all ranks are one checkpoint, with the metrics that rank 0 gives. It
        is stored when all of them are; another rank that gives no files records nothing. `rank` and
        `world_size` say what is not found by itself, `world_size=1` that the call stands alone.
        """
        record = self._run.record_checkpoint(
            path, metrics, step, primary_metric, quiet=quiet, rank=rank, world_size=world_size
        )
        checkpoint = self._checkpoint_type(self._repository, record)
        if isinstance(record, LeftToRankZero):
            checkpoint._is_recorded = False
        else:
            self._made.append(checkpoint)
        return checkpoint

    def stop(self) -> None:
        """End it: no more checkpoints. Harmless when repeated; happens by itself when Python exits."""
        self._run.end("stopped")

    def refresh(self) -> None:
        """Read it and its checkpoints again."""
        self._show(query.resolve(self._repository, self.id).summary)
        self._read = self._read_checkpoints()

    def delete(self) -> None:
        """Delete it and its checkpoints; one that this process runs is stopped first."""
        ExperimentList([self]).delete()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint."""
        return self._object_of(latest_checkpoint(self._records()))

    def best(self) -> Checkpoint | None:
        """The checkpoint with the best primary metric; None when none can be ranked."""
        return self._object_of(best_checkpoint(self._records()))

    def primary_metric(self) -> str:
        """Name of the primary metric; raises `ValueError` when there is none or more than one."""
        return self.checkpoints.primary_metric()

    def is_running(self) -> bool:
        """Whether it runs now; asks the daemon."""
        self._show(query.resolve(self._repository, self.id).summary)
        return self.status == "running"

    def _reference(self) -> str:
        chosen = query.resolve(self._repository, self.id).checkpoint
        return chosen.id if chosen is not None else f"{self.id}:code"

    def _show(self, summary: ExperimentSummary) -> None:
        self._summary = summary
        # The daemon counts what this process has told it, which is not to be counted twice.
        self._stalled_elsewhere_s = max(0.0, (summary.stall_s or 0.0) - self._run.stall.told_seconds)

    def _read_checkpoints(self) -> list[Checkpoint]:
        made = list(self._made)
        known = {checkpoint.id: checkpoint for checkpoint in (*made, *(self._read or ()))}
        checkpoints = []
        for record in query.list_checkpoints(self._repository, self.id):
            checkpoint = known.get(record.id) or Checkpoint(self._repository, record)
            checkpoint._record = record
            checkpoints.append(checkpoint)
        for checkpoint in made:
            if checkpoint._record.state != "failed":
                with contextlib.suppress(ValueError):  # another thread was faster
                    self._made.remove(checkpoint)
        return checkpoints

    def _records(self) -> list[CheckpointRecord]:
        return [checkpoint._record for checkpoint in self.checkpoints]

    def _object_of(self, record: CheckpointRecord | None) -> Checkpoint | None:
        return next((one for one in self.checkpoints if record is not None and one.id == record.id), None)

    def __enter__(self) -> Experiment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        left_well = error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
        self._run.end("stopped" if left_well else "failed")

    def __repr__(self) -> str:
        count = len(self._made) if self._read is None else len(self.checkpoints)
        name = f" {self.name!r}" if self.name else ""
        checkpoints = plural(max(count, self._summary.checkpoint_count), "checkpoint")
        return f"<Experiment {self.short_id}{name} {self.status}, {checkpoints}>"


class ExperimentList(_TypedList[Experiment]):
    """Experiments, oldest first unless they were sorted otherwise."""

    def primary_metric(self) -> str:
        """Name of the primary metric; raises `ValueError` when there is none or more than one."""
        return _single_primary_metric(checkpoint for one in self for checkpoint in one.checkpoints)

    def delete(self) -> None:
        """Delete these experiments and their checkpoints; those of this process are stopped first."""
        for experiment in self:
            experiment._run.end_if_owned()
        _remove((one._repository, one.id) for one in self if one._is_recorded)


class _Columns(Mapping[str, "list[Value]"]):
    """Rows of metrics as columns; a metric that no row has is a `KeyError`."""

    def __init__(self, rows: list[dict[str, Value]]) -> None:
        self._rows = rows

    def __getitem__(self, name: str) -> list[Value]:
        if not any(name in row for row in self._rows):
            raise KeyError(name)
        return [row.get(name) for row in self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for row in self._rows for name in row))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def _single_primary_metric(checkpoints: Iterable[Checkpoint]) -> str:
    names = {one.primary_metric.name for one in checkpoints if one.primary_metric is not None}
    if len(names) != 1:
        raise ValueError(
            f"more than one primary metric: {', '.join(sorted(names))}"
            if names
            else "no checkpoint has a primary metric"
        )
    return names.pop()


def _remove(items: Iterable[tuple[str, str]]) -> None:
    by_repository = defaultdict(list)
    for repository, identifier in items:
        by_repository[repository].append(identifier)
    for repository, identifiers in by_repository.items():
        query.remove(repository, identifiers)
