"""Turns the contents of files into chunks: reads, cuts, hashes and encodes what is new, all at the same time.

Files are read piece by piece into a few buffers, whatever their size; where from is the caller's matter. A
file of tensors is cut at their beginnings and ends, and described as if all tensors came first and what lies
between them last (docs/format.md, "Gathered files"); other files are cut by content. Used by `writer`.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Final, NamedTuple, Protocol, TypeAlias

from blake3 import blake3

from replicate.errors import RepositoryError
from replicated.buffers import ALIGNMENT, PAGE_BYTES, Buffers
from replicated.chunk.cdc import TEXT_SAMPLE_BYTES, ChunkerParameters, Cutter
from replicated.chunk.codec import Encoded, encode, encode_delta, hash_chunk
from replicated.chunk.tensor import PIECE_BYTES, Layout, find_layout
from replicated.format.builders import ContentBuilder, StoreNode
from replicated.format.manifest import EMPTY_HASH, FileContent
from replicated.index import Index
from replicated.packer import Chunk, Packer, Stored
from replicated.reader import ChunkReader

#: Reads the bytes of a file from an offset on into a buffer, at least one; how many.
ReadInto: TypeAlias = Callable[[memoryview, int], int]

#: Threads that hash and compress chunks; training comes first.
MAX_THREADS: Final = 4
_THREADS = max(2, min(MAX_THREADS, (os.cpu_count() or 1) // 2))

# Bytes that are read, cut and handed to a thread together: of one file, or of many small ones.
_WINDOW_BYTES = 4 << 20
# One is filled, one is with each thread, one waits between them.
_BUFFERS = _THREADS + 2
# Zeros are looked for in steps of so many bytes.
_ZEROS: Final = bytes(256 << 10)
_ZERO_SAMPLE_BYTES = 4096

_log = logging.getLogger(__name__)


class Bases(Protocol):
    """What the pieces of a layout, numbered from 0 in their order, may be stored as differences to.

    Both are called from the thread that owns the writer.
    """

    def base_of(self, piece: int) -> bytes:
        """The chunk that a piece most likely differs little from; b"" to store it on its own."""

    def note(self, piece: int, chunk_id: bytes, stored: Stored | None) -> None:
        """What became of a piece, once each and in order; None: the repository had the chunk."""


#: Finds the bases for a file whose layout is known only once it is read; None: there are none.
FindBases: TypeAlias = Callable[[Layout], "Bases | None"]


class PendingContent:
    """The content of a file whose chunks may still be on their way."""

    def __init__(self, content: FileContent | None, wait: Callable[[], None]) -> None:
        """`wait` returns once something has become of the oldest content that is on its way."""
        self._content = content
        self._wait = wait

    def complete(self, content: FileContent) -> None:
        """Called by the writer, once."""
        self._content = content

    def result(self) -> FileContent:
        """The content; waits for it. To be called before the writer finishes; raises what failed."""
        while self._content is None:
            self._wait()
        return self._content


class ContentWriter:
    """Stores contents through a packer; see the module's text. Not for several threads."""

    def __init__(
        self,
        packer: Packer,
        index: Index,
        reader: ChunkReader,
        chunker: ChunkerParameters,
        store_node: StoreNode,
        report: Callable[[int], None],
        buffers: Buffers,
    ) -> None:
        """`report` is called in the caller's thread with the bytes that are done since the last time.

        `buffers` are `make_buffers`', borrowed; all have been given back when `flush` has returned.
        """
        self._packer = packer
        self._index = index
        self._reader = reader
        self._chunker = chunker
        self._store_node = store_node
        self._report = report
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ingest")
        self._buffers = buffers
        self._batch: _Batch | None = None
        #: Batches of small files that are being stored, oldest first.
        self._batches: deque[Future[None]] = deque()
        #: Windows of longer files that are being stored, oldest first.
        self._windows: deque[_Window] = deque()

    def begin(self, size: int, read_into: ReadInto, find_bases: FindBases | None) -> PendingContent:
        """Read and cut a content; its chunks may still be on their way when this returns."""
        if size == 0:
            return PendingContent(FileContent(0, EMPTY_HASH), self._collect)
        if size < self._chunker.whole_below:
            return PendingContent(self._add_whole(size, read_into), self._collect)
        return self._add_in_windows(size, read_into, find_bases)

    def flush(self) -> None:
        """Wait until everything that was begun is with the packer."""
        self._flush_batch()
        while self._windows:
            self._collect()
        while self._batches:
            self._batches.popleft().result()

    def stop(self) -> None:
        """End the threads; what they have not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    # Small files

    def _add_whole(self, size: int, read_into: ReadInto) -> FileContent:
        """Store a file that is one chunk together with others."""
        batch, content = self._reserve(size)
        _fill(content, read_into, 0)
        digest = hash_chunk(content)
        batch.chunks.append(Chunk(digest, content))
        self._report(size)
        return FileContent(size, digest)

    def _reserve(self, size: int) -> tuple[_Batch, memoryview]:
        """Room for `size` bytes, at most a buffer's, among others that are stored together."""
        if self._batch is not None and self._batch.used + size > self._buffers.size:
            self._flush_batch()
        if self._batch is None:
            self._batch = _Batch(self._take())
        return self._batch, self._batch.reserve(size)

    def _flush_batch(self) -> None:
        while self._batches and self._batches[0].done():
            self._batches.popleft().result()
        if self._batch is not None:
            self._batches.append(self._pool.submit(self._store_batch, self._batch))
            self._batch = None

    def _store_batch(self, batch: _Batch) -> None:
        try:
            self._packer.add(batch.chunks)
        finally:
            self._buffers.give_back(batch.buffer)

    # Longer files

    def _add_in_windows(self, size: int, read_into: ReadInto, find_bases: FindBases | None) -> PendingContent:
        cutting: _Cutting | None = None
        bases: Bases | None = None
        pending = PendingContent(None, self._collect)
        file = _File(pending, ContentBuilder(self._store_node))
        whole = blake3()
        rest = b""
        done = 0
        while done < size:
            buffer = self._take()
            # What is read begins at a page, as in the file, so tensors are aligned here as they are there.
            start = -len(rest) % PAGE_BYTES
            middle = start + len(rest)
            room = (len(buffer) - middle) // PAGE_BYTES * PAGE_BYTES
            end = middle + min(room, size - done)
            buffer[start:middle] = rest
            _fill(buffer[middle:end], read_into, done)
            done += end - middle
            window = buffer[start:end]
            if cutting is None:
                cutting, bases = self._begin_cutting(size, window, read_into, find_bases)
            is_zero = _is_zero(window)
            cuts, certain = cutting.cut(window, is_last=done == size, is_zero=is_zero)
            rest = bytes(window[certain:])
            named = [bases.base_of(cut.piece) if bases and cut.piece >= 0 else b"" for cut in cuts]
            stored = self._pool.submit(self._store_window, buffer, window, cuts, named, is_zero)
            self._windows.append(_Window(stored, file, cuts, bases, certain))
            file.windows += 1
            # The buffer is not used again before the next one is taken, so this may take its time.
            whole.update(window[:certain])
            while len(self._windows) > _THREADS:
                self._collect()
        assert cutting is not None, "the file is not empty"
        file.last, file.layout = self._store_metadata(cutting.metadata), cutting.layout
        file.digest = whole.digest()
        file.complete_if_done()
        return pending

    def _begin_cutting(
        self, size: int, window: memoryview, read_into: ReadInto, find_bases: FindBases | None
    ) -> tuple[_Cutting, Bases | None]:
        """How a file is cut that begins with `window`."""

        def read_at(offset: int, length: int) -> bytes:
            length = max(0, min(length, size - offset))
            if offset + length <= len(window):
                return bytes(window[offset : offset + length])
            data = memoryview(bytearray(length))
            _fill(data, read_into, offset)
            return bytes(data)

        head = bytes(window[:TEXT_SAMPLE_BYTES])
        layout = find_layout(size, head, read_at)
        if layout is None:
            return _ByContent(Cutter(self._chunker.sizes_for(head))), None
        return _AtTensors(layout), find_bases(layout) if find_bases is not None else None

    def _store_window(
        self,
        buffer: memoryview,
        window: memoryview,
        cuts: Sequence[_Cut],
        bases: Sequence[bytes],
        is_zero: bool,
    ) -> tuple[list[bytes], list[Stored | None]]:
        """The ids of the pieces of a window, and how they were stored; runs in a thread of the pool."""
        try:
            chunks = []
            for cut, base in zip(cuts, bases, strict=True):
                plain = window[cut.start : cut.start + cut.length]
                chunk_id = _hash_zeros(cut.length) if is_zero else hash_chunk(plain)
                chunks.append(Chunk(chunk_id, plain, cut.item_bytes, base))
            return [chunk.id for chunk in chunks], self._packer.add(chunks, encode=self._encode)
        finally:
            self._buffers.give_back(buffer)

    def _encode(self, chunks: Sequence[Chunk]) -> Iterator[Encoded]:
        """Encode new chunks of one window, as differences where that pays."""
        bases = self._read_bases(chunks)
        # Known, and still to be stored: as differences to what is lost. The index has one place for each
        # chunk, and prefers one without a base.
        damaged = self._index.locate(chunk.id for chunk in chunks if chunk.base in bases)
        for chunk in chunks:
            encoded = None
            base = bases.get(chunk.base)
            if base is not None and len(base) == len(chunk.plain) and chunk.id not in damaged:
                encoded = encode_delta(chunk.plain, chunk.base, base, chunk.item_bytes or 0)
            yield encoded if encoded is not None else encode(chunk.plain, chunk.item_bytes)

    def _read_bases(self, chunks: Sequence[Chunk]) -> dict[bytes, bytes]:
        wanted = {chunk.base for chunk in chunks if chunk.base}
        if not wanted:
            return {}
        # A base must be stored without one, so that reading never needs more than two chunks.
        usable = self._index.find_bases(wanted)
        try:
            return self._reader.read_many(usable, is_once=True)
        except RepositoryError as error:
            # What cannot be read is only not saved: where storing fails as well, that says so.
            _log.warning("tensors are stored on their own, not as differences: %s", error)
            return {}

    def _collect(self) -> None:
        """Take in what became of the oldest window."""
        window = self._windows.popleft()
        ids, stored = window.stored.result()
        for cut, chunk_id, how in zip(window.cuts, ids, stored, strict=True):
            window.file.chunks.add(chunk_id, cut.length)
            if window.bases is not None and cut.piece >= 0:
                window.bases.note(cut.piece, chunk_id, how)
        window.file.windows -= 1
        window.file.complete_if_done()
        self._report(window.size)

    def _store_metadata(self, metadata: bytearray) -> list[tuple[bytes, int]]:
        """Store what lies between the tensors of a file; its chunks."""
        chunks = []
        for start in range(0, len(metadata), PIECE_BYTES):
            piece = metadata[start : start + PIECE_BYTES]
            batch, room = self._reserve(len(piece))
            room[:] = piece
            chunks.append((hash_chunk(room), len(piece)))
            batch.chunks.append(Chunk(chunks[-1][0], room))
        return chunks

    def _take(self) -> memoryview:
        self._packer.raise_failure()
        return self._buffers.take()


