"""What is needed from outside: the trees of all records and announcements.

The order of the listings is that of `log/`, `shards/`, `checkpoints/`, `experiments/`: what becomes something
else (an announcement a record, shards a checkpoint) goes only after that is there, so it is seen as the one
or as the other. Whatever cannot be understood stops the collector: it could need anything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple

from replicate.errors import RepositoryDamaged, RepositoryIncompatible
from replicate.ids import is_id
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.manifest import RootNode
from replicated.format.metadata import decode_snapshot
from replicated.format.segment import parse_segment
from replicated.format.shards import decode_shard
from replicated.keys import (
    CHECKPOINT_PREFIX,
    EXPERIMENT_PREFIX,
    KINDS,
    SHARD_PREFIX,
    Announced,
    LogListing,
    id_of_record,
    segment_key,
)
from replicated.store.base import KeyMissing, ObjectInfo, Store

#: An object may take so long from when its age begins until it shows.
_MARGIN_S: Final = 300.0
#: A checkpoint may be there so long before its experiment, or after it.
ORPHAN_AGE_S: Final = 24 * 3600.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Root:
    """The tree of one record or announcement."""

    #: The key of the record.
    key: str
    root: RootNode
    #: Whether readers can see it; else its writer is bound to look again whether all of it is there.
    is_committed: bool
    #: Of a checkpoint or shard whose experiment is neither recorded nor announced: what a removal has missed.
    is_orphan: bool = False


class _Read(NamedTuple):
    """A record that was read."""

    size: int
    #: On the monotonic clock: before it was listed.
    at: float
    #: None: it has no files.
    root: RootNode | None


class Roots:
    """Finds roots again and again; what is surely the same as before is not read another time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        #: By the keys of records.
        self._known: dict[str, _Read] = {}
        #: Keys of records that were in the last listing, but for those that are removed.
        self.records: frozenset[str] = frozenset()
        #: Keys of checkpoints in the last listing that belong to no experiment any more, and need nothing.
        self.orphans: frozenset[str] = frozenset()
        #: (experiment id, id of what was removed), as in `record_log.News`.
        self._removed: set[tuple[str, str]] = set()
        #: Names of the segments whose removals are known.
        self._segments: set[str] = set()

    def find(self, listing: LogListing) -> list[Root]:
        """All roots, given a listing of `log/` that was made before.

        Raises `RepositoryDamaged` and `RepositoryIncompatible` for what cannot be understood.
        """
        if listing.unknown:
            key = min(listing.unknown)
            raise RepositoryIncompatible(
                f"{key} in {self._store.url} was written by a newer version",
                hint="upgrade replicate-vcs; nothing was deleted",
                fields={"key": key},
            )
        self._load_removed(listing)
        announced = [
            (item, info.key)
            for item, infos in listing.new.items()
            if not self.is_removed(item.record_key) and item.kind in ("experiment", "checkpoint", "shard")
            for info in infos
        ]
        with ThreadPoolExecutor(self._store.capabilities.parallel_requests) as threads:
            pending = list(threads.map(lambda found: self._load_announced(*found), announced))
            begun = time.monotonic()
            listed = [info for info in self._list_records() if not self.is_removed(info.key)]
            now = time.monotonic()
            keys = [info.key for info in listed]
            self.records = frozenset(keys)
            new = [info for info in listed if not self._is_same(info, now)]
            loaded = threads.map(self._load_record, (info.key for info in new))
            self._known.update(
                (info.key, _Read(info.size, begun, root)) for info, root in zip(new, loaded, strict=True)
            )
        experiments = {key for key in keys if key.startswith(EXPERIMENT_PREFIX)}
        experiments.update(item.record_key for item, _ in announced if item.kind == "experiment")
        orphans = {info.key for info in listed if _experiment_of(info.key) not in experiments}
        # Its experiment was removed while it was stored: after a day nobody is about to take it away.
        self.orphans = frozenset(
            info.key
            for info in listed
            if info.key in orphans
            and info.key.startswith(CHECKPOINT_PREFIX)
            and (info.age_s or 0.0) > ORPHAN_AGE_S
        )
        roots = []
        for key in keys:
            root = self._known[key].root
            if root is not None and key not in self.orphans:
                roots.append(Root(key, root, is_committed=True, is_orphan=key in orphans))
        for (item, _), root in zip(announced, pending, strict=True):
            key = item.record_key
            # The record that is there may be of an earlier start, and be put anew.
            if root is not None and (key not in self.records or self._known[key].root != root):
                roots.append(Root(key, root, is_committed=False))
        return roots

    def is_removed(self, record_key: str) -> bool:
        """Whether it is known that the record was removed: readers do not show it, and it needs nothing."""
        _, experiment_id, *rest = record_key.removesuffix(".json").split("/")
        removed = self._removed
        return (experiment_id, experiment_id) in removed or bool(rest and (experiment_id, rest[0]) in removed)

    def _load_removed(self, listing: LogListing) -> None:
        """Take in what is removed; what cannot be read removes nothing, which is safe."""
        self._removed.update((item.experiment_id, item.id) for item in listing.new if item.kind == "removal")
        self._segments &= listing.segments.keys()
        for name in sorted(listing.segments.keys() - self._segments):
            key = segment_key(name)
            try:
                _, records = parse_segment(self._store.get(key))
            except KeyMissing:
                continue  # merged since it was listed
            except (Malformed, NewerFormat) as error:
                _log.warning("%s in %s cannot be read: %s", key, self._store.url, error)
                continue
            self._segments.add(name)
            self._removed.update(
                (record.experiment_id, record.id) for record in records if KINDS[record.letter] == "removal"
            )

    def _is_same(self, info: ObjectInfo, now: float) -> bool:
        """Whether a record was read, and is older than that.

        Shards are deleted and put again with other bytes, and so is any record that was removed, when it is
        made again under an id that the user gave. Where requests are cheap nobody need be sure.
        """
        known = self._known.get(info.key)
        return (
            known is not None
            and self._store.capabilities.has_costly_requests
            and not info.key.startswith(SHARD_PREFIX)
            and info.size == known.size
            and info.age_s is not None
            and info.age_s > now - known.at + _MARGIN_S
        )

    def _list_records(self) -> Iterator[ObjectInfo]:
        """All records that can have files."""
        for prefix in (SHARD_PREFIX, CHECKPOINT_PREFIX, EXPERIMENT_PREFIX):
            for info in self._store.list(prefix):
                *parents, name = info.key.removeprefix(prefix).split("/")
                if prefix == EXPERIMENT_PREFIX:
                    is_record = not parents and id_of_record(name) is not None
                elif prefix == CHECKPOINT_PREFIX:
                    is_record = len(parents) == 1 and id_of_record(name) is not None
                else:
                    is_record = len(parents) == 2 and name.endswith(".json")
                if is_record and all(map(is_id, parents)):
                    yield info

    def _load_announced(self, announced: Announced, key: str) -> RootNode | None:
        """The root of an announcement; when that is gone, of the record that it has become."""
        try:
            return self._load(key, is_shard=announced.kind == "shard")
        except KeyMissing:
            return self._load_record(announced.record_key)

    def _load_record(self, key: str) -> RootNode | None:
        try:
            return self._load(key, is_shard=key.startswith(SHARD_PREFIX))
        except KeyMissing:
            return None  # removed since it was listed

    def _load(self, key: str, *, is_shard: bool) -> RootNode | None:
        data = self._store.get(key)
        try:
            if is_shard:
                return decode_shard(data).root
            snapshot = decode_snapshot(data)
            return None if snapshot is None else snapshot.root
        except Malformed as error:
            raise RepositoryDamaged(
                f"{key} in {self._store.url} is damaged, so nobody knows what it needs: {error}",
                hint="nothing was deleted; put it back from a copy, or remove what it belongs to",
                fields={"key": key},
            ) from error
        except NewerFormat as error:
            raise RepositoryIncompatible(
                f"{key} in {self._store.url} was written by a newer version: {error}",
                hint="upgrade replicate-vcs; nothing was deleted",
                fields={"key": key},
            ) from error


def _experiment_of(key: str) -> str:
    """The key of the experiment to which a record belongs."""
    if key.startswith(EXPERIMENT_PREFIX):
        return key
    return f"{EXPERIMENT_PREFIX}{key.split('/')[1]}.json"
