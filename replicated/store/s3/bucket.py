"""Making the bucket of a new repository."""

from __future__ import annotations

from typing import Any, Final

from replicate.errors import ConfigError, RepositoryMissing
from replicated.store.buckets import Place
from replicated.store.s3.client import DEFAULT_REGION, Clients
from replicated.store.s3.errors import Kind, Trouble, explain, read_trouble

# Said by servers that have no regions, or other ones than they are asked for.
_WRONG_REGION: Final = (
    "IllegalLocationConstraintException",
    "InvalidLocationConstraint",
    "InvalidRegion",
    "MalformedXML",
    "InvalidRequest",
)


def make_bucket(clients: Clients, place: Place) -> None:
    """Make the bucket in the region that is configured; fine when it is there already.

    Raises `RepositoryMissing` when that is not allowed, `ConfigError` when the name is somebody else's.
    """
    region = clients.region
    trouble = _try(clients, place, "" if region in ("", DEFAULT_REGION) else region)
    if trouble is not None and trouble.code in _WRONG_REGION:
        trouble = _try(clients, place, "" if region != DEFAULT_REGION else trouble.region)
    if trouble is None or trouble.code == "BucketAlreadyOwnedByYou":
        return
    fields = {"url": place.url, "code": trouble.code}
    if trouble.code == "BucketAlreadyExists":
        raise ConfigError(
            f"the bucket {place.bucket} belongs to somebody else",
            hint="choose another name: those of buckets are shared by everybody",
            fields=fields,
        )
    if trouble.kind in (Kind.DENIED, Kind.UNSUPPORTED):
        raise RepositoryMissing(
            f"there is no bucket {place.bucket} at {clients.endpoint}, and it cannot be made: "
            f"{trouble.code}: {trouble.reason}",
            hint=f"have it made (`aws s3 mb s3://{place.bucket}`), or allow s3:CreateBucket",
            fields=fields,
        )
    raise explain(trouble, f"make the bucket {place.bucket}", place.url, clients.endpoint)


def _try(clients: Clients, place: Place, region: str) -> Trouble | None:
    arguments: dict[str, Any] = {"Bucket": place.bucket}
    if region:
        arguments["CreateBucketConfiguration"] = {"LocationConstraint": region}
    try:
        clients.get().create_bucket(**arguments)
    except Exception as error:
        return read_trouble(error)
    return None
