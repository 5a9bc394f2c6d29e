"""Trees: the directories, files and links of one snapshot as content-addressed nodes.

What a node consists of, and the strict parser of nodes that anybody may have written; `builders` makes
them. Invariant: a parsed node holds only names that are safe to create below a directory, sorted and unique.
docs/format.md, section "Trees", is the normative text.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple

from blake3 import blake3

from replicate.records import FileType
from replicated.chunk.codec import HASH_BYTES, MAX_CHUNK_BYTES
from replicated.chunk.containers.source import MAX_REGIONS
from replicated.format.canonical import Malformed, find_items, pack, unpack, unpack_items
from replicated.format.segments import MAX_LEVEL

DIRECTORY_NODE: Final = 1
CHUNK_LIST_NODE: Final = 2
LAYOUT_NODE: Final = 3

FILE: Final = 0
DIRECTORY: Final = 1
SYMLINK: Final = 2

TYPE_NAMES: Final[tuple[FileType, ...]] = ("file", "directory", "symlink")

#: Larger nodes are refused; segments keep ours near 1 MiB at most.
MAX_NODE_BYTES: Final = 4 << 20
MAX_NAME_BYTES: Final = 1024
MAX_TARGET_BYTES: Final = 4096
MAX_MODE: Final = 0o7777
#: Files of at most so many chunks carry their list in the directory.
MAX_INLINE_CHUNKS: Final = 16
#: Directories within directories; a path of 4096 bytes cannot be deeper than half of that.
MAX_DEPTH: Final = 4096

EMPTY_HASH: Final = blake3(b"").digest()
NANOSECONDS: Final = 10**9

_MAX_INT64 = 2**63 - 1


class FileContent(NamedTuple):
    """Where the bytes of one regular file are: what `SnapshotWriter.add_file` gives.

    Exactly one form applies. `size` 0: nothing else. One chunk: nothing else, its id is `hash`. Few
    chunks: `chunk_ids` (concatenated, 32 bytes each) and `lengths`. Many: `node`, the id of the root of
    a list of chunks.

    With a `layout`, the file is gathered: few or many chunks (a single one counts as few) hold its regions,
    then its gaps, and the layout says where in the file they belong.
    """

    size: int
    #: BLAKE3 of the whole content, as `b3sum` prints it.
    hash: bytes
    chunk_ids: bytes = b""
    lengths: tuple[int, ...] = ()
    node: bytes = b""
    #: The id of a layout node, or nothing; neither `ids` nor the list of chunks has it.
    layout: bytes = b""

    def encode(self) -> bytes:
        """The content as bytes, for caches; `decode` gives it back."""
        return pack([self.size, self.hash, self.packed()])

    @classmethod
    def decode(cls, data: bytes) -> FileContent:
        """What `encode` made; raises `ValueError` for anything else."""
        try:
            value = unpack(data)
            if type(value) is not tuple or len(value) != 3:
                raise Malformed("not a file's content")
            return cls.from_entry(*value)
        except Malformed as error:
            raise ValueError(str(error)) from error

    @classmethod
    def from_entry(cls, size: object, digest: object, content: object) -> FileContent:
        """The content that a directory's entry describes; raises `Malformed`."""
        if type(size) is not int or not 0 <= size <= _MAX_INT64:
            raise Malformed("a file's size is out of range")
        if type(digest) is not bytes or len(digest) != HASH_BYTES or type(content) is not tuple:
            raise Malformed("a file's content is not described")
        if not content:
            if size > MAX_CHUNK_BYTES or (size == 0 and digest != EMPTY_HASH):
                raise Malformed("a file's chunk is too large, or an empty file has a wrong hash")
            return cls(size, digest)
        # What is not the lengths of chunks is the id of a node: of a list first, of a layout last.
        if len(content) > 1 and type(content[1]) is tuple:
            chunk_ids, lengths, *layouts = content
            _check_lengths(chunk_ids, lengths, MAX_CHUNK_BYTES)
            fewest = 1 if layouts else 2
            if not fewest <= len(lengths) <= MAX_INLINE_CHUNKS or sum(lengths) != size:
                raise Malformed("a file's chunks do not add up to its size")
            return cls(size, digest, chunk_ids, lengths, layout=_layout_id(layouts))
        node, *layouts = content
        if type(node) is not bytes or len(node) != HASH_BYTES or size == 0:
            raise Malformed("a file's list of chunks is not named")
        return cls(size, digest, node=node, layout=_layout_id(layouts))

    @property
    def is_one_chunk(self) -> bool:
        """Whether it is one chunk, which then has the same hash."""
        return self.size > 0 and not (self.node or self.chunk_ids)

    def ids(self) -> list[bytes]:
        """The chunks, for contents without a `node`; the layout is not among them."""
        return split_ids(self.chunk_ids) if self.chunk_ids else [self.hash] if self.size else []

    def named_ids(self) -> list[bytes]:
        """The ids that stand in the content itself: chunks or the root of their list, and the layout."""
        return [*([self.node] if self.node else self.ids()), *([self.layout] if self.layout else [])]

    def packed(self) -> tuple[Any, ...]:
        """The `content` member of a directory's entry."""
        layout = (self.layout,) if self.layout else ()
        if self.node:
            return (self.node, *layout)
        return (self.chunk_ids, self.lengths, *layout) if self.chunk_ids else ()


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """One file, directory or link to be put into a tree by `SnapshotWriter.add_tree`."""

    #: Relative to the root of the tree, `/`-separated, no leading or trailing slash; b"" is the root.
    path: bytes
    type: FileType
    #: Permission bits, at most 0o7777.
    mode: int
    mtime_ns: int
    #: For files only.
    content: FileContent | None = None
    #: For symlinks only: where it points to, as written in it.
    target: bytes = b""


