"""Files whose chunks hold their regions first and their gaps last."""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from replicate.errors import RepositoryDamaged
from replicate.ids import ExperimentId, SnapshotId, new_id
from replicate.records import ExperimentRecord, utc_now
from replicated.file_reader import MAX_FETCH_BYTES, FileReader
from replicated.format.builders import ContentBuilder, DirectoryBuilder
from replicated.format.canonical import pack
from replicated.format.manifest import LAYOUT_NODE, MAX_INLINE_CHUNKS, FileContent, RootNode
from replicated.format.metadata import Snapshot
from replicated.format.pack import TREE_PACK
from replicated.packer import Chunk, Packer, WriteStats
from replicated.references import iter_chunks
from replicated.repository import Repository
from replicated.store.memory import MemoryStore
from replicated.tree import open_tree

MIB = 1 << 20
STANDALONE_READER = Path(__file__).parents[2] / "examples" / "standalone_reader.py"


class Counting(MemoryStore):
    """Counts what is read of its packs."""

    reads = 0
    read_bytes = 0

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        data = super().get(key, offset, length)
        if key.startswith("packs/"):
            self.reads += 1
            self.read_bytes += len(data)
        return data


@pytest.fixture(scope="module")
def store() -> Counting:
    return Counting()


@pytest.fixture(scope="module")
def repository(store: Counting, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    opened = Repository.open_on(store, cache=tmp_path_factory.mktemp("cache"), create=True)
    yield opened
    opened.close()


def gather(data: bytes, lengths: Sequence[int]) -> bytes:
    """The regions of a file and then its gaps."""
    starts = list(accumulate(lengths, initial=0))
    parts = [data[start : start + length] for start, length in zip(starts, lengths, strict=False)]
    return b"".join([*parts[1::2], *parts[0::2]])


def store_gathered(
    repository: Repository, data: bytes, lengths: Sequence[int], piece_bytes: int = MIB
) -> FileContent:
    packer = Packer(repository.store, repository.index, WriteStats())

    def store_node(node: bytes) -> bytes:
        packer.add([Chunk(blake3(node).digest(), node)], TREE_PACK)
        return blake3(node).digest()

    builder = ContentBuilder(store_node)
    stream = gather(data, lengths)
    for start in range(0, len(stream), piece_bytes):
        piece = stream[start : start + piece_bytes]
        packer.add([Chunk(blake3(piece).digest(), piece)])
        builder.add(blake3(piece).digest(), len(piece))
    content = builder.finish(blake3(data).digest(), lengths)
    packer.finish()
    return content


def put_snapshot(repository: Repository, content: FileContent) -> SnapshotId:
    """A snapshot with nothing but the file `model`."""
    packer = Packer(repository.store, repository.index, WriteStats())

    def store_node(node: bytes) -> bytes:
        packer.add([Chunk(blake3(node).digest(), node)], TREE_PACK)
        return blake3(node).digest()

    directory = DirectoryBuilder(store_node)
    directory.add_file(b"model", 0o644, 0, content)
    root = RootNode(directory.finish(), 0o755, 0, files=1, size_bytes=content.size)
    packer.finish()
    snapshot = Snapshot(SnapshotId(new_id()), root)
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
    return snapshot.id


layouts = st.builds(
    lambda first, others: (first, *others) if first or len(others) > 1 else (1, *others),
    st.integers(0, 40),
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
)


@given(layouts, st.integers(1, 60), st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500))))
def test_any_part_of_a_file_of_any_layout_is_read(
    repository: Repository, lengths: tuple[int, ...], piece_bytes: int, ranges: list[tuple[int, int]]
) -> None:
    data = random.Random(sum(lengths)).randbytes(sum(lengths))
    reader = FileReader(repository, store_gathered(repository, data, lengths, piece_bytes))
    for offset, length in [(0, len(data)), *ranges]:
        assert reader.pread(offset, length) == data[offset : offset + length]
        parts = list(reader.iter_parts(offset, length))
        assert b"".join(parts) == data[offset : offset + length]
        assert all(len(part) > 0 for part in parts)


