"""Writing requests on their way to the daemon: waiting for room, and not waiting for a daemon that is away.

The daemon lets a call wait when too much is to be stored; that is told once, and the same request repeated
until there is room, or until nothing has moved for a while. That, and a daemon that cannot be reached, costs
patience once: from then on calls that can do without fail at once, or nearly so, until it is over. Called by
`run`, `beginning` and `missed`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from replicate import connection, notices
from replicate.errors import DaemonUnavailable, QueueFull, ReplicateError
from replicate.home import Home, find_home

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from replicate._pb import daemon_pb2 as pb

    _Reply = TypeVar("_Reply", bound=Message)
else:
    _Reply = TypeVar("_Reply")

#: What a call does after the daemon could not be reached. "routine": nothing, until the pause is over.
#: "last": it looks for it again, briefly. "vital": it looks for it as if nothing had been.
Urgency = Literal["routine", "last", "vital"]

#: Pauses in which nobody looks for a daemon that could not be reached: each is twice the one before.
_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 60.0
#: How long such a daemon is looked for. One that is being started goes on with that, and is found next time.
_REACH_S = 3.0
#: The daemon makes a call wait by itself, and is not asked more often than this if it should not.
_QUEUE_POLL_S = 0.5
#: How long a call waits for room while nothing moves; and one that finds it as an earlier one has left it.
_STUCK_PATIENCE_S = 30.0
_STUCK_AGAIN_S = 0.5
_QUEUE = "queue"
#: Subject of the warnings of those who had to do without.
STUCK = "stuck"


def deliver(
    method: str,
    request: Message,
    reply_type: type[_Reply],
    *,
    urgency: Urgency = "routine",
    timeout_s: float | None = None,
) -> _Reply:
    """The daemon's reply to a request that writes; raises what `connection.call` raises.

    Without `timeout_s` it waits for room as long as anything moves, and raises `QueueFull` when nothing does.
    """
    global _outage
    patience = _StuckPatience(request, urgency)
    outage = _current_outage()
    if outage is not None and urgency == "routine" and time.monotonic() < outage.pause_ends:
        raise outage.repeated_error()
    reach_s = None if outage is None or urgency == "vital" else _REACH_S
    while True:
        begun = time.monotonic()
        try:
            reply = connection.call(method, request, reply_type, timeout_s=timeout_s, reach_s=reach_s)
        except DaemonUnavailable as error:
            _note_outage(error, begun)
            raise
        except QueueFull as full:
            _outage = None
            if timeout_s is not None:
                raise
            patience.note(full, begun)
            notices.warn_once(f"a call has to wait: {full}", about=_QUEUE)
            time.sleep(max(0.0, begun + _QUEUE_POLL_S - time.monotonic()))
        except ReplicateError:
            _outage = None
            raise
        else:
            _outage = None
            patience.note_room()
            return reply


class _StuckPatience:
    """How long one call waits for room while nothing moves in its repository."""

    def __init__(self, request: Message, urgency: Urgency) -> None:
        capture: pb.Capture | None = getattr(request, "capture", None)
        self._has_files = capture is not None and bool(capture.paths)
        self._queue = (find_home(), str(getattr(request, "repository", "")))
        self._is_known = urgency != "vital" and self._queue in _stuck
        #: Since when the answers have said so, without a break; of `time.monotonic`.
        self._since: float | None = None

    def note(self, full: QueueFull, begun: float) -> None:
        """The answer to a request that was sent at `begun`; raises `QueueFull` when that is enough."""
        if not full.fields.get("stuck"):
            self._since, self._is_known = None, False
            self._is_over()
            return
        if self._since is None:
            self._since = begun
        limit_s = _STUCK_AGAIN_S if self._is_known else _STUCK_PATIENCE_S
        if time.monotonic() - self._since >= limit_s:
            _stuck.add(self._queue)
            hint = "`replicate status` shows what waits, and why"
            raise QueueFull(full.message, hint=hint, fields=full.fields) from None

    def note_room(self) -> None:
        """The request was taken; one without files is always, and says nothing."""
        if self._has_files:
            self._is_over()

    def _is_over(self) -> None:
        if self._queue in _stuck:
            _stuck.discard(self._queue)
            notices.forget(STUCK)
            notices.forget(_QUEUE)


#: The queues, by home and repository, in which nothing moved for so long that a call gave up; any thread
#: adds and discards.
_stuck: set[tuple[Home, str]] = set()


@dataclass(frozen=True, slots=True)
class _Outage:
    """The daemon of a home could not be reached."""

    home: Home
    error: DaemonUnavailable
    noted: float
    pause_s: float

    @property
    def pause_ends(self) -> float:
        """Of `time.monotonic`."""
        return self.noted + self.pause_s

    def repeated_error(self) -> DaemonUnavailable:
        """The same error, of its own for each call."""
        return type(self.error)(self.error.message, hint=self.error.hint, fields=self.error.fields)


#: Replaced as a whole, by any thread; a child that is forked meanwhile has no more luck than its parent.
_outage: _Outage | None = None


def _current_outage() -> _Outage | None:
    outage = _outage
    return outage if outage is not None and outage.home == find_home() else None


def _note_outage(error: DaemonUnavailable, begun: float) -> None:
    global _outage
    before = _current_outage()
    if before is not None and before.noted > begun:
        return  # another thread found the same
    pause_s = _FIRST_PAUSE_S if before is None else min(2 * before.pause_s, _LONGEST_PAUSE_S)
    _outage = _Outage(find_home(), error, time.monotonic(), pause_s)
