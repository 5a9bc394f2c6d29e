"""Checkpoints that the daemon could not be told of when they were made: kept, and told later, in order.

Their files are not what they were any more, so that one with files is recorded as failed, with its metrics
and the reason; one without is recorded as if nothing had been. A request keeps its id, so that one which the
daemon got after all is not recorded twice. Kept in memory and bounded; called by `run`, and when the process
exits. A forked child begins with none: they are its parent's to tell.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from replicate import notices
from replicate.delivery import STUCK, Urgency, deliver
from replicate.errors import DaemonUnavailable, QueueFull, ReplicateError
from replicate.home import find_home
from replicate.ids import CheckpointId
from replicate.lazy import LazyModule
from replicate.phrases import plural

if TYPE_CHECKING:
    from replicate import wire
    from replicate._pb import daemon_pb2 as pb
else:
    wire = LazyModule("replicate.wire")
    pb = LazyModule("replicate._pb.daemon_pb2")

#: What is kept of a run at most; then the oldest go.
MAX_COUNT = 2000
MAX_BYTES = 32 << 20

#: A process that exits is held up no longer than this, all in all.
_EXIT_PATIENCE_S = 2.0
_LATE_PATIENCE_S = 0.5
_SUBJECT = "missed"


def is_passing(error: ReplicateError) -> bool:
    """Whether the same request may well be taken later."""
    return error.retryable or isinstance(error, DaemonUnavailable)


class MissedCheckpoints:
    """Those of one run, oldest first; any thread may use it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._waiting: deque[bytes] = deque()
        self._size_bytes = 0
        self._lost = 0
        #: Why the last one could not be told, or was given up.
        self._because = ""
        #: Of those that the daemon was told of, the ones whose files are lost.
        self.without_files = 0

    def __len__(self) -> int:
        self._forget_those_of_the_parent()
        return len(self._waiting)

    def add(self, request: pb.CreateCheckpointRequest, error: ReplicateError) -> None:
        """Keep a request that could not be told, and warn of that."""
        self._keep(request, error)
        notices.warn_once(
            f"a checkpoint was not saved: {error}; training goes on, and until this is mended the metrics of "
            "checkpoints are kept in memory, their files are not saved",
            about=_SUBJECT,
        )

    def add_without_room(self, request: pb.CreateCheckpointRequest, error: QueueFull) -> None:
        """Keep a request whose files there was no room for, and warn of that.

        The daemon is told at once if it can be: what has no files needs no room.
        """
        self._keep(request, error)
        notices.warn_once(
            f"a checkpoint was not saved: {error}; training goes on, and until this is mended only the "
            "metrics of checkpoints are saved",
            about=STUCK,
        )
        with suppress(ReplicateError):
            self.tell(quiet=True)

    def _keep(self, request: pb.CreateCheckpointRequest, error: ReplicateError) -> None:
        kept = pb.CreateCheckpointRequest()
        kept.CopyFrom(request)
        kept.ClearField("capture")
        if request.capture.paths:
            reason = f"the files could not be captured when it was made: {error.message}"
            kept.missed_because = wire.encode_text(reason)
        encoded = kept.SerializeToString()
        with _lock:
            self._forget_those_of_the_parent()
            self._because = error.message
            self._waiting.append(encoded)
            self._size_bytes += len(encoded)
            while len(self._waiting) > MAX_COUNT or self._size_bytes > MAX_BYTES:
                self._drop(self._waiting[0])
                self._lost += 1
        _tell_when_the_process_exits(self)

    def tell(
        self, urgency: Urgency = "routine", *, deadline: float | None = None, quiet: bool = False
    ) -> None:
        """Tell the daemon of all of them; raises `ReplicateError` as soon as it cannot be told now.

        Raises it at the latest at `deadline` (of `time.monotonic`).
        """
        if not self:
            return
        method, reply_type = "CreateCheckpoint", pb.CaptureReply
        told = 0
        with _telling:
            while self._waiting:
                first = self._waiting[0]
                timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
                request = pb.CreateCheckpointRequest.FromString(first)
                try:
                    deliver(method, request, reply_type, urgency=urgency, timeout_s=timeout_s)
                    told += 1
                    if request.missed_because:
                        self.without_files += 1
                    else:
                        _recorded_later.add(CheckpointId(request.checkpoint.id))
                except ReplicateError as error:
                    if is_passing(error):
                        raise
                    self._lost, self._because = self._lost + 1, error.message
                with _lock:
                    self._drop(first)
        notices.forget(_SUBJECT)
        if told and not quiet:
            earlier = plural(told, "earlier one")
            notices.say(f"checkpoints are saved again, and the metrics of {earlier} were recorded")

    def give_up(self) -> tuple[int, str]:
        """Keep them no longer; how many were never told in all, and why."""
        with _lock:
            lost = self._lost + len(self)
            self._waiting.clear()
            self._lost = self._size_bytes = 0
            return lost, self._because

    @property
    def lost(self) -> tuple[int, str]:
        """How many will never be told, and why."""
        self._forget_those_of_the_parent()
        return self._lost, self._because

    def _drop(self, request: bytes) -> None:
        # A signal handler may have told of it meanwhile.
        if self._waiting and self._waiting[0] is request:
            self._waiting.popleft()
            self._size_bytes -= len(request)

    def _forget_those_of_the_parent(self) -> None:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._waiting = deque()
            self._size_bytes = self._lost = self.without_files = 0


