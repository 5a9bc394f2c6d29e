"""What a capture found: the directories of a tree, the stat of each file, and where its content is.

A stream of MessagePack values: a header, then one array a directory, each before what lies below it,
siblings by the bytes of their names; or, for a tree that has not changed at all, one array that names
the tree that is stored already. Short streams go into the journal, long ones into the spool. Written
by `capture`, read by `ingest` and after a restart; rows and sources have the same form in `treecache`,
so that those of a directory that has not changed are copied and compared without looking at them.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import msgpack

from replicate.errors import CaptureFailed
from replicated.format.manifest import RootNode

VERSION: Final = 1

#: A content that the repository has: [KNOWN, hash, content as `FileContent.packed`].
KNOWN: Final = 0
#: A small file among others: [PACKED, offset, name of the spool file].
PACKED: Final = 1
#: A file with a spool file of its own: [SPOOLED, name of the spool file].
SPOOLED: Final = 2
#: A file that a lease keeps from changing: [HELD, number]. Once it had to be copied, the copy is the
#: spool file `held_name(number)`.
HELD: Final = 3
#: A symbolic link: [LINK, target].
LINK: Final = 4

Source: TypeAlias = "tuple[Any, ...]"
#: A `Row` without the names of its fields: making one costs a fifth.
PlainRow: TypeAlias = "tuple[bytes, int, int, int, int, int]"

_DIRECTORY: Final = 0
_SAME_TREE: Final = 1
_MIN_INT, _MAX_INT = -(2**63), 2**63 - 1
_MAX_VALUE_BYTES = 1 << 30


class Row(NamedTuple):
    """One file or link of a directory as `lstat` saw it; in packed form a plain array in this order."""

    name: bytes
    #: With the bits of the type.
    mode: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link; else it is a regular file."""
        return stat.S_ISLNK(self.mode)


@dataclass(frozen=True, slots=True)
class CapturedDirectory:
    """One directory: its own stat, and its files and links (its directories follow as records)."""

    #: Relative to the project directory, b"" is that directory itself.
    path: bytes
    mode: int
    mtime_ns: int
    device: int
    inode: int
    #: The clock when it was listed: files whose times are not clearly older may have changed since.
    listed_ns: int
    #: Whether all that the rules keep was listed, as opposed to chosen names only.
    is_complete: bool
    #: `pack_rows` of its files and links, by name.
    rows: bytes
    #: `pack_sources` of the sources of these rows, in their order.
    sources: bytes


@dataclass(frozen=True, slots=True)
class SameTree:
    """The tree has not changed since it was stored under this root."""

    root: RootNode


@dataclass(frozen=True, slots=True)
class Header:
    """What the entries of a capture begin with."""

    project_directory: bytes
    #: Names the walk (directory, paths, patterns), for `treecache`; empty when it is of no use again.
    tree_key: bytes


def held_name(number: int) -> str:
    """Name of the spool file with the copy of a held file."""
    return f"held-{number}"


def pack_rows(rows: Sequence[PlainRow]) -> bytes:
    """Rows as bytes; equal rows give equal bytes."""
    try:
        return _pack(rows)
    except OverflowError:
        # Times after 2262 or before 1677, which some file systems can hold.
        return _pack([tuple(map(_pack_large, row)) for row in rows])


def unpack_rows(data: bytes) -> list[Row]:
    """The rows that `pack_rows` packed; raises `CaptureFailed` for anything else."""
    try:
        return [Row(*map(_unpack_large, row)) for row in _unpack(data)]
    except (TypeError, ValueError) as error:
        raise CaptureFailed(f"the rows of a directory cannot be read: {error}") from error


def pack_sources(sources: Sequence[Source]) -> bytes:
    """Sources as bytes."""
    return _pack(sources)


def unpack_sources(data: bytes) -> tuple[Source, ...]:
    """The sources that `pack_sources` packed; raises `CaptureFailed` for anything else."""
    try:
        sources = _unpack(data)
        if not all(type(source) is tuple and source for source in sources):
            raise ValueError("not an array of arrays")
    except (TypeError, ValueError) as error:
        raise CaptureFailed(f"the sources of a directory cannot be read: {error}") from error
    return tuple(sources)


