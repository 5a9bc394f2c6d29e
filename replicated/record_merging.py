"""Merges records into segments, so that who opens a repository needs few requests for all of them.

What was announced and committed goes into a segment, and only when a listing shows the segment, its
announcements are deleted; segments of a level become one of the next. Two machines that do it at once write
the same records twice, which costs nothing but space. Used by `upkeep` after jobs, where requests are costly.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from blake3 import blake3

from replicate.errors import RepositoryDamaged
from replicated.format.segment import MAX_SEGMENT_PLAIN_BYTES, SegmentRecord, build_segment
from replicated.founding import complete_log
from replicated.keys import LETTERS, Announced, LogListing, level_of, levelled_name, segment_key
from replicated.record_log import list_announced, load_records, load_segment
from replicated.repository import Repository
from replicated.store.base import KeyMissing, StoreBusy

#: So many announcements are worth merging: with them a listing still is one page.
FEWEST_ANNOUNCED: Final = 200
#: So many segments of a level, each smaller than this, are worth merging.
FEWEST_SEGMENTS: Final = 8
LARGE_SEGMENT_BYTES: Final = 4 << 20
#: Many machines see at once that merging is worth it; so few of them do it after a job.
CHANCE: Final = 0.5

_log = logging.getLogger(__name__)


def merge_records(repository: Repository, *, chance: Callable[[], float] = random.random) -> bool:
    """Merge if the last listing shows that it is worth it; whether that was done.

    Without that it makes no request. Raises `RepositoryUnreachable`, `RepositoryFull`; nothing is lost then.
    """
    listing = repository.log.last
    if listing is None:
        return False
    is_done = False
    if len(listing.new) >= FEWEST_ANNOUNCED and chance() < CHANCE:
        merge_announced(repository, listing)
        is_done = True
    names = plan_merge(listing)
    if names and chance() < CHANCE:
        merge_segments(repository, names)
        is_done = True
    return is_done


def merge_announced(repository: Repository, listing: LogListing) -> None:
    """Put what was announced and committed into segments, and delete the announcements."""
    announced = [key for key in listing.new if key.kind != "shard"]
    everything = dict.fromkeys(announced)
    if not listing.is_complete:
        # As in a repository that was copied from a disk: from now on the log knows everything.
        everything.update(dict.fromkeys(list_announced(repository)))
    found = load_records(repository, everything)
    _put(repository, [_record_of(key, data) for key, data in sorted(found.items())], level=0)
    if not listing.is_complete:
        complete_log(repository.store)
    merged = [key for key in announced if key in found]
    merged += [key for key in listing.new if key.kind == "shard" and _checkpoint_of(key) in found]
    done = [info.key for key in merged for info in listing.new[key]]
    repository.store.delete(*done)
    _log.info("merged %d records of %s", len(found), repository.url)


def plan_merge(listing: LogListing) -> list[str]:
    """The segments that are worth merging now; none for most of the time."""
    small = sorted(name for name, info in listing.segments.items() if info.size < LARGE_SEGMENT_BYTES)
    levels = [level_of(name) for name in small]
    for level in sorted(set(levels)):
        if levels.count(level) >= FEWEST_SEGMENTS:
            return [name for name in small if level_of(name) <= level]
    return []


def merge_segments(repository: Repository, names: Sequence[str]) -> None:
    """Make one segment of several, or a few when it would be too large; then delete them."""
    records: dict[tuple[str, str, str], SegmentRecord] = {}
    merged: list[str] = []
    for name in sorted(names):
        try:
            _, held = load_segment(repository, name)
        except KeyMissing:
            return  # somebody else merges
        except RepositoryDamaged as error:
            _log.warning("a segment is not merged: %s", error)
            continue
        merged.append(name)
        records.update(((record.letter, record.experiment_id, record.id), record) for record in held)
    removed = {(record.experiment_id, record.id) for record in records.values() if record.letter == "x"}
    left = [record for record in records.values() if record.letter == "x" or not _is_removed(record, removed)]
    level = max(map(level_of, merged), default=0) + 1
    made = _put(repository, sorted(left), level=level, merged=merged)
    repository.store.delete(*(segment_key(name) for name in merged if name not in made))
    _log.info("merged %d segments of %s", len(merged), repository.url)


def _put(
    repository: Repository, records: Sequence[SegmentRecord], *, level: int, merged: Sequence[str] = ()
) -> set[str]:
    """Put segments, and see them in a listing; their names."""
    made: dict[str, int] = {}
    for part in _parts(records):
        data = build_segment(part, merged)
        # Made of the content, so that two machines that merge the same make the same.
        name = levelled_name(level, blake3(data).hexdigest())
        made[name] = len(data)
        repository.store.put(segment_key(name), [data], is_unique=True, is_checked=False)
    listing = repository.log.list()
    for name, size in made.items():
        info = listing.segments.get(name)
        if info is None or info.size != size:
            raise StoreBusy(f"{repository.url} does not list what was put there: {segment_key(name)}")
    return set(made)


def _parts(records: Sequence[SegmentRecord]) -> Iterator[list[SegmentRecord]]:
    part: list[SegmentRecord] = []
    size = 0
    for record in records:
        if part and size + len(record.data) > MAX_SEGMENT_PLAIN_BYTES:
            yield part
            part, size = [], 0
        part.append(record)
        size += len(record.data) + 160
    if part:
        yield part


def _record_of(key: Announced, data: bytes) -> SegmentRecord:
    return SegmentRecord(LETTERS[key.kind], key.experiment_id, key.id, data)


def _checkpoint_of(key: Announced) -> Announced:
    return Announced("checkpoint", key.experiment_id, key.id)


def _is_removed(record: SegmentRecord, removed: set[tuple[str, str]]) -> bool:
    experiment_id = record.experiment_id
    return (experiment_id, experiment_id) in removed or (experiment_id, record.id) in removed
