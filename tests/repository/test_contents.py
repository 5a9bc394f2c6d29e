"""Storing the contents of files of tensors: cut where tensors are, as differences where that is said."""

import json
import random
from collections.abc import Sequence

import numpy as np
import pytest
from blake3 import blake3

from replicate.errors import RepositoryDamaged, RepositoryUnreachable
from replicated.chunk.cdc import ChunkerParameters, ChunkSizes, Cutter
from replicated.chunk.codec import DELTA, PLANES
from replicated.chunk.tensor import PIECE_BYTES, Layout
from replicated.contents import Bases, ReadInto
from replicated.file_reader import FileReader
from replicated.format.listing import parse_index
from replicated.format.manifest import FileContent
from replicated.packer import Stored
from replicated.reader import ChunkMemory, ChunkReader
from replicated.repository import Repository

PARAMETERS = ChunkerParameters()


def weights(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, count).astype("<f4")


def safetensors(tensors: Sequence[np.ndarray], name: str = "layer") -> bytes:
    header, offset = {}, 0
    for number, tensor in enumerate(tensors):
        end = offset + tensor.nbytes
        header[f"{name}.{number}"] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(tensor.tobytes() for tensor in tensors)


def reading(data: bytes) -> ReadInto:
    def read_into(view: memoryview, offset: int) -> int:
        # In bites, as a file may be read.
        count = min(len(view), 3_000_000)
        view[:count] = data[offset : offset + count]
        return count

    return read_into


class NamedBases:
    """Bases that a test names, and what became of the pieces."""

    def __init__(self, named: dict[int, bytes] | None = None) -> None:
        self.named = named or {}
        self.noted: list[tuple[bytes, Stored | None]] = []

    def base_of(self, piece: int) -> bytes:
        return self.named.get(piece, b"")

    def note(self, piece: int, chunk_id: bytes, stored: Stored | None) -> None:
        assert piece == len(self.noted), "in order and once each"
        self.noted.append((chunk_id, stored))

    def ids(self) -> dict[int, bytes]:
        return {piece: chunk_id for piece, (chunk_id, _) in enumerate(self.noted)}


def store(repository: Repository, data: bytes, bases: Bases | None = None) -> tuple[FileContent, int]:
    """The content, and how many bytes it cost."""
    with repository.writer() as writer:
        content = writer.add_content(len(data), reading(data), lambda layout: bases)
        writer.finish()
        return content, writer.stats.new_stored_bytes


def read(repository: Repository, content: FileContent) -> bytes:
    return FileReader(repository, content).pread(0, content.size)


@pytest.mark.parametrize(
    "counts", [[70_000], [1_000_000, 3, 500_000], [5_000_000, 1_500, 4_000_000, 1 << 18]]
)
def test_file_of_tensors_is_read_back(repository: Repository, counts: list[int]) -> None:
    data = safetensors([weights(count, seed) for seed, count in enumerate(counts)])
    content, _ = store(repository, data)
    assert content.layout
    assert (content.size, content.hash) == (len(data), blake3(data).digest())
    assert read(repository, content) == data


def test_tensors_are_found_again_wherever_they_lie_and_under_any_name(
    repository: Repository,
) -> None:
    tensors = [weights(count, seed) for seed, count in enumerate([3_000_000, 400_000, 2_000_000])]
    data = safetensors(tensors)
    _, first = store(repository, data)
    assert first > 0.7 * len(data)
    for again in (safetensors(tensors, "model.decoder.block"), safetensors([tensors[2], *tensors[:2]])):
        content, cost = store(repository, again)
        assert cost < 4000
        assert read(repository, content) == again


def test_weights_take_less_than_their_size(repository: Repository) -> None:
    bases = NamedBases()
    data = safetensors([weights(2_000_000, 1)])
    _, cost = store(repository, data, bases)
    assert cost < 0.87 * len(data)
    assert {stored.codec for _, stored in bases.noted if stored} == {PLANES}


def test_tensors_become_differences_to_the_chunks_that_are_named(repository: Repository) -> None:
    before, step = weights(3_000_000, 1), weights(3_000_000, 2) * np.float32(0.005)
    first, second = safetensors([before]), safetensors([before + step])
    keyframe, later = NamedBases(), NamedBases()
    store(repository, first, keyframe)
    _, alone = store(repository, safetensors([before - step]))
    later.named = keyframe.ids()
    content, cost = store(repository, second, later)
    assert {stored.codec for _, stored in later.noted if stored} == {DELTA}
    assert cost < 0.9 * alone
    assert read(repository, content) == second
    repository.close()


def test_chunk_that_is_a_difference_is_no_base(repository: Repository) -> None:
    before, step = weights(600_000, 1), weights(600_000, 2) * np.float32(0.001)
    first, second, third = NamedBases(), NamedBases(), NamedBases()
    store(repository, safetensors([before]), first)
    second.named = first.ids()
    store(repository, safetensors([before + step]), second)
    third.named = second.ids()
    content, _ = store(repository, safetensors([before + 2 * step]), third)
    assert DELTA not in {stored.codec for _, stored in third.noted if stored}
    assert read(repository, content) == safetensors([before + 2 * step])


@pytest.mark.parametrize("base", [b"", bytes(32), b"x" * 32])
def test_base_that_is_not_there_is_not_needed(repository: Repository, base: bytes) -> None:
    data = safetensors([weights(400_000, 1)])
    bases = NamedBases(dict.fromkeys(range(10), base))
    content, _ = store(repository, data, bases)
    assert read(repository, content) == data
    assert {stored.codec for _, stored in bases.noted if stored} == {PLANES}