def make_buffers(chunker: ChunkerParameters) -> Buffers:
    """What contents are read into."""
    # So large that a window with what the one before left over always holds a certain chunk.
    longest = max(chunker.text.maximum, chunker.binary.maximum, chunker.whole_below, PIECE_BYTES)
    size = max(_WINDOW_BYTES, 2 * longest)
    return Buffers(_BUFFERS, size + -size % PAGE_BYTES + PAGE_BYTES)


class _Cut(NamedTuple):
    """A piece of a window that becomes a chunk."""

    start: int
    length: int
    #: As in `Chunk`.
    item_bytes: int | None = None
    #: Its number among the pieces of a layout; -1 where there is none.
    piece: int = -1


class _Cutting(Protocol):
    """How one file is cut, window by window; a window begins with what the one before left over."""

    #: Bytes that are stored after all others, complete after the last window.
    metadata: bytearray
    #: As `ContentBuilder.finish` wants it.
    layout: Sequence[int]

    def cut(self, window: memoryview, *, is_last: bool, is_zero: bool) -> tuple[list[_Cut], int]:
        """The pieces at the beginning of a window, and how many of its bytes are done with."""


class _ByContent:
    """Wherever the content says: the same piece of a file is found again when it has moved."""

    def __init__(self, cutter: Cutter) -> None:
        self._cutter = cutter
        self.metadata = bytearray()
        self.layout: Sequence[int] = ()

    def cut(self, window: memoryview, *, is_last: bool, is_zero: bool) -> tuple[list[_Cut], int]:
        if is_zero and not is_last:
            lengths = self._cutter.cut_zeros(len(window))
        else:
            lengths = self._cutter.cut(window, is_last=is_last)
        cuts = []
        position = 0
        for length in lengths:
            cuts.append(_Cut(position, length))
            position += length
        return cuts, position