@dataclass(frozen=True, slots=True)
class RootNode:
    """The root directory of a stored tree, and what lies below it."""

    node: bytes
    mode: int
    mtime_ns: int
    #: Numbers of entries below the root, the root itself not counted.
    files: int = 0
    directories: int = 0
    symlinks: int = 0
    #: Sum of the sizes of all files.
    size_bytes: int = 0


class Entry(NamedTuple):
    """One entry of a directory as it is stored, checked."""

    name: bytes
    type: int
    mode: int
    seconds: int
    nanoseconds: int
    size: int
    #: Of a directory, the id of its node.
    hash: bytes
    #: See docs/format.md; a file's goes into `FileContent.from_entry`, a link's holds the target.
    content: tuple[Any, ...]

    @property
    def mtime_ns(self) -> int:
        """Time of the last change in nanoseconds since 1970."""
        return self.seconds * NANOSECONDS + self.nanoseconds


class ChildNode(NamedTuple):
    """A node of a long directory, as the node above names it."""

    #: Name of the last entry below the child.
    last_name: bytes
    node: bytes
    #: Entries below the child.
    entry_count: int


class DirectoryNode:
    """A node of a directory, checked: entries on level 0, children above; both are its items.

    It keeps the bytes that it was parsed from and takes out of them what it is asked for: parsed, all of
    it would take four times the memory, and most is asked for once.
    """

    __slots__ = ("_data", "_starts", "_totals", "level")

    def __init__(self, level: int, data: bytes, starts: array[int], totals: array[int]) -> None:
        self.level = level
        self._data = data
        #: Where each item begins, and where the last one ends.
        self._starts = starts
        #: Of a node above others, how many entries there are below it and before each child, and in all.
        self._totals = totals

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def size_bytes(self) -> int:
        """About what it takes of the memory."""
        return len(self._data) + 4 * len(self._starts) + 8 * len(self._totals)

    @property
    def entry_count(self) -> int:
        """Entries in it, or below it."""
        return self._totals[-1] if self.level else len(self)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All its entries; none above level 0."""
        return () if self.level else self.slice_entries(0, len(self))

    @property
    def children(self) -> tuple[ChildNode, ...]:
        """All its children; none on level 0."""
        return self.slice_children(0, len(self)) if self.level else ()

    def slice_entries(self, start: int, stop: int) -> tuple[Entry, ...]:
        """Some of the entries, on level 0."""
        return tuple(map(Entry._make, self._unpack(start, stop)))

    def slice_children(self, start: int, stop: int) -> tuple[ChildNode, ...]:
        """Some of the children, above level 0."""
        return tuple(map(ChildNode._make, self._unpack(start, stop)))

    def name_at(self, position: int) -> bytes:
        """The name of an entry, or that of the last entry below a child."""
        (item,) = self._unpack(position, position + 1)
        name: bytes = item[0]
        return name

    def position_of(self, name: bytes) -> int:
        """The first item whose `name_at` is not before this name; the number of items when there is none."""
        return bisect_left(range(len(self)), name, key=self.name_at)

    def entries_before(self, position: int) -> int:
        """How many entries are below the children before one."""
        return self._totals[position]

    def child_with(self, slot: int) -> int:
        """The position of the child below which the entry of that number is."""
        return bisect_right(self._totals, slot) - 1

    def _unpack(self, start: int, stop: int) -> tuple[Any, ...]:
        starts = self._starts
        return unpack_items(stop - start, self._data[starts[start] : starts[stop]])


@dataclass(frozen=True, slots=True)
class ChunkList:
    """A parsed node of a file's list: chunks on level 0, nodes above, with the bytes in each."""

    level: int
    ids: bytes
    lengths: tuple[int, ...]

    def id_at(self, position: int) -> bytes:
        """The id of the chunk or node at a position."""
        return self.ids[position * HASH_BYTES : (position + 1) * HASH_BYTES]

    def split_ids(self) -> list[bytes]:
        """The ids of all chunks or nodes."""
        return split_ids(self.ids)


