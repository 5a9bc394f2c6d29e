"""`replicate du`: what experiments would take as plain copies, what they take, and what made the difference.

Reads the trees of all snapshots, no contents: of packs it sees only whether they are there, and how large.
Every figure is defined in docs/concepts.md, and a test makes them again from the packs alone. Invariants: the
encodings add up to the unique bytes and, with the bases, to the stored bytes; stored bytes, metadata and what
is unreferenced add up to the repository. A snapshot that cannot be read is named and counted nowhere.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple, TypeAlias

from replicate.errors import NotStored, RepositoryDamaged, RepositoryIncompatible
from replicate.ids import ExperimentId, SnapshotId
from replicated.chunk.codec import DELTA, HASH_BYTES, PLANES, RAW, ZSTD
from replicated.experiments import Experiments
from replicated.format.pack import ENTRY, FOOTER, HEADER, RECORD
from replicated.idset import IdSet
from replicated.index import Location
from replicated.keys import PACK_PREFIX, pack_key, parse_snapshot_id, snapshot_of
from replicated.references import StoredChunk, iter_chunks
from replicated.repositories import OpenRepositories
from replicated.repository import Repository

#: How chunks of contents can be stored, in the order in which the figures are given.
ENCODINGS: Final[Mapping[int, str]] = {RAW: "raw", ZSTD: "zstd", PLANES: "planes", DELTA: "delta"}

#: What a pack holds for each chunk besides its stored bytes.
_PLACE_BYTES: Final = ENTRY.size + RECORD.size
_BASES_BATCH: Final = 500

#: Where chunks lie; raises `RepositoryDamaged` when one is nowhere.
_Locate: TypeAlias = Callable[[Sequence[bytes]], Iterable[Location]]


class EncodedBytes(NamedTuple):
    """Chunks of one encoding, before and after."""

    plain_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """The figures of one experiment, or of the whole repository (`id` empty)."""

    id: str
    snapshots: int
    logical_bytes: int
    unique_bytes: int
    stored_bytes: int
    #: The part of `stored_bytes` for chunks in no snapshot here, without which others cannot be decoded.
    base_bytes: int
    metadata_bytes: int
    #: By names, all of `ENCODINGS` at least.
    encodings: Mapping[str, EncodedBytes]


@dataclass(frozen=True, slots=True)
class UnreadableSnapshot:
    """A snapshot that is counted nowhere."""

    #: Of the experiment or checkpoint whose files it has.
    id: str
    #: Empty when no record of an experiment that can be read names it.
    experiment_id: str
    error: str


@dataclass(frozen=True, slots=True)
class UsageReport:
    """What `measure` found."""

    experiments: Sequence[Usage]
    total: Usage
    #: What packs hold that no readable snapshot needs.
    unreferenced_bytes: int
    unreadable: Sequence[UnreadableSnapshot]


def measure(
    experiments: Experiments,
    repositories: OpenRepositories,
    repository: str,
    references: Iterable[str],
) -> UsageReport:
    """The usage of the experiments that are named (of all when none is), and of the whole repository."""
    chosen = [experiments.resolve(repository, reference).summary.record.id for reference in references]
    listed = [ExperimentId(listed.id) for listed in experiments.list_summaries(repository)]
    return measure_repository(repositories.get(repository), listed, chosen or listed)


def measure_repository(
    repository: Repository, experiment_ids: Iterable[ExperimentId], wanted: Iterable[ExperimentId]
) -> UsageReport:
    """The usage of the wanted ones of all these experiments, in that order, and of the whole repository."""
    usages: dict[ExperimentId, Usage | None] = dict.fromkeys(wanted)
    survey = _Survey(repository)
    for experiment_id in experiment_ids:
        usage = survey.count(experiment_id, is_wanted=experiment_id in usages)
        if usage is not None:
            usages[experiment_id] = usage
    total, unreferenced = survey.finish()
    rows = [usage for usage in usages.values() if usage is not None]
    return UsageReport(rows, total, unreferenced, survey.unreadable)


class _Survey:
    """Goes through all snapshots of a repository, experiment by experiment."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        #: Those that have not been looked at.
        self._left = dict.fromkeys(repository.list_snapshot_ids())
        # After that, because what they need was stored before them.
        self._objects = _Objects(repository)
        self._total = _Census(self._locate)
        self.unreadable: list[UnreadableSnapshot] = []

    def count(self, experiment_id: ExperimentId, *, is_wanted: bool) -> Usage | None:
        """Count an experiment for the total and, if it is wanted, on its own."""
        own = _Census(self._locate) if is_wanted else None
        checkpoints = self._repository.list_checkpoint_ids(experiment_id)
        for checkpoint_id in ("", *checkpoints):
            if (snapshot_id := snapshot_of(experiment_id, checkpoint_id)) in self._left:
                self._take(snapshot_id, experiment_id, own)
        return own.usage(experiment_id) if own is not None else None

    def finish(self) -> tuple[Usage, int]:
        """The whole repository, and how many bytes of it no snapshot needs."""
        for snapshot_id in list(self._left):
            # The record that names it is damaged, or is about to be written.
            self._take(snapshot_id, "", None)
        usage = self._total.usage("")
        objects = self._objects
        placed = self._total.placed_bytes + self._total.place_count * _PLACE_BYTES
        # Never below 0, also if a chunk was stored anew, elsewhere, while they were counted.
        unreferenced = max(0, objects.packed_bytes - objects.frame_bytes - placed)
        # The rest, so that it all adds up.
        metadata = objects.packed_bytes + objects.other_bytes - usage.stored_bytes - unreferenced
        return replace(usage, metadata_bytes=metadata), unreferenced

    def _take(self, snapshot_id: SnapshotId, experiment_id: str, own: _Census | None) -> None:
        del self._left[snapshot_id]
        censuses = [self._total] if own is None else [own, self._total]
        try:
            snapshot = self._repository.load_snapshot(snapshot_id)
            # In the order of their seeing: what is not new to an experiment is not new in total.
            first, *rest = censuses
            for chunk in iter_chunks(self._repository, snapshot, first.seen):
                self._objects.check_pack(chunk.pack)
                first.add(chunk)
                for census in rest:
                    if census.seen.add(chunk.id):
                        census.add(chunk)
            for census in censuses:
                census.settle()
        except NotStored:
            pass  # removed since it was listed
        except (RepositoryDamaged, RepositoryIncompatible) as error:
            for census in censuses:
                census.undo()
            self.unreadable.append(UnreadableSnapshot(_owner(snapshot_id), experiment_id, error.message))
        else:
            for census in censuses:
                census.keep(snapshot.root.size_bytes)

    def _locate(self, chunk_ids: Sequence[bytes]) -> Iterable[Location]:
        places = self._repository.locate(chunk_ids).values()
        for place in places:
            self._objects.check_pack(place.pack)
        return places


