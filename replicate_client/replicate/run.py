"""The write side: begins, resumes and ends experiments, and records checkpoints.

Checks everything that the user hands in before anything is sent, and sends it to the daemon, which has
captured the files when it answers. Called by `experiment` and `project`, which wrap a `Run` in what
users hold. Promise: once an experiment has begun, trouble with the daemon or the storage is told and
recorded in the result, and never raised into the training loop.
"""

from __future__ import annotations

import atexit
import dataclasses
import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, get_args

from replicate import connection, notices
from replicate._version import __version__
from replicate.config import ProjectConfig
from replicate.environment import collect, identify_process
from replicate.errors import (
    CaptureFailed,
    InvalidArgument,
    NotFound,
    PathMissing,
    ReplicateError,
    RepositoryMissing,
)
from replicate.home import find_home
from replicate.ids import CheckpointId, ExperimentId, is_id, new_id, short
from replicate.lazy import LazyModule
from replicate.phrases import format_size, plural
from replicate.project_paths import check_paths
from replicate.records import (
    MAX_STEP,
    CheckpointRecord,
    EndStatus,
    ExperimentRecord,
    ExperimentSummary,
    SnapshotState,
    Value,
    utc_now,
    validate_mapping,
    validate_primary_metric,
    validate_step,
    validate_tags,
    validate_text,
)

if TYPE_CHECKING:
    from replicate import wire
    from replicate._pb import daemon_pb2 as pb
else:
    wire = LazyModule("replicate.wire")
    pb = LazyModule("replicate._pb.daemon_pb2")

#: A process that exits is held up no longer than this.
_EXIT_PATIENCE_S = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Backlog:
    """What the daemon had still to store of an experiment when it was told of its end."""

    snapshots: int = 0
    size_bytes: int = 0
    failed: int = 0
    #: Why nothing is being stored at present; empty when nothing is held up.
    waiting_because: str = ""


class Run:
    """An experiment that this process records into.

    Any thread may use it, and so may a forked child, which never ends it.
    """

    def __init__(
        self,
        project: ProjectConfig,
        experiment_id: ExperimentId,
        *,
        next_step: int = 0,
        ignore: tuple[str, ...] = (),
        ends_with_process: bool = False,
        quiet: bool = False,
    ) -> None:
        self.project = project
        self.experiment_id = experiment_id
        self.quiet = quiet
        #: Where its daemon lives; asked for only when it is to be told of the end.
        self.home = find_home() if ends_with_process else None
        self.ended: EndStatus | None = None
        self.is_end_told = False
        self.backlog = Backlog()
        self.ended_at: datetime | None = None
        self._ignore = ignore
        self._next_step = next_step
        #: The process whose exit ends the run; None when that is another's affair.
        self.owner_pid = os.getpid() if ends_with_process else None
        if ends_with_process:
            _remember(self)

    def record_checkpoint(
        self, path: object, metrics: object, step: object, primary_metric: object, *, quiet: bool
    ) -> CheckpointRecord:
        """Record a checkpoint; returns when its files are captured.

        Raises `TypeError`, `ValueError` and `FileNotFoundError` for wrong arguments, and `RuntimeError`
        after the end. Any other trouble gives a record in state `failed` that says why.
        """
        if self.ended is not None and not _is_exiting:
            raise RuntimeError(f"experiment {short(self.experiment_id)} was stopped")
        paths = check_paths(path, self.project.directory)
        values = validate_mapping(metrics, "metrics")
        primary = validate_primary_metric(primary_metric, values)
        number, before = self._take_step(None if step is None else validate_step(step))
        record = CheckpointRecord(
            id=CheckpointId(new_id()),
            experiment_id=self.experiment_id,
            created=utc_now(),
            step=number,
            paths=paths,
            metrics=values,
            primary_metric=primary,
        )
        request = pb.CreateCheckpointRequest(
            repository=self.project.repository,
            checkpoint=wire.encode_checkpoint(record),
            capture=_encode_capture(self.project, paths, self._ignore),
        )
        try:
            reply = connection.call("CreateCheckpoint", request, pb.CaptureReply)
        except (PathMissing, InvalidArgument) as error:
            self._return_step(number, before)
            raise _for_users(error) from None
        except ReplicateError as error:
            notices.warn_once(f"a checkpoint was not saved: {error}")
            return dataclasses.replace(record, state="failed", error=error.message)
        _tell(reply, quiet or self.quiet)
        return dataclasses.replace(record, state=_decode_state(reply.state))

    def end(self, status: EndStatus, *, is_exiting: bool = False, timeout_s: float | None = None) -> None:
        """Tell the daemon that the run has ended; harmless when repeated, and in a forked child.

        Should the daemon not be told, that is said, and tried again when the process exits.
        """
        if self.is_end_told or self.owner_pid not in (None, os.getpid()):
            return
        if self.ended is None or self.ended_at is None:
            self.ended, self.ended_at = status, utc_now()
        request = pb.EndExperimentRequest(
            repository=self.project.repository,
            experiment_id=self.experiment_id,
            status=self.ended,
            ended_ns=wire.encode_time(self.ended_at),
            is_exiting=is_exiting,
        )
        try:
            reply = connection.call("EndExperiment", request, pb.EndExperimentReply, timeout_s=timeout_s)
        except ReplicateError as error:
            notices.warn_once(f"the end of experiment {short(self.experiment_id)} was not recorded: {error}")
            return
        self.is_end_told = True
        self.backlog = Backlog(reply.pending, reply.bytes_pending, reply.failed, reply.waiting_because)

    def end_if_owned(self) -> None:
        """End a run of this process, before its experiment is removed."""
        if self.owner_pid == os.getpid():
            self.end("stopped")

    def _take_step(self, chosen: int | None) -> tuple[int, int]:
        """The step of a new checkpoint, and what would have been the next one."""
        with _lock:
            before = self._next_step
            step = before if chosen is None else chosen
            if step > MAX_STEP:
                raise ValueError(f"the last step was the largest one possible: {MAX_STEP}")
            self._next_step = step + 1
        return step, before

    def _return_step(self, step: int, before: int) -> None:
        """Undo `_take_step`, unless another thread has gone on from there."""
        with _lock:
            if self._next_step == step + 1:
                self._next_step = before


