"""Turns files and trees into chunks and nodes: the write side of a repository, for one snapshot.

What is there already is not stored again; which chunks those are and how the rest gets into packs is
`packer`'s matter. Nothing here becomes visible to readers: that is `Repository.put_snapshot`.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from blake3 import blake3

from replicated.chunk.cdc import TEXT_SAMPLE_BYTES, ChunkerParameters, cut_windows
from replicated.chunk.codec import hash_chunk
from replicated.format.builders import ContentBuilder, DirectoryBuilder
from replicated.format.manifest import EMPTY_HASH, MAX_DEPTH, FileContent, RootNode, TreeEntry
from replicated.format.pack import TREE_PACK
from replicated.index import Index
from replicated.packer import Packer, WriteStats
from replicated.reader import ChunkReader
from replicated.store.base import Buffer, Store

#: Threads that hash and compress the chunks of one file; training comes first.
MAX_THREADS: Final = 4
_THREADS = max(2, min(MAX_THREADS, (os.cpu_count() or 1) // 2))

#: Of a root without an entry of its own.
DEFAULT_ROOT_MODE: Final = 0o755

# Chunks of a list that `contains` looks up together.
_LOOK_UP_BATCH = 4096


class SnapshotWriter:
    """Turns files and trees into chunks in packs; nothing becomes visible to readers by it.

    `add_file` may be called from several threads, the rest from one. Use it as a context manager:
    leaving without `finish` throws away what is not in the repository yet. After an error only
    leaving is allowed. Everything may be repeated with another writer: what is there is not stored again.
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
        self._progress_lock = threading.Lock()

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        self._packer.abandon()

    def add_file(self, data: Buffer) -> FileContent:
        """Store the whole content of one file; `data` is borrowed for the call only.

        Raises `RepositoryError`s.
        """
        size = len(data)
        if size == 0:
            return FileContent(0, EMPTY_HASH)
        with memoryview(data) as whole, whole.cast("B") as content:
            if size >= self._chunker.whole_below:
                return self._add_big(content)
            chunk_id = hash_chunk(content)
            self._packer.add([(chunk_id, content)])
        self._report(size)
        return FileContent(size, chunk_id)

    def contains(self, content: FileContent) -> bool:
        """Whether the repository holds this content already (from an earlier `add_file`)."""
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

    def add_tree(self, entries: Iterable[TreeEntry]) -> RootNode:
        """Store a tree.

        Entries come depth-first: each directory before what it holds, siblings by the bytes of their
        names; that is the order of `path.split(b"/")`. An entry with path b"" may come first and gives
        mode and time of the root. Every directory on the way has an entry of its own. Raises
        `ValueError` for another order, and for names and values that a tree cannot hold.
        """
        return _TreeBuilder(self._store_node).build(entries)

    def finish(self) -> None:
        """Make durable everything that was added, and findable by readers of the index."""
        self._packer.finish()

    def _add_big(self, content: memoryview) -> FileContent:
        """Cut a file into chunks: cut and hash the whole here, hash and compress the chunks elsewhere."""
        sizes = self._chunker.sizes_for(bytes(content[:TEXT_SAMPLE_BYTES]))
        chunks = ContentBuilder(self._store_node)
        whole = blake3()
        # Windows on their way, oldest first, so that memory is bounded and chunks come in order.
        windows: deque[tuple[Future[list[bytes]], list[int]]] = deque()
        try:
            for offset, lengths in cut_windows(content, sizes):
                with content[offset : offset + sum(lengths)] as window:
                    windows.append((self._pool.submit(self._store_window, window[:], lengths), lengths))
                    whole.update(window)
                if len(windows) > _THREADS:
                    self._collect(windows.popleft(), chunks)
            while windows:
                self._collect(windows.popleft(), chunks)
        finally:
            # The buffer is borrowed: nobody may look at it any more when this returns.
            wait([future for future, _ in windows])
        return chunks.finish(whole.digest())

    def _store_window(self, window: memoryview, lengths: Sequence[int]) -> list[bytes]:
        pieces: list[memoryview] = []
        try:
            position = 0
            for length in lengths:
                pieces.append(window[position : position + length])
                position += length
            ids = [hash_chunk(piece) for piece in pieces]
            self._packer.add(list(zip(ids, pieces, strict=True)))
            return ids
        finally:
            # By hand, because an exception's traceback would keep them alive.
            for piece in pieces:
                piece.release()
            window.release()

    def _collect(self, window: tuple[Future[list[bytes]], list[int]], chunks: ContentBuilder) -> None:
        future, lengths = window
        for chunk_id, length in zip(future.result(), lengths, strict=True):
            chunks.add(chunk_id, length)
        self._report(sum(lengths))

    def _store_node(self, data: bytes) -> bytes:
        node = hash_chunk(data)
        self._packer.add([(node, data)], TREE_PACK)
        return node

    def _report(self, size: int) -> None:
        with self._progress_lock:
            self.stats.bytes_done += size
            done = self.stats.bytes_done
        if self._on_progress is not None:
            self._on_progress(done)


@dataclass(slots=True)
class _OpenDirectory:
    """A directory whose entries are still coming."""

    name: bytes
    mode: int
    mtime_ns: int
    builder: DirectoryBuilder


class _TreeBuilder:
    """Builds the nodes of one tree from the bottom, while its entries come from the top."""

    def __init__(self, store_node: Callable[[bytes], bytes]) -> None:
        self._store_node = store_node
        root = _OpenDirectory(b"", DEFAULT_ROOT_MODE, 0, DirectoryBuilder(store_node))
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
            opened = _OpenDirectory(name, entry.mode, entry.mtime_ns, DirectoryBuilder(self._store_node))
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
