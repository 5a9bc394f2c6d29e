"""Reads the files of a repository at any offset, by their lists of chunks and their layouts.

Used by `tree`, which says which files there are; fetching and verifying chunks is the reader's matter.
Invariant: work and memory are bounded by what is asked for, whatever somebody may have written into the
repository, and what does not fit together is damage.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final, NamedTuple, TypeAlias

from replicate.errors import RepositoryDamaged
from replicated.format.manifest import ChunkList, FileContent
from replicated.repository import Repository

#: Nodes of a file's list of chunks that its reader remembers.
CACHED_LISTS: Final = 64
#: And items of these, as many as such nodes have when they are long; somebody else's may have far more.
CACHED_ITEMS: Final = 64 * 2048
#: A reader fetches at most so many bytes of a file at once, more only where a request takes more and is
#: costly; and at most so many parts.
MAX_FETCH_BYTES: Final = 8 << 20
MAX_FETCH_PARTS: Final = 4096
#: Parts that are shorter and follow each other are joined up to so many bytes: there is no limit to how short
#: chunks may be, and each part takes a hundred bytes of memory.
MIN_PART_BYTES: Final = 4096
JOINED_BYTES: Final = 64 << 10

#: A part of a file as it lies in one chunk, often all of it.
Part: TypeAlias = bytes | memoryview


class Piece(NamedTuple):
    """Where a part of a file lies: what is between two places in a chunk."""

    chunk_id: bytes
    #: What the file says of the chunk.
    chunk_length: int
    start: int
    stop: int

    def cut(self, chunk: bytes) -> Part:
        """The part itself, not copied; raises `RepositoryDamaged` for a chunk of another length."""
        if len(chunk) != self.chunk_length:
            raise RepositoryDamaged(
                f"chunk {self.chunk_id.hex()} has {len(chunk)} bytes where a file says {self.chunk_length}",
                fields={"chunk": self.chunk_id.hex()},
            )
        if self.stop - self.start == self.chunk_length:
            return chunk
        return memoryview(chunk)[self.start : self.stop]


def chunks_of(pieces: Iterable[Piece]) -> dict[bytes, int]:
    """The chunks that pieces lie in, with their lengths.

    Of two lengths of one chunk it is the smaller: who fetches that finds out before it fills the memory.
    """
    lengths: dict[bytes, int] = {}
    for piece in pieces:
        if lengths.setdefault(piece.chunk_id, piece.chunk_length) > piece.chunk_length:
            lengths[piece.chunk_id] = piece.chunk_length
    return lengths


class FileReader:
    """Reads one file at any offset; may be used from several threads."""

    def __init__(self, repository: Repository, content: FileContent) -> None:
        self._repository = repository
        self._content = content
        self._size = content.size
        self._lists: _ChunkLists | None = None
        self._root: _Extents | None = None
        self._layout: _Layout | None = None
        capabilities = repository.store.capabilities
        self._fetch_bytes = MAX_FETCH_BYTES
        if capabilities.has_costly_requests:
            self._fetch_bytes = max(MAX_FETCH_BYTES, capabilities.max_read_bytes)
        if not content.node and not content.chunk_ids:
            return
        self._lists = _ChunkLists(repository)
        if content.node:
            self._root = self._lists.load(content.node, content.size)
        else:
            self._root = _Extents(ChunkList(0, content.chunk_ids, content.lengths))
        if content.layout:
            self._layout = self._load_layout(content.layout)

    def pread(self, offset: int, length: int) -> bytes:
        """The bytes from `offset`, fewer than `length` only at the end of the file.

        Raises `RepositoryDamaged` and `RepositoryUnreachable`.
        """
        parts = list(_join_short(self._iter_parts(offset, length, is_once=False)))
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def iter_parts(self, offset: int, length: int, *, is_cached: bool = True) -> Iterator[Part]:
        """The bytes that `pread` gives, in parts that are not copied unless they are short; none is empty.

        Few of them are in memory at once, and none is kept there for the next call, nor in the cache of
        contents unless `is_cached`. Raises as `pread`, when the parts are asked for.
        """
        return _join_short(self._iter_parts(offset, length, is_once=True, is_cached=is_cached))

    def iter_pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """Where the bytes lie that `pread` gives, in order; none is empty.

        Reads no more than lists of chunks. Raises as `pread`.
        """
        if offset < 0 or length < 0:
            raise ValueError(f"a negative offset or length: {offset}, {length}")
        end = min(offset + length, self._size)
        if offset >= end:
            return iter(())
        if self._root is None:
            return iter((Piece(self._content.hash, self._size, offset, end),))
        if self._layout is None:
            return self._iter_chunked(self._root, 0, offset, end)
        return self._iter_gathered(self._root, self._layout, offset, end)

    def fetch(
        self, chunks: Mapping[bytes, int], *, is_once: bool = True, is_cached: bool = True
    ) -> dict[bytes, bytes]:
        """Chunks that pieces lie in, given with their lengths, verified; raises as `pread`.

        Those that are fetched `is_once` are not kept in memory, and only where `is_cached` in the cache of
        contents.
        """
        return self._repository.read_chunks(
            list(chunks), list(chunks.values()), is_once=is_once, is_cached=is_cached
        )

    def _iter_parts(
        self, offset: int, length: int, *, is_once: bool, is_cached: bool = True
    ) -> Iterator[Part]:
        chunks: dict[bytes, bytes] = {}
        for pieces in self._iter_batches(self.iter_pieces(offset, length)):
            wanted = chunks_of(pieces)
            # What one batch ends in the next often begins in.
            chunks = {chunk_id: chunks[chunk_id] for chunk_id in wanted if chunk_id in chunks}
            missing = {chunk_id: size for chunk_id, size in wanted.items() if chunk_id not in chunks}
            chunks.update(self.fetch(missing, is_once=is_once, is_cached=is_cached))
            for piece in pieces:
                yield piece.cut(chunks[piece.chunk_id])

    def _iter_batches(self, pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
        """Pieces in groups whose chunks can be in memory together."""
        batch: list[Piece] = []
        sizes: dict[bytes, int] = {}
        size_bytes = 0
        for piece in pieces:
            batch.append(piece)
            if piece.chunk_id not in sizes:
                sizes[piece.chunk_id] = piece.chunk_length
                size_bytes += piece.chunk_length
            if size_bytes >= self._fetch_bytes or len(batch) == MAX_FETCH_PARTS:
                yield batch
                batch, sizes, size_bytes = [], {}, 0
        if batch:
            yield batch

    def _load_layout(self, node_id: bytes) -> _Layout:
        lengths = self._repository.read_layout(node_id)
        if sum(lengths) != self._size:
            raise RepositoryDamaged(
                f"layout {node_id.hex()} in {self._repository.url} does not fit the file it belongs to",
                fields={"chunk": node_id.hex()},
            )
        return _Layout(lengths)

    def _iter_gathered(self, root: _Extents, layout: _Layout, offset: int, end: int) -> Iterator[Piece]:
        """What lies between two offsets of a gathered file: taken from its regions and gaps in turn."""
        regions_begin, regions_end = layout.regions_before(offset), layout.regions_before(end)
        gaps_begin, gaps_end = (
            layout.region_bytes + offset - regions_begin,
            layout.region_bytes + end - regions_end,
        )
        regions = _Supply(self._iter_chunked(root, 0, regions_begin, regions_end))
        gaps = _Supply(self._iter_chunked(root, 0, gaps_begin, gaps_end))
        for is_region, length in layout.iter_between(offset, end):
            yield from (regions if is_region else gaps).take(length)

    def _iter_chunked(self, extents: _Extents, base: int, offset: int, end: int) -> Iterator[Piece]:
        """The bytes of chunks between `offset` and `end`, below a node whose first byte is at `base`."""
        node = extents.node
        for position in range(bisect_right(extents.ends, offset - base), len(node.lengths)):
            length = node.lengths[position]
            start = base + extents.ends[position] - length
            if start >= end:
                return
            if node.level == 0:
                yield Piece(node.id_at(position), length, max(0, offset - start), min(length, end - start))
            else:
                assert self._lists is not None, "a node came from there"
                below = self._lists.load(node.id_at(position), length, node.level - 1)
                yield from self._iter_chunked(below, start, max(offset, start), end)


class BytesReader:
    """Reads bytes that are in memory, as `FileReader` reads a file; `digest` is their hash."""

    def __init__(self, data: bytes, digest: bytes) -> None:
        self._data = data
        self._digest = digest

    def iter_parts(self, offset: int, length: int, *, is_cached: bool = True) -> Iterator[Part]:
        """See `FileReader.iter_parts`."""
        for piece in self.iter_pieces(offset, length):
            yield piece.cut(self._data)

    def iter_pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """See `FileReader.iter_pieces`."""
        end = min(offset + length, len(self._data))
        if offset < end:
            yield Piece(self._digest, len(self._data), offset, end)

    def fetch(self, chunks: Mapping[bytes, int]) -> dict[bytes, bytes]:
        """See `FileReader.fetch`."""
        return dict.fromkeys(chunks, self._data)


class _Layout:
    """Which bytes of a gathered file are in regions; in memory a fraction of the node that says it."""

    def __init__(self, lengths: Sequence[int]) -> None:
        #: Where each gap (at even positions) and region (at odd ones) begins, and where the last ends.
        self._starts = array("Q", accumulate(lengths, initial=0))
        #: How many bytes of regions lie before each of these places.
        self._regions_before = array(
            "Q", accumulate((n if p % 2 else 0 for p, n in enumerate(lengths)), initial=0)
        )
        self.region_bytes = self._regions_before[-1]

    def regions_before(self, offset: int) -> int:
        """How many bytes of regions lie before a byte of the file."""
        position = self._find(offset)
        inside = offset - self._starts[position] if position % 2 else 0
        return self._regions_before[position] + inside

    def iter_between(self, offset: int, end: int) -> Iterator[tuple[bool, int]]:
        """Whether it is a region, and its bytes: of each region and gap between two offsets, in order."""
        position = self._find(offset)
        while offset < end:
            stop = min(end, self._starts[position + 1])
            yield position % 2 == 1, stop - offset
            offset = stop
            position += 1

    def _find(self, offset: int) -> int:
        """The position of the gap or region that holds a byte; past the end, the last one's."""
        return min(bisect_right(self._starts, offset), len(self._starts) - 1) - 1


