"""What is needed from outside: the trees of all records and announcements.

The order of the listings is that of `log/`, `shards/`, `checkpoints/`, `experiments/`: what becomes something
else (an announcement a record, shards a checkpoint) goes only after that is there, so it is seen as the one
or as the other. Whatever cannot be understood stops the collector: it could need anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from replicate.errors import RepositoryDamaged, RepositoryIncompatible
from replicate.ids import is_id
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.manifest import RootNode
from replicated.format.metadata import decode_snapshot
from replicated.format.shards import decode_shard
from replicated.keys import (
    CHECKPOINT_PREFIX,
    EXPERIMENT_PREFIX,
    SHARD_PREFIX,
    Announced,
    LogListing,
    id_of_record,
)
from replicated.store.base import KeyMissing, Store


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


class Roots:
    """Finds roots again and again; records, which never change, are read once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        #: By the keys of records; None: it has no files.
        self._known: dict[str, RootNode | None] = {}
        #: Keys of records that were in the last listing.
        self.records: frozenset[str] = frozenset()

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
        announced = [item for item in listing.new if item.kind in ("experiment", "checkpoint", "shard")]
        with ThreadPoolExecutor(self._store.capabilities.parallel_requests) as threads:
            pending = dict(zip(announced, threads.map(self._load_announced, announced), strict=True))
            keys = list(self._list_records())
            self.records = frozenset(keys)
            new = [key for key in keys if key not in self._known]
            self._known.update(zip(new, threads.map(self._load_record, new), strict=True))
        experiments = {key for key in keys if key.startswith(EXPERIMENT_PREFIX)}
        experiments.update(item.record_key for item in announced if item.kind == "experiment")
        roots = []
        for key in keys:
            root = self._known[key]
            if root is not None:
                roots.append(
                    Root(key, root, is_committed=True, is_orphan=_experiment_of(key) not in experiments)
                )
        for item, root in pending.items():
            if root is not None and item.record_key not in self.records:
                roots.append(Root(item.record_key, root, is_committed=False))
        return roots

    def _list_records(self) -> Iterator[str]:
        """The keys of all records that can have files."""
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
                    yield info.key

    def _load_announced(self, announced: Announced) -> RootNode | None:
        """The root of an announcement; when that is gone, of the record that it has become."""
        try:
            return self._load(announced.key, is_shard=announced.kind == "shard")
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
