"""A store that can be exchanged while it is in use: when the credentials of its bucket have changed.

Also tells when it last had an answer, so that who waits for many requests can tell a store that is slow from
one that is out of reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from replicated.store.base import Buffer, Capabilities, KeyMissing, ObjectInfo, Store


class SwitchedStore:
    """Passes everything on to the store of the moment. All methods may be called from any thread.

    Requests that run while it is exchanged end with the store that they began with.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._answered_at = clock()

    def switch(self, store: Store) -> None:
        """Use another store from now on; the same bucket, reached in another way."""
        self._store = store

    @property
    def answered_at(self) -> float:
        """When a request last succeeded, or it was made; of the clock."""
        return self._answered_at

    @property
    def url(self) -> str:
        """See `Store.url`."""
        return self._store.url

    @property
    def capabilities(self) -> Capabilities:
        """See `Store.capabilities`."""
        return self._store.capabilities

    def put(
        self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
    ) -> None:
        """See `Store.put`."""
        self._store.put(key, parts, is_unique=is_unique, is_checked=is_checked)
        self._answered()

    def replace(self, key: str, data: bytes) -> None:
        """See `Store.replace`."""
        self._store.replace(key, data)
        self._answered()

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Store.get`."""
        try:
            data = self._store.get(key, offset, length)
        except KeyMissing:
            self._answered()
            raise
        self._answered()
        return data

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Store.list`."""
        for info in self._store.list(prefix):
            self._answered()
            yield info
        self._answered()

    def delete(self, *keys: str) -> None:
        """See `Store.delete`."""
        self._store.delete(*keys)
        self._answered()

    def exists(self, key: str) -> bool:
        """See `Store.exists`."""
        found = self._store.exists(key)
        self._answered()
        return found

    def _answered(self) -> None:
        self._answered_at = self._clock()