#: Both re-entrant, because a signal handler may record a checkpoint at any moment. `_telling` is held across
#: calls, so that checkpoints are told in order; `_lock` is a leaf.
_telling = threading.RLock()
_lock = threading.RLock()
#: Those that had something to keep in this process.
_kept: list[MissedCheckpoints] = []
#: Checkpoints without files that the daemon was told of after all.
_recorded_later: set[CheckpointId] = set()
_kept_by_pid = 0
_exit_deadline: float | None = None


def was_recorded_later(checkpoint_id: CheckpointId) -> bool:
    """Whether a checkpoint that could not be recorded when it was made has been since, with all it has."""
    return checkpoint_id in _recorded_later


def tell_now(deadline: float | None = None) -> tuple[int, str]:
    """Tell the daemon of all that this process could not tell it of; how many are lost for good, and why.

    Raises `ReplicateError` when they cannot be told now, at the latest at `deadline` (of `time.monotonic`).
    """
    count, because = 0, ""
    for missed in list(_kept):
        missed.tell("vital", deadline=deadline, quiet=True)
        lost, reason = missed.lost
        count, because = count + lost, reason if lost else because
    return count, because


def exit_deadline() -> float:
    """Until when the exit of this process may be held up, of `time.monotonic`.

    What is asked for later than at first gets a little time of its own.
    """
    global _exit_deadline
    now = time.monotonic()
    _exit_deadline = max(_exit_deadline or now + _EXIT_PATIENCE_S, now + _LATE_PATIENCE_S)
    return _exit_deadline


def _tell_when_the_process_exits(missed: MissedCheckpoints) -> None:
    global _kept_by_pid
    if _kept_by_pid != os.getpid():
        _kept_by_pid = os.getpid()
        _kept.clear()
        atexit.register(_tell_all)
        if "multiprocessing.util" in sys.modules:
            # Its workers end without what was registered with `atexit`.
            sys.modules["multiprocessing.util"].Finalize(None, _tell_all, exitpriority=0)
    if missed not in _kept:
        _kept.append(missed)


def _tell_all() -> None:
    """Tell the daemon of what it was not told of yet, and people of what it never will be told of."""
    lost, because = 0, ""
    deadline = exit_deadline()
    for missed in _kept:
        try:
            # Where there is no state any more, none is made again.
            if find_home().run.is_dir() and time.monotonic() < deadline:
                missed.tell("last", deadline=deadline, quiet=True)
        except ReplicateError:
            pass
        count, reason = missed.give_up()
        lost, because = lost + count, reason if count else because
    if lost:
        notices.say(f"{plural(lost, 'checkpoint')} could not be recorded, not even the metrics: {because}")


def _renew_locks() -> None:
    global _telling, _lock
    _telling, _lock = threading.RLock(), threading.RLock()


os.register_at_fork(after_in_child=_renew_locks)
