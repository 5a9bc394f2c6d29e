"""The tree caches of the repositories that this daemon has open. Called by `intake`, for captures."""

from __future__ import annotations

import threading
from pathlib import Path

from replicated.repositories import OpenRepositories
from replicated.snapshot.treecache import TreeCache


class TreeCaches:
    """Opens tree caches on demand. Thread-safe."""

    def __init__(self, directory: Path, repositories: OpenRepositories) -> None:
        self._directory = directory
        self._repositories = repositories
        self._lock = threading.Lock()
        self._open: dict[str, tuple[str, TreeCache]] = {}

    def find(self, url: str) -> TreeCache | None:
        """The cache for the repository at `url`; None while that is not open: captures do not wait."""
        repository = self._repositories.known(url)
        if repository is None:
            return None
        with self._lock:
            known = self._open.get(url)
            if known is not None:
                if known[0] == repository.id:
                    return known[1]
                known[1].close()  # the repository was deleted and made anew
            cache = TreeCache(self._directory, repository.id, url)
            self._open[url] = repository.id, cache
            return cache

    def close(self) -> None:
        """Close all; call when no thread uses them any more."""
        with self._lock:
            for _, cache in self._open.values():
                cache.close()
            self._open.clear()
