"""Makes few index objects of many, so that who opens a repository needs few requests for its index.

Like the levels of a log-structured tree: several small objects of a level become one of the next, with the
same sections. What is merged is put, and seen in a listing, before what it was made of is deleted, so at
every moment each pack is in some object of every listing. The name follows from the content: two machines
that merge the same objects write the same one, and whoever is killed in between leaves only what is merged
again later. Used by `jobs` after a job, and by `collecting`, which leaves out packs that go.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final

from blake3 import blake3

from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.listing import Section, join_sections, split_sections
from replicated.index import Index
from replicated.keys import LogListing, index_key, level_of, levelled_name
from replicated.log import Log
from replicated.store.base import KeyMissing, ObjectInfo, Store

#: So many small objects of one level are worth merging.
FEWEST_MERGED: Final = 8
#: One of this size stays as it is, and none is made that is much larger: whoever takes it in needs some
#: hundred MB for it. It lists 350,000 chunks, of tensors 350 GB.
LARGE_BYTES: Final = 16 << 20
#: Merged at once.
MOST_MERGED: Final = 4096
#: When many machines see that merging is worth it, so few of them do it after a job; soon one has.
CHANCE: Final = 0.5

_log = logging.getLogger(__name__)


class IndexChanged(Exception):
    """Index objects went, or do not show, while they were being merged: to be looked at again."""


def plan_merge(objects: Mapping[str, ObjectInfo]) -> list[str]:
    """The names of the index objects that are worth merging now; none for most of the time."""
    small = sorted(name for name, info in objects.items() if info.size < LARGE_BYTES)
    levels = [level_of(name) for name in small]
    for level in sorted(set(levels)):
        # With those of lower levels, which would otherwise stay until there are many of them.
        if levels.count(level) >= FEWEST_MERGED:
            return [name for name in small if level_of(name) <= level][:MOST_MERGED]
    return []


def compact(store: Store, log: Log, index: Index, *, chance: Callable[[], float] = random.random) -> bool:
    """Merge index objects if the last listing shows that it is worth it; whether that was done.

    Without that it makes no request. Raises `RepositoryUnreachable`, `RepositoryFull`; nothing is lost then.
    """
    listing = log.last
    names = plan_merge(listing.index) if listing is not None else []
    if not names or chance() >= CHANCE:
        return False
    try:
        merge(store, log, names, index.list_gone())
    except IndexChanged as error:
        _log.info("index objects are not merged now: %s", error)
        return False
    _log.info("merged %d index objects of %s", len(names), store.url)
    return True


def merge(store: Store, log: Log, names: Sequence[str], left_out: Collection[bytes]) -> LogListing:
    """Put these index objects together anew, without some packs; a listing that shows the result.

    Damaged ones are passed over and stay. Raises `IndexChanged` when some are gone, or what was put does not
    show: then nothing was deleted.
    """
    made: dict[str, int] = {}
    merged: list[str] = []
    level = max(map(level_of, names)) + 1
    for data in _join(_read(store, sorted(names), merged), left_out):
        name = levelled_name(level, blake3(data).hexdigest())
        store.put(index_key(name), [data])
        made[name] = len(data)
    listing = log.list()
    for name, size in made.items():
        info = listing.index.get(name)
        if info is None or info.size != size:
            raise IndexChanged(f"{store.url} does not list what was put there: {index_key(name)}")
    store.delete(*(index_key(name) for name in merged if name not in made))
    return listing


def _read(store: Store, names: Sequence[str], merged: list[str]) -> Iterator[list[Section]]:
    """The sections of each object; the names of those that could be read are added to `merged`."""
    for name in names:
        key = index_key(name)
        try:
            sections = split_sections(store.get(key))
        except KeyMissing:
            raise IndexChanged(f"{key} is gone") from None
        except (Malformed, NewerFormat) as error:
            _log.warning("index object %s in %s cannot be merged: %s", key, store.url, error)
            continue
        merged.append(name)
        yield sections


def _join(objects: Iterator[list[Section]], left_out: Collection[bytes]) -> Iterator[bytes]:
    """Index objects with each pack once; none when there is no pack."""
    seen = set(left_out)
    parts: list[memoryview] = []
    size = 0
    for sections in objects:
        for section in sections:
            if section.name in seen:
                continue
            seen.add(section.name)
            if parts and size + len(section.data) > LARGE_BYTES:
                yield join_sections(parts)
                parts, size = [], 0
            parts.append(section.data)
            size += len(section.data)
    if parts:
        yield join_sections(parts)
