"""The repositories that this process has open, by URL: each opened once and shared by all threads.

A bucket is opened with the variables that users' calls brought (`reaching`), and reached in another way at
once when those have changed. Whoever asks for one that does not answer is told so soon (`patience`), and can
have what this machine remembers of it instead (`standings`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeVar

from replicate.access import scheme_of
from replicate.errors import ReplicateError, RepositoryMissing, RepositoryUnreachable
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.settings import decode_settings
from replicated.keys import SETTINGS_KEY
from replicated.patience import Patience
from replicated.reaching import Access
from replicated.repository import Repository
from replicated.standings import Standings
from replicated.store import open_store
from replicated.store.base import KeyMissing, Store
from replicated.store.retrying import USER_PATIENCE_S
from replicated.store.switched import SwitchedStore
from replicated.store.unreachable import UnreachableStore

T = TypeVar("T")

#: Where requests cost money, it is looked so often whether a repository is still the same.
CHECK_INTERVAL_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class _Opened:
    repository: Repository
    store: SwitchedStore
    #: The bytes of its `repository.json`.
    identity: bytes
    #: With which variables it is reached.
    environment: Mapping[str, str] | None
    #: When it was seen to be the same repository, of `time.monotonic`.
    checked_at: float


@dataclass(slots=True)
class _Place:
    """What may be at one URL."""

    #: Held while it is opened or checked, where nobody minds waiting.
    opening: threading.Lock = field(default_factory=threading.Lock)
    #: Replaced as a whole; may be read without the lock.
    opened: _Opened | None = None
    #: Over a store that cannot be reached.
    remembered: Repository | None = None


class OpenRepositories:
    """Opens repositories on demand. Thread-safe; one that is slow to open holds up no other."""

    def __init__(
        self,
        cache: Path,
        wrap: Callable[[Store], Store] = lambda store: store,
        *,
        access: Access | None = None,
        standings: Standings | None = None,
        patience: Patience | None = None,
        store_patience_s: float = USER_PATIENCE_S,
    ) -> None:
        """`wrap` is put around the store of each. Without `patience`, who asks waits as the store does:
        requests that fail in passing are repeated for `store_patience_s`.
        """
        self._cache = cache
        self._wrap = wrap
        self._access = access or Access()
        self._standings = standings
        self._patience = patience
        self._store_patience_s = store_patience_s
        #: Guards the places and what is opened at each; a leaf.
        self._lock = threading.Lock()
        self._places: dict[str, _Place] = {}

    def get(self, url: str, *, create: bool = False) -> Repository:
        """The repository at `url`, made when missing if `create` is set; raises as `Repository.open`.

        A repository that was deleted, or deleted and made anew, since it was opened is noticed here; where
        that costs a request, within a minute.
        """
        place = self._place(url)
        opened = place.opened
        if opened is not None and self._is_fresh(opened, url):
            return opened.repository
        if self._patience is None or scheme_of(url) is None:
            with place.opening:
                return self._renew(place, url, create)
        return self._patience.run(
            ("open", url, create, self._way(url)),
            lambda: self._renew(place, url, create),
            url=url,
            answered_at=lambda: _answered_at(place),
            is_shared=True,
        )

    def known(self, url: str) -> Repository | None:
        """The repository at `url` if it is open already; asks nobody, so it costs nothing."""
        opened = self._place(url).opened
        return opened.repository if opened is not None else None

    def remembered(self, url: str, because: ReplicateError) -> Repository | None:
        """What this machine knows of a repository that cannot be reached; None when it never was.

        What is not known here raises `because` once more.
        """
        place = self._place(url)
        if place.opened is not None:
            return place.opened.repository
        settings = self._standings.settings(url) if self._standings is not None else b""
        if not settings:
            return None
        with place.opening:
            if place.remembered is None:
                store = UnreachableStore(
                    url, lambda: RepositoryUnreachable(because.message, hint=because.hint)
                )
                try:
                    place.remembered = Repository(store, decode_settings(settings), self._cache)
                except (Malformed, NewerFormat):
                    return None
            return place.remembered

    def has_used(self, url: str) -> bool:
        """Whether this machine has had the repository open before, and knows what is behind the URL."""
        return self.known(url) is not None or (
            self._standings is not None and bool(self._standings.settings(url))
        )

    def patiently(self, url: str, what: str, work: Callable[[], T]) -> T:
        """What `work` gives, which asks the store of `url`; given up when that falls silent.

        Raises `RepositoryUnreachable` then. `what` names the work: of one kind only one is done at a time.
        """
        if self._patience is None or scheme_of(url) is None:
            return work()
        place = self._place(url)
        return self._patience.run(
            (what, url, self._way(url)), work, url=url, answered_at=lambda: _answered_at(place)
        )

    def close(self) -> None:
        """Close all; call when no thread uses them any more."""
        with self._lock:
            for place in self._places.values():
                if place.opened is not None:
                    place.opened.repository.close()
                if place.remembered is not None:
                    place.remembered.close()
            self._places.clear()

    def _place(self, url: str) -> _Place:
        with self._lock:
            return self._places.setdefault(url, _Place())

    def _way(self, url: str) -> frozenset[tuple[str, str]]:
        """What tells apart in which way a bucket is reached."""
        return frozenset((self._access.environment(url) or {}).items())

    def _is_fresh(self, opened: _Opened, url: str) -> bool:
        return (
            opened.store.capabilities.has_costly_requests
            and time.monotonic() - opened.checked_at < CHECK_INTERVAL_S
            and opened.environment == self._access.environment(url)
        )

    def _renew(self, place: _Place, url: str, create: bool) -> Repository:
        """Open what is at a place, or see that it is what it was."""
        while True:
            environment = self._access.environment(url)
            begun = place.opened
            current = self._look_again(begun, url, create, environment) if begun is not None else None
            if begun is not None and current is None:
                self._give_up(place, begun)
                begun = None
            if current is None:
                current = self._open(url, create, environment)
            with self._lock:
                is_first = place.opened is begun
                is_newest = environment == self._access.environment(url)
                if is_first and is_newest:
                    place.opened = current
            if is_first and is_newest:
                if self._standings is not None:
                    self._standings.remember(url, current.identity)
                return current.repository
            # Another thread was faster, or the variables have changed meanwhile.
            if begun is None:
                current.repository.close()

    def _give_up(self, place: _Place, opened: _Opened) -> None:
        """What was there is not there any more."""
        with self._lock:
            if place.opened is opened:
                place.opened = None
        opened.repository.close()

    def _look_again(
        self, opened: _Opened, url: str, create: bool, environment: Mapping[str, str] | None
    ) -> _Opened | None:
        """The same repository, reached with these variables; None when there is another one, or none."""
        now = time.monotonic()
        if opened.environment != environment:
            opened.store.switch(self._open_store(url, create, environment))
        if _identity(opened.repository.store) != opened.identity:
            return None
        return replace(opened, environment=environment, checked_at=now)

    def _open(self, url: str, create: bool, environment: Mapping[str, str] | None) -> _Opened:
        now = time.monotonic()
        store = SwitchedStore(self._open_store(url, create, environment))
        repository = Repository.open_on(self._wrap(store), cache=self._cache, create=create)
        return _Opened(repository, store, repository.identity, environment, now)

    def _open_store(self, url: str, create: bool, environment: Mapping[str, str] | None) -> Store:
        return open_store(url, create=create, environment=environment, patience_s=self._store_patience_s)


def _answered_at(place: _Place) -> float:
    return place.opened.store.answered_at if place.opened is not None else 0.0


def _identity(store: Store) -> bytes:
    try:
        return store.get(SETTINGS_KEY)
    except KeyMissing:
        return b""
    except RepositoryMissing:
        return b""
