"""Turns files and trees into chunks and nodes: the write side of a repository, for one snapshot.

What is there already is not stored again; how contents become chunks is `contents`' matter, and how those
get into packs `packer`'s. Nothing here becomes visible to readers: that is `Repository.put_snapshot`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from replicated.chunk.cdc import ChunkerParameters
from replicated.chunk.codec import hash_chunk
from replicated.contents import ContentWriter, FindBases, PendingContent, ReadInto, make_buffers
from replicated.format.builders import DirectoryBuilder
from replicated.format.manifest import MAX_DEPTH, FileContent, RootNode, TreeEntry
from replicated.format.pack import TREE_PACK
from replicated.index import Index
from replicated.packer import Chunk, Packer, WriteStats, make_pack_memory
from replicated.reader import ChunkReader
from replicated.store.base import Buffer, Capabilities, Store

#: Of a root without an entry of its own.
DEFAULT_ROOT_MODE: Final = 0o755

# Chunks of a list that `contains` looks up together.
_LOOK_UP_BATCH = 4096


class WriteMemory:
    """The memory of one writer."""

    def __init__(self, chunker: ChunkerParameters, capabilities: Capabilities) -> None:
        self.buffers = make_buffers(chunker)
        self.packs = make_pack_memory(capabilities)

    def close(self) -> None:
        """Give it back to the system now."""
        self.buffers.close()
        for packs in self.packs.values():
            packs.close()


class WriteMemories:
    """Keeps the memory of a writer for the next one on the same store. May be used from several threads.

    Using memory for the first time costs more than reading, hashing and copying what is put there.
    """

    def __init__(self, chunker: ChunkerParameters) -> None:
        self._chunker = chunker
        self._lock = threading.Lock()
        self._spare: WriteMemory | None = None

    def take(self, capabilities: Capabilities) -> WriteMemory:
        """Memory for a writer."""
        with self._lock:
            memory, self._spare = self._spare, None
        return memory or WriteMemory(self._chunker, capabilities)

    def give_back(self, memory: WriteMemory) -> None:
        """Let another writer have a memory, all of which is free again."""
        with self._lock:
            spare, self._spare = self._spare, memory
        if spare is not None:
            spare.close()

    def close(self) -> None:
        """Give back to the system what no writer has."""
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()


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
        memories: WriteMemories | None = None,
    ) -> None:
        self.stats = WriteStats()
        self._is_finished = False
        self._index = index
        self._reader = reader
        self._on_progress = on_progress
        self._memories = WriteMemories(chunker) if memories is None else memories
        self._memory = self._memories.take(store.capabilities)
        self._packer = Packer(store, index, self.stats, memory=self._memory.packs)
        self._contents = ContentWriter(
            self._packer, index, reader, chunker, self.store_node, self.add_known, self._memory.buffers
        )

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # First, so that threads which wait for room in a pack do not wait for uploads that nobody wants.
        self._packer.stop()
        self._contents.stop()
        self._packer.abandon()
        # What failed may not have given back all of it.
        if self._is_finished:
            self._memories.give_back(self._memory)
        else:
            self._memory.close()

    def add_file(self, data: Buffer) -> FileContent:
        """Store the content of one file that is in memory; `data` is borrowed for the call only.

        Raises `RepositoryError`s.
        """
        with memoryview(data) as whole, whole.cast("B") as content:
            return self.add_content(len(content), lambda view, offset: _copy(content, view, offset))

    def add_content(self, size: int, read_into: ReadInto, find_bases: FindBases | None = None) -> FileContent:
        """Store the content of one file of `size` bytes; arguments and errors as for `begin_content`."""
        return self.begin_content(size, read_into, find_bases).result()

    def begin_content(
        self, size: int, read_into: ReadInto, find_bases: FindBases | None = None
    ) -> PendingContent:
        """Store the content of one file of `size` bytes, and go on while its chunks are on their way.

        `read_into` is called in this thread, until this returns, for all bytes in their order, and before
        that for some here and there. `find_bases` is asked when the file turns out to hold tensors. Raises
        `RepositoryError`s, `EOFError` when `read_into` reads nothing before the end, and what it raises.
        """
        self._packer.raise_failure()
        return self._contents.begin(size, read_into, find_bases)

    def add_known(self, size: int) -> None:
        """Count content that the repository has already as done."""
        self.stats.bytes_done += size
        if self._on_progress is not None:
            self._on_progress(self.stats.bytes_done)

    def contains(self, content: FileContent) -> bool:
        """Whether the repository holds this content already (from an earlier `finish`)."""
        if not content.node:
            return not self._index.find_missing(content.named_ids())
        # A list can be in the repository before its chunks are, so each of them is looked up.
        batch = [content.layout] if content.layout else []
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
        return DirectoryBuilder(self.store_node)

    def add_tree(self, entries: Iterable[TreeEntry]) -> RootNode:
        """Store a tree.

        Entries come depth-first: each directory before what it holds, siblings by the bytes of their
        names; that is the order of `path.split(b"/")`. An entry with path b"" may come first and gives
        mode and time of the root. Every directory on the way has an entry of its own. Raises
        `ValueError` for another order, and for names and values that a tree cannot hold.
        """
        return _TreeBuilder(self.new_directory).build(entries)

    def store_node(self, data: bytes) -> bytes:
        """Store a node that was made in another way; its id."""
        node = hash_chunk(data)
        self._packer.add([Chunk(node, data)], TREE_PACK)
        return node

    def finish(self) -> None:
        """Make durable everything that was added, and findable by readers of the index."""
        self._contents.flush()
        self._packer.finish()
        self._is_finished = True


def _copy(content: memoryview, view: memoryview, offset: int) -> int:
    view[:] = content[offset : offset + len(view)]
    return len(view)


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
