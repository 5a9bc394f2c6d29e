"""Which thread does what: the requests that wait for an answer, and the threads that work on them.

Decides and counts only: threads are started, and answers written, by `loop`. Two promises are kept here.
A request is answered exactly once, by whoever claims it first: the thread that works on it, INTERRUPT, or
the watchdog when it takes too long. And as long as there are threads, one waits for the next request:
whoever takes one while nobody else waits has another started, or, when there are enough, puts the request
into a queue and goes on waiting. So a slow store holds up neither `ls` nor INTERRUPT. May be used from any
thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from replicated.mount.engine.native.protocol import READ, RELEASE, Request

#: Threads that work on requests or wait for one; those whose request was given up do not count.
MAX_THREADS: Final = 16
#: Of these, how many may be reading files: the others are for names, which must stay quick.
MAX_READING: Final = 12
#: With those whose request was given up: they are stuck in a store, and more of them would not help.
MAX_STUCK_THREADS: Final = 256
#: No more threads than this wait for requests at the same time. With 2, reading one file ahead started and
#: ended 300 threads a GB, and took 0.4 s of processor time instead of 0.3 (2 cores, November 2026).
MAX_IDLE: Final = 4


class Step(Enum):
    """What a thread does next."""

    #: Work on the request that it has taken.
    WORK = auto()
    #: The same, once it has started another thread that waits in its place.
    START_AND_WORK = auto()
    #: Wait for a request.
    WAIT = auto()
    #: Nothing: there are enough without it.
    LEAVE = auto()


@dataclass(slots=True, eq=False)
class _Work:
    """A request that has not been answered."""

    request: Request
    #: By `time.monotonic`.
    taken_at: float
    #: Whether a thread works on it; else it is in a queue.
    is_running: bool = False
    #: When a signal came for whoever waits, by `time.monotonic`.
    interrupted_at: float | None = None


class Requests:
    """The requests that wait for an answer. It begins with one thread, which waits."""

    def __init__(self) -> None:
        # Guards everything else; held for a few instructions only.
        self._lock = threading.Lock()
        self._unanswered: dict[int, _Work] = {}
        self._queue: deque[_Work] = deque()
        self._queued_reads: deque[_Work] = deque()
        self._threads = 1
        self._idle = 1
        self._reading = 0
        self._stuck = 0

    def take(self, request: Request) -> Step:
        """What becomes of a request that a waiting thread has just taken from the kernel."""
        work = _Work(request, time.monotonic())
        with self._lock:
            self._unanswered[request.unique] = work
            if request.operation == READ and self._reading >= MAX_READING:
                self._queued_reads.append(work)
                return Step.WAIT
            if self._idle > 1:
                self._idle -= 1
                self._begin(work)
                return Step.WORK
            if self._has_room():
                self._threads += 1
                self._begin(work)
                return Step.START_AND_WORK
            (self._queued_reads if request.operation == READ else self._queue).append(work)
            return Step.WAIT

    def claim(self, request: Request) -> bool:
        """Whether the thread that worked on a request answers it; else somebody has done so already."""
        with self._lock:
            work = self._unanswered.pop(request.unique, None)
            if work is None:
                self._stuck -= 1
                return False
            self._reading -= request.operation == READ
            return True

    def interrupt(self, unique: int) -> Request | None:
        """The request of this number, of which is noted that a signal came for its sender, if it is known."""
        with self._lock:
            work = self._unanswered.get(unique)
            if work is None:
                return None
            work.interrupted_at = time.monotonic()
            return work.request

    def interrupted(self) -> list[tuple[Request, float]]:
        """The requests for whose sender a signal came, and how many seconds ago."""
        now = time.monotonic()
        with self._lock:
            return [
                (work.request, now - work.interrupted_at)
                for work in self._unanswered.values()
                if work.interrupted_at is not None
            ]

    def give_up(self, unique: int) -> bool:
        """Whether the caller answers a request that some other thread works on, or none yet."""
        with self._lock:
            work = self._unanswered.pop(unique, None)
            if work is None:
                return False
            if work.is_running:
                self._stuck += 1
                self._reading -= work.request.operation == READ
            return True

    def next(self) -> Request | Step:
        """What a thread does that has done its work: a request that was queued, wait, or leave."""
        with self._lock:
            work = self._dequeue()
            if work is not None:
                self._begin(work)
                return work.request
            if self._idle >= MAX_IDLE:
                self._threads -= 1
                return Step.LEAVE
            self._idle += 1
            return Step.WAIT

    def next_for_another(self) -> Request | None:
        """A queued request for which one more thread is to be started, now that others are stuck."""
        with self._lock:
            work = self._dequeue() if self._has_room() else None
            if work is None:
                return None
            self._threads += 1
            self._begin(work)
            return work.request

    def put_back(self, request: Request) -> None:
        """There is no thread for what `next_for_another` gave: it is queued again, before all others."""
        with self._lock:
            self._threads -= 1
            work = self._unanswered.get(request.unique)
            if work is None:
                self._stuck -= 1
                return
            work.is_running = False
            self._reading -= request.operation == READ
            (self._queued_reads if request.operation == READ else self._queue).appendleft(work)

    def needs_waiting(self) -> bool:
        """Whether one more thread is to be started, which waits, because none does."""
        with self._lock:
            if self._idle or not self._has_room():
                return False
            self._threads += 1
            self._idle += 1
            return True

    def leave(self) -> None:
        """A thread that waits is not there any longer, or never was."""
        with self._lock:
            self._threads -= 1
            self._idle -= 1

    def overdue(self, timeout_s: float) -> list[Request]:
        """The requests that were taken longer ago than that.

        Not a RELEASE that is queued: nobody waits for its answer, and the handle is to be given back.
        """
        before = time.monotonic() - timeout_s
        with self._lock:
            return [
                work.request
                for work in self._unanswered.values()
                if work.taken_at < before and (work.is_running or work.request.operation != RELEASE)
            ]

    def _begin(self, work: _Work) -> None:
        work.is_running = True
        self._reading += work.request.operation == READ

    def _has_room(self) -> bool:
        return self._threads - self._stuck < MAX_THREADS and self._threads < MAX_STUCK_THREADS

    def _dequeue(self) -> _Work | None:
        """The queued request that is to be worked on next; some have been given up meanwhile."""
        for queue, is_open in ((self._queue, True), (self._queued_reads, self._reading < MAX_READING)):
            while is_open and queue:
                work = queue.popleft()
                if self._unanswered.get(work.request.unique) is work:
                    return work
        return None