# Parsing


def parse_directory(data: bytes) -> DirectoryNode:
    """A node of a directory; raises `Malformed` for what no writer could have made."""
    level, members = _parse_node(data, DIRECTORY_NODE, 1)
    (items,) = members
    if type(items) is not tuple:
        raise Malformed("the items of a directory are not an array")
    starts = find_items(data)
    if level == 0:
        for item in items:
            if not _is_small_file(item):
                check_entry(item)
        if not all(left[0] < right[0] for left, right in pairwise(items)):
            raise Malformed("the entries of a directory are not sorted and unique")
        return DirectoryNode(0, data, starts, array("Q"))
    children = tuple(map(_parse_child, items))
    if not children:
        raise Malformed("a directory's node above others is empty")
    if not all(left.last_name < right.last_name for left, right in pairwise(children)):
        raise Malformed("the nodes of a directory are not sorted and unique")
    totals = list(accumulate((child.entry_count for child in children), initial=0))
    if totals[-1] > _MAX_INT64:
        raise Malformed("a directory of an impossible length")
    return DirectoryNode(level, data, starts, array("Q", totals))


def parse_chunk_list(data: bytes) -> ChunkList:
    """A node of a file's list of chunks; raises `Malformed`."""
    level, (ids, lengths) = _parse_node(data, CHUNK_LIST_NODE, 2)
    _check_lengths(ids, lengths, MAX_CHUNK_BYTES if level == 0 else _MAX_INT64)
    return ChunkList(level, ids, lengths)


def parse_layout(data: bytes) -> tuple[int, ...]:
    """The lengths of a layout node, gap, region, gap, …; raises `Malformed`.

    Only the first may be 0; there are 1 to `MAX_REGIONS` regions, and a gap that is not empty.
    """
    if len(data) > MAX_NODE_BYTES:
        raise Malformed("a node is too large")
    value = unpack(data)
    if type(value) is not tuple or len(value) != 2 or type(value[0]) is not int or value[0] != LAYOUT_NODE:
        raise Malformed("not a layout")
    lengths = value[1]
    if type(lengths) is not tuple or not 2 <= len(lengths) <= 2 * MAX_REGIONS + 1:
        raise Malformed("a layout with no regions, or too many")
    if not all(type(length) is int and 0 < length <= _MAX_INT64 for length in lengths[1:]):
        raise Malformed("a layout with an impossible length")
    if type(lengths[0]) is not int or not 0 <= lengths[0] <= _MAX_INT64:
        raise Malformed("a layout with an impossible length")
    if lengths[0] == 0 and len(lengths) == 2:
        raise Malformed("a layout without a gap")
    return lengths


def _parse_node(data: bytes, kind: int, member_count: int) -> tuple[int, Sequence[Any]]:
    if len(data) > MAX_NODE_BYTES:
        raise Malformed("a node is too large")
    value = unpack(data)
    if type(value) is not tuple or len(value) != 2 + member_count:
        raise Malformed("not a node")
    found, level, *members = value
    if type(found) is not int or found != kind:
        raise Malformed("a node of another kind")
    if type(level) is not int or not 0 <= level <= MAX_LEVEL:
        raise Malformed("a node of an impossible level")
    return level, members


def split_ids(ids: bytes) -> list[bytes]:
    """Ids that stand one after the other."""
    return [ids[start : start + HASH_BYTES] for start in range(0, len(ids), HASH_BYTES)]