def lose(repository: Repository, chunk_id: bytes) -> None:
    """Damage the index object that lists a chunk, and make the index anew."""
    root = repository.store.capabilities.local_root
    assert root
    for path in (root / "log" / "index").iterdir():
        data = path.read_bytes()
        if any(record.chunk_id == chunk_id for listing in parse_index(data) for record in listing.records):
            path.chmod(0o644)
            path.write_bytes(data[:-1])
    repository.index.rebuild()


@pytest.mark.parametrize("has_other_base", [False, True])
def test_difference_to_what_is_lost_is_stored_again(repository: Repository, has_other_base: bool) -> None:
    before, step = weights(600_000, 1), weights(600_000, 2) * np.float32(0.001)
    keyframe, later, other, again = NamedBases(), NamedBases(), NamedBases(), NamedBases()
    store(repository, safetensors([before]), keyframe)
    later.named = keyframe.ids()
    data = safetensors([before + step])
    content, _ = store(repository, data, later)
    lose(repository, keyframe.ids()[0])
    with pytest.raises(RepositoryDamaged):
        read(repository, content)
    with repository.writer() as writer:
        assert not writer.contains(content)
    if has_other_base:
        store(repository, safetensors([before - step]), other)
        again.named = other.ids()
    store(repository, data, again)
    assert {stored.codec for _, stored in again.noted if stored} == {PLANES}
    assert read(repository, content) == data
    repository.index.rebuild()
    assert read(repository, content) == data


def test_base_that_cannot_be_read_costs_bytes_only(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, step = weights(600_000, 1), weights(600_000, 2) * np.float32(0.001)
    keyframe, later = NamedBases(), NamedBases()
    store(repository, safetensors([before]), keyframe)
    later.named = keyframe.ids()
    get = repository.store.get

    def refuse(key: str, *where: int) -> bytes:
        if key.startswith("packs/"):
            raise RepositoryUnreachable("Input/output error")
        return get(key, *where)

    with monkeypatch.context() as patch:
        patch.setattr(repository.store, "get", refuse)
        patch.setattr(repository, "_reader", ChunkReader(repository.store, repository.index, ChunkMemory(0)))
        content, _ = store(repository, safetensors([before + step]), later)
    assert {stored.codec for _, stored in later.noted if stored} == {PLANES}
    assert read(repository, content) == safetensors([before + step])


def test_chunks_that_are_there_are_noted_as_such(repository: Repository) -> None:
    data = safetensors([weights(900_000, 1)])
    store(repository, data)
    bases = NamedBases()
    store(repository, data, bases)
    assert [stored for _, stored in bases.noted] == [None] * 4


def test_contents_that_are_on_their_way_can_be_asked_for_in_any_order(repository: Repository) -> None:
    files = [
        safetensors([weights(700_000, 1)]),
        random.Random(2).randbytes(12_000_000),
        b"small",
        b"",
        bytes(9_000_000),
        b"a line of text\n" * 400_000,
    ]
    with repository.writer() as writer:
        pending = [writer.begin_content(len(data), reading(data)) for data in files]
        contents = [content.result() for content in reversed(pending)]
        assert [content.result() for content in reversed(pending)] == contents
        writer.finish()
        assert writer.stats.bytes_done == sum(map(len, files))
    for data, content in zip(files, reversed(contents), strict=True):
        assert content.hash == blake3(data).digest()
        assert read(repository, content) == data


def test_file_that_gets_shorter_while_its_layout_is_looked_for_is_an_error(repository: Repository) -> None:
    data = safetensors([weights(100_000, seed) for seed in range(3)])

    def read_into(view: memoryview, offset: int) -> int:
        piece = data[:300_000][offset : offset + len(view)]
        view[: len(piece)] = piece
        return len(piece)

    with repository.writer() as writer, pytest.raises(EOFError):
        writer.add_content(len(data), read_into)


@pytest.mark.parametrize("sizes", [PARAMETERS.text, PARAMETERS.binary])
def test_zeros_are_cut_like_anything_else(sizes: ChunkSizes) -> None:
    for length in (sizes.maximum + 1, 3 * sizes.maximum, 3 * sizes.maximum + 5, 8 << 20):
        cutter = Cutter(sizes)
        assert cutter.cut_zeros(length) == cutter.cut(memoryview(bytes(length)), is_last=False)


def test_long_zeros_within_a_file_cost_nothing(repository: Repository) -> None:
    ends = [random.Random(seed).randbytes(1_000_000) for seed in (1, 2)]
    data = ends[0] + bytes(60_000_000) + ends[1]
    content, cost = store(repository, data)
    assert cost < 2_100_000
    assert read(repository, content) == data
    # The same cuts as in one pass over the whole.
    cutter = Cutter(PARAMETERS.sizes_for(data[:8192]))
    lengths = cutter.cut(memoryview(data), is_last=True)
    assert repository.read_chunk_list(content.node).lengths == tuple(lengths)


def test_pieces_are_those_of_the_layout(repository: Repository) -> None:
    tensors = [weights(1_000_000, 1), weights(100, 2), weights(50_000, 3)]
    found: list[Layout] = []
    data = safetensors(tensors)
    bases = NamedBases()

    def find_bases(layout: Layout) -> Bases:
        found.append(layout)
        return bases

    with repository.writer() as writer:
        content = writer.add_content(len(data), reading(data), find_bases)
        writer.finish()
    (layout,) = found
    pieces = list(layout.pieces)
    assert len(pieces) == len(bases.noted)
    assert max(piece.size for piece in pieces) == PIECE_BYTES
    for piece, (chunk_id, _) in zip(pieces, bases.noted, strict=True):
        assert repository.read_chunk(chunk_id) == data[piece.start : piece.start + piece.size]
    assert content.ids()[: len(pieces)] == [chunk_id for chunk_id, _ in bases.noted]
