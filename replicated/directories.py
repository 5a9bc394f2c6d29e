"""The entries of the directories of a repository: found by name, by slot and in order, in little memory.

Used by `tree`. A long directory is stored as several nodes, of which only those are read that hold what is
asked for; a bounded number of them is kept. Invariants: an entry has the same slot however it is found;
and a node that is not what the one above it says is damage.
"""

from __future__ import annotations

import sys
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Final, NamedTuple, Protocol, TypeAlias

from replicate.errors import ReplicateError, RepositoryDamaged
from replicate.records import FileType
from replicated.format.manifest import DIRECTORY, FILE, TYPE_NAMES, DirectoryNode, Entry, FileContent
from replicated.repository import Repository

#: What the nodes that were used last may take of the memory: some sixty thousand entries.
CACHED_BYTES: Final = 4 << 20
#: Nodes of a long directory that are read together when it is listed: with stores far away each read counts.
NODES_AHEAD: Final = 8

#: Of a file, where its bytes are; of a directory, the ids of its nodes, those of later snapshots last. What
#: is no tree of a repository puts here what it knows its nodes by. That of a directory has a hash.
Content: TypeAlias = object


class Node(NamedTuple):
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


class Listing(Protocol):
    """The entries of a directory, each with a number of its own, its slot. Thread-safe."""

    def __len__(self) -> int:
        """All slots are below this; some may hold nothing."""
        ...

    def find(self, name: bytes) -> tuple[int, Node] | None:
        """The entry of this name."""
        ...

    def at(self, slot: int) -> Node | None:
        """The entry in a slot, if there is one."""
        ...

    def entries(self, start: int, limit: int) -> Sequence[tuple[int, Node]]:
        """The first `limit` entries whose slots are not below `start`, by slot."""
        ...


