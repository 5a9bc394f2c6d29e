"""Keeps a fork of the process away from the moments in which its threads use databases.

A child inherits the locks inside of SQLite as they are, and nobody would ever give those up that another
thread had. So whoever uses a repository passes a gate, and a fork waits until nobody is inside, but not for
long: who is inside for longer waits for a store, not in a database.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: How long a fork waits.
MAX_WAIT_S: Final = 2.0


class Gate:
    """Counts who is inside, each thread once. Its lock is held while the process forks, by who forks."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside = 0
        self._is_closed = False
        self._own = threading.local()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Within, no fork happens in another thread, unless it takes too long. May be nested."""
        depth = getattr(self._own, "depth", 0)
        if depth == 0:
            with self._changed:
                self._changed.wait_for(lambda: not self._is_closed)
                self._inside += 1
        self._own.depth = depth + 1
        try:
            yield
        finally:
            self._own.depth = depth
            if depth == 0:
                with self._changed:
                    self._inside -= 1
                    self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in, and wait until those inside have left; the lock stays with this thread."""
        self._changed.acquire()
        self._is_closed = True
        self._changed.wait_for(lambda: self._inside == self._count_own(), MAX_WAIT_S)

    def open(self) -> None:
        """Let everybody in again, in the parent."""
        self._is_closed = False
        self._changed.notify_all()
        self._changed.release()

    def open_in_child(self) -> None:
        """The same in a child, where there is no other thread."""
        self._inside = self._count_own()
        self.open()

    def _count_own(self) -> int:
        return 1 if getattr(self._own, "depth", 0) else 0


gate: Final = Gate()
os.register_at_fork(before=gate.close, after_in_parent=gate.open, after_in_child=gate.open_in_child)
