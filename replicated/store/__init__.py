"""Opening the store that a URL names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from replicate.errors import ConfigError, RepositoryMissing, RepositoryUnreachable
from replicated.store.base import Store
from replicated.store.buckets import parse_bucket_url
from replicated.store.local import LocalStore
from replicated.store.retrying import USER_PATIENCE_S, RetryingStore

_FILE = "file://"


def open_store(
    url: str,
    *,
    create: bool,
    environment: Mapping[str, str] | None = None,
    patience_s: float = USER_PATIENCE_S,
) -> Store:
    """The store at `file:///absolute`, `s3://bucket[/prefix]` or `gs://bucket[/prefix]`.

    With `create`, a directory that is missing is made at once, a bucket when something is written to it.
    `environment` holds the variables of the cloud SDKs (AWS_*, GOOGLE_*, …) as they are where the user called
    us; None: those of this process. What fails in passing is repeated for `patience_s` (`RetryingStore`).

    Raises `ConfigError` for a URL that cannot be used and `RepositoryMissing` when nothing is there: with a
    bucket only the first request does, because looking would cost one more.
    """
    if url.startswith("s3://"):
        return RetryingStore(_open_s3(url, create, environment), patience_s=patience_s)
    if url.startswith("gs://"):
        # Needs a library that is an extra.
        from replicated.store.gs import open_gs

        return RetryingStore(open_gs(url, create=create, environment=environment), patience_s=patience_s)
    path = url.removeprefix(_FILE)
    if not url.startswith(_FILE) or not path.startswith("/") or "\0" in path:
        raise ConfigError(
            f"not a repository URL: {url}",
            hint="use one like file:///path/to/repository, s3://bucket/prefix or gs://bucket/prefix",
        )
    return _open_local(url, Path(os.path.abspath(path)), create)


def _open_s3(url: str, create: bool, environment: Mapping[str, str] | None) -> Store:
    place = parse_bucket_url(url)
    # For weight: most repositories need none of it.
    from replicated.store.s3.store import S3Store

    return S3Store(place, create=create, environment=environment)


def _open_local(url: str, root: Path, create: bool) -> Store:
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
