"""The two queues of work on held files: those to be copied at once, and those to be reflinked later.

Filled and emptied by `held`. A file may have been dealt with otherwise when it is taken out. Each has a lock
of its own under which nothing else is locked.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


class SmallestFirst(Generic[_Item]):
    """A queue from which the smallest is taken first, and of equals the one that came first."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, _Item]] = []
        self._arrivals = itertools.count()
        self._changed = threading.Condition(threading.Lock())
        self._is_closed = False

    def put(self, size: int, item: _Item) -> None:
        """Add one."""
        with self._changed:
            heapq.heappush(self._heap, (size, next(self._arrivals), item))
            self._changed.notify()

    def take(self, max_size: int | None = None) -> _Item | None:
        """Wait for one that is not larger than `max_size`; None when it is closed and there is none.

        At most one thread at a time may give a `max_size`.
        """
        with self._changed:
            while not self._heap or (max_size is not None and self._heap[0][0] > max_size):
                if self._is_closed:
                    return None
                if self._heap:
                    self._changed.notify()  # too large for this thread, not for the next
                self._changed.wait()
            return heapq.heappop(self._heap)[2]

    def close(self) -> None:
        """Nothing is added from now on that anybody has to take."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class Delayed(Generic[_Item]):
    """A queue from which nothing is taken before it has been there for `delay_s`."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._items: deque[tuple[float, _Item]] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._is_closed = False

    def put(self, item: _Item) -> None:
        """Add one."""
        with self._changed:
            self._items.append((time.monotonic() + self._delay_s, item))
            if len(self._items) == 1:
                self._changed.notify()

    def take(self) -> _Item | None:
        """Wait for the oldest; None once it is closed. For one thread."""
        with self._changed:
            while not self._is_closed:
                wait_s = self._items[0][0] - time.monotonic() if self._items else None
                if wait_s is not None and wait_s <= 0:
                    return self._items.popleft()[1]
                self._changed.wait(wait_s)
            return None

    def close(self) -> None:
        """Nothing is taken any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
