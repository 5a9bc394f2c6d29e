"""Turns files and trees into chunks and nodes: the write side of a repository, for one snapshot.

What is there already is not stored again; which chunks those are and how the rest gets into packs is
`packer`'s matter. Files are read here, piece by piece into a few buffers, whatever their size; where
from is the caller's matter. Nothing here becomes visible to readers: that is `Repository.put_snapshot`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Final, TypeAlias

from blake3 import blake3

from replicated.buffers import ALIGNMENT, PAGE_BYTES, Buffers
from replicated.chunk.cdc import TEXT_SAMPLE_BYTES, ChunkerParameters, Cutter
from replicated.chunk.codec import hash_chunk
from replicated.format.builders import ContentBuilder, DirectoryBuilder
from replicated.format.manifest import EMPTY_HASH, MAX_DEPTH, FileContent, RootNode, TreeEntry
from replicated.format.pack import TREE_PACK
from replicated.index import Index
from replicated.packer import Packer, WriteStats
from replicated.reader import ChunkReader
from replicated.store.base import Buffer, Store

#: Reads the bytes of a file from an offset on into a buffer, at least one; how many.
ReadInto: TypeAlias = Callable[[memoryview, int], int]

#: Threads that hash and compress chunks; training comes first.
MAX_THREADS: Final = 4
_THREADS = max(2, min(MAX_THREADS, (os.cpu_count() or 1) // 2))

#: Of a root without an entry of its own.
DEFAULT_ROOT_MODE: Final = 0o755

# Bytes that are read, cut and handed to a thread together: of one file, or of many small ones.
_WINDOW_BYTES = 8 << 20
# One is filled, one is with each thread, one waits between them.
_BUFFERS = _THREADS + 2
# Chunks of a list that `contains` looks up together.
_LOOK_UP_BATCH = 4096


class SnapshotWriter:
    """Turns files and trees into chunks in packs; nothing becomes visible to readers by it.

    Not for several threads. Use it as a context manager: leaving without `finish` throws away what is
    not in the repository yet. After an error only leaving is allowed; an error may be one of an earlier
    call. Everything may be repeated with another writer: what is there is not stored again.
    """

    def __init__(
        self,
        store: Store,
        index: Index,
        reader: ChunkReader,
        chunker: ChunkerParameters,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.stats = WriteStats()
        self._index = index
        self._reader = reader
        self._chunker = chunker
        self._on_progress = on_progress
        self._packer = Packer(store, index, self.stats)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ingest")
        # So large that a window with what the one before left over always holds a certain chunk.
        longest = max(chunker.text.maximum, chunker.binary.maximum, chunker.whole_below)
        self._buffers = Buffers(_BUFFERS, max(_WINDOW_BYTES, 2 * longest) + PAGE_BYTES)
        self._batch: _Batch | None = None
        #: Batches that are being stored, oldest first.
        self._batches: deque[Future[None]] = deque()

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._packer.abandon()
        self._buffers.close()

    def add_file(self, data: Buffer) -> FileContent:
        """Store the content of one file that is in memory; `data` is borrowed for the call only.

        Raises `RepositoryError`s.
        """
        with memoryview(data) as whole, whole.cast("B") as content:
            return self.add_content(len(content), lambda view, offset: _copy(content, view, offset))

    def add_content(self, size: int, read_into: ReadInto) -> FileContent:
        """Store the content of one file of `size` bytes.

        `read_into` is called in this thread, for all bytes in their order. Raises `RepositoryError`s,
        `EOFError` when it reads nothing before the end, and what it raises.
        """
        self._packer.raise_failure()
        if size == 0:
            return FileContent(0, EMPTY_HASH)
        if size > self._buffers.size:
            return self._add_long(size, read_into)
        return self._add_short(size, read_into)

    def add_known(self, size: int) -> None:
        """Count content that the repository has already as done."""
        self._report(size)

    def contains(self, content: FileContent) -> bool:
        """Whether the repository holds this content already (from an earlier `finish`)."""
        if not content.node:
            return not self._index.find_missing(content.ids())
        # A list can be in the repository before its chunks are, so each of them is looked up.
        batch: list[bytes] = []
        pending = [content.node]
        while pending:
            node = pending.pop()
            if self._index.find_missing([node]):
                return False
            chunks = self._reader.read_chunk_list(node)
            (batch if chunks.level == 0 else pending).extend(chunks.split_ids())
            if len(batch) >= _LOOK_UP_BATCH:
                if self._index.find_missing(batch):
                    return False
                batch.clear()
        return not self._index.find_missing(batch)

    def new_directory(self) -> DirectoryBuilder:
        """A builder of one directory whose nodes are stored; those below it are built before it ends."""
        return DirectoryBuilder(self._store_node)

    def add_tree(self, entries: Iterable[TreeEntry]) -> RootNode:
        """Store a tree.

        Entries come depth-first: each directory before what it holds, siblings by the bytes of their
        names; that is the order of `path.split(b"/")`. An entry with path b"" may come first and gives
        mode and time of the root. Every directory on the way has an entry of its own. Raises
        `ValueError` for another order, and for names and values that a tree cannot hold.
        """
        return _TreeBuilder(self.new_directory).build(entries)

    def finish(self) -> None:
        """Make durable everything that was added, and findable by readers of the index."""
        self._flush()
        while self._batches:
            self._batches.popleft().result()
        self._packer.finish()

    def _add_short(self, size: int, read_into: ReadInto) -> FileContent:
        """Store a file that fits into a buffer together with others; its chunks are hashed here."""
        batch, content = self._reserve(size)
        _fill(content, read_into, 0)
        if size < self._chunker.whole_below:
            digest = hash_chunk(content)
            batch.chunks.append((digest, content))
            self._report(size)
            return FileContent(size, digest)
        chunks = ContentBuilder(self._store_node)
        for piece in _split(content, self._new_cutter(content).cut(content, is_last=True)):
            chunk_id = hash_chunk(piece)
            batch.chunks.append((chunk_id, piece))
            chunks.add(chunk_id, len(piece))
        self._report(size)
        return chunks.finish(hash_chunk(content))

    def _add_long(self, size: int, read_into: ReadInto) -> FileContent:
        """Store a file of several windows: read, cut and hash the whole here, its chunks elsewhere."""
        cutter: Cutter | None = None
        chunks = ContentBuilder(self._store_node)
        whole = blake3()
        # Windows on their way, oldest first: chunks come in order.
        windows: deque[tuple[Future[list[bytes]], list[int]]] = deque()
        rest = b""
        done = 0
        while done < size:
            buffer = self._buffers.take()
            start = -len(rest) % PAGE_BYTES
            middle = start + len(rest)
            end = min(len(buffer), middle + size - done)
            buffer[start:middle] = rest
            _fill(buffer[middle:end], read_into, done)
            done += end - middle
            window = buffer[start:end]
            if cutter is None:
                cutter = self._new_cutter(window)
            lengths = cutter.cut(window, is_last=done == size)
            certain = window[: sum(lengths)]
            rest = bytes(window[len(certain) :])
            windows.append((self._pool.submit(self._store_window, buffer, certain, lengths), lengths))
            # The buffer is not used again before the next one is taken, so this may take its time.
            whole.update(certain)
            while len(windows) > _THREADS:
                self._collect(windows.popleft(), chunks)
        while windows:
            self._collect(windows.popleft(), chunks)
        return chunks.finish(whole.digest())

    def _store_window(self, buffer: memoryview, window: memoryview, lengths: Sequence[int]) -> list[bytes]:
        try:
            pieces = list(_split(window, lengths))
            ids = [hash_chunk(piece) for piece in pieces]
            self._packer.add(list(zip(ids, pieces, strict=True)))
            return ids
        finally:
            self._buffers.give_back(buffer)

    def _collect(self, window: tuple[Future[list[bytes]], list[int]], chunks: ContentBuilder) -> None:
        future, lengths = window
        for chunk_id, length in zip(future.result(), lengths, strict=True):
            chunks.add(chunk_id, length)
        self._report(sum(lengths))

    def _reserve(self, size: int) -> tuple[_Batch, memoryview]:
        """Room for a file of `size` bytes, at most a buffer's, among others that are stored together."""
        if self._batch is not None and self._batch.used + size > self._buffers.size:
            self._flush()
        if self._batch is None:
            self._batch = _Batch(self._buffers.take())
        return self._batch, self._batch.reserve(size)

    def _flush(self) -> None:
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

    def _new_cutter(self, content: memoryview) -> Cutter:
        return Cutter(self._chunker.sizes_for(bytes(content[:TEXT_SAMPLE_BYTES])))

    def _store_node(self, data: bytes) -> bytes:
        node = hash_chunk(data)
        self._packer.add([(node, data)], TREE_PACK)
        return node

    def _report(self, size: int) -> None:
        self.stats.bytes_done += size
        if self._on_progress is not None:
            self._on_progress(self.stats.bytes_done)


