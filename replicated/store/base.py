"""What a store is: plain immutable objects under keys, on whatever holds them.

A store knows nothing of chunks, packs or snapshots; `repository` gives the keys their meaning. Every
implementation passes the contract suite in tests/store. Invariant: what `put` has returned for can be
read back, whole, after a power loss, and an object is never visible in part.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from replicate.errors import RepositoryUnreachable

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap

MAX_KEY_LENGTH = 256

# Lower case only, because some file systems cannot tell the cases apart.
_KEY = re.compile(r"[a-z0-9._-]+(/[a-z0-9._-]+)*")
_PREFIX = re.compile(r"[a-z0-9._/-]*")


class KeyMissing(Exception):
    """There is no object under `key`."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class StoreBusy(RepositoryUnreachable):
    """A request failed in a way that passes: it may be made again, later rather than at once.

    `is_throttled`: the store asked for fewer requests. `store.retrying` makes requests again; who meets this
    above it has met the end of its patience.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        fields: Mapping[str, str] | None = None,
        is_throttled: bool = False,
    ) -> None:
        super().__init__(message, hint=hint, fields=fields)
        self.is_throttled = is_throttled


@dataclass(frozen=True, slots=True)
class Capabilities:
    """How stores differ, as data."""

    #: The directory below which an object's key is its path, or None where objects are not local files.
    local_root: Path | None = None
    #: Whether reading asks no other machine, so that what was read need not be kept on this one's disk.
    is_near: bool = False
    #: Whether each request costs money and a round trip, and so do a thousand names in a listing: then what
    #: is new is found in the log of the repository, not by listing all there is.
    has_costly_requests: bool = False
    #: Requests that are worth making at the same time.
    parallel_requests: int = 4
    #: Two ranges of an object so close to each other are cheaper to have in one request.
    max_gap_bytes: int = 64 << 10
    #: No more than this is worth reading in one request while others wait.
    max_read_bytes: int = 8 << 20


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object in a listing."""

    key: str
    size: int
    #: Seconds since it was made or replaced, by the clock of the store; None where it does not tell.
    age_s: float | None = field(default=None, compare=False)


class Store(Protocol):
    """Objects under keys. All methods may be called from any thread.

    Errors: `RepositoryFull` when there is no space, `RepositoryUnreachable` for whatever else fails
    underneath; both name what was tried and the reason. Keys that `check_key` refuses are `ValueError`:
    a key is never made of user input.
    """

    @property
    def url(self) -> str:
        """The URL that opens this store."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What this store can do."""
        ...

    def put(
        self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
    ) -> None:
        """Make a new object of the concatenated parts; it survives power loss when this returns.

        Idempotent: the same bytes under the same key are fine. Raises `RepositoryDamaged` when the key
        already holds other bytes, which stay as they are; `is_unique`: nobody else uses this key, so that
        need not be looked for. Unless `is_checked`, the caller sees for itself whether the object is there.
        """
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Make or overwrite a small object atomically; a power loss may lose the new or the old bytes."""
        ...

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """At most `length` bytes from `offset` (all that follow when None); fewer only at the end.

        Raises `KeyMissing`.
        """
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix`, in any order; unfinished ones are not shown."""
        ...

    def delete(self, *keys: str) -> None:
        """Remove objects, in this order; durable when it returns. Keys that are not there are fine.

        Where requests are costly, many go in one, and then only the last is sure to go after all others.
        """
        ...

    def exists(self, key: str) -> bool:
        """Whether there is an object under `key`."""
        ...


def is_key(key: str) -> bool:
    """Whether `key` can name an object: `/`-separated names of `a-z 0-9 . _ -`, none of them dots only."""
    return (
        len(key) <= MAX_KEY_LENGTH
        and _KEY.fullmatch(key) is not None
        and not any(part.strip(".") == "" for part in key.split("/"))
    )


def check_key(key: str) -> str:
    """The key itself; raises `ValueError` unless `is_key`."""
    if not is_key(key):
        raise ValueError(f"not a key of a store: {key!r}")
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself; raises `ValueError` when no key could begin with it."""
    if not _PREFIX.fullmatch(prefix) or ".." in prefix or "//" in prefix or prefix.startswith("/"):
        raise ValueError(f"not a prefix of keys: {prefix!r}")
    return prefix
