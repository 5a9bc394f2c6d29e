"""How long calls of this library hold up a training: one clock a run.

Counted is the time in which at least one call is under way: calls of several threads at once, or of a signal
handler within a call, are not added up. The daemon is told in portions, with the requests that are sent
anyway. Called by `run` and `project`. A forked child begins at zero: the rest is its parent's to tell.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_NANOSECONDS = 10**9


class StallClock:
    """Counts what calls cost the training, in this process; any thread and any signal handler may use it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._calls = 0
        self._settled_ns = time.monotonic_ns()
        self._told_ns = 0
        self._untold_ns = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of this block."""
        with _lock:
            self._settle()
            self._calls += 1
        try:
            yield
        finally:
            with _lock:
                self._settle()
                self._calls = max(0, self._calls - 1)  # the child of a fork within the block has none

    @property
    def seconds(self) -> float:
        """What was counted until now."""
        with _lock:
            self._settle()
            return (self._told_ns + self._untold_ns) / _NANOSECONDS

    @property
    def told_seconds(self) -> float:
        """What the daemon was told of it."""
        with _lock:
            self._settle()
            return self._told_ns / _NANOSECONDS

    def take_untold(self) -> int:
        """Nanoseconds that the daemon is to be told of now."""
        with _lock:
            self._settle()
            taken, self._untold_ns = self._untold_ns, 0
            self._told_ns += taken
            return taken

    def give_back(self, taken_ns: int) -> None:
        """The daemon was not told of them after all."""
        with _lock:
            self._settle()
            self._told_ns = max(0, self._told_ns - taken_ns)
            self._untold_ns += taken_ns

    def _settle(self) -> None:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._calls = self._told_ns = self._untold_ns = 0
        now = time.monotonic_ns()
        if self._calls:
            self._untold_ns += now - self._settled_ns
        self._settled_ns = now


#: A leaf; re-entrant, because a signal handler may record a checkpoint at any moment.
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)