def pack_children(children: Sequence[tuple[bytes, int, int, bytes]]) -> bytes:
    """Name, mode, mtime and stored node of each directory in a directory, as bytes."""
    return _pack([(name, mode, _pack_large(mtime_ns), node) for name, mode, mtime_ns, node in children])


def unpack_children(data: bytes) -> list[tuple[bytes, int, int, bytes]]:
    """What `pack_children` packed; raises `CaptureFailed` for anything else."""
    try:
        return [(name, mode, _unpack_large(mtime_ns), node) for name, mode, mtime_ns, node in _unpack(data)]
    except (TypeError, ValueError) as error:
        raise CaptureFailed(f"the directories in a directory cannot be read: {error}") from error


def pack_header(header: Header) -> bytes:
    """The beginning of a stream of entries."""
    return _pack((VERSION, header.project_directory, header.tree_key))


def pack_directory(directory: CapturedDirectory) -> bytes:
    """One directory of a stream of entries."""
    return _pack(
        (
            _DIRECTORY,
            directory.path,
            directory.mode,
            _pack_large(directory.mtime_ns),
            directory.device,
            directory.inode,
            directory.listed_ns,
            directory.is_complete,
            directory.rows,
            directory.sources,
        )
    )


def pack_same_tree(same: SameTree) -> bytes:
    """The only value after the header of a tree that has not changed."""
    return _pack((_SAME_TREE, *pack_root(same.root)))


def pack_root(root: RootNode) -> tuple[Any, ...]:
    """A root as values that can be packed; `unpack_root` gives it back."""
    return (
        root.node,
        root.mode,
        _pack_large(root.mtime_ns),
        root.files,
        root.directories,
        root.symlinks,
        root.size_bytes,
    )


def unpack_root(values: Sequence[Any]) -> RootNode:
    """What `pack_root` took apart."""
    node, mode, mtime_ns, *counts = values
    return RootNode(node, mode, _unpack_large(mtime_ns), *counts)


def read_entries(chunks: Iterable[bytes]) -> tuple[Header, Iterator[CapturedDirectory | SameTree]]:
    """Header and records of a stream that comes in pieces; raises `CaptureFailed` when it is damaged."""
    values = _values(chunks)
    header = next(values, None)
    if type(header) is not tuple or len(header) != 3 or header[0] != VERSION:
        raise CaptureFailed("what was captured cannot be read: it was written by another version")
    return Header(*header[1:]), map(_record, values)


def _record(value: object) -> CapturedDirectory | SameTree:
    try:
        if type(value) is not tuple:
            raise TypeError("not an array")
        kind, *rest = value
        if kind == _SAME_TREE:
            return SameTree(unpack_root(rest))
        path, mode, mtime_ns, *others = rest
        return CapturedDirectory(path, mode, _unpack_large(mtime_ns), *others)
    except (TypeError, ValueError) as error:
        raise CaptureFailed(f"what was captured cannot be read: {error}") from error


def _values(chunks: Iterable[bytes]) -> Iterator[object]:
    unpacker = msgpack.Unpacker(raw=False, use_list=False, max_buffer_size=_MAX_VALUE_BYTES)
    fed = 0
    try:
        for chunk in chunks:
            unpacker.feed(chunk)
            fed += len(chunk)
            yield from unpacker
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise CaptureFailed(f"what was captured cannot be read: {error}") from error
    if unpacker.tell() != fed:
        raise CaptureFailed("what was captured cannot be read: it is cut short")


def _pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(
        data, raw=False, use_list=False, max_bin_len=_MAX_VALUE_BYTES, max_array_len=len(data)
    )


def _pack_large(value: Any) -> Any:
    """A whole number beyond 64 bits as its digits; anything else as it is."""
    if type(value) is int and not _MIN_INT <= value <= _MAX_INT:
        return str(value)
    return value


def _unpack_large(value: Any) -> Any:
    return int(value) if type(value) is str else value
