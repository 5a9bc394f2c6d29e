"""The records that were read a moment ago, kept where each request costs.

Whoever looks a record up nearly always wants the snapshot in it next. Records never change; that one was
removed elsewhere may go unnoticed for as long as they are kept. Used by `repository`.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from replicated.store.base import Store

#: As long as a record is kept.
KEPT_S: Final = 30.0
#: All together, and one of them.
MAX_BYTES: Final = 4 << 20
MAX_RECORD_BYTES: Final = 256 << 10


class RecentRecords:
    """Records of one store. May be used from several threads; its lock is a leaf."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._size_bytes = 0

    def get(self, key: str) -> bytes:
        """A record; raises `KeyMissing`."""
        now = self._clock()
        with self._lock:
            found = self._kept.get(key)
        if found is not None and now - found[0] < KEPT_S:
            return found[1]
        data = self._store.get(key)
        if len(data) <= MAX_RECORD_BYTES:
            self._keep(key, now, data)
        return data

    def forget(self) -> None:
        """Drop all: something was removed."""
        with self._lock:
            self._kept.clear()
            self._size_bytes = 0

    def _keep(self, key: str, now: float, data: bytes) -> None:
        with self._lock:
            _, replaced = self._kept.pop(key, (0.0, b""))
            self._kept[key] = now, data
            self._size_bytes += len(data) - len(replaced)
            while self._size_bytes > MAX_BYTES:
                _, (_, oldest) = self._kept.popitem(last=False)
                self._size_bytes -= len(oldest)
