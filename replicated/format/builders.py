"""Turning directories and lists of chunks into nodes.

Pure but for the function that the caller passes, which stores a node and gives its id. Items come one
by one and few are held at a time, so that a directory of a million files needs little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from blake3 import blake3

from replicated.format.canonical import Malformed, pack, pack_array_header
from replicated.format.manifest import (
    CHUNK_LIST_NODE,
    DIRECTORY,
    DIRECTORY_NODE,
    EMPTY_HASH,
    FILE,
    LAYOUT_NODE,
    MAX_INLINE_CHUNKS,
    NANOSECONDS,
    SYMLINK,
    FileContent,
    check_entry,
    parse_layout,
)
from replicated.format.segments import NodeTree

#: Stores a node and gives its id.
StoreNode: TypeAlias = Callable[[bytes], bytes]


class _DirectoryItem(NamedTuple):
    """An entry, or a node standing for several, on its way into a node."""

    packed: bytes
    last_name: bytes
    entry_count: int
    digest: bytes
    #: Set for nodes only.
    node: bytes = b""

    @property
    def size_bytes(self) -> int:
        return len(self.packed)


class _ChunkItem(NamedTuple):
    """A chunk, or a node standing for several, on its way into a node."""

    id: bytes
    length: int
    digest: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.id) + 9


class DirectoryBuilder:
    """Turns the entries of one directory, added in order of their names, into nodes."""

    def __init__(self, store_node: StoreNode) -> None:
        self._store_node = store_node
        self._nodes: NodeTree[_DirectoryItem] = NodeTree(self._write_node)
        self._last_name = b""

    def add_file(self, name: bytes, mode: int, mtime_ns: int, content: FileContent) -> None:
        """Add a regular file."""
        self._add(name, FILE, mode, mtime_ns, content.size, content.hash, content.packed())

    def add_directory(self, name: bytes, mode: int, mtime_ns: int, node: bytes) -> None:
        """Add a directory whose own node is stored."""
        self._add(name, DIRECTORY, mode, mtime_ns, 0, node, ())

    def add_symlink(self, name: bytes, mode: int, mtime_ns: int, target: bytes) -> None:
        """Add a link."""
        digest = blake3(target).digest()
        self._add(name, SYMLINK, mode, mtime_ns, len(target), digest, (target,))

    def finish(self) -> bytes:
        """The id of the directory's root node; call once."""
        return self._nodes.finish().node

    def _add(
        self, name: bytes, kind: int, mode: int, mtime_ns: int, size: int, digest: bytes, content: Any
    ) -> None:
        if name <= self._last_name:
            raise ValueError(f"names of a directory are not in order: {name!r}")
        self._last_name = name
        seconds, nanoseconds = divmod(mtime_ns, NANOSECONDS)
        # Checked, so that what is written is what is accepted, whoever calls.
        entry = (name, kind, mode, seconds, nanoseconds, size, digest, content)
        try:
            check_entry(entry)
        except Malformed as error:
            raise ValueError(f"{name!r} cannot be stored: {error}") from error
        self._nodes.add(_DirectoryItem(pack(entry), name, 1, blake3(name).digest()))

    def _write_node(self, level: int, items: Sequence[_DirectoryItem]) -> _DirectoryItem:
        node = self._store_node(
            b"".join(
                [
                    bytes([0x93, DIRECTORY_NODE, level]),
                    pack_array_header(len(items)),
                    *(item.packed for item in items),
                ]
            )
        )
        entry_count = sum(item.entry_count for item in items)
        last_name, digest = (items[-1].last_name, items[-1].digest) if items else (b"", EMPTY_HASH)
        return _DirectoryItem(pack((last_name, node, entry_count)), last_name, entry_count, digest, node)


class ContentBuilder:
    """Turns the chunks of one file, added in order, into a `FileContent`."""

    def __init__(self, store_node: StoreNode) -> None:
        self._store_node = store_node
        self._nodes: NodeTree[_ChunkItem] = NodeTree(self._write_node)
        self._first: list[_ChunkItem] = []
        self._count = 0
        self._size = 0

    def add(self, chunk_id: bytes, length: int) -> None:
        """Add the next chunk."""
        item = _ChunkItem(chunk_id, length, chunk_id)
        self._count += 1
        self._size += length
        if self._count <= MAX_INLINE_CHUNKS:
            self._first.append(item)
        self._nodes.add(item)

    def finish(self, digest: bytes, layout: Sequence[int] = ()) -> FileContent:
        """The content, whose hash as a whole is `digest`; call once.

        With a `layout` (see `parse_layout`) the chunks are those of the gathered file.
        """
        layout_node = self._store_layout(layout) if layout else b""
        if self._count <= 1 and not layout:
            return FileContent(self._size, digest)
        if self._count <= MAX_INLINE_CHUNKS:
            chunk_ids = b"".join(item.id for item in self._first)
            lengths = tuple(item.length for item in self._first)
            return FileContent(self._size, digest, chunk_ids, lengths, layout=layout_node)
        return FileContent(self._size, digest, node=self._nodes.finish().id, layout=layout_node)

    def _store_layout(self, lengths: Sequence[int]) -> bytes:
        data = pack([LAYOUT_NODE, lengths])
        # Parsed again, so that what is written is what is accepted, whoever calls.
        try:
            is_whole = sum(parse_layout(data)) == self._size
        except Malformed as error:
            raise ValueError(f"a layout that cannot be stored: {error}") from error
        if not is_whole:
            raise ValueError(f"a layout of {sum(lengths)} bytes for a file of {self._size}")
        return self._store_node(data)

    def _write_node(self, level: int, items: Sequence[_ChunkItem]) -> _ChunkItem:
        ids = b"".join(item.id for item in items)
        lengths = [item.length for item in items]
        node = self._store_node(pack([CHUNK_LIST_NODE, level, ids, lengths]))
        return _ChunkItem(node, sum(lengths), items[-1].digest)