def _owner(snapshot_id: SnapshotId) -> str:
    experiment_id, checkpoint_id = parse_snapshot_id(snapshot_id)
    return checkpoint_id or experiment_id


class _Objects:
    """What lies in the store, as it was when this was made, and whether it is what the index says."""

    def __init__(self, repository: Repository) -> None:
        self._url = repository.url
        #: All packs together.
        self.packed_bytes = 0
        #: What packs hold besides places of chunks.
        self.frame_bytes = 0
        #: All objects that are no packs.
        self.other_bytes = 0
        #: By their keys, what is wrong with packs.
        self._damage: dict[str, str] = {}
        # Before the store is listed, which then shows all packs that the index knows.
        repository.index.refresh()
        known = {pack_key(pack.name): pack for pack in repository.index.list_packs()}
        for info in repository.store.list(""):
            if not info.key.startswith(PACK_PREFIX):
                self.other_bytes += info.size
                continue
            self.packed_bytes += info.size
            self.frame_bytes += min(info.size, HEADER.size + FOOTER.size)
            pack = known.pop(info.key, None)
            if pack is not None and pack.size == info.size:
                self.frame_bytes += pack.base_count * HASH_BYTES
            elif pack is not None:
                self._damage[info.key] = f"has {info.size} bytes, not {pack.size}"
        self._damage.update(dict.fromkeys(known, "is missing"))

    def check_pack(self, name: bytes) -> None:
        """Raise `RepositoryDamaged` unless the pack is there, as large as it should be."""
        if self._damage and (damage := self._damage.get(key := pack_key(name))):
            raise RepositoryDamaged(
                f"pack {key} of {self._url} {damage}",
                hint="the rest of the repository can still be read",
                fields={"key": key},
            )


