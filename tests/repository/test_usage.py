"""Every figure of `replicate du`, made again from the objects of the repository by a parser of its own."""

import json
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zstandard
from blake3 import blake3

from replicate.ids import CheckpointId, ExperimentId, SnapshotId, new_id
from replicate.records import CheckpointRecord, ExperimentRecord, utc_now
from replicated.chunk.codec import DELTA, PLANES, RAW, ZSTD
from replicated.format.canonical import pack
from replicated.format.listing import build_index
from replicated.format.manifest import FileContent, TreeEntry
from replicated.format.metadata import Snapshot
from replicated.format.pack import DATA_PACK, PackBuilder, parse_pack
from replicated.keys import checkpoint_key, index_key, levelled_name, pack_key, snapshot_of
from replicated.repository import Repository
from replicated.usage import EncodedBytes, Usage, UsageReport, measure_repository

Save = Callable[[Repository, dict[str, bytes]], Snapshot]

CODECS = {0: "raw", 1: "zstd", 2: "planes", 3: "delta"}


def root_of(repository: Repository) -> Path:
    return Path(repository.url.removeprefix("file://"))


# The figures, from nothing but docs/format.md and docs/concepts.md


@dataclass
class Place:
    """Where a chunk lies in a pack."""

    pack: Path
    offset: int
    stored: int
    plain: int
    codec: int
    base: bytes


@dataclass
class References:
    """What snapshots refer to."""

    logical: int = 0
    snapshots: int = 0
    nodes: set[bytes] = field(default_factory=set)
    chunks: set[bytes] = field(default_factory=set)