def check_name(name: object) -> None:
    """Raise `Malformed` unless a file in a directory can have this name, as bytes."""
    if type(name) is not bytes or not 0 < len(name) <= MAX_NAME_BYTES:
        raise Malformed("a name is empty, too long or not bytes")
    if b"/" in name or b"\0" in name or name in (b".", b".."):
        raise Malformed(f"a name that no file can have: {name!r}")


def _is_small_file(raw: object) -> bool:
    """Whether this is certainly an entry for a file of one chunk: most are, and this costs little."""
    if type(raw) is not tuple or len(raw) != len(Entry._fields):
        return False
    name, kind, mode, seconds, nanoseconds, size, digest, content = raw
    return (
        type(name) is bytes
        and 0 < len(name) <= MAX_NAME_BYTES
        and b"/" not in name
        and b"\0" not in name
        and name not in (b".", b"..")
        and type(kind) is type(mode) is type(seconds) is type(nanoseconds) is type(size) is int
        and kind == FILE
        and 0 <= mode <= MAX_MODE
        and -_MAX_INT64 <= seconds <= _MAX_INT64
        and 0 <= nanoseconds < NANOSECONDS
        and 0 < size <= MAX_CHUNK_BYTES
        and type(digest) is bytes
        and len(digest) == HASH_BYTES
        and content == ()
    )


def check_entry(raw: object) -> None:
    """Raise `Malformed` unless this is the unpacked array of an entry of a directory."""
    if type(raw) is not tuple or len(raw) != len(Entry._fields):
        raise Malformed("not an entry of a directory")
    name, kind, mode, seconds, nanoseconds, size, digest, content = raw
    check_name(name)
    if type(mode) is not int or not 0 <= mode <= MAX_MODE:
        raise Malformed("a mode is out of range")
    if type(seconds) is not int or not -_MAX_INT64 <= seconds <= _MAX_INT64:
        raise Malformed("a time is out of range")
    if type(nanoseconds) is not int or not 0 <= nanoseconds < NANOSECONDS:
        raise Malformed("a time is out of range")
    if type(kind) is not int or kind not in (FILE, DIRECTORY, SYMLINK):
        raise Malformed("an entry of an unknown type")
    if kind == FILE:
        FileContent.from_entry(size, digest, content)
        return
    if type(size) is not int or type(digest) is not bytes or len(digest) != HASH_BYTES:
        raise Malformed("an entry without size and hash")
    if kind == DIRECTORY:
        if size != 0 or content != ():
            raise Malformed("a directory with a size")
        return
    if type(content) is not tuple or len(content) != 1:
        raise Malformed("a link without a target")
    (target,) = content
    if type(target) is not bytes or not 0 < len(target) <= MAX_TARGET_BYTES or b"\0" in target:
        raise Malformed("a link's target is impossible")
    if size != len(target) or digest != blake3(target).digest():
        raise Malformed("a link's size or hash does not fit its target")


def _parse_child(raw: object) -> ChildNode:
    if type(raw) is not tuple or len(raw) != len(ChildNode._fields):
        raise Malformed("not a node of a directory")
    last_name, node, count = raw
    check_name(last_name)
    if type(node) is not bytes or len(node) != HASH_BYTES:
        raise Malformed("a node of a directory without an id")
    if type(count) is not int or not 0 < count <= _MAX_INT64:
        raise Malformed("a node of a directory with an impossible count")
    return ChildNode._make(raw)


def _layout_id(layouts: Sequence[object]) -> bytes:
    """The last member of a content, if it has one, else nothing."""
    if not layouts:
        return b""
    if len(layouts) > 1 or type(layouts[0]) is not bytes or len(layouts[0]) != HASH_BYTES:
        raise Malformed("a file's content has too many members, or its layout is not named")
    return layouts[0]


def _check_lengths(ids: object, lengths: object, maximum: int) -> None:
    """Raise `Malformed` unless these are ids and as many lengths, at least one."""
    if type(ids) is not bytes or type(lengths) is not tuple or not lengths:
        raise Malformed("a list of chunks without ids or lengths")
    if len(ids) != HASH_BYTES * len(lengths):
        raise Malformed("a list of chunks with more ids than lengths, or fewer")
    if not all(type(length) is int and 0 < length <= maximum for length in lengths):
        raise Malformed("a list of chunks with an impossible length")
