"""A store that repeats what failed in a way that passes, as long as its user has patience.

It is the only one that repeats: the clients below try once. Pauses grow, and are random from nothing up to
their length, so that many who were refused together do not come back together. How many requests are on
their way at once follows what the store can take: half as many after it asked for fewer, then slowly more.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol, TypeVar, runtime_checkable

from replicated.store.base import Buffer, Capabilities, ObjectInfo, Store, StoreBusy

#: Somebody looks at a prompt: what does not answer in this time is said to be away.
USER_PATIENCE_S: Final = 10.0
#: Work behind the scenes outlasts a restart of the server; then `status` says what it waits for.
WORKER_PATIENCE_S: Final = 60.0

# The longest pause before the second try, and before any; longer where fewer requests were asked for.
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
_FIRST_THROTTLED_PAUSE_S: Final = 0.5
_LONGEST_THROTTLED_PAUSE_S: Final = 20.0

_Result = TypeVar("_Result")


@runtime_checkable
class PagedStore(Protocol):
    """A store whose listing can go on where it was interrupted."""

    def list_pages(self, prefix: str, after: str = "") -> Iterator[Sequence[ObjectInfo]]:
        """What `list` gives, in the order of the keys and from behind the key `after`, one request a page."""
        ...


class InFlight:
    """How many requests are made at the same time. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._limit = float(most)
        self._running = 0
        # Counts how often the limit was halved.
        self._halvings = 0

    @property
    def limit(self) -> int:
        """How many are allowed now."""
        return int(self._limit)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Inside, a request is made; waits until that is allowed."""
        with self._changed:
            while self._running >= self.limit:
                self._changed.wait()
            self._running += 1
            halvings = self._halvings
        is_throttled = False
        try:
            yield
        except StoreBusy as error:
            is_throttled = error.is_throttled
            raise
        finally:
            with self._changed:
                self._running -= 1
                if not is_throttled:
                    # One more after as many as are allowed at once.
                    self._limit = min(float(self._most), self._limit + 1 / self._limit)
                elif halvings == self._halvings:
                    # Those that were on their way already when it was halved say nothing new.
                    self._limit = max(1.0, self._limit / 2)
                    self._halvings += 1
                self._changed.notify_all()


class RetryingStore:
    """Another store, whose passing failures are not seen for `patience_s`."""

    def __init__(
        self,
        store: Store,
        *,
        patience_s: float = USER_PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        fraction: Callable[[], float] = random.random,
    ) -> None:
        """`fraction` chooses how much of a pause is waited for, from 0 to 1."""
        self._store = store
        #: How long one call goes on trying. May be set at any time: processes that work behind the scenes set
        #: `WORKER_PATIENCE_S`.
        self.patience_s = patience_s
        self._clock = clock
        self._fraction = fraction
        self._closed = threading.Event()
        self._in_flight = InFlight(store.capabilities.parallel_requests)

    @property
    def url(self) -> str:
        """That of the other store."""
        return self._store.url

    @property
    def capabilities(self) -> Capabilities:
        """Those of the other store."""
        return self._store.capabilities

    @property
    def below(self) -> Store:
        """The other store."""
        return self._store

    @property
    def in_flight_limit(self) -> int:
        """How many requests may be on their way at once now."""
        return self._in_flight.limit

    def put(
        self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
    ) -> None:
        """See `Store.put`."""
        self._repeat(lambda: self._store.put(key, parts, is_unique=is_unique, is_checked=is_checked))

    def replace(self, key: str, data: bytes) -> None:
        """See `Store.replace`."""
        self._repeat(lambda: self._store.replace(key, data))

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Store.get`."""
        return self._repeat(lambda: self._store.get(key, offset, length))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Store.list`. Goes on where it was interrupted; each page has a patience of its own."""
        store = self._store
        if not isinstance(store, PagedStore):
            yield from self._repeat(lambda: list(store.list(prefix)))
            return
        after = ""
        pages = store.list_pages(prefix)
        is_broken = False

        def next_page() -> Sequence[ObjectInfo] | None:
            nonlocal pages, is_broken
            if is_broken:
                # One that has raised gives nothing more.
                pages, is_broken = store.list_pages(prefix, after), False
            try:
                return next(pages, None)
            except StoreBusy:
                is_broken = True
                raise

        while (page := self._repeat(next_page)) is not None:
            if page:
                after = page[-1].key
            yield from page

    def delete(self, *keys: str) -> None:
        """See `Store.delete`."""
        self._repeat(lambda: self._store.delete(*keys))

    def exists(self, key: str) -> bool:
        """See `Store.exists`."""
        return self._repeat(lambda: self._store.exists(key))

    def close(self) -> None:
        """Repeat nothing any more: who waits to gets the error that it waits over. May be called twice."""
        self._closed.set()
        close = getattr(self._store, "close", None)
        if close is not None:
            close()

    def _repeat(self, call: Callable[[], _Result]) -> _Result:
        began = self._clock()
        tries = 0
        while True:
            try:
                with self._in_flight.one():
                    return call()
            except StoreBusy as error:
                tries += 1
                pause = self._fraction() * longest_pause_s(tries, is_throttled=error.is_throttled)
                waited = self._clock() - began
                if waited + pause > self.patience_s or self._closed.wait(pause):
                    raise _tried(error, tries, waited) from error


def longest_pause_s(tries: int, *, is_throttled: bool) -> float:
    """The longest pause after so many tries that failed."""
    first, longest = _FIRST_PAUSE_S, _LONGEST_PAUSE_S
    if is_throttled:
        first, longest = _FIRST_THROTTLED_PAUSE_S, _LONGEST_THROTTLED_PAUSE_S
    return float(min(longest, first * 2 ** min(tries - 1, 30)))


def _tried(error: StoreBusy, tries: int, waited_s: float) -> StoreBusy:
    if tries == 1:
        return error
    return StoreBusy(
        f"{error.message} ({tries} tries in {waited_s:.0f} s)",
        hint=error.hint,
        fields=error.fields,
        is_throttled=error.is_throttled,
    )