@pytest.mark.parametrize("piece_bytes", [20_000, MIB], ids=["list of chunks", "inline"])
def test_large_file_is_read_through_its_tree(repository: Repository, piece_bytes: int) -> None:
    lengths = (300, 3 * MIB + 5, 64, 5 * MIB, 700_000, 40_000, 9)
    data = random.Random(1).randbytes(sum(lengths))
    content = store_gathered(repository, data, lengths, piece_bytes)
    assert bool(content.node) == (sum(lengths) / piece_bytes > MAX_INLINE_CHUNKS)
    tree = open_tree(repository, put_snapshot(repository, content))
    reader = tree.reader(tree.find(b"model"))
    assert reader.pread(0, 1 << 40) == data
    for offset in range(0, len(data), 700_001):
        assert reader.pread(offset, 700_001) == data[offset : offset + 700_001]
    assert reader.pread(len(data), 1) == reader.pread(5, 0) == b""


def test_snapshot_names_the_layout_among_its_chunks(repository: Repository) -> None:
    lengths = (10, 2000, 30)
    data = random.Random(2).randbytes(sum(lengths))
    content = store_gathered(repository, data, lengths, 500)
    snapshot = repository.load_snapshot(put_snapshot(repository, content))
    named = [chunk[0] for chunk in iter_chunks(repository, snapshot)]
    assert sorted(named) == sorted([snapshot.root.node, content.layout, *content.ids()])
    assert list(iter_chunks(repository, snapshot, set(named))) == []


def test_content_without_its_layout_is_not_contained(repository: Repository) -> None:
    lengths = (10, 2000, 30)
    for piece_bytes in (500, 20):
        data = random.Random(3).randbytes(sum(lengths))
        content = store_gathered(repository, data, lengths, piece_bytes)
        with repository.writer() as writer:
            assert writer.contains(content)
            assert not writer.contains(content._replace(layout=bytes(32)))


@pytest.mark.parametrize("piece_bytes", [20_000, MIB], ids=["list of chunks", "inline"])
def test_reader_made_from_the_document_reads_the_same(tmp_path: Path, piece_bytes: int) -> None:
    lengths = [0, 500_000, *[64, 4096] * 200, 1_000_000, 10, 1, 1]
    data = random.Random(7).randbytes(sum(lengths))
    repository = Repository.open((tmp_path / "store").as_uri(), cache=tmp_path / "cache", create=True)
    snapshot_id = put_snapshot(repository, store_gathered(repository, data, lengths, piece_bytes))
    wrong = store_gathered(repository, data, [len(data) - 1, 1], piece_bytes)
    wrong_id = put_snapshot(repository, wrong._replace(hash=bytes(32)))
    repository.close()
    for identifier, status in ((snapshot_id, 0), (wrong_id, 1)):
        target = tmp_path / identifier
        command = [sys.executable, "-I", STANDALONE_READER, tmp_path / "store", "extract", identifier, target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, bool(done.stderr)) == (status, bool(status)), done.stderr
        assert "Traceback" not in done.stderr
        assert (target / "model").read_bytes() == data, "what is wrong is seen at the end only"


# Work


def test_sequential_reading_fetches_no_chunk_twice_and_gaps_once(
    store: Counting, repository: Repository
) -> None:
    """Many small tensors: each mebibyte has hundreds of gaps, all of them in one chunk at the end."""
    lengths = [64, 4096] * 4000
    data = random.Random(4).randbytes(sum(lengths))
    content = store_gathered(repository, data, lengths)
    reader = FileReader(repository, content)
    reads, read_bytes = store.reads, store.read_bytes
    parts = [reader.pread(offset, MIB) for offset in range(0, len(data), MIB)]
    assert b"".join(parts) == data
    assert store.read_bytes - read_bytes <= len(data)
    assert store.reads - reads <= len(data) // MIB + 2