def begin(
    project: ProjectConfig,
    *,
    path: object = None,
    params: object = None,
    name: object = None,
    tags: object = (),
    ignore: object = (),
    quiet: bool = False,
) -> tuple[Run, ExperimentSummary]:
    """Begin an experiment; returns when its files are captured.

    Raises `TypeError`, `ValueError` and `FileNotFoundError` for wrong arguments, `ReplicateError` for
    anything else; nothing is recorded then.
    """
    patterns = _check_patterns(ignore)
    summary = _create(project, path, params, name, tags, patterns, quiet, ExperimentId(new_id()))
    run = Run(project, summary.record.id, ignore=patterns, ends_with_process=True, quiet=quiet)
    return run, summary


def resume(
    project: ProjectConfig, reference: str, *, params: object = None, ignore: object = (), quiet: bool = False
) -> tuple[Run, ExperimentSummary]:
    """Go on with an experiment in this process; its steps continue after its last checkpoint.

    Files are not saved again. Raises `NotFound`, and `ValueError` when params are given that differ.
    """
    found = _find(project, reference)
    _check_same_params(found, params)
    request = pb.ResumeExperimentRequest(
        target=pb.Target(repository=project.repository, id=found.record.id),
        process=wire.encode_process(identify_process()),
        at_ns=wire.encode_time(utc_now()),
    )
    reply = connection.call("ResumeExperiment", request, pb.ExperimentSummary)
    summary = wire.decode_summary(reply)
    if not quiet:
        notices.say(f"experiment {short(found.record.id)} in {project.repository} goes on")
    return attach(project, summary, ignore=ignore, ends_with_process=True, quiet=quiet), summary


def join(
    project: ProjectConfig,
    reference: str,
    *,
    path: object = None,
    params: object = None,
    name: object = None,
    tags: object = (),
    ignore: object = (),
    quiet: bool = False,
) -> tuple[Run, ExperimentSummary]:
    """The experiment named by REPLICATE_EXPERIMENT_ID: begun, joined or resumed, whichever it takes.

    A complete id that does not exist is begun under that id. One that runs belongs to the process that
    began it: this one adds checkpoints and leaves its end alone. One that has ended is resumed.
    """
    try:
        summary = _find(project, reference)
    except (NotFound, RepositoryMissing):
        if not is_id(reference):
            raise
        patterns = _check_patterns(ignore)
        mine = _create(project, path, params, name, tags, patterns, quiet, ExperimentId(reference))
        # Another rank may have been faster: the record that was written first counts.
        summary = _find(project, reference)
        is_mine = summary.record.process == mine.record.process
        run = Run(project, mine.record.id, ignore=patterns, ends_with_process=is_mine, quiet=quiet)
        return run, summary
    if summary.status != "running":
        return resume(project, summary.record.id, params=params, ignore=ignore, quiet=quiet)
    _check_same_params(summary, params)
    return attach(project, summary, ignore=ignore, quiet=quiet), summary


