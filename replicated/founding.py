"""The beginning of a repository: how one is made, and how it is known to be one.

Used by `repository` when it is opened. A store that holds objects but not the one that says what they are is
never taken for an empty one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from replicate.errors import RepositoryDamaged, RepositoryIncompatible, RepositoryMissing
from replicate.ids import new_id
from replicate.records import utc_now
from replicated.format import metadata
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.settings import RepositorySettings, decode_settings, encode_settings
from replicated.keys import (
    COMPLETE_KEY,
    EXPERIMENT_PREFIX,
    LOG_PREFIX,
    PACK_PREFIX,
    SEGMENT_PREFIX,
    SETTINGS_KEY,
)
from replicated.store.base import KeyMissing, Store

T = TypeVar("T")


def found_repository(store: Store) -> None:
    """Make an empty repository, unless somebody else does at the same moment."""
    _refuse_headless(store)
    settings = RepositorySettings(id=new_id(), created=utc_now())
    try:
        store.put(SETTINGS_KEY, [encode_settings(settings)])
    except RepositoryDamaged:
        # Another one is there by now; whether it is good shows when it is loaded.
        return
    if store.capabilities.has_costly_requests:
        complete_log(store)


def complete_log(store: Store) -> None:
    """Say that all records are in the log, so that nobody has to list them."""
    store.put(COMPLETE_KEY, [metadata.encode_complete()], is_unique=True, is_checked=False)


def _refuse_headless(store: Store) -> None:
    """Raise `RepositoryDamaged` when there are objects but not the one that says what they are."""
    for prefix in (LOG_PREFIX, EXPERIMENT_PREFIX, PACK_PREFIX):
        # Asked for again once something was seen: somebody may make the repository and write at this moment.
        if next(store.list(prefix), None) is not None and not store.exists(SETTINGS_KEY):
            raise RepositoryDamaged(
                f"{SETTINGS_KEY} is missing in {store.url}, though there are objects below {prefix}",
                hint="put it back from a copy; without it nothing is written there",
                fields={"key": SETTINGS_KEY},
            )


def forget_segments(store: Store) -> None:
    """Where records are listed, and changed without the log: let nobody believe what the log says of them.

    As where a bucket was copied to a disk, from which it may be copied back.
    """
    if store.exists(COMPLETE_KEY):
        store.delete(COMPLETE_KEY)
        store.delete(*(info.key for info in store.list(SEGMENT_PREFIX)))


def load_settings(store: Store) -> tuple[RepositorySettings, bytes]:
    """What a repository says of itself, and its bytes; raises `RepositoryMissing` when there is none."""
    try:
        data = store.get(SETTINGS_KEY)
        return decode_object(store.url, SETTINGS_KEY, data, decode_settings), data
    except KeyMissing:
        _refuse_headless(store)
        raise RepositoryMissing(
            f"no repository at {store.url}: there is no {SETTINGS_KEY}",
            hint="check the URL; the first `replicate.init` there makes a repository",
        ) from None


def decode_object(url: str, key: str, data: bytes, decode: Callable[[bytes], T]) -> T:
    """A decoded object of the store at `url`; raises `RepositoryDamaged`, `RepositoryIncompatible`."""
    try:
        return decode(data)
    except Malformed as error:
        raise RepositoryDamaged(
            f"{key} in {url} is damaged: {error}",
            hint="the rest of the repository can still be read",
            fields={"key": key},
        ) from error
    except NewerFormat as error:
        raise RepositoryIncompatible(
            f"{key} in {url} was written by a newer version: {error}",
            hint="upgrade replicate-vcs; nothing was changed",
            fields={"key": key},
        ) from error
