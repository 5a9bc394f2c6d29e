"""Reads ranges of many files at once, with as few requests as the places of their chunks allow.

Chunks of all ranges are fetched together, up to a number of bytes, each once, and the reader joins what lies
close together and asks for the rest at the same time. Invariant: a range is given whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from replicate.errors import RepositoryDamaged
from replicated.file_reader import MAX_FETCH_PARTS, FileReader, Part, Piece, chunks_of
from replicated.repository import Repository

#: Chunks that are in memory together. Of a store that is far away many reads go on at the same time.
NEAR_BATCH_BYTES: Final = 8 << 20
FAR_BATCH_BYTES: Final = 64 << 20


class Range(NamedTuple):
    """A part of a file, within its length."""

    reader: FileReader
    start: int
    stop: int


def read_ranges(repository: Repository, ranges: Sequence[Range], *, is_once: bool) -> list[bytes]:
    """The bytes of each range; `is_once`: they are not kept in memory to be read again.

    Raises `RepositoryDamaged` and `RepositoryUnreachable`.
    """
    parts: list[list[Part]] = [[] for _ in ranges]
    for position, part in iter_parts(repository, ranges, is_once=is_once):
        parts[position].append(part)
    whole = []
    for wanted, found in zip(ranges, parts, strict=True):
        data = bytes(found[0]) if len(found) == 1 else b"".join(found)
        if len(data) != wanted.stop - wanted.start:
            raise RepositoryDamaged(
                f"a file in {repository.url} has {len(data)} bytes where there should be "
                f"{wanted.stop - wanted.start}"
            )
        whole.append(data)
    return whole


def iter_parts(
    repository: Repository, ranges: Sequence[Range], *, is_once: bool
) -> Iterator[tuple[int, Part]]:
    """The position of a range, and its next bytes: all of the first range, then of the second, and so on.

    Raises as `read_ranges`.
    """
    batch_bytes = NEAR_BATCH_BYTES if repository.store.capabilities.is_near else FAR_BATCH_BYTES
    chunks: dict[bytes, bytes] = {}
    for batch in _batches(ranges, batch_bytes):
        wanted = chunks_of(piece for _, piece in batch)
        # What one batch ends in the next often begins in.
        chunks = {chunk_id: chunks[chunk_id] for chunk_id in wanted if chunk_id in chunks}
        missing = {chunk_id: length for chunk_id, length in wanted.items() if chunk_id not in chunks}
        chunks.update(repository.read_chunks(list(missing), list(missing.values()), is_once=is_once))
        for position, piece in batch:
            yield position, piece.cut(chunks[piece.chunk_id])


def _batches(ranges: Sequence[Range], batch_bytes: int) -> Iterator[list[tuple[int, Piece]]]:
    """Pieces in groups whose chunks can be in memory together."""
    batch: list[tuple[int, Piece]] = []
    seen: set[bytes] = set()
    size_bytes = 0
    for position, wanted in enumerate(ranges):
        for piece in wanted.reader.iter_pieces(wanted.start, wanted.stop - wanted.start):
            batch.append((position, piece))
            if piece.chunk_id not in seen:
                seen.add(piece.chunk_id)
                size_bytes += piece.chunk_length
            if size_bytes >= batch_bytes or len(batch) == MAX_FETCH_PARTS:
                yield batch
                batch, seen, size_bytes = [], set(), 0
    if batch:
        yield batch
