"""A read-only view of the files of a snapshot, or of a checkpoint laid over its experiment.

Used by mount, checkout and rpc. It loads what is asked for and keeps bounded caches. Invariant: bytes
that leave here are the bytes that were saved, else an error is raised; and work and memory are bounded
by what is asked for, whatever somebody may have written into the repository.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from replicate.errors import NotFound, RepositoryDamaged
from replicate.ids import SnapshotId
from replicated.directories import Directories, Listing, Node, layers_of, without_shadowed
from replicated.file_reader import FileReader
from replicated.format.manifest import MAX_DEPTH, FileContent, RootNode
from replicated.repository import Repository
from replicated.store.base import Capabilities

__all__ = ["Node", "Tree", "diff_trees", "open_tree"]

#: Entries of a directory that `walk` takes at once.
_WALK_BATCH: Final = 256


class Tree:
    """The files of one snapshot, or of several laid over each other. May be used from several threads.

    `entry_limit` is how many entries the snapshots say to have together.
    """

    def __init__(self, repository: Repository, root: Node, entry_limit: int) -> None:
        self.root = root
        self._repository = repository
        self._entry_limit = entry_limit
        self._directories = Directories(repository)

    @property
    def capabilities(self) -> Capabilities:
        """What the store can do that it is read from."""
        return self._repository.store.capabilities

    def listing(self, node: Node) -> Listing:
        """What a directory holds, of which no more is read than is asked for.

        Raises `NotADirectoryError` for another node.
        """
        listing = self._directories.listing(layers_of(node))
        if len(listing) > self._entry_limit:
            raise self._too_large()
        return listing

    def preload(self, nodes: Sequence[Node]) -> None:
        """Read the beginnings of directories that will be listed, with few reads of the store."""
        self._directories.preload([layer for node in nodes for layer in layers_of(node)])

    def children(self, node: Node) -> Mapping[bytes, Node]:
        """What a directory holds, by name, sorted; raises `NotADirectoryError` for another node."""
        return MappingProxyType({child.name: child for child in self._iter_children(node)})

    def find(self, path: bytes) -> Node:
        """The node at a path (b"" is the root), no links followed; raises `NotFound`."""
        node = self.root
        for name in path.split(b"/") if path else ():
            found = self.listing(node).find(name) if node.type == "directory" else None
            if found is None:
                raise NotFound(
                    f"no such file in the snapshot: {path.decode('utf-8', 'backslashreplace')}",
                    hint="`replicate files ID` lists what it holds",
                )
            node = found[1]
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
        stack = [(path, self._iter_children(top))]
        while stack:
            parent, siblings = stack[-1]
            node = next(siblings, None)
            if node is None:
                stack.pop()
                continue
            count += 1
            # The same small node below itself many times over would go on for ever.
            if count > self._entry_limit or len(stack) > MAX_DEPTH:
                raise self._too_large()
            node_path = parent + b"/" + node.name if parent else node.name
            yield node_path, node
            if node.type == "directory":
                stack.append((node_path, self._iter_children(node)))

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

    def _iter_children(self, node: Node) -> Iterator[Node]:
        """What a directory holds, sorted by name; of one snapshot's, little is in memory."""
        listing = self.listing(node)
        children = _iter_listing(listing)
        if len(layers_of(node)) == 1:
            return children
        return iter(sorted(children, key=lambda child: child.name))

    def _too_large(self) -> RepositoryDamaged:
        return RepositoryDamaged(
            f"a tree in {self._repository.url} has more entries or levels than its snapshot says"
        )


def open_tree(repository: Repository, *snapshot_ids: SnapshotId) -> Tree:
    """The files of the snapshots, later ones laid over earlier ones.

    Directories merge; otherwise the later one wins. Raises `NotStored`.
    """
    if not snapshot_ids:
        raise ValueError("a tree needs a snapshot")
    return overlay_roots(
        repository, [repository.load_snapshot(snapshot_id).root for snapshot_id in snapshot_ids]
    )


def overlay_roots(repository: Repository, roots: Sequence[RootNode]) -> Tree:
    """The same, of snapshots that are loaded; there is at least one."""
    last = roots[-1]
    root = Node(
        name=b"",
        type="directory",
        mode=last.mode,
        mtime_ns=last.mtime_ns,
        size=0,
        hash=b"",
        target=b"",
        content=without_shadowed([root.node for root in roots]),
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


def _iter_listing(listing: Listing) -> Iterator[Node]:
    start = 0
    while entries := listing.entries(start, _WALK_BATCH):
        yield from (node for _, node in entries)
        start = entries[-1][0] + 1