def attach(
    project: ProjectConfig,
    summary: ExperimentSummary,
    *,
    ignore: object = (),
    ends_with_process: bool = False,
    quiet: bool = False,
) -> Run:
    """A run that adds to an experiment which exists."""
    return Run(
        project,
        summary.record.id,
        next_step=summary.latest.step + 1 if summary.latest else 0,
        ignore=_check_patterns(ignore),
        ends_with_process=ends_with_process,
        quiet=quiet,
    )


def _check_patterns(ignore: object) -> tuple[str, ...]:
    if isinstance(ignore, str):
        return (validate_text(ignore, "ignore"),)
    if not isinstance(ignore, Sequence):
        raise TypeError(f"ignore must be a list of patterns, not {ignore!r}")
    return tuple(validate_text(pattern, f"ignore[{number}]") for number, pattern in enumerate(ignore))


def _check_same_params(summary: ExperimentSummary, params: object) -> None:
    if params is None:
        return
    given, recorded = validate_mapping(params, "params"), dict(summary.record.params)
    names = [name for name in (*recorded, *given) if _written(recorded, name) != _written(given, name)]
    if names:
        raise ValueError(
            f"params differ from those of experiment {short(summary.record.id)}: "
            + ", ".join(dict.fromkeys(names))
        )


def _written(values: dict[str, Value], name: str) -> str:
    """A value as text, so that NaN equals NaN and 1 does not equal True; empty when it is absent."""
    return json.dumps(values[name], sort_keys=True) if name in values else ""


def _create(
    project: ProjectConfig,
    path: object,
    params: object,
    name: object,
    tags: object,
    ignore: tuple[str, ...],
    quiet: bool,
    experiment_id: ExperimentId,
) -> ExperimentSummary:
    paths = check_paths(path, project.directory)
    values = validate_mapping(params, "params")
    checked_name = "" if name is None else validate_text(name, "name")
    checked_tags = validate_tags(tags)
    created = utc_now()
    environment = collect(project.directory)
    record = ExperimentRecord(
        id=experiment_id,
        created=created,
        name=checked_name,
        tags=checked_tags,
        user=environment.user,
        host=environment.host,
        command=environment.command,
        paths=paths,
        params=values,
        python_version=environment.python_version,
        python_packages=environment.python_packages,
        system=environment.system,
        git=environment.git,
        replicate_version=__version__,
        process=environment.process,
    )
    request = pb.CreateExperimentRequest(
        repository=project.repository,
        experiment=wire.encode_experiment(record),
        capture=_encode_capture(project, paths, ignore),
    )
    try:
        reply = connection.call("CreateExperiment", request, pb.CaptureReply)
    except (PathMissing, InvalidArgument, CaptureFailed) as error:
        raise _for_users(error) from None
    if not quiet:
        label = f"experiment {short(record.id)}" + (f" ({record.name})" if record.name else "")
        files = f"{plural(reply.file_count, 'file')}, {format_size(reply.size_bytes)}"
        notices.say(f"{label} in {project.repository}" + (f": {files}" if paths else ""))
    _tell(reply, quiet)
    return ExperimentSummary(record, status="running", state=_decode_state(reply.state))


def _find(project: ProjectConfig, reference: str) -> ExperimentSummary:
    target = pb.Target(repository=project.repository, id=reference)
    return wire.decode_summary(connection.call("Resolve", target, pb.Resolution).summary)


def _encode_capture(project: ProjectConfig, paths: Sequence[str], ignore: Sequence[str]) -> pb.Capture:
    return pb.Capture(
        project_directory=wire.encode_path(os.path.normpath(project.directory)),
        paths=[wire.encode_path(path) for path in paths],
        ignore=[wire.encode_path(pattern) for pattern in (*project.ignore, *ignore)],
        mode=project.capture,
    )


def _decode_state(state: str) -> SnapshotState:
    return wire.decode_word(state, get_args(SnapshotState), "state")


