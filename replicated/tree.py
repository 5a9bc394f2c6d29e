"""A read-only view of the files of a snapshot, or of a checkpoint laid over its experiment.

Used by mount, checkout and rpc. It loads what is asked for and keeps bounded caches. Invariant: bytes
that leave here are the bytes that were saved, else an error is raised; and work and memory are bounded
by what is asked for, whatever somebody may have written into the repository.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

from replicate.errors import NotFound, RepositoryDamaged
from replicate.ids import SnapshotId
from replicate.records import FileType
from replicated.file_reader import FileReader
from replicated.format.manifest import (
    DIRECTORY,
    FILE,
    MAX_DEPTH,
    TYPE_NAMES,
    DirectoryNode,
    Entry,
    FileContent,
)
from replicated.repository import Repository

#: Directories are remembered until they hold more entries than this together; the last one always is.
CACHED_ENTRIES: Final = 1 << 17

#: Of a file, where its bytes are; of a directory, the ids of its nodes, those of later snapshots last.
Content: TypeAlias = FileContent | tuple[bytes, ...] | None


@dataclass(frozen=True, slots=True)
class Node:
    """One file, directory or link."""

    name: bytes
    type: FileType
    #: Permission bits as recorded, at most 0o7777.
    mode: int
    mtime_ns: int
    #: Of a file its length, of a link the length of its target, of a directory 0.
    size: int
    #: BLAKE3 of a file's content or of a link's target; empty for directories.
    hash: bytes
    #: Where a link points to; empty otherwise.
    target: bytes
    #: Opaque; equal contents are equal subtrees or equal files.
    content: Content


class Tree:
    """The files of one snapshot, or of several laid over each other. May be used from several threads.

    `entry_limit` is how many entries the snapshots say to have together.
    """

    def __init__(self, repository: Repository, root: Node, entry_limit: int) -> None:
        self.root = root
        self._repository = repository
        self._entry_limit = entry_limit
        self._lock = threading.Lock()
        self._recent: OrderedDict[tuple[bytes, ...], Mapping[bytes, Node]] = OrderedDict()
        self._recent_entries = 0

    def children(self, node: Node) -> Mapping[bytes, Node]:
        """What a directory holds, by name, sorted; raises `NotADirectoryError` for another node."""
        layers = _layers(node)
        with self._lock:
            known = self._recent.get(layers)
            if known is not None:
                self._recent.move_to_end(layers)
                return known
        merged: dict[bytes, Node] = {}
        for layer in layers:
            for entry in self._load_entries(layer):
                merged[entry.name] = _overlay(merged.get(entry.name), _node(entry))
        if len(layers) > 1:
            merged = dict(sorted(merged.items()))
        children = MappingProxyType(merged)
        self._remember(layers, children)
        return children

    def find(self, path: bytes) -> Node:
        """The node at a path (b"" is the root), no links followed; raises `NotFound`."""
        node = self.root
        for name in path.split(b"/") if path else ():
            found = self._find_child(node, name) if node.type == "directory" else None
            if found is None:
                raise NotFound(
                    f"no such file in the snapshot: {path.decode('utf-8', 'backslashreplace')}",
                    hint="`replicate files ID` lists what it holds",
                )
            node = found
        return node

    def walk(self, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
        """(path, node) of everything below `path`, depth-first, parents first, siblings by name.

        Paths are relative to the root of the tree; the node at `path` itself is not given. Raises
        `NotFound`.
        """
        top = self.find(path)
        if top.type != "directory":
            return
        count = 0
        stack = [(path, iter(self.children(top).values()))]
        while stack:
            parent, siblings = stack[-1]
            node = next(siblings, None)
            if node is None:
                stack.pop()
                continue
            count += 1
            # The same small node below itself many times over would go on for ever.
            if count > self._entry_limit or len(stack) > MAX_DEPTH:
                raise RepositoryDamaged(
                    f"a tree in {self._repository.url} has more entries or levels than its snapshot says"
                )
            node_path = parent + b"/" + node.name if parent else node.name
            yield node_path, node
            if node.type == "directory":
                stack.append((node_path, iter(self.children(node).values())))

    def reader(self, node: Node) -> FileReader:
        """A reader of a regular file; raises `IsADirectoryError` or `ValueError` for another node."""
        if node.type == "directory":
            raise IsADirectoryError(node.name)
        if not isinstance(node.content, FileContent):
            raise ValueError(f"not a regular file: {node.name!r}")
        return FileReader(self._repository, node.content)

    def read_files(self, nodes: Sequence[Node]) -> list[bytes]:
        """The contents of small files, with few reads of the store; raises as `reader` and `pread`."""
        of_one_chunk = [
            node for node in nodes if isinstance(node.content, FileContent) and node.content.is_one_chunk
        ]
        chunks = self._repository.read_chunks(
            [node.hash for node in of_one_chunk], [node.size for node in of_one_chunk]
        )
        # A file of several chunks takes the long way, whatever it says its hash is.
        return [
            chunks[node.hash]
            if len(chunks.get(node.hash, b"")) == node.size > 0
            else self.reader(node).pread(0, node.size)
            for node in nodes
        ]

    def _find_child(self, directory: Node, name: bytes) -> Node | None:
        """One entry of a directory, without loading the rest of a long one."""
        layers = _layers(directory)
        with self._lock:
            known = self._recent.get(layers)
        if known is not None:
            return known.get(name)
        if all(self._repository.read_directory(layer).level == 0 for layer in layers):
            return self.children(directory).get(name)
        found: Node | None = None
        for layer in layers:
            entry = self._find_entry(layer, name)
            if entry is not None:
                found = _overlay(found, _node(entry))
        return found

    def _find_entry(self, node_id: bytes, name: bytes) -> Entry | None:
        node = self._repository.read_directory(node_id)
        while node.level > 0:
            position = bisect_left([child.last_name for child in node.children], name)
            if position == len(node.children):
                return None
            (node,) = self._load_below(node, position, position + 1)
        position = bisect_left([entry.name for entry in node.entries], name)
        if position < len(node.entries) and node.entries[position].name == name:
            return node.entries[position]
        return None

    def _load_entries(self, node_id: bytes) -> Iterator[Entry]:
        """The entries of one directory of one snapshot, in order."""
        pending = [self._repository.read_directory(node_id)]
        while pending:
            node = pending.pop()
            if node.level == 0:
                yield from node.entries
            else:
                pending.extend(reversed(self._load_below(node, 0, len(node.children))))

    def _load_below(self, node: DirectoryNode, start: int, stop: int) -> list[DirectoryNode]:
        """Some of the nodes below one, each checked to be what the one above says."""
        children = node.children[start:stop]
        loaded = self._repository.read_directories([child.node for child in children])
        for position, (child, below) in enumerate(zip(children, loaded, strict=True), start):
            names = [e.name for e in below.entries] or [c.last_name for c in below.children]
            count = len(below.entries) + sum(c.entry_count for c in below.children)
            lower = node.children[position - 1].last_name if position else b""
            if (
                below.level != node.level - 1
                or not names
                or names[0] <= lower
                or names[-1] != child.last_name
                or count != child.entry_count
            ):
                raise RepositoryDamaged(
                    f"tree node {child.node.hex()} in {self._repository.url} is not what the node above says",
                    fields={"chunk": child.node.hex()},
                )
        return loaded

    def _remember(self, layers: tuple[bytes, ...], children: Mapping[bytes, Node]) -> None:
        with self._lock:
            if layers not in self._recent:
                self._recent[layers] = children
                self._recent_entries += len(children)
            while self._recent_entries > CACHED_ENTRIES and len(self._recent) > 1:
                _, oldest = self._recent.popitem(last=False)
                self._recent_entries -= len(oldest)


def open_tree(repository: Repository, *snapshot_ids: SnapshotId) -> Tree:
    """The files of the snapshots, later ones laid over earlier ones.

    Directories merge; otherwise the later one wins. Raises `NotStored`.
    """
    if not snapshot_ids:
        raise ValueError("a tree needs a snapshot")
    roots = [repository.load_snapshot(snapshot_id).root for snapshot_id in snapshot_ids]
    last = roots[-1]
    root = Node(
        name=b"",
        type="directory",
        mode=last.mode,
        mtime_ns=last.mtime_ns,
        size=0,
        hash=b"",
        target=b"",
        content=_without_shadowed([root.node for root in roots]),
    )
    return Tree(repository, root, sum(root.files + root.directories + root.symlinks for root in roots))


def diff_trees(left: Tree, right: Tree) -> Iterator[tuple[bytes, Node | None, Node | None]]:
    """(path, left node, right node) of what differs in type, content or mode, in the order of `walk`.

    A node is None where there is nothing; equal subtrees are not looked into.
    """
    stack = [_pair_children(left, left.root, right, right.root, b"")]
    while stack:
        pair = next(stack[-1], None)
        if pair is None:
            stack.pop()
            continue
        path, before, after = pair
        if before is None or after is None or not _is_same(before, after):
            yield path, before, after
        before_directory = before if before is not None and before.type == "directory" else None
        after_directory = after if after is not None and after.type == "directory" else None
        if before_directory or after_directory:
            stack.append(_pair_children(left, before_directory, right, after_directory, path))


def _pair_children(
    left: Tree, before: Node | None, right: Tree, after: Node | None, path: bytes
) -> Iterator[tuple[bytes, Node | None, Node | None]]:
    """The entries of two directories side by side; none when the directories hold the same."""
    if before is not None and after is not None and before.content == after.content:
        return
    left_children = left.children(before) if before is not None else {}
    right_children = right.children(after) if after is not None else {}
    for name in sorted(left_children.keys() | right_children.keys()):
        yield (
            path + b"/" + name if path else name,
            left_children.get(name),
            right_children.get(name),
        )


def _is_same(before: Node, after: Node) -> bool:
    """Whether two nodes are alike but for their times, and for what a directory holds."""
    return (before.type, before.mode, before.size, before.hash) == (
        after.type,
        after.mode,
        after.size,
        after.hash,
    )


def _node(entry: Entry) -> Node:
    content: Content = None
    digest, target = entry.hash, b""
    if entry.type == FILE:
        content = FileContent.from_entry(entry.size, entry.hash, entry.content)
    elif entry.type == DIRECTORY:
        content, digest = (entry.hash,), b""
    else:
        (target,) = entry.content
    return Node(
        entry.name, TYPE_NAMES[entry.type], entry.mode, entry.mtime_ns, entry.size, digest, target, content
    )


def _overlay(earlier: Node | None, later: Node) -> Node:
    """What is seen where two snapshots have a node of the same name."""
    if earlier is None or earlier.type != "directory" or later.type != "directory":
        return later
    layers = _without_shadowed((*_layers(earlier), *_layers(later)))
    return Node(later.name, "directory", later.mode, later.mtime_ns, 0, b"", b"", layers)


def _without_shadowed(layers: Sequence[bytes]) -> tuple[bytes, ...]:
    """The layers, of equal ones only the last: it covers all that the others hold."""
    return tuple(reversed(dict.fromkeys(reversed(layers))))


def _layers(node: Node) -> tuple[bytes, ...]:
    if not isinstance(node.content, tuple):
        raise NotADirectoryError(node.name)
    return node.content
