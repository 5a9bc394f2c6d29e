"""Finds out what was recorded since the last time, where each request costs: from the log, in few requests.

Announcements name what is new, segments hold what was merged; a repository whose log is not complete, as one
that was copied from a disk, is listed once. What is found goes to whoever keeps it (`catalog`); this knows
only what is asked for again later: announcements whose record was not there yet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Protocol

from replicate.errors import RepositoryDamaged, RepositoryIncompatible
from replicate.ids import is_id
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.segment import SegmentHeader, SegmentRecord, parse_header, parse_segment
from replicated.keys import (
    CHECKPOINT_PREFIX,
    EDIT_PREFIX,
    KINDS,
    Announced,
    Kind,
    LogListing,
    id_of_record,
    segment_key,
)
from replicated.repository import Repository
from replicated.store.base import KeyMissing

#: What a merged segment says of itself is nearly always within so many bytes.
HEADER_READ_BYTES: Final = 32 << 10
#: A smaller one is read whole.
SMALL_SEGMENT_BYTES: Final = 256 << 10
#: Records that are read one by one are handed over so many at a time.
_BATCH: Final = 500
#: A record that is announced but not there is asked for again after this share of the time that passed.
_PATIENCE_SHARE: Final = 0.25

_RECORDS: Final[tuple[Kind, ...]] = ("experiment", "checkpoint", "edit")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class News:
    """What was found, to be kept together: all of it or nothing."""

    #: Sealed records; they may be damaged, and some may be known.
    records: dict[Announced, bytes] = field(default_factory=dict)
    #: (experiment id, id of what was removed): an experiment itself, or a checkpoint of it.
    removed: list[tuple[str, str]] = field(default_factory=list)
    #: The segment that all of this was in.
    segment: str = ""
    #: Everything that there is has been listed.
    is_all: bool = False


class Known(Protocol):
    """What was kept of former news."""

    def segments(self) -> set[str]:
        """The segments that were taken in."""
        ...

    def is_listed(self) -> bool:
        """Whether everything was listed once."""
        ...

    def unknown(self, announced: Iterable[Announced]) -> list[Announced]:
        """Those that are neither known nor removed."""
        ...


@dataclass(slots=True)
class _Missing:
    first_s: float
    again_s: float


class RecordLog:
    """Reads the log of one repository. For one thread at a time."""

    def __init__(self, repository: Repository, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._repository = repository
        self._clock = clock
        self._missing: dict[Announced, _Missing] = {}
        self._damaged: set[str] = set()

    def read(self, known: Known) -> Iterator[News]:
        """What is new; each piece is kept before the next one is asked for."""
        listing = self._repository.log.list()
        taken = known.segments()
        if not (listing.is_complete or listing.segments or listing.new):
            # A bucket that was emptied looks like this.
            self._repository.check_present()
        damaged: set[str] = set()
        for name in sorted(listing.segments.keys() - taken):
            try:
                news = self._read_segment(name, listing.segments[name].size, taken)
            except KeyMissing:
                continue  # merged meanwhile: shows in the next listing
            except Malformed as error:
                damaged.add(name)
                _log.warning("%s in %s is damaged: %s", segment_key(name), self._repository.url, error)
                continue
            taken.add(name)
            yield news
        # What a damaged segment held is found once by listing everything, also where that was done before.
        is_news = not damaged <= self._damaged
        self._damaged = damaged
        if is_news or not (listing.is_complete or known.is_listed()):
            yield from self._list_all(known)
        yield from self._read_announced(listing, known)

    def _read_segment(self, name: str, size: int, taken: set[str]) -> News:
        store = self._repository.store
        key = segment_key(name)
        try:
            if size > SMALL_SEGMENT_BYTES and not name.startswith("00-"):
                header = parse_header(store.get(key, 0, HEADER_READ_BYTES))
                if header is not None and _is_known(header, taken):
                    return News(segment=name)
            header, records = parse_segment(store.get(key))
        except NewerFormat as error:
            raise RepositoryIncompatible(
                f"{key} in {self._repository.url} was written by a newer version: {error}",
                hint="upgrade replicate-vcs; nothing was changed",
                fields={"key": key},
            ) from error
        return News(segment=name) if _is_known(header, taken) else _news_of(records, name)

    def _read_announced(self, listing: LogListing, known: Known) -> Iterator[News]:
        removed = known.unknown(key for key in listing.new if key.kind == "removal")
        if removed:
            yield News(removed=[(key.experiment_id, key.id) for key in removed])
        now = self._clock()
        for key in self._missing.keys() - listing.new.keys():
            del self._missing[key]
        wanted = [
            key
            for key in known.unknown(key for key in listing.new if key.kind in _RECORDS)
            if key not in self._missing or self._missing[key].again_s <= now
        ]
        for batch in _batches(sorted(wanted)):
            found = load_records(self._repository, batch)
            for key in batch:
                if key in found:
                    self._missing.pop(key, None)
                else:
                    missing = self._missing.setdefault(key, _Missing(now, now))
                    missing.again_s = now + _PATIENCE_SHARE * (now - missing.first_s)
            if found:
                yield News(records=found)

    def _list_all(self, known: Known) -> Iterator[News]:
        """Everything, by listing it and reading each record on its own."""
        for batch in _batches(known.unknown(list_announced(self._repository))):
            yield News(records=load_records(self._repository, batch))
        yield News(is_all=True)


def list_announced(repository: Repository) -> list[Announced]:
    """What there is, whether or not the log knows it, by listing all records."""
    found = [Announced("experiment", name, name) for name in repository.list_experiment_ids()]
    kinds: tuple[tuple[str, Kind], ...] = ((CHECKPOINT_PREFIX, "checkpoint"), (EDIT_PREFIX, "edit"))
    for prefix, kind in kinds:
        for info in repository.store.list(prefix):
            experiment_id, _, name = info.key.removeprefix(prefix).partition("/")
            if is_id(experiment_id) and (identifier := id_of_record(name)):
                found.append(Announced(kind, experiment_id, identifier))
    return found


def load_records(repository: Repository, announced: Iterable[Announced]) -> dict[Announced, bytes]:
    """The records that are there, several requests at a time."""
    store = repository.store

    def load(key: Announced) -> tuple[Announced, bytes | None]:
        try:
            return key, repository.read_record(key.record_key)
        except KeyMissing:
            return key, None

    wanted = list(announced)
    if len(wanted) < 2:
        results = [load(key) for key in wanted]
    else:
        with ThreadPoolExecutor(store.capabilities.parallel_requests, "records") as threads:
            results = list(threads.map(load, wanted))
    return {key: data for key, data in results if data is not None}


def load_segment(repository: Repository, name: str) -> tuple[SegmentHeader, list[SegmentRecord]]:
    """A whole segment; raises `KeyMissing`, `RepositoryDamaged` and `RepositoryIncompatible`."""
    key = segment_key(name)
    data = repository.store.get(key)
    try:
        return parse_segment(data)
    except Malformed as error:
        raise RepositoryDamaged(
            f"{key} in {repository.url} is damaged: {error}", fields={"key": key}
        ) from error
    except NewerFormat as error:
        raise RepositoryIncompatible(
            f"{key} in {repository.url} was written by a newer version: {error}",
            hint="upgrade replicate-vcs; nothing was changed",
            fields={"key": key},
        ) from error


def _is_known(header: SegmentHeader, taken: set[str]) -> bool:
    """Whether all of a merged segment was taken in before it was merged."""
    return bool(header.merged) and all(name in taken for name in header.merged)


def _news_of(records: Iterable[SegmentRecord], segment: str) -> News:
    news = News(segment=segment)
    for record in records:
        kind = KINDS[record.letter]
        if kind == "removal":
            news.removed.append((record.experiment_id, record.id))
        else:
            news.records[Announced(kind, record.experiment_id, record.id)] = record.data
    return news


def _batches(items: list[Announced]) -> Iterator[list[Announced]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]