class _Supply:
    """Pieces that come one after the other, of which any number of bytes is taken."""

    def __init__(self, pieces: Iterator[Piece]) -> None:
        self._pieces = pieces
        self._rest: Piece | None = None

    def take(self, length: int) -> Iterator[Piece]:
        """The next `length` bytes; there are as many."""
        while length > 0:
            piece = self._rest or next(self._pieces)
            cut = piece.start + length
            if piece.stop > cut:
                self._rest = piece._replace(start=cut)
                piece = piece._replace(stop=cut)
            else:
                self._rest = None
            length -= piece.stop - piece.start
            yield piece


def _join_short(parts: Iterator[Part]) -> Iterator[Part]:
    """The same bytes in few parts."""
    short: list[Part] = []
    short_bytes = 0
    for part in parts:
        is_short = len(part) < MIN_PART_BYTES
        if is_short:
            short.append(part)
            short_bytes += len(part)
        if short and (not is_short or short_bytes >= JOINED_BYTES):
            yield short[0] if len(short) == 1 else b"".join(short)
            short, short_bytes = [], 0
        if not is_short:
            yield part
    if short:
        yield short[0] if len(short) == 1 else b"".join(short)


class _Extents:
    """A node of a list of chunks with the ends of its parts, relative to its own beginning."""

    def __init__(self, node: ChunkList) -> None:
        self.node = node
        self.ends = list(accumulate(node.lengths))


class _ChunkLists:
    """Loads the nodes of one file's list of chunks and remembers the last ones."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._lock = threading.Lock()
        self._recent: OrderedDict[bytes, _Extents] = OrderedDict()
        self._recent_items = 0

    def load(self, node_id: bytes, size: int, level: int | None = None) -> _Extents:
        """A node that stands for `size` bytes; raises `RepositoryDamaged` when it does not."""
        with self._lock:
            extents = self._recent.get(node_id)
        if extents is None:
            extents = _Extents(self._repository.read_chunk_list(node_id))
        if extents.ends[-1] != size or (level is not None and extents.node.level != level):
            raise RepositoryDamaged(
                f"chunk list {node_id.hex()} in {self._repository.url} does not fit the file it belongs to",
                fields={"chunk": node_id.hex()},
            )
        with self._lock:
            if node_id not in self._recent:
                self._recent[node_id] = extents
                self._recent_items += len(extents.ends)
            self._recent.move_to_end(node_id)
            while len(self._recent) > CACHED_LISTS or self._recent_items > CACHED_ITEMS:
                self._recent_items -= len(self._recent.popitem(last=False)[1].ends)
        return extents