class Recount:
    """A repository in a directory. Chunks that are in two packs must be alike in both."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.places: dict[bytes, Place] = {}
        self.packed = self.frames = 0
        listed = {name for path in root.glob("log/index/*") for name in self._list_packs(path.read_bytes())}
        for path in root.glob("packs/*/*"):
            data = path.read_bytes()
            self.packed += len(data)
            self.frames += 16 + 48
            if path.name in listed:
                self._read_pack(path, data)
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        self.others = size - self.packed

    def _list_packs(self, index: bytes) -> list[str]:
        (sections,) = struct.unpack_from("<I", index, 12)
        names, position = [], 16
        for _ in range(sections):
            name, shared, _, records = struct.unpack_from("<32sIII", index, position)
            position += 44 + 48 * records + 32 * (shared >> 8)
            names.append(name.hex())
        assert position == len(index) - 32
        return names

    def _read_pack(self, path: Path, data: bytes) -> None:
        record_count, base_count = struct.unpack_from("<II", data, len(data) - 48)
        self.frames += 32 * base_count
        bases = len(data) - 48 - 32 * base_count
        for position in range(bases - 48 * record_count, bases, 48):
            chunk, offset, stored, plain, shared = struct.unpack_from("<32sIIII", data, position)
            assert data[offset - 32 : offset] == chunk, "its header is just before it"
            number = shared >> 8
            base = data[bases + 32 * (number - 1) : bases + 32 * number] if number else b""
            place = Place(path, offset, stored, plain, shared & 255, base)
            known = self.places.setdefault(chunk, place)
            assert (known.stored, known.codec, known.base) == (place.stored, place.codec, place.base)

    def _read_node(self, node: bytes) -> Any:
        place = self.places[node]
        stored = place.pack.read_bytes()[place.offset : place.offset + place.stored]
        plain = zstandard.ZstdDecompressor().decompress(stored) if place.codec else stored
        assert blake3(plain).digest() == node
        return msgpack.unpackb(plain)

    def refer(self, snapshot_ids: Iterable[str]) -> References:
        """What these snapshots refer to together."""
        found = References()
        for snapshot_id in snapshot_ids:
            directory = "checkpoints" if "/" in snapshot_id else "experiments"
            snapshot = json.loads((self.root / directory / f"{snapshot_id}.json").read_bytes())["snapshot"]
            found.snapshots += 1
            self._walk(bytes.fromhex(snapshot["root"]["node"]), found)
        return found

    def _walk(self, node: bytes, found: References) -> None:
        found.nodes.add(node)
        _, level, items = self._read_node(node)
        if level:
            for _, below, _ in items:
                self._walk(below, found)
            return
        for _, kind, _, _, _, length, digest, content in items:
            if kind == 1:
                self._walk(digest, found)
            elif kind == 0 and length:
                found.logical += length
                self._walk_content(digest, content, found)

    def _walk_content(self, digest: bytes, content: Any, found: References) -> None:
        if not content:
            found.chunks.add(digest)
            return
        is_inline = len(content) > 1 and isinstance(content[1], list)
        if len(content) > 1 + is_inline:
            found.nodes.add(content[-1])
        if is_inline:
            found.chunks.update(split(content[0]))
        else:
            self._walk_list(content[0], found)

    def _walk_list(self, node: bytes, found: References) -> None:
        found.nodes.add(node)
        _, level, ids, _ = self._read_node(node)
        for below in split(ids):
            if level:
                self._walk_list(below, found)
            else:
                found.chunks.add(below)

    def usage(self, identifier: str, found: References) -> Usage:
        """The figures of what refers to all that."""
        plain: Counter[str] = Counter(dict.fromkeys(CODECS.values(), 0))
        stored: Counter[str] = Counter()
        for chunk in found.chunks:
            place = self.places[chunk]
            plain[CODECS[place.codec]] += place.plain
            stored[CODECS[place.codec]] += place.stored
        bases = self._stored(self._bases(found))
        return Usage(
            id=identifier,
            snapshots=found.snapshots,
            logical_bytes=found.logical,
            unique_bytes=plain.total(),
            stored_bytes=stored.total() + bases,
            base_bytes=bases,
            metadata_bytes=self._stored(found.nodes),
            encodings={name: EncodedBytes(plain[name], stored[name]) for name in plain},
        )

    def unreferenced(self, found: References) -> int:
        """What is in packs besides."""
        needed = found.nodes | found.chunks | self._bases(found)
        return self.packed - self.frames - self._stored(needed) - len(needed) * (48 + 48)

    def size(self) -> int:
        return self.packed + self.others

    def _bases(self, found: References) -> set[bytes]:
        return {self.places[chunk].base for chunk in found.chunks} - found.chunks - {b""}

    def _stored(self, chunks: Iterable[bytes]) -> int:
        return sum(self.places[chunk].stored for chunk in chunks)


def split(ids: bytes) -> list[bytes]:
    return [ids[start : start + 32] for start in range(0, len(ids), 32)]


def check(
    repository: Repository, owners: dict[ExperimentId, list[SnapshotId]], others: Iterable[str] = ()
) -> UsageReport:
    """Measure, and compare every figure; `owners` and `others` are the snapshots that can be read."""
    report = measure_repository(repository, owners, owners)
    recount = Recount(root_of(repository))
    assert [usage.id for usage in report.experiments] == list(owners)
    for usage in report.experiments:
        assert usage == recount.usage(usage.id, recount.refer(owners[ExperimentId(usage.id)]))
    everything = recount.refer([*(name for names in owners.values() for name in names), *others])
    expected = recount.usage("", everything)
    total = report.total
    assert report.unreferenced_bytes == recount.unreferenced(everything)
    assert total.stored_bytes + total.metadata_bytes + report.unreferenced_bytes == recount.size()
    for name in Usage.__slots__:
        assert name == "metadata_bytes" or getattr(total, name) == getattr(expected, name)
    for usage in (*report.experiments, total):
        assert sum(encoded.plain_bytes for encoded in usage.encodings.values()) == usage.unique_bytes
        stored = sum(encoded.stored_bytes for encoded in usage.encodings.values())
        assert stored + usage.base_bytes == usage.stored_bytes
    return report


# Repositories to measure


class Chunk:
    """A chunk as it is put into packs: nothing that `du` reads."""

    def __init__(self, codec: int, plain: int, stored: int, base: bytes = b"", data: bytes = b"") -> None:
        self.id = blake3(data).digest() if data else bytes.fromhex(new_id())
        self.codec, self.plain, self.base = codec, plain, base
        self.data = data or bytes(stored)


def put_pack(repository: Repository, chunks: Iterable[Chunk], *, is_listed: bool = True) -> str:
    builder = PackBuilder(DATA_PACK)
    for chunk in chunks:
        builder.add(chunk.id, chunk.codec, chunk.data, chunk.plain, chunk.base)
    data = b"".join(builder.seal())
    name = bytes.fromhex(new_id())
    repository.store.put(pack_key(name), [data])
    if is_listed:
        repository.store.put(index_key(levelled_name(0, new_id())), [build_index([parse_pack(name, data)])])
        repository.index.refresh()
    return pack_key(name)


def describe_file(chunks: list[Chunk], layout: bytes = b"", node: bytes = b"") -> FileContent:
    size = sum(chunk.plain for chunk in chunks)
    if node:
        return FileContent(size, bytes(32), node=node, layout=layout)
    if len(chunks) == 1 and not layout:
        return FileContent(size, chunks[0].id)
    ids = b"".join(chunk.id for chunk in chunks)
    return FileContent(size, bytes(32), ids, tuple(chunk.plain for chunk in chunks), layout=layout)


def list_entries(files: dict[str, FileContent]) -> list[TreeEntry]:
    entries = {}
    for path, content in files.items():
        directory, _, _ = path.rpartition("/")
        if directory:
            entries[directory.encode()] = TreeEntry(directory.encode(), "directory", 0o755, 0)
        entries[path.encode()] = TreeEntry(path.encode(), "file", 0o644, 0, content)
    return [entries[path] for path in sorted(entries, key=lambda path: path.split(b"/"))]


def put_trees(repository: Repository, *trees: dict[str, FileContent]) -> list[Snapshot]:
    with repository.writer() as writer:
        roots = [writer.add_tree(list_entries(files)) for files in trees]
        writer.finish()
    return [Snapshot(SnapshotId(new_id()), root) for root in roots]


def put_experiment(repository: Repository) -> ExperimentId:
    experiment_id = ExperimentId(new_id())
    repository.put_experiment(ExperimentRecord(experiment_id, utc_now()))
    return experiment_id


def put_checkpoint(repository: Repository, experiment_id: ExperimentId, snapshot: Snapshot) -> SnapshotId:
    checkpoint_id = CheckpointId(snapshot.id)
    record = CheckpointRecord(checkpoint_id, experiment_id, utc_now(), 0, state="stored")
    repository.put_checkpoint(record, snapshot.root)
    return snapshot_of(experiment_id, checkpoint_id)


def _owner(snapshot_id: SnapshotId) -> str:
    return snapshot_id.rpartition("/")[2]


@dataclass
class Made:
    """A repository made at random."""

    owners: dict[ExperimentId, list[SnapshotId]]
    unlisted: list[SnapshotId]
    unreadable: set[SnapshotId]


def make_at_random(repository: Repository, seed: int) -> Made:
    """Snapshots of chunks of every codec, of which some are removed, some unreadable, some without record."""
    rng = random.Random(seed)
    plain_chunks = [
        Chunk(codec, rng.randrange(500, 1000), rng.randrange(1, 500))
        for codec in rng.choices([RAW, ZSTD, PLANES], k=30)
    ]
    deltas = [Chunk(DELTA, 1000, rng.randrange(32, 400), rng.choice(plain_chunks).id) for _ in range(30)]
    layouts = [Chunk(RAW, 20, 20) for _ in range(3)]
    lists = [rng.choices(plain_chunks + deltas, k=20) for _ in range(3)]
    nodes = [
        pack([2, 0, b"".join(chunk.id for chunk in chunks), [chunk.plain for chunk in chunks]])
        for chunks in lists
    ]
    list_nodes = [Chunk(RAW, len(node), 0, data=node) for node in nodes]
    good = plain_chunks + deltas
    lost = Chunk(RAW, 10, 10)
    baseless = Chunk(DELTA, 100, 50, lost.id)
    everything = [*good, *layouts, *list_nodes, baseless]
    rng.shuffle(everything)
    for start in range(0, len(everything), 20):
        # The last ones are in the next pack as well.
        put_pack(repository, everything[start : start + 23])
    put_pack(repository, [Chunk(ZSTD, 50, 40), lost], is_listed=False)

    def make_file() -> FileContent:
        layout = rng.choice(layouts).id if rng.random() < 0.3 else b""
        if rng.random() < 0.3:
            number = rng.randrange(len(lists))
            return describe_file(lists[number], layout, list_nodes[number].id)
        return describe_file(rng.choices(good, k=rng.choice([1, 1, 2, 3])), layout)

    made = Made({put_experiment(repository): [] for _ in range(3)}, [], set())
    files = [make_file() for _ in range(12)]
    fates = rng.choices(["good", "good", "good", "removed", "unlisted", "lost", "baseless", "rotten"], k=14)
    trees = []
    for fate in fates:
        trees.append({f"{rng.choice('ab')}/{n}": file for n, file in enumerate(rng.choices(files, k=4))})
        if fate in ("lost", "baseless"):
            trees[-1]["b/bad"] = describe_file([rng.choice(good), lost if fate == "lost" else baseless])
    for fate, snapshot in zip(fates, put_trees(repository, *trees), strict=True):
        owner = rng.choice(list(made.owners))
        if fate == "unlisted":
            experiment = ExperimentRecord(ExperimentId(snapshot.id), utc_now())
            repository.put_experiment(experiment, snapshot.root)
            made.unlisted.append(snapshot.id)
            continue
        name = put_checkpoint(repository, owner, snapshot)
        if fate == "good":
            made.owners[owner].append(name)
        elif fate == "removed":
            repository.delete_checkpoint(owner, CheckpointId(snapshot.id))
        else:
            made.unreadable.add(snapshot.id)
        if fate == "rotten":
            repository.store.replace(checkpoint_key(owner, snapshot.id), b"{}")
    return made


@pytest.mark.parametrize("seed", range(8))
def test_every_figure_is_what_the_packs_say(repository: Repository, seed: int) -> None:
    made = make_at_random(repository, seed)
    report = check(repository, made.owners, made.unlisted)
    assert {snapshot.id for snapshot in report.unreadable} == made.unreadable


def test_the_figures_of_real_files_are_what_the_packs_say(repository: Repository, save: Save) -> None:
    big = random.Random(1).randbytes(3_000_000)
    many = {f"many/{number:04}": b"%d" % (number % 700) for number in range(2000)}
    experiments = [put_experiment(repository) for _ in range(2)]
    owners: dict[ExperimentId, list[SnapshotId]] = {}
    for step, experiment in enumerate(experiments):
        files = {"big": big + bytes([step]) * 1000, "text": b"compress me " * 50_000, "zero": b"", **many}
        snapshot = save(repository, files)
        repository.delete_experiment(ExperimentId(snapshot.id))
        owners[experiment] = [put_checkpoint(repository, experiment, snapshot)]
    report = check(repository, owners)
    one, other = report.experiments
    assert report.total.logical_bytes == one.logical_bytes + other.logical_bytes > 7_000_000
    assert report.total.unique_bytes < one.unique_bytes * 1.1, "equal pieces of both are counted once"
    assert report.total.encodings["zstd"].stored_bytes < report.total.encodings["zstd"].plain_bytes / 10
    assert report.unreferenced_bytes == 0


def test_a_base_in_another_snapshot_is_counted_as_what_it_is_there(repository: Repository) -> None:
    base = Chunk(PLANES, 1000, 700)
    delta = Chunk(DELTA, 1000, 100, base.id)
    put_pack(repository, [delta, base])
    first, second = (put_experiment(repository) for _ in range(2))
    trees = put_trees(repository, {"m": describe_file([base])}, {"m": describe_file([delta])})
    owners = {
        owner: [put_checkpoint(repository, owner, tree)]
        for owner, tree in zip((first, second), trees, strict=True)
    }
    report = check(repository, owners)
    alone = report.experiments[1]
    assert (alone.unique_bytes, alone.stored_bytes, alone.base_bytes) == (1000, 800, 700)
    assert (report.total.unique_bytes, report.total.stored_bytes, report.total.base_bytes) == (2000, 800, 0)


def test_a_base_of_a_removed_snapshot_is_needed_as_long_as_its_deltas_are(repository: Repository) -> None:
    base = Chunk(PLANES, 1000, 700)
    delta = Chunk(DELTA, 1000, 100, base.id)
    put_pack(repository, [base])
    put_pack(repository, [delta])
    experiment = put_experiment(repository)
    trees = put_trees(repository, {"m": describe_file([base])}, {"m": describe_file([delta])})
    first, second = (put_checkpoint(repository, experiment, tree) for tree in trees)
    check(repository, {experiment: [first, second]})
    repository.delete_checkpoint(experiment, CheckpointId(_owner(first)))
    report = check(repository, {experiment: [second]})
    assert (report.total.stored_bytes, report.total.base_bytes) == (800, 700)
    unreferenced = report.unreferenced_bytes
    repository.delete_checkpoint(experiment, CheckpointId(_owner(second)))
    report = check(repository, {experiment: []})
    assert report.total.stored_bytes == 0
    assert report.unreferenced_bytes > unreferenced + 800


@pytest.mark.parametrize(
    ("lost", "needing"),
    [("whole", {0, 2}), ("base", {1}), ("delta", {1}), ("spare", set()), ("tree", {2})],
)
def test_a_lost_pack_leaves_out_the_snapshots_that_need_it(
    repository: Repository, lost: str, needing: set[int]
) -> None:
    chunks = {"whole": Chunk(RAW, 900, 900), "base": Chunk(PLANES, 1000, 700), "spare": Chunk(RAW, 50, 50)}
    chunks["delta"] = Chunk(DELTA, 1000, 100, chunks["base"].id)
    other = Chunk(RAW, 300, 300)
    packs = {name: put_pack(repository, [chunk]) for name, chunk in chunks.items()}
    put_pack(repository, [other])
    experiments = [put_experiment(repository) for _ in range(4)]
    files = [[chunks["whole"]], [chunks["delta"], other], [other, chunks["whole"]], [other]]
    ids = []
    for experiment, contents in zip(experiments, files, strict=True):
        before = {info.key for info in repository.store.list("packs/")}
        (tree,) = put_trees(repository, {"f": describe_file(contents)})
        ids.append(put_checkpoint(repository, experiment, tree))
        if len(ids) == 3:
            (packs["tree"],) = {info.key for info in repository.store.list("packs/")} - before
    owners = dict(zip(experiments, ([one] for one in ids), strict=True))
    check(repository, owners)  # which leaves the trees in memory
    repository.store.delete(packs[lost])
    left = {experiment: owners[experiment] for experiment in experiments}
    for number in needing:
        left[experiments[number]] = []
    report = check(repository, left)
    assert {snapshot.id for snapshot in report.unreadable} == {_owner(ids[number]) for number in needing}
    for snapshot in report.unreadable:
        assert snapshot.error == f"pack {packs[lost]} of {repository.url} is missing"


@pytest.mark.parametrize("change", [-60, -1, 1])
def test_a_pack_of_another_size_is_damaged_as_well(repository: Repository, change: int) -> None:
    experiment = put_experiment(repository)
    base = Chunk(PLANES, 100, 70)
    chunks = [[Chunk(RAW, 10, 10), Chunk(DELTA, 100, 40, base.id), base], [Chunk(RAW, 20, 20)]]
    keys = [put_pack(repository, pack) for pack in chunks]
    trees = put_trees(repository, *({"f": describe_file(pack)} for pack in chunks))
    damaged, _ = (put_checkpoint(repository, experiment, tree) for tree in trees)
    data = repository.store.get(keys[0])
    repository.store.replace(keys[0], (data + b"?")[: len(data) + change])
    report = measure_repository(repository, [experiment], [experiment])
    (unreadable,) = report.unreadable
    assert unreadable.id == _owner(damaged)
    sizes = f"{len(data) + change} bytes, not {len(data)}"
    assert unreadable.error == f"pack {keys[0]} of {repository.url} has {sizes}"
    assert (report.total.snapshots, report.total.logical_bytes, report.total.stored_bytes) == (1, 20, 20)
    size = sum(path.stat().st_size for path in root_of(repository).rglob("*") if path.is_file())
    assert report.total.stored_bytes + report.total.metadata_bytes + report.unreferenced_bytes == size
    assert report.unreferenced_bytes > 10 + 40 + 70


@pytest.mark.parametrize("size", [0, 10])
def test_packs_cut_to_nothing_do_not_count_for_more_than_they_take(repository: Repository, size: int) -> None:
    for number in range(3):
        key = put_pack(repository, [Chunk(RAW, 10, 10)], is_listed=number > 0)
        repository.store.replace(key, bytes(size))
    report = measure_repository(repository, [], [])
    whole = sum(path.stat().st_size for path in root_of(repository).rglob("*") if path.is_file())
    assert report.unreferenced_bytes == 0
    assert report.total.metadata_bytes == whole


def test_only_the_wanted_experiments_have_rows_in_the_order_of_wanting(repository: Repository) -> None:
    put_pack(repository, [chunk := Chunk(RAW, 10, 10)])
    experiments = [put_experiment(repository) for _ in range(3)]
    for experiment in experiments:
        (tree,) = put_trees(repository, {"f": describe_file([chunk])})
        put_checkpoint(repository, experiment, tree)
    wanted = [experiments[2], experiments[0]]
    report = measure_repository(repository, experiments, wanted)
    assert [usage.id for usage in report.experiments] == wanted
    assert [usage.unique_bytes for usage in report.experiments] == [10, 10]
    assert (report.total.snapshots, report.total.logical_bytes, report.total.unique_bytes) == (3, 30, 10)


def test_an_empty_repository(repository: Repository) -> None:
    report = check(repository, {})
    assert (report.total.snapshots, report.total.stored_bytes, report.unreferenced_bytes) == (0, 0, 0)
