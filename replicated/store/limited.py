"""A store that hands over only so many bytes a second: a connection is shared with the training.

What is limited is what `put` makes (packs, index objects); small records and reading are not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from replicated.store.base import Buffer, Capabilities, ObjectInfo, Store

#: After a pause so much may go out at once, in seconds of the limit.
BURST_S: Final = 1.0
#: What can be waited for at once has a limit.
_LONGEST_WAIT_S: Final = 3600.0


class UploadInterrupted(Exception):
    """Nobody wants the upload any more."""


class UploadLimit:
    """Bytes a second for all stores of a process; 0 is no limit. Thread-safe.

    A token bucket: it fills at the rate of the limit, up to `BURST_S` of it, and a taker waits until it
    is not below empty. So an object may be larger than what the bucket holds: it is waited for first.
    """

    def __init__(self, bytes_per_s: int = 0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._bytes_per_s = bytes_per_s
        self._is_interrupted = False
        self._level = bytes_per_s * BURST_S
        self._filled_at = clock()

    def set(self, bytes_per_s: int) -> None:
        """Change the limit, also for those who wait; ends an interruption."""
        with self._changed:
            self._is_interrupted = False
            if bytes_per_s != self._bytes_per_s:
                self._fill()
                # Nobody waits at the new rate for what was allowed at the old one.
                self._level = min(max(self._level, 0.0), bytes_per_s * BURST_S)
                self._bytes_per_s = bytes_per_s
            self._changed.notify_all()

    def interrupt(self) -> None:
        """Let everybody who waits, or would, raise `UploadInterrupted` until the next `set`."""
        with self._changed:
            self._is_interrupted = True
            self._changed.notify_all()

    def take(self, size_bytes: int) -> None:
        """Return when so many more bytes may go out."""
        with self._changed:
            self._fill()
            self._level -= size_bytes
            while self._bytes_per_s and self._level < 0 and not self._is_interrupted:
                self._changed.wait(min(-self._level / self._bytes_per_s, _LONGEST_WAIT_S))
                self._fill()
            if self._is_interrupted:
                raise UploadInterrupted

    def _fill(self) -> None:
        now = self._clock()
        gained = (now - self._filled_at) * self._bytes_per_s
        self._level = min(self._level + gained, self._bytes_per_s * BURST_S)
        self._filled_at = now


class LimitedStore:
    """Another store, whose `put` waits for its turn."""

    def __init__(self, store: Store, limit: UploadLimit) -> None:
        self._store = store
        self._limit = limit

    @property
    def below(self) -> Store:
        """The other store."""
        return self._store

    @property
    def url(self) -> str:
        """That of the other store."""
        return self._store.url

    @property
    def capabilities(self) -> Capabilities:
        """Those of the other store."""
        return self._store.capabilities

    def put(
        self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
    ) -> None:
        """See `Store.put`; raises `UploadInterrupted` too."""
        self._limit.take(sum(memoryview(part).nbytes for part in parts))
        self._store.put(key, parts, is_unique=is_unique, is_checked=is_checked)

    def replace(self, key: str, data: bytes) -> None:
        """See `Store.replace`."""
        self._store.replace(key, data)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Store.get`."""
        return self._store.get(key, offset, length)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Store.list`."""
        return self._store.list(prefix)

    def delete(self, *keys: str) -> None:
        """See `Store.delete`."""
        self._store.delete(*keys)

    def exists(self, key: str) -> bool:
        """See `Store.exists`."""
        return self._store.exists(key)