@dataclass(slots=True)
class _Sums:
    """What a census has added up."""

    snapshots: int = 0
    logical_bytes: int = 0
    base_bytes: int = 0
    node_bytes: int = 0
    #: Chunks, bases and nodes.
    place_count: int = 0
    #: Of chunks of contents, by codec.
    plain_bytes: Counter[int] = field(default_factory=Counter)
    stored_bytes: Counter[int] = field(default_factory=Counter)


class _Census:
    """Adds up the chunks of snapshots, each chunk once, and can take the last snapshot back."""

    def __init__(self, locate: _Locate) -> None:
        self._locate = locate
        #: Of chunks and nodes that were added; for `references.iter_chunks`.
        self.seen = IdSet()
        #: Ids that were met as bases; they may be in `seen` as well, then they count as what they are there.
        self._bases = IdSet()
        #: Bases whose sizes are still to be looked up.
        self._new_bases: list[bytes] = []
        self._sums = _Sums()
        self._kept = _Sums()

    @property
    def place_count(self) -> int:
        """How many places in packs are needed."""
        return self._sums.place_count

    @property
    def placed_bytes(self) -> int:
        """The stored bytes in these places."""
        sums = self._sums
        return sums.stored_bytes.total() + sums.base_bytes + sums.node_bytes

    def add(self, chunk: StoredChunk) -> None:
        """Count a chunk or node that was not in `seen` before; raises as `settle`."""
        sums = self._sums
        sums.place_count += 1
        if chunk.is_node:
            sums.node_bytes += chunk.stored_length
        else:
            sums.plain_bytes[chunk.codec] += chunk.plain_length
            sums.stored_bytes[chunk.codec] += chunk.stored_length
        if chunk.id in self._bases:
            self._count_base(chunk.stored_length, -1)
        if chunk.base and chunk.base not in self.seen and self._bases.add(chunk.base):
            self._new_bases.append(chunk.base)
            if len(self._new_bases) >= _BASES_BATCH:
                self.settle()

    def settle(self) -> None:
        """Count what was met as a base; raises `RepositoryDamaged` when one cannot be read."""
        for location in self._locate(self._new_bases):
            self._count_base(location.stored_length, 1)
        self._new_bases.clear()

    def keep(self, logical_bytes: int) -> None:
        """Let what was added stay: it was a snapshot of this size."""
        self._sums.snapshots += 1
        self._sums.logical_bytes += logical_bytes
        self._kept = copy.deepcopy(self._sums)
        self.seen.keep()
        self._bases.keep()

    def undo(self) -> None:
        """Take back what was added since the last `keep`."""
        self._sums = copy.deepcopy(self._kept)
        self._new_bases.clear()
        self.seen.undo()
        self._bases.undo()

    def usage(self, identifier: str) -> Usage:
        """The figures of what was kept."""
        sums = self._sums
        names = {codec: ENCODINGS.get(codec, f"codec {codec}") for codec in {*ENCODINGS, *sums.plain_bytes}}
        return Usage(
            id=identifier,
            snapshots=sums.snapshots,
            logical_bytes=sums.logical_bytes,
            unique_bytes=sums.plain_bytes.total(),
            stored_bytes=sums.stored_bytes.total() + sums.base_bytes,
            base_bytes=sums.base_bytes,
            metadata_bytes=sums.node_bytes,
            encodings={
                names[codec]: EncodedBytes(sums.plain_bytes[codec], sums.stored_bytes[codec])
                for codec in sorted(names)
            },
        )

    def _count_base(self, stored_length: int, times: int) -> None:
        self._sums.base_bytes += stored_length * times
        self._sums.place_count += times
