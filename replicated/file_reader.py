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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, TypeAlias

from replicate.errors import RepositoryDamaged
from replicated.format.manifest import ChunkList, FileContent
from replicated.repository import Repository

#: Nodes of a file's list of chunks that its reader remembers.
CACHED_LISTS: Final = 64
#: A reader fetches at most so many bytes of a file at once, and at most so many chunks.
MAX_FETCH_BYTES: Final = 8 << 20
MAX_FETCH_CHUNKS: Final = 4096

#: A part of a file as it lies in one chunk, often all of it.
Part: TypeAlias = bytes | memoryview


class FileReader:
    """Reads one file at any offset; may be used from several threads."""

    def __init__(self, repository: Repository, content: FileContent) -> None:
        self._repository = repository
        self._size = content.size
        self._lists = _ChunkLists(repository)
        if content.node:
            self._root = self._lists.load(content.node, content.size)
        elif content.chunk_ids:
            self._root = _Extents(ChunkList(0, content.chunk_ids, content.lengths))
        else:
            self._root = _Extents(ChunkList(0, content.hash, (content.size,)))
        self._layout = self._load_layout(content.layout) if content.layout else None

    def pread(self, offset: int, length: int) -> bytes:
        """The bytes from `offset`, fewer than `length` only at the end of the file.

        Raises `RepositoryDamaged` and `RepositoryUnreachable`.
        """
        parts = list(self._iter_parts(offset, length, is_once=False))
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def iter_parts(self, offset: int, length: int) -> Iterator[Part]:
        """The bytes that `pread` gives, in parts that are not copied; none is empty.

        Few of them are in memory at once, and none is kept there for the next call. Raises as `pread`, when
        the parts are asked for.
        """
        return self._iter_parts(offset, length, is_once=True)

    def _iter_parts(self, offset: int, length: int, *, is_once: bool) -> Iterator[Part]:
        if offset < 0 or length < 0:
            raise ValueError(f"a negative offset or length: {offset}, {length}")
        end = min(offset + length, self._size)
        if offset >= end:
            return iter(())
        if self._layout is None:
            return self._iter_chunked(offset, end, is_once)
        return self._iter_gathered(self._layout, offset, end, is_once)

    def _load_layout(self, node_id: bytes) -> _Layout:
        lengths = self._repository.read_layout(node_id)
        if sum(lengths) != self._size:
            raise RepositoryDamaged(
                f"layout {node_id.hex()} in {self._repository.url} does not fit the file it belongs to",
                fields={"chunk": node_id.hex()},
            )
        return _Layout(lengths)

    def _iter_gathered(self, layout: _Layout, offset: int, end: int, is_once: bool) -> Iterator[Part]:
        """What lies between two offsets of a gathered file: taken from its regions and gaps in turn."""
        regions_begin, regions_end = layout.regions_before(offset), layout.regions_before(end)
        gaps_begin, gaps_end = (
            layout.region_bytes + offset - regions_begin,
            layout.region_bytes + end - regions_end,
        )
        regions = _Supply(self._iter_chunked(regions_begin, regions_end, is_once))
        gaps = _Supply(self._iter_chunked(gaps_begin, gaps_end, is_once))
        for is_region, length in layout.iter_between(offset, end):
            yield from (regions if is_region else gaps).take(length)

    def _iter_chunked(self, offset: int, end: int, is_once: bool) -> Iterator[Part]:
        """What lies between two offsets of the bytes that the chunks make up."""
        batch: list[_Extent] = []
        batch_bytes = 0
        for extent in self._iter_extents(self._root, 0, offset, end):
            batch.append(extent)
            batch_bytes += extent.length
            if batch_bytes >= MAX_FETCH_BYTES or len(batch) == MAX_FETCH_CHUNKS:
                yield from self._fetch(batch, offset, end, is_once)
                batch, batch_bytes = [], 0
        if batch:
            yield from self._fetch(batch, offset, end, is_once)

    def _fetch(self, extents: Sequence[_Extent], offset: int, end: int, is_once: bool) -> Iterator[Part]:
        chunks = self._repository.read_chunks(
            [extent.chunk_id for extent in extents],
            [extent.length for extent in extents],
            is_once=is_once,
        )
        for extent in extents:
            chunk = chunks[extent.chunk_id]
            start = max(0, offset - extent.start)
            stop = min(extent.length, end - extent.start)
            yield chunk if start == 0 and stop == extent.length else memoryview(chunk)[start:stop]

    def _iter_extents(self, extents: _Extents, base: int, offset: int, end: int) -> Iterator[_Extent]:
        """The chunks between `offset` and `end`, below a node whose first byte is at `base`."""
        node = extents.node
        first = bisect_right(extents.ends, offset - base)
        for position in range(first, len(node.lengths)):
            length = node.lengths[position]
            start = base + extents.ends[position] - length
            if start >= end:
                return
            if node.level == 0:
                yield _Extent(node.id_at(position), start, length)
            else:
                below = self._lists.load(node.id_at(position), length, node.level - 1)
                yield from self._iter_extents(below, start, max(offset, start), end)


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
    """Parts that come one after the other, of which any number of bytes is taken."""

    def __init__(self, parts: Iterator[Part]) -> None:
        self._parts = parts
        self._rest: Part = b""

    def take(self, length: int) -> Iterator[Part]:
        """The next `length` bytes; there are as many."""
        while length > 0:
            part = self._rest or next(self._parts)
            if len(part) > length:
                view = memoryview(part)
                part, self._rest = view[:length], view[length:]
            else:
                self._rest = b""
            length -= len(part)
            yield part


@dataclass(frozen=True, slots=True)
class _Extent:
    """One chunk and where it lies in its file."""

    chunk_id: bytes
    start: int
    length: int


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
            self._recent[node_id] = extents
            self._recent.move_to_end(node_id)
            while len(self._recent) > CACHED_LISTS:
                self._recent.popitem(last=False)
        return extents
