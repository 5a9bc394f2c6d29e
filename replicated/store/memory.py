"""A store in memory: a real one in every respect but that it dies with the process. For tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

from replicate.errors import RepositoryDamaged
from replicated.store.base import Buffer, Capabilities, KeyMissing, ObjectInfo, check_key, check_prefix


class MemoryStore:
    """A `Store` in a dictionary."""

    def __init__(self, name: str = "test") -> None:
        self._name = name
        self._objects: dict[str, bytes] = {}
        self._made: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """`memory:` and the name; no store can be opened by it."""
        return f"memory:{self._name}"

    @property
    def capabilities(self) -> Capabilities:
        """Nothing is nearer."""
        return Capabilities(is_near=True)

    def put(
        self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
    ) -> None:
        """See `Store.put`."""
        data = b"".join(parts)
        with self._lock:
            self._made.setdefault(key, time.monotonic())
            if self._objects.setdefault(check_key(key), data) != data:
                raise RepositoryDamaged(
                    f"another object is already stored as {key} in {self.url}", fields={"key": key}
                )

    def replace(self, key: str, data: bytes) -> None:
        """See `Store.replace`."""
        with self._lock:
            self._objects[check_key(key)] = bytes(data)
            self._made[key] = time.monotonic()

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Store.get`."""
        with self._lock:
            data = self._objects.get(check_key(key))
        if data is None:
            raise KeyMissing(key)
        return data[offset:] if length is None else data[offset : offset + length]

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Store.list`."""
        check_prefix(prefix)
        with self._lock:
            now = time.monotonic()
            found = [
                ObjectInfo(key, len(data), now - self._made[key])
                for key, data in self._objects.items()
                if key.startswith(prefix)
            ]
        yield from found

    def delete(self, *keys: str) -> None:
        """See `Store.delete`."""
        with self._lock:
            for key in keys:
                self._objects.pop(check_key(key), None)
                self._made.pop(key, None)

    def exists(self, key: str) -> bool:
        """See `Store.exists`."""
        with self._lock:
            return check_key(key) in self._objects
