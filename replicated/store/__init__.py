"""Opening the store that a URL names."""

from __future__ import annotations

from replicated.store.base import Store


def open_store(url: str, *, create: bool) -> Store:
    """The store at `url` (`file:///absolute`); with `create`, make its directory when missing.

    Raises `ConfigError` for a URL that cannot be used and `RepositoryMissing` when nothing is there.
    """
    raise NotImplementedError
