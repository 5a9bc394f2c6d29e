"""Opening the store that a URL names."""

from __future__ import annotations

import os
from pathlib import Path

from replicate.errors import ConfigError, RepositoryMissing, RepositoryUnreachable
from replicated.store.base import Store
from replicated.store.local import LocalStore

_FILE = "file://"
_BUCKETS = ("s3://", "gs://")


def open_store(url: str, *, create: bool) -> Store:
    """The store at `url` (`file:///absolute`); with `create`, make its directory when missing.

    Raises `ConfigError` for a URL that cannot be used and `RepositoryMissing` when nothing is there.
    """
    if url.startswith(_BUCKETS):
        raise ConfigError(
            f"this version stores on local disk only, not in a bucket: {url}",
            hint="use a repository URL like file:///path/to/repository",
        )
    path = url.removeprefix(_FILE)
    if not url.startswith(_FILE) or not path.startswith("/") or "\0" in path:
        raise ConfigError(f"not a repository URL: {url}", hint="use one like file:///path/to/repository")
    root = Path(os.path.abspath(path))
    try:
        if create:
            _make_root(root)
        if not root.is_dir():
            reason = "it is not a directory" if root.exists() else "there is no such directory"
            raise RepositoryMissing(
                f"no repository at {url}: {reason}",
                hint="check the URL; the first `replicate.init` there makes a repository",
            )
    except OSError as error:
        raise RepositoryUnreachable(f"cannot open {url}: {error.strerror}") from error
    store = LocalStore(root)
    if create:
        store.remove_stale_temporaries()
    return store


def _make_root(root: Path) -> None:
    """Make the directory with those above it, each durable in its parent."""
    if root.is_dir():
        return
    if root.exists():
        return
    _make_root(root.parent)
    root.mkdir(exist_ok=True)
    descriptor = os.open(root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
