"""What a URL of a bucket names: `s3://bucket[/prefix]`, `gs://bucket[/prefix]`.

Only the words of the URL are judged here; whether there is such a bucket, its store finds out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from replicate.errors import ConfigError

#: A key of a bucket has at most 1024 bytes, and ours need `MAX_KEY_LENGTH` of them.
MAX_PREFIX_BYTES: Final = 700

# Google allows underscores and longer names with dots in them, Amazon neither.
_NAMES = {
    "s3": re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"),
    "gs": re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]"),
}
_RULES = {
    "s3": "3 to 63 lower-case letters, digits, dots and hyphens",
    "gs": "3 to 222 lower-case letters, digits, dots, hyphens and underscores",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where in which bucket the objects of a repository lie."""

    scheme: str
    bucket: str
    #: What the name of every object begins with: empty, or ends in a slash.
    root: str

    @property
    def url(self) -> str:
        """The URL of it, with as few slashes as possible."""
        return f"{self.scheme}://{self.bucket}/{self.root}".rstrip("/")


def parse_bucket_url(url: str) -> Place:
    """The place that an `s3://` or `gs://` URL names; raises `ConfigError` for one that can name none.

    Upper case and spaces are fine in the prefix, which is no key of ours. More slashes than needed do not
    matter, so that one place has one URL.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    form = f"use one like {scheme}://bucket/prefix"
    if "@" in bucket:
        # What stands there may be a password: it is not repeated.
        raise ConfigError(
            f"a {scheme}:// URL must not hold a user or a password",
            hint=f"{form}, and give credentials as the SDK of the cloud wants them",
        )
    if bucket.startswith("arn:"):
        raise ConfigError(f"not the name of a bucket: {bucket}", hint="use the alias of the access point")
    if ":" in bucket:
        raise ConfigError(
            f"a {scheme}:// URL has no port: {bucket}",
            hint=f"{form}, and name another server with {_ENDPOINT[scheme]}",
        )
    if not _NAMES[scheme].fullmatch(bucket) or ".." in bucket:
        raise ConfigError(f"not the name of a bucket: {bucket!r}", hint=f"{form}; it has {_RULES[scheme]}")
    names = [name for name in prefix.split("/") if name]
    for sign in "?#\\":
        if sign in prefix:
            raise ConfigError(f"a {scheme}:// URL cannot hold {sign!r}: {url}", hint=form)
    if not prefix.isprintable() or any(name.strip(".") == "" for name in names):
        raise ConfigError(f"not a prefix of objects: {prefix!r}", hint=form)
    root = "".join(f"{name}/" for name in names)
    try:
        size = len(root.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"not a prefix of objects: {prefix!r}", hint=form) from None
    if size > MAX_PREFIX_BYTES:
        raise ConfigError(
            f"the prefix of {scheme}://{bucket} is longer than {MAX_PREFIX_BYTES} bytes", hint=form
        )
    return Place(scheme, bucket, root)


_ENDPOINT: Final = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}