class FixedListing:
    """Entries that are all in memory, sorted by name."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._nodes = tuple(nodes)
        self._names = [node.name for node in self._nodes]

    def __len__(self) -> int:
        return len(self._nodes)

    def find(self, name: bytes) -> tuple[int, Node] | None:
        """See `Listing.find`."""
        slot = bisect_left(self._names, name)
        node = self.at(slot)
        return None if node is None or node.name != name else (slot, node)

    def at(self, slot: int) -> Node | None:
        """See `Listing.at`."""
        return self._nodes[slot] if slot < len(self._nodes) else None

    def entries(self, start: int, limit: int) -> Sequence[tuple[int, Node]]:
        """See `Listing.entries`."""
        return list(enumerate(self._nodes[start : start + limit], start))


class Directories:
    """The nodes of directories of one repository; those used last are kept. Thread-safe."""

    def __init__(self, repository: Repository, cached_bytes: int = CACHED_BYTES) -> None:
        self._repository = repository
        self._cached_bytes = cached_bytes
        self._lock = threading.Lock()
        self._recent: OrderedDict[bytes, DirectoryNode] = OrderedDict()
        self._recent_bytes = 0

    def listing(self, layers: Sequence[bytes]) -> Listing:
        """What the directories with these root nodes hold together, the later ones laid over the earlier."""
        if len(layers) == 1:
            return _Layer(self, layers[0])
        listings = [_Layer(self, layer) for layer in layers]
        if sum(map(len, listings)) > sys.maxsize:
            raise RepositoryDamaged(f"a directory of an impossible length in {self._repository.url}")
        return _Overlay(listings)

    def preload(self, node_ids: Iterable[bytes]) -> None:
        """Read nodes that will be asked for, with few reads of the store; one that is damaged stays out."""
        with suppress(ReplicateError):
            self.load(list(node_ids))

    def load(self, node_ids: Sequence[bytes]) -> list[DirectoryNode]:
        """Nodes in the order given; raises `RepositoryDamaged` and what else reading raises."""
        found: dict[bytes, DirectoryNode] = {}
        with self._lock:
            for node_id in node_ids:
                known = self._recent.get(node_id)
                if known is not None:
                    self._recent.move_to_end(node_id)
                    found[node_id] = known
        missing = [node_id for node_id in dict.fromkeys(node_ids) if node_id not in found]
        if missing:
            read = dict(zip(missing, self._repository.read_directories(missing), strict=True))
            self._remember(read)
            found.update(read)
        return [found[node_id] for node_id in node_ids]

    def load_below(self, node: DirectoryNode, position: int, ahead: int = 1) -> DirectoryNode:
        """One of the nodes below one, checked to be what the one above says.

        When it has to be read, so are those after it, `ahead` together.
        """
        lower = node.name_at(position - 1) if position else b""
        children = node.slice_children(position, min(len(node), position + ahead))
        child = children[0]
        if ahead > 1 and not self._is_known(child.node):
            self.preload(after.node for after in children)
        (below,) = self.load([child.node])
        if (
            below.level != node.level - 1
            or not len(below)
            or below.entry_count != child.entry_count
            or below.name_at(0) <= lower
            or below.name_at(len(below) - 1) != child.last_name
        ):
            raise RepositoryDamaged(
                f"tree node {child.node.hex()} in {self._repository.url} is not what the node above says",
                fields={"chunk": child.node.hex()},
            )
        return below

    def _is_known(self, node_id: bytes) -> bool:
        with self._lock:
            return node_id in self._recent

    def _remember(self, nodes: dict[bytes, DirectoryNode]) -> None:
        with self._lock:
            for node_id, node in nodes.items():
                if node_id not in self._recent:
                    self._recent[node_id] = node
                    self._recent_bytes += node.size_bytes
            while self._recent_bytes > self._cached_bytes and len(self._recent) > 1:
                _, oldest = self._recent.popitem(last=False)
                self._recent_bytes -= oldest.size_bytes


class _Layer:
    """A directory of one snapshot: the slot of an entry is its place in the order of names."""

    def __init__(self, directories: Directories, root: bytes) -> None:
        self._directories = directories
        self._root_id = root
        self._length = self._root().entry_count

    def __len__(self) -> int:
        return self._length

    def find(self, name: bytes) -> tuple[int, Node] | None:
        node = self._root()
        slot = 0
        while node.level > 0:
            position = node.position_of(name)
            if position == len(node):
                return None
            slot += node.entries_before(position)
            node = self._directories.load_below(node, position)
        position = node.position_of(name)
        if position == len(node):
            return None
        (entry,) = node.slice_entries(position, position + 1)
        return (slot + position, _node(entry)) if entry.name == name else None

    def at(self, slot: int) -> Node | None:
        if slot >= self._length:
            return None
        node, first = self._leaf(slot, 1)
        (entry,) = node.slice_entries(slot - first, slot - first + 1)
        return _node(entry)

    def entries(self, start: int, limit: int) -> list[tuple[int, Node]]:
        found: list[tuple[int, Node]] = []
        while len(found) < limit and start < self._length:
            leaf, first = self._leaf(start, NODES_AHEAD)
            position = start - first
            entries = leaf.slice_entries(position, min(len(leaf), position + limit - len(found)))
            found.extend(enumerate(map(_node, entries), start))
            start += len(entries)
        return found

    def _leaf(self, slot: int, ahead: int) -> tuple[DirectoryNode, int]:
        """The node of level 0 that has this slot, and its first one; with those after it, `ahead` in all."""
        node = self._root()
        first = 0
        while node.level > 0:
            position = node.child_with(slot - first)
            first += node.entries_before(position)
            node = self._directories.load_below(node, position, ahead if node.level == 1 else 1)
        return node, first

    def _root(self) -> DirectoryNode:
        return self._directories.load([self._root_id])[0]


class _Overlay:
    """A directory of several snapshots.

    An entry is found in the last layer that has it, and its slot is its place in there, after all those of
    the layers before. Places whose entry is in a later layer too hold nothing, so none has to be merged to
    number another.
    """

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self._layers = layers
        self._firsts = list(accumulate(map(len, layers), initial=0))

    def __len__(self) -> int:
        return self._firsts[-1]

    def find(self, name: bytes) -> tuple[int, Node] | None:
        seen: Node | None = None
        slot = 0
        for first, layer in zip(self._firsts, self._layers, strict=False):
            found = layer.find(name)
            if found is not None:
                slot, seen = first + found[0], overlay(seen, found[1])
        return None if seen is None else (slot, seen)

    def at(self, slot: int) -> Node | None:
        number = self._layer_with(slot)
        node = self._layers[number].at(slot - self._firsts[number]) if number < len(self._layers) else None
        return None if node is None else self._seen(slot, node)

    def entries(self, start: int, limit: int) -> list[tuple[int, Node]]:
        found: list[tuple[int, Node]] = []
        while len(found) < limit and start < len(self):
            number = self._layer_with(start)
            first = self._firsts[number]
            lot = self._layers[number].entries(start - first, limit - len(found))
            for slot, node in lot:
                seen = self._seen(first + slot, node)
                if seen is not None:
                    found.append((first + slot, seen))
            start = first + lot[-1][0] + 1
        return found

    def _layer_with(self, slot: int) -> int:
        return bisect_right(self._firsts, slot) - 1

    def _seen(self, slot: int, node: Node) -> Node | None:
        """What is seen of an entry of one layer in its slot."""
        found = self.find(node.name)
        return found[1] if found is not None and found[0] == slot else None


def overlay(earlier: Node | None, later: Node) -> Node:
    """What is seen where two snapshots have a node of the same name."""
    if earlier is None or earlier.type != "directory" or later.type != "directory":
        return later
    layers = without_shadowed((*layers_of(earlier), *layers_of(later)))
    return Node(later.name, "directory", later.mode, later.mtime_ns, 0, b"", b"", layers)


def without_shadowed(layers: Sequence[bytes]) -> tuple[bytes, ...]:
    """The layers, of equal ones only the last: it covers all that the others hold."""
    return tuple(reversed(dict.fromkeys(reversed(layers))))


def layers_of(node: Node) -> tuple[bytes, ...]:
    """The root nodes of a directory; raises `NotADirectoryError` for another node."""
    if node.type != "directory" or not isinstance(node.content, tuple):
        raise NotADirectoryError(node.name)
    return node.content


def _node(entry: Entry) -> Node:
    name, kind, mode, _, _, size, digest, content = entry
    mtime_ns = entry.mtime_ns
    if kind == FILE:
        # It was checked when its node was parsed.
        whole = FileContent.from_entry(size, digest, content) if content else FileContent(size, digest)
        return Node(name, TYPE_NAMES[kind], mode, mtime_ns, size, digest, b"", whole)
    if kind == DIRECTORY:
        return Node(name, TYPE_NAMES[kind], mode, mtime_ns, 0, b"", b"", (digest,))
    return Node(name, TYPE_NAMES[kind], mode, mtime_ns, size, digest, content[0], None)