class _AtTensors:
    """At the beginnings and ends of tensors, and in fixed steps within them."""

    def __init__(self, layout: Layout) -> None:
        self.layout: Sequence[int] = layout.lengths
        self.metadata = bytearray()
        self._pieces = enumerate(layout.pieces)
        self._next = next(self._pieces, None)
        #: Where the next window begins in the file.
        self._offset = 0

    def cut(self, window: memoryview, *, is_last: bool, is_zero: bool) -> tuple[list[_Cut], int]:
        cuts = []
        position = 0
        while self._next is not None:
            number, piece = self._next
            start = piece.start - self._offset
            self.metadata += window[position : min(start, len(window))]
            position = min(start, len(window))
            if start + piece.size > len(window):
                break
            cuts.append(_Cut(start, piece.size, piece.item_bytes, number))
            position = start + piece.size
            self._next = next(self._pieces, None)
        else:
            self.metadata += window[position:]
            position = len(window)
        self._offset += position
        return cuts, position


class _File:
    """A file whose windows are on their way."""

    def __init__(self, pending: PendingContent, chunks: ContentBuilder) -> None:
        self.pending = pending
        self.chunks = chunks
        #: Windows whose chunks are not in `chunks` yet.
        self.windows = 0
        #: Chunks that come after those of all windows, with their lengths.
        self.last: list[tuple[bytes, int]] = []
        self.layout: Sequence[int] = ()
        #: Of the whole; empty until all of it has been read.
        self.digest = b""

    def complete_if_done(self) -> None:
        """Complete the content once nothing of it is on its way: then only that is kept of the file."""
        if self.windows or not self.digest:
            return
        for chunk_id, length in self.last:
            self.chunks.add(chunk_id, length)
        self.pending.complete(self.chunks.finish(self.digest, self.layout))