def test_reading_looks_only_at_what_is_asked_for(repository: Repository) -> None:
    lengths = [64, 4096] * 4000
    data = random.Random(4).randbytes(sum(lengths))
    reader = FileReader(repository, store_gathered(repository, data, lengths))
    parts = reader.iter_parts(len(data) // 2, 10_000)
    assert len(list(parts)) <= 8, "a gap and a region each 4160 bytes, and a chunk's end or two"


def test_reading_at_once_holds_few_chunks(repository: Repository) -> None:
    lengths = (100, 40 * MIB, 100)
    data = random.Random(5).randbytes(40 * MIB) + bytes(200)
    reader = FileReader(repository, store_gathered(repository, data, lengths))
    asked: list[int] = []
    read_chunks = repository.read_chunks

    class Watched:
        url = repository.url

        def read_chunks(
            self, chunk_ids: Sequence[bytes], lengths: Sequence[int], *, is_once: bool, is_cached: bool
        ) -> dict[bytes, bytes]:
            asked.append(sum(lengths))
            assert is_once
            return read_chunks(chunk_ids, lengths, is_once=is_once, is_cached=is_cached)

    reader._repository = Watched()  # type: ignore[assignment]
    whole = blake3()
    for part in reader.iter_parts(0, len(data)):
        whole.update(part)
    assert whole.digest() == blake3(data).digest()
    assert max(asked) < MAX_FETCH_BYTES + MIB
    assert len(asked) >= 5


# What no writer of ours made

Forge = Callable[..., FileContent]


@pytest.fixture
def forge(repository: Repository) -> Forge:
    """A file of two chunks with this layout node."""

    def store(layout: bytes) -> FileContent:
        chunks = [b"a" * 100, b"b" * 50]
        packer = Packer(repository.store, repository.index, WriteStats())
        packer.add([Chunk(blake3(chunk).digest(), chunk) for chunk in chunks])
        packer.add([Chunk(blake3(layout).digest(), layout)], TREE_PACK)
        packer.finish()
        ids = b"".join(blake3(chunk).digest() for chunk in chunks)
        return FileContent(150, bytes(32), ids, (100, 50), layout=blake3(layout).digest())

    return store


def test_forged_layout_that_is_right_is_read(repository: Repository, forge: Forge) -> None:
    reader = FileReader(repository, forge(pack([LAYOUT_NODE, [20, 100, 30]])))
    assert reader.pread(0, 150) == b"b" * 20 + b"a" * 100 + b"b" * 30


@pytest.mark.parametrize(
    "layout",
    [
        pack([LAYOUT_NODE, [20, 100, 29]]),
        pack([LAYOUT_NODE, [20, 100, 31]]),
        pack([LAYOUT_NODE, [20, 2**62, 30]]),
        pack([LAYOUT_NODE, [2**63 - 1] * 5]),
        pack([LAYOUT_NODE, [0, 150]]),
        pack([LAYOUT_NODE, [20, 0, 130]]),
        pack([LAYOUT_NODE, [-20, 170]]),
        pack([2, 0, bytes(32), [150]]),
        b"a" * 100,
    ],
)
def test_layout_that_does_not_fit_is_damage(repository: Repository, forge: Forge, layout: bytes) -> None:
    with pytest.raises(RepositoryDamaged):
        FileReader(repository, forge(layout))


def test_layout_that_is_in_no_pack_is_damage(repository: Repository, forge: Forge) -> None:
    content = forge(pack([LAYOUT_NODE, [20, 100, 30]]))
    with pytest.raises(RepositoryDamaged):
        FileReader(repository, content._replace(layout=bytes(32)))


def test_layout_of_the_most_regions_is_read_where_asked(repository: Repository) -> None:
    lengths = [1, 2] * (1 << 16)
    data = random.Random(6).randbytes(sum(lengths))
    reader = FileReader(repository, store_gathered(repository, data, lengths))
    for offset in (0, 1, 2, 3, 99_999, 100_000, 100_001, len(data) - 1):
        assert reader.pread(offset, 1) == data[offset : offset + 1]
        assert reader.pread(offset, 1000) == data[offset : offset + 1000]
