"""Calls that end in time: whoever calls is answered, whatever the callee is waiting for.

For engines whose library wants its answer from the thread that it asked in: the work is done in a thread
of ours, which is given up when it takes too long or nobody wants the answer any more. The threads are
real Python threads and stay, so that buffers that belong to a thread are of use; a thread of a library of
C is a new one to Python in each call.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

#: How often it is looked whether an answer is still wanted.
_POLL_S = 0.05
#: With those that hang. More callers wait until one is free.
_MAX_WORKERS = 64


class GivenUp(Exception):
    """The answer is not wanted any more."""


class BoundedCalls:
    """Runs functions for at most `timeout_s` each. `run` may be called from any thread.

    `is_given_up` says, in the thread that called `run`, whether its answer is not wanted any more.
    """

    def __init__(self, timeout_s: float, is_given_up: Callable[[], bool]) -> None:
        self._timeout_s = timeout_s
        self._is_given_up = is_given_up
        self._idle: deque[_Worker] = deque()
        self._places = threading.Semaphore(_MAX_WORKERS)

    def run(
        self,
        function: Callable[[], T],
        use: Callable[[T], R],
        *,
        discard: Callable[[T], object] | None = None,
    ) -> R:
        """What `use` makes of the result of `function`.

        `use` is called in this thread, and only then may the thread that made the result do something
        else. A result that comes too late goes to `discard`. Raises what `function` raises,
        `TimeoutError`, `GivenUp`, and `RuntimeError` when no thread can be had.
        """
        deadline = time.monotonic() + self._timeout_s
        self._wait(lambda: self._places.acquire(timeout=_POLL_S), deadline)
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = self._start_worker()
        call = _Call(function, discard)
        worker.begin(call)
        try:
            self._wait(lambda: call.done.acquire(timeout=_POLL_S), deadline)
        except BaseException:
            if call.abandon():
                raise
        try:
            if call.error is not None:
                raise call.error
            assert call.result is not None
            return use(call.result[0])
        finally:
            # It refers to this frame.
            call.error = None
            self._idle.append(worker)
            self._places.release()

    def _start_worker(self) -> _Worker:
        try:
            return _Worker(self._places)
        except BaseException:
            # No thread can be had just now: the place is for who tries again.
            self._places.release()
            raise

    def _wait(self, try_once: Callable[[], bool], deadline: float) -> None:
        while not try_once():
            if self._is_given_up():
                raise GivenUp
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {self._timeout_s:g} s")


class _Call(Generic[T]):
    """One call; `result` and `error` may be looked at once `done` could be acquired."""

    def __init__(self, function: Callable[[], T], discard: Callable[[T], object] | None) -> None:
        self._function = function
        self._discard = discard
        # Guards the two below, so that a result is either used or discarded.
        self._lock = threading.Lock()
        self._is_done = False
        self._is_abandoned = False
        self.done = threading.Lock()
        self.done.acquire()
        self.result: tuple[T] | None = None
        self.error: BaseException | None = None

    def execute(self) -> bool:
        """Call the function; whether somebody takes the result."""
        try:
            self.result = (self._function(),)
        except BaseException as error:
            self.error = error
        with self._lock:
            self._is_done = not self._is_abandoned
        if self._is_done:
            self.done.release()
        elif self.result is not None and self._discard is not None:
            self._discard(self.result[0])
        return self._is_done

    def abandon(self) -> bool:
        """Want the result no more; False when it is there already."""
        with self._lock:
            self._is_abandoned = not self._is_done
            return self._is_abandoned


class _Worker:
    """A thread for one call at a time. One that was given up ends, and gives its place back, when it can."""

    def __init__(self, places: threading.Semaphore) -> None:
        self._places = places
        self._wanted = threading.Lock()
        self._wanted.acquire()
        self._call: _Call[object] | None = None
        threading.Thread(target=self._work, name="mount-call", daemon=True).start()

    def begin(self, call: _Call[T]) -> None:
        """Let the thread execute a call; the one before has been."""
        self._call = call  # type: ignore[assignment]  # nothing but `execute` is called
        self._wanted.release()

    def _work(self) -> None:
        while True:
            self._wanted.acquire()
            assert self._call is not None
            call, self._call = self._call, None
            if not call.execute():
                self._places.release()
                return
