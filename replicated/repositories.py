"""The repositories that this daemon has open, by URL: each opened once and shared by all threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from replicate.errors import RepositoryMissing
from replicated.repository import Repository
from replicated.store import open_store
from replicated.store.base import KeyMissing, Store


class OpenRepositories:
    """Opens repositories on demand. Thread-safe; the lock is held while one is being opened."""

    def __init__(self, cache: Path, wrap: Callable[[Store], Store] = lambda store: store) -> None:
        """`wrap` is put around the store of each."""
        self._cache = cache
        self._wrap = wrap
        self._lock = threading.Lock()
        self._open: dict[str, tuple[Repository, bytes]] = {}

    def get(self, url: str, *, create: bool = False) -> Repository:
        """The repository at `url`, made when missing if `create` is set; raises as `Repository.open`.

        A repository that was deleted, or deleted and made anew, since it was opened is noticed here.
        """
        with self._lock:
            known = self._open.get(url)
            if known is not None:
                repository, identity = known
                if _identity(repository) == identity:
                    return repository
                del self._open[url]
                repository.close()
            store = self._wrap(open_store(url, create=create))
            repository = Repository.open_on(store, cache=self._cache, create=create)
            self._open[url] = repository, _identity(repository)
            return repository

    def known(self, url: str) -> Repository | None:
        """The repository at `url` if it is open already; asks nobody, so it costs nothing."""
        with self._lock:
            known = self._open.get(url)
        return known[0] if known else None

    def close(self) -> None:
        """Close all; call when no thread uses them any more."""
        with self._lock:
            for repository, _ in self._open.values():
                repository.close()
            self._open.clear()


def _identity(repository: Repository) -> bytes:
    try:
        return repository.store.get("repository.json")
    except KeyMissing:
        return b""
    except RepositoryMissing:
        return b""
