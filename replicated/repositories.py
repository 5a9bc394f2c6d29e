"""The repositories that this daemon has open, by URL: each opened once and shared by all threads."""

from __future__ import annotations

import threading
from pathlib import Path

from replicate.errors import RepositoryMissing
from replicated.repository import Repository
from replicated.store.base import KeyMissing


class OpenRepositories:
    """Opens repositories on demand. Thread-safe; the lock is held while one is being opened."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
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
            repository = Repository.open(url, cache=self._cache, create=create)
            self._open[url] = repository, _identity(repository)
            return repository

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