def _tell(reply: pb.CaptureReply, quiet: bool) -> None:
    if not quiet:
        for warning in reply.warnings:
            notices.warn_once(warning)
    if reply.waiting_because:  # trouble, which is told to those who want it quiet too
        notices.warn_once(f"what is captured waits to be stored: {reply.waiting_because}")


def _for_users(error: ReplicateError) -> Exception:
    """The daemon's error as the exception that Python has for it."""
    if isinstance(error, PathMissing):
        return FileNotFoundError(errno.ENOENT, error.message)
    if isinstance(error, CaptureFailed) and error.fields.get("errno") in ("EACCES", "EPERM"):
        number = errno.EACCES if error.fields["errno"] == "EACCES" else errno.EPERM
        return PermissionError(number, error.message, error.fields.get("path"))
    return error


# What ends with the process. A forked child has the list of its parent, and other runs of its own.

#: Re-entrant, because a signal handler may record a checkpoint at any moment.
_lock = threading.RLock()
_runs: list[Run] = []
_is_exiting = False
#: An exception went through all of the main thread's code.
_is_failing = False


def own_experiments() -> frozenset[ExperimentId]:
    """The experiments that this process, or the one that it was forked from, began or resumed."""
    return frozenset(run.experiment_id for run in _runs)


def _remember(run: Run) -> None:
    if not _runs:
        atexit.register(_end_all)
        sys.excepthook = _noting_failure(sys.excepthook)
    _runs.append(run)
    if _is_exiting or _is_python_ending():
        # What is registered now is not called any more.
        _end_all()


def _is_python_ending() -> bool:
    """Whether the functions registered with `atexit` are being called: the main thread counts as over."""
    main = threading.main_thread()
    return main.ident == threading.get_ident() and not main.is_alive()


def _noting_failure(
    hook: Callable[[type[BaseException], BaseException, TracebackType | None], object],
) -> Callable[[type[BaseException], BaseException, TracebackType | None], object]:
    def note(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        global _is_failing
        # At an interactive prompt, life goes on after an exception.
        _is_failing = not hasattr(sys, "ps1")
        hook(kind, value, traceback)

    return note


def _end_all() -> None:
    """End what this process began, and say what is left to be stored; takes two seconds at most."""
    global _is_exiting
    _is_exiting = True
    deadline = time.monotonic() + _EXIT_PATIENCE_S
    home = find_home()
    mine = [run for run in _runs if run.owner_pid == os.getpid() and run.home == home]
    if not home.run.is_dir():
        return  # the state was deleted, and the experiments with it
    left = []
    for run in mine:
        if not run.is_end_told:
            timeout_s = max(0.0, deadline - time.monotonic())
            run.end("failed" if _is_failing else "stopped", is_exiting=True, timeout_s=timeout_s)
            left.append(run.backlog)
        elif run.backlog.snapshots:
            left.append(_ask_backlog(run, deadline))
    _tell_backlog(left, quiet=all(run.quiet for run in mine))


def _ask_backlog(run: Run, deadline: float) -> Backlog:
    """What is left of a run that was stopped earlier. (The daemon's count has more than files in it.)"""
    request = pb.WaitStoredRequest(ids=[run.experiment_id], timeout_s=0)
    try:
        reply = connection.call(
            "WaitStored", request, pb.StatusReply, timeout_s=max(0.0, deadline - time.monotonic())
        )
    except ReplicateError:
        return Backlog()
    waiting = reply.pending + reply.active if reply.bytes_pending else 0
    snapshots = min(run.backlog.snapshots, waiting)
    return Backlog(snapshots, reply.bytes_pending, reply.failed, reply.waiting_because)


def _tell_backlog(left: Sequence[Backlog], *, quiet: bool) -> None:
    snapshots = sum(backlog.snapshots for backlog in left)
    failed = sum(backlog.failed for backlog in left)
    reasons = "; ".join(dict.fromkeys(one.waiting_because for one in left if one.waiting_because))
    if snapshots and (reasons or not quiet):
        size = format_size(sum(backlog.size_bytes for backlog in left))
        waits = f", which waits at present: {reasons}" if reasons else ""
        notices.say(
            f"still storing {plural(snapshots, 'snapshot')} ({size}) in the background{waits}; "
            "`replicate status` shows progress"
        )
    if failed:
        notices.say(f"{plural(failed, 'snapshot')} could not be stored; `replicate status` says why")


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)
