"""A store that fails now and then, before it has done what it was asked or after, as its seed says."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from replicated.store.base import Buffer, Capabilities, ObjectInfo, Store, StoreBusy, check_prefix

_Result = TypeVar("_Result")

PAGE = 2


class UnpagedFaultyStore:
    """Another store, of which `probability` of the calls fail, half of them after they were done."""

    def __init__(self, store: Store, seed: int, probability: float = 0.3) -> None:
        self._store = store
        self._random = random.Random(seed)
        self._probability = probability
        self.failures = 0

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def capabilities(self) -> Capabilities:
        return self._store.capabilities

    def put(
        self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
    ) -> None:
        self._perhaps(lambda: self._store.put(key, parts, is_unique=is_unique, is_checked=is_checked))

    def replace(self, key: str, data: bytes) -> None:
        self._perhaps(lambda: self._store.replace(key, data))

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._perhaps(lambda: self._store.get(key, offset, length))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for info in self._store.list(prefix):
            self._perhaps(lambda: None)
            yield info

    def delete(self, *keys: str) -> None:
        self._perhaps(lambda: self._store.delete(*keys))

    def exists(self, key: str) -> bool:
        return self._perhaps(lambda: self._store.exists(key))

    def _perhaps(self, call: Callable[[], _Result]) -> _Result:
        fate = self._random.random()
        if fate < self._probability / 2:
            self._fail()
        result = call()
        if fate >= 1 - self._probability / 2:
            self._fail()
        return result

    def _fail(self) -> None:
        self.failures += 1
        raise StoreBusy(f"failure {self.failures} was ordered", is_throttled=self._random.random() < 0.5)


class FaultyStore(UnpagedFaultyStore):
    """The same, listing page by page."""

    def list_pages(self, prefix: str, after: str = "") -> Iterator[Sequence[ObjectInfo]]:
        check_prefix(prefix)
        found = sorted((i for i in self._store.list(prefix) if i.key > after), key=lambda info: info.key)
        for start in range(0, len(found), PAGE):
            yield self._perhaps(lambda start=start: found[start : start + PAGE])