class _Batch:
    """A buffer with the contents of several files, and their chunks."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.used = 0
        self.chunks: list[tuple[bytes, memoryview]] = []

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


def _copy(content: memoryview, view: memoryview, offset: int) -> int:
    view[:] = content[offset : offset + len(view)]
    return len(view)


def _split(content: memoryview, lengths: Iterable[int]) -> Iterator[memoryview]:
    start = 0
    for length in lengths:
        yield content[start : start + length]
        start += length


@dataclass(slots=True)
class _OpenDirectory:
    """A directory whose entries are still coming."""

    name: bytes
    mode: int
    mtime_ns: int
    builder: DirectoryBuilder


class _TreeBuilder:
    """Builds the nodes of one tree from the bottom, while its entries come from the top."""

    def __init__(self, new_directory: Callable[[], DirectoryBuilder]) -> None:
        self._new_directory = new_directory
        root = _OpenDirectory(b"", DEFAULT_ROOT_MODE, 0, new_directory())
        # From the root down to the directory that the next entry most likely belongs to.
        self._open = [root]
        self._path: list[bytes] = []
        self._counts = {"file": 0, "directory": 0, "symlink": 0}
        self._size_bytes = 0

    def build(self, entries: Iterable[TreeEntry]) -> RootNode:
        for entry in entries:
            if entry.path:
                self._add(entry)
            else:
                self._set_root(entry)
        while len(self._open) > 1:
            self._close()
        root = self._open[0]
        return RootNode(
            node=root.builder.finish(),
            mode=root.mode,
            mtime_ns=root.mtime_ns,
            files=self._counts["file"],
            directories=self._counts["directory"],
            symlinks=self._counts["symlink"],
            size_bytes=self._size_bytes,
        )

    def _set_root(self, entry: TreeEntry) -> None:
        if entry.type != "directory" or any(self._counts.values()):
            raise ValueError("the root of a tree is a directory and comes first")
        self._open[0].mode, self._open[0].mtime_ns = entry.mode, entry.mtime_ns

    def _add(self, entry: TreeEntry) -> None:
        *parents, name = entry.path.split(b"/")
        while self._path != parents[: len(self._path)]:
            self._close()
        if self._path != parents:
            raise ValueError(f"an entry comes before its directory, or out of order: {entry.path!r}")
        builder = self._open[-1].builder
        if entry.type == "directory":
            if len(self._open) > MAX_DEPTH:
                raise ValueError(f"directories are nested deeper than {MAX_DEPTH}: {entry.path[:100]!r}…")
            opened = _OpenDirectory(name, entry.mode, entry.mtime_ns, self._new_directory())
            self._open.append(opened)
            self._path.append(name)
        elif entry.type == "symlink":
            builder.add_symlink(name, entry.mode, entry.mtime_ns, entry.target)
        else:
            if entry.content is None:
                raise ValueError(f"a file without content: {entry.path!r}")
            builder.add_file(name, entry.mode, entry.mtime_ns, entry.content)
            self._size_bytes += entry.content.size
        self._counts[entry.type] += 1

    def _close(self) -> None:
        """Add the innermost directory to the one that holds it."""
        done = self._open.pop()
        self._path.pop()
        self._open[-1].builder.add_directory(done.name, done.mode, done.mtime_ns, done.builder.finish())
