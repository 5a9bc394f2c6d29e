"""Waiting for a repository that may be out of reach: as long as it answers, and not much longer.

Requests of users must not hang. Work that asks a store far away is done in a thread of its own, which goes on
when the one who waited has given up: who comes next waits for the same work, or is told at once that it has
been stuck. Work on local files is done by who wants it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, Final, TypeVar

from replicate.errors import RepositoryUnreachable

T = TypeVar("T")

#: Somebody who waits is told so soon that a store does not answer: a little later than a store which fails
#: gives up by itself, because that one knows the cause.
PATIENCE_S: Final = 12.0
_POLL_S: Final = 0.1


class _Flight:
    """Work that is being done, and what came of it."""

    def __init__(self, now: float) -> None:
        self.begun = now
        self.has_ended = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None


class Patience:
    """Owner of the threads that do such work. Thread-safe; the lock is a leaf."""

    def __init__(self, patience_s: float = PATIENCE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._lock = threading.Lock()
        self._flights: dict[Hashable, _Flight] = {}

    def run(
        self,
        key: Hashable,
        work: Callable[[], T],
        *,
        url: str,
        answered_at: Callable[[], float] = lambda: 0.0,
        is_shared: bool = False,
    ) -> T:
        """The result of `work`, or its error; `RepositoryUnreachable` when the store is silent too long.

        Of one key only one runs at a time. Who comes while it runs takes over its error, and if
        `is_shared` its result; else `work` then runs again, since what was new may have been missed.
        `answered_at` tells when
        the store last answered, by the clock.
        """
        while True:
            with self._lock:
                flight = self._flights.get(key)
                is_mine = flight is None
                if flight is None:
                    flight = self._flights[key] = _Flight(self._clock())
            if is_mine:
                self._start(key, flight, work)
            self._wait(flight, url, answered_at)
            if flight.error is not None:
                raise _again(flight.error) if not is_mine else flight.error
            if is_mine or is_shared:
                result: T = flight.result
                return result

    def _start(self, key: Hashable, flight: _Flight, work: Callable[[], object]) -> None:
        def run() -> None:
            try:
                flight.result = work()
            except BaseException as error:
                flight.error = error
            finally:
                with self._lock:
                    del self._flights[key]
                flight.has_ended.set()

        threading.Thread(target=run, name="far", daemon=True).start()

    def _wait(self, flight: _Flight, url: str, answered_at: Callable[[], float]) -> None:
        while not flight.has_ended.wait(_POLL_S):
            if self._clock() - max(flight.begun, answered_at()) > self._patience_s:
                raise RepositoryUnreachable(
                    f"{url} does not answer: nothing came for {self._patience_s:.0f} s",
                    hint="check the network, the endpoint and the proxy; `replicate doctor` tries it",
                )


def _again(error: BaseException) -> BaseException:
    """The same error, of its own for another thread."""
    if isinstance(error, RepositoryUnreachable):
        return type(error)(error.message, hint=error.hint, fields=error.fields)
    return error
