"""What happens to runs when their process ends: they are ended, and what is left to be stored is said.

Called by `beginning` for every run that ends with this process. A forked child has the list of its parent,
and ends nothing of it. Promise: an ending process is held up for two seconds at most (see `missed`).
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from replicate import connection, notices
from replicate.errors import ReplicateError
from replicate.home import find_home
from replicate.ids import ExperimentId
from replicate.lazy import LazyModule
from replicate.missed import exit_deadline
from replicate.phrases import format_size, plural
from replicate.run import Backlog, Run

if TYPE_CHECKING:
    from replicate._pb import daemon_pb2 as pb
else:
    pb = LazyModule("replicate._pb.daemon_pb2")

_runs: list[Run] = []
_is_exiting = False
#: An exception went through all of the main thread's code.
_is_failing = False


def own_experiments() -> frozenset[ExperimentId]:
    """The experiments that this process, or the one that it was forked from, began or resumed."""
    return frozenset(run.experiment_id for run in _runs)


def remember(run: Run) -> None:
    """End this run with the process."""
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
    deadline = exit_deadline()
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
        elif run.backlog.snapshots or run.backlog.failed:
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
        return Backlog(failed=run.backlog.failed)
    waiting = reply.pending + reply.active if reply.bytes_pending else 0
    snapshots = min(run.backlog.snapshots, waiting)
    # What was missed fails only when its record has been stored.
    failed = max(reply.failed, run.backlog.failed) if reply.pending + reply.active else reply.failed
    return Backlog(snapshots, reply.bytes_pending, failed, reply.waiting_because)


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
