"""Where the bytes of a file lie, apart from fetching them."""

import random
from collections.abc import Callable

import pytest
from blake3 import blake3

from replicate.errors import RepositoryDamaged
from replicate.ids import SnapshotId
from replicated.file_reader import BytesReader, FileReader, Piece, chunks_of
from replicated.repository import Repository
from replicated.tree import open_tree

MIB = 1 << 20

Save = Callable[..., SnapshotId]


@pytest.mark.parametrize("size", [1, 1000, 300_000, 3 * MIB, 40 * MIB])
def test_pieces_and_the_chunks_they_lie_in_give_the_bytes(
    repository: Repository, save: Save, size: int
) -> None:
    data = random.Random(size).randbytes(size)
    tree = open_tree(repository, save({b"file": data}))
    reader: FileReader | BytesReader
    for reader in (tree.reader(tree.find(b"file")), BytesReader(data, blake3(data).digest())):
        for offset, length in ((0, size), (size // 2, 4096), (size - 1, 10), (size, 1), (0, 0)):
            pieces = list(reader.iter_pieces(offset, length))
            assert all(0 <= piece.start < piece.stop <= piece.chunk_length for piece in pieces)
            chunks = reader.fetch(chunks_of(pieces))
            parts = [piece.cut(chunks[piece.chunk_id]) for piece in pieces]
            assert b"".join(parts) == data[offset : offset + length]
            assert b"".join(reader.iter_parts(offset, length)) == data[offset : offset + length]


def test_saying_where_bytes_lie_fetches_no_chunk(
    repository: Repository, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = open_tree(repository, save({b"file": random.Random(1).randbytes(3 * MIB)}))
    reader = tree.reader(tree.find(b"file"))
    monkeypatch.setattr(Repository, "read_chunks", None)
    assert sum(piece.stop - piece.start for piece in reader.iter_pieces(100, MIB)) == MIB


def test_chunk_of_another_length_is_not_cut() -> None:
    piece = Piece(bytes(32), 10, 2, 5)
    assert piece.cut(b"0123456789") == b"234"
    for chunk in (b"012345678", b"0123456789a"):
        with pytest.raises(RepositoryDamaged):
            piece.cut(chunk)


def test_of_two_lengths_of_a_chunk_the_smaller_is_fetched() -> None:
    pieces = [Piece(b"a", 100, 0, 1), Piece(b"b", 7, 0, 7), Piece(b"a", 5, 0, 1), Piece(b"a", 50, 0, 1)]
    assert chunks_of(pieces) == {b"a": 5, b"b": 7}
