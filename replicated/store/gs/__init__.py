"""Opening a store in a bucket of Google Cloud Storage: `gs://bucket[/prefix]`.

The library for it is an extra, and heavy: it is imported by `open_gs`, not with this module. Nothing is asked
of the service yet: the first request tells whether the bucket is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from replicate.errors import ConfigError
from replicated.store.buckets import parse_bucket_url

if TYPE_CHECKING:
    from replicated.store.gs.store import GsStore


def open_gs(url: str, *, create: bool, environment: Mapping[str, str] | None = None) -> GsStore:
    """The store at `gs://bucket[/prefix]`; with `create`, the first `put` makes the bucket if it is missing.

    `environment` holds the variables that say who we are (see `access`); None: those of this process.
    Raises `ConfigError` for a URL that cannot be used and when the library is not installed, and
    `RepositoryUnreachable` when there are no credentials.
    """
    place = parse_bucket_url(url)
    try:
        from replicated.store.gs.access import find_access
        from replicated.store.gs.store import GsStore
    except ImportError as error:
        if not (error.name or "").startswith(("google", "requests")):
            raise
        raise ConfigError(
            f"{url} needs the library of Google Cloud Storage, which is not installed",
            hint="pip install 'replicate-vcs[gs]'",
        ) from error
    return GsStore(find_access(environment), place, create=create)
