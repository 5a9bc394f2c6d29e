"""Threads for what a mount does although nobody waits for it: reading in advance, completing files.

Used by `scanning`, `assembling` and `prefetching`, each with threads of its own, which begin with their
first work. Invariant: what waits is bounded, and nothing that goes wrong here is more than a line in the
log; the end of the process is never held up by work that hangs in a store.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from replicate.errors import ReplicateError

_LOG = logging.getLogger(__name__)

#: How long `close` waits for work that has begun.
END_TIMEOUT_S: Final = 2.0
#: After so long it is tried again to start a thread that could not be.
_START_AGAIN_S: Final = 0.2


class Stopped(Exception):
    """The mount ends: what was being done is of no use any more."""


class Workers:
    """At most `count` threads that do what is submitted, in that order; at most `capacity` things wait.

    All methods may be called from any thread.
    """

    def __init__(self, name: str, count: int = 1, *, capacity: int, niceness: int = 0) -> None:
        self._name = name
        self._count = count
        self._capacity = capacity
        self._niceness = niceness
        #: Guards what follows; a leaf. Notified when there is work, when some is done, and at the end.
        self._changed = threading.Condition(threading.Lock())
        self._waiting: deque[Callable[[], None]] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        #: Whether the last thread could not be started.
        self._is_short = False
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called: work that takes long asks for it."""
        return self._is_closed

    def check(self) -> None:
        """Raise `Stopped` once `close` was called."""
        if self._is_closed:
            raise Stopped

    def pause(self, timeout_s: float) -> None:
        """Wait, but not beyond `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, timeout_s)

    def submit(self, work: Callable[[], None]) -> bool:
        """Have something done soon; False when it never is.

        That is when too much waits, when there is no thread and none can be started, and after `close`.
        """
        with self._changed:
            if self._is_closed or len(self._waiting) >= self._capacity:
                return False
            return self._put(work)

    def put(self, work: Callable[[], None]) -> None:
        """As `submit`, but waits while that is not possible; raises `Stopped`."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._is_closed or len(self._waiting) < self._capacity)
                self.check()
                if self._put(work):
                    return
                self._changed.wait(_START_AGAIN_S)

    def wait_idle(self) -> None:
        """Wait until all is done; raises `Stopped`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or (not self._waiting and self._idle == len(self._threads))
            )
            self.check()

    def _put(self, work: Callable[[], None]) -> bool:
        """False when nobody would do it; the lock is held."""
        if len(self._waiting) >= self._idle and len(self._threads) < self._count:
            # No `ThreadPoolExecutor`: the end of the process would wait for its threads.
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                # The system has no memory or no place for one more, which passes: the next work tries again.
                if not self._is_short:
                    _LOG.warning("%s: %s", self._name, error)
                self._is_short = True
                if not self._threads:
                    return False
            else:
                self._is_short = False
                self._threads.append(thread)
        self._waiting.append(work)
        self._changed.notify_all()
        return True

    def close(self) -> None:
        """Forget what waits, and wait a little for what has begun; may be called twice."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        deadline = time.monotonic() + END_TIMEOUT_S
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        if self._niceness:
            # Of this thread alone, as Linux counts.
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        while True:
            with self._changed:
                self._idle += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                self._idle -= 1
                if self._is_closed:
                    return
                work = self._waiting.popleft()
                self._changed.notify_all()
            try:
                work()
            except Stopped:
                pass
            except (ReplicateError, OSError) as error:
                _LOG.warning("%s: %s", self._name, error)
            except Exception:
                _LOG.exception("%s: failed", self._name)
            # What was done may hold a lot of memory.
            del work
