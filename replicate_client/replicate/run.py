"""The write side: an experiment that this process records into.

Checks everything that the user hands in before anything is sent, and sends it to the daemon, which has
captured the files when it answers. Made by `beginning`, ended by users or by `ending`. Promise: trouble with
the daemon or the storage is told and recorded in the result, and never raised into the training loop; it
holds the training up for half a minute once, and what could not be told is told later (`missed`).
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING

from replicate import notices, ranks
from replicate.capturing import decode_state, encode_capture, error_for_users, tell_reply
from replicate.config import ProjectConfig
from replicate.delivery import deliver
from replicate.errors import CaptureFailed, InvalidArgument, PathMissing, QueueFull, ReplicateError
from replicate.home import find_home
from replicate.ids import CheckpointId, ExperimentId, new_id, short
from replicate.lazy import LazyModule
from replicate.missed import MissedCheckpoints, is_passing
from replicate.project_paths import check_paths
from replicate.records import (
    MAX_STEP,
    CheckpointRecord,
    EndStatus,
    Part,
    utc_now,
    validate_mapping,
    validate_primary_metric,
    validate_step,
)
from replicate.stall import StallClock

if TYPE_CHECKING:
    from replicate import wire
    from replicate._pb import daemon_pb2 as pb
else:
    wire = LazyModule("replicate.wire")
    pb = LazyModule("replicate._pb.daemon_pb2")


@dataclasses.dataclass(frozen=True, slots=True)
class Backlog:
    """What the daemon had still to store of an experiment when it was told of its end."""

    snapshots: int = 0
    size_bytes: int = 0
    failed: int = 0
    #: Why nothing is being stored at present; empty when nothing is held up.
    waiting_because: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class LeftToRankZero(CheckpointRecord):
    """What another rank than 0 is given for a checkpoint to which it adds no files: nothing was recorded."""


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
        member_id: str = "",
        recorded_before: Counter[int | None] | None = None,
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
        #: What calls cost the training, and the checkpoints that could not be told to the daemon.
        self.stall = StallClock()
        self.missed = MissedCheckpoints()
        #: By which the daemon knows what this process, another rank than 0, adds to the experiment.
        self.member_id = member_id
        self._attempt: str | None = None
        #: How many checkpoints were made together with other ranks, by the step that was given.
        self._shared_checkpoints: Counter[int | None] = Counter()
        #: How many there were before, by step and in all (None), in earlier starts of the same job.
        self._recorded_before: Counter[int | None] = recorded_before or Counter()
        self._is_exiting = False
        self._ignore = ignore
        self._next_step = next_step
        #: The process whose exit ends the run; None when that is another's affair.
        self.owner_pid = os.getpid() if ends_with_process else None

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
        """Record a checkpoint, or this rank's part of it; returns when its files are captured.

        Raises `TypeError`, `ValueError` and `FileNotFoundError` for wrong arguments, and `RuntimeError`
        after the end. Any other trouble gives a record in state `failed` that says why.
        """
        with self.stall.running():
            place = ranks.check_place(rank, world_size)
            is_detected = rank is None and world_size is None
            return self._record_checkpoint(
                path, metrics, step, primary_metric, quiet or self.quiet, place, is_detected
            )

    def _record_checkpoint(
        self,
        path: object,
        metrics: object,
        step: object,
        primary_metric: object,
        quiet: bool,
        place: ranks.Place | None,
        is_detected: bool,
    ) -> CheckpointRecord:
        if self.ended is not None and not self._is_exiting:
            raise RuntimeError(f"experiment {short(self.experiment_id)} was stopped")
        paths = check_paths(path, self.project.directory)
        values = validate_mapping(metrics, "metrics")
        primary = validate_primary_metric(primary_metric, values)
        chosen = None if step is None else validate_step(step)
        capture = encode_capture(self.project, paths, self._ignore)
        is_first = place is None or place.rank == 0
        if values and not is_first and not quiet:
            notices.warn_once(
                "the metrics of a checkpoint are those that rank 0 gives; others are not recorded"
            )
        part, identifier = None, CheckpointId(new_id())
        if place is not None and (paths or not is_detected):
            part, identifier = self._take_part(place, chosen, is_detected=is_detected)
        number, before = self._take_step(chosen)
        record = CheckpointRecord(
            id=identifier,
            experiment_id=self.experiment_id,
            created=utc_now(),
            step=number,
            paths=paths,
            metrics=values if is_first else {},
            primary_metric=primary if is_first else None,
            world_size=place.world_size if place is not None and part is not None else 1,
            part=part,
        )
        if part is None and not is_first:
            return _left_to_rank_zero(record)
        request = pb.CreateCheckpointRequest(
            repository=self.project.repository,
            checkpoint=wire.encode_checkpoint(record),
            capture=capture,
            # Of other ranks nobody would tell it on.
            stall_ns=self.stall.take_untold() if is_first else 0,
        )
        try:
            self.missed.tell(quiet=quiet)
            reply = deliver("CreateCheckpoint", request, pb.CaptureReply)
        except (PathMissing, InvalidArgument) as error:
            self._return_step(number, before)
            self.stall.give_back(request.stall_ns)
            raise error_for_users(error) from None
        except ReplicateError as error:
            if isinstance(error, QueueFull):
                self.missed.add_without_room(request, error)
            elif is_passing(error):
                self.missed.add(request, error)
            else:
                if not isinstance(error, CaptureFailed):  # which is recorded
                    self.stall.give_back(request.stall_ns)
                notices.warn_once(f"a checkpoint was not saved: {error}")
            return dataclasses.replace(record, state="failed", error=error.message)
        tell_reply(reply, "checkpoint", quiet=quiet)
        state = decode_state(reply.state)
        return record if state == record.state else dataclasses.replace(record, state=state)

    def end(self, status: EndStatus, *, is_exiting: bool = False, timeout_s: float | None = None) -> None:
        """Tell the daemon that the run has ended; harmless when repeated, and in a forked child.

        Should the daemon not be told, that is said, and tried again when the process exits.
        """
        self._is_exiting = is_exiting
        if self.is_end_told or self.owner_pid not in (None, os.getpid()):
            return
        if self.ended is None or self.ended_at is None:
            self.ended, self.ended_at = status, utc_now()
        with self.stall.running():
            self._tell_end(is_exiting, None if timeout_s is None else time.monotonic() + timeout_s)

    def _tell_end(self, is_exiting: bool, deadline: float | None) -> None:
        assert self.ended is not None and self.ended_at is not None
        stall_ns = 0
        reply_type = pb.EndExperimentReply
        try:
            self.missed.tell("last", deadline=deadline, quiet=self.quiet)
            stall_ns = 0 if self.member_id else self.stall.take_untold()
            request = pb.EndExperimentRequest(
                repository=self.project.repository,
                experiment_id=self.member_id or self.experiment_id,
                status=self.ended,
                ended_ns=wire.encode_time(self.ended_at),
                is_exiting=is_exiting,
                stall_ns=stall_ns,
            )
            timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            reply = deliver("EndExperiment", request, reply_type, urgency="last", timeout_s=timeout_s)
        except ReplicateError as error:
            self.stall.give_back(stall_ns)
            notices.warn_once(f"the end of experiment {short(self.experiment_id)} was not recorded: {error}")
            return
        self.is_end_told = True
        # The daemon counts those that it was given files of.
        failed = reply.failed + self.missed.without_files
        self.backlog = Backlog(reply.pending, reply.bytes_pending, failed, reply.waiting_because)

    def end_if_owned(self) -> None:
        """End a run of this process, before its experiment is removed."""
        if self.owner_pid == os.getpid():
            self.end("stopped")

    def _take_part(
        self, place: ranks.Place, step: int | None, *, is_detected: bool
    ) -> tuple[Part, CheckpointId]:
        """This rank's part of the next checkpoint that is given this step, and the id that all ranks find."""
        patience_s = ranks.patience_s()
        if self._attempt is None:
            self._attempt = ranks.agree_on_attempt(place, self.experiment_id)
        with _lock:
            number = self._shared_checkpoints[step]
            self._shared_checkpoints[step] += 1
        if not self._attempt:
            # Nothing else tells the checkpoints of this start from those of earlier ones.
            number += self._recorded_before[step]
        part = Part(
            place.rank,
            place.world_size,
            is_detected=is_detected,
            is_expected=bool(ranks.given_experiment()),
            attempt=ranks.attempt_of(),
            patience_s=patience_s,
        )
        return part, ranks.shared_checkpoint(self.experiment_id, self._attempt, step, number)

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


def _left_to_rank_zero(record: CheckpointRecord) -> CheckpointRecord:
    return LeftToRankZero(record.id, record.experiment_id, record.created, record.step, state="stored")


#: For the steps; re-entrant, because a signal handler may record a checkpoint at any moment.
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)