class _Window(NamedTuple):
    """A piece of a file that is being stored."""

    stored: Future[tuple[list[bytes], list[Stored | None]]]
    file: _File
    cuts: Sequence[_Cut]
    bases: Bases | None
    #: Bytes of the file that are done with it.
    size: int


class _Batch:
    """A buffer with the contents of several files, and their chunks."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.used = 0
        self.chunks: list[Chunk] = []

    def reserve(self, size: int) -> memoryview:
        """The next `size` bytes, which the caller has made sure are there."""
        start = self.used
        self.used += size + -size % ALIGNMENT
        return self.buffer[start : start + size]


def _fill(view: memoryview, read_into: ReadInto, offset: int) -> None:
    """Read as many bytes as there is room for; raises `EOFError`."""
    done = 0
    while done < len(view):
        count = read_into(view[done:], offset + done)
        if count <= 0:
            raise EOFError(f"it ends at byte {offset + done}")
        done += count


def _is_zero(window: memoryview) -> bool:
    """Whether a window holds nothing but zeros; quick to say no."""
    if window[:_ZERO_SAMPLE_BYTES].tobytes().strip(b"\0"):
        return False
    return all(
        _ZEROS.startswith(window[start : start + len(_ZEROS)].tobytes())
        for start in range(0, len(window), len(_ZEROS))
    )


@lru_cache(maxsize=64)
def _hash_zeros(length: int) -> bytes:
    return hash_chunk(bytes(length))
