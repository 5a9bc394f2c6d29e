"""A read-only view of the files of a snapshot, or of a checkpoint laid over its experiment.

Used by mount, checkout and rpc. It loads what is asked for and keeps bounded caches. Invariant: bytes
that leave here are the bytes that were saved, else an error is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from replicate.ids import SnapshotId
from replicate.records import FileType
from replicated.format.manifest import FileContent
from replicated.repository import Repository

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


class FileReader:
    """Reads one file at any offset; may be used from several threads."""

    def pread(self, offset: int, length: int) -> bytes:
        """The bytes from `offset`, fewer than `length` only at the end of the file.

        Raises `RepositoryDamaged` and `RepositoryUnreachable`.
        """
        raise NotImplementedError


class Tree:
    """The files of one snapshot, or of several laid over each other. May be used from several threads."""

    root: Node

    def children(self, node: Node) -> Mapping[bytes, Node]:
        """What a directory holds, by name, sorted; raises `NotADirectoryError` for another node."""
        raise NotImplementedError

    def find(self, path: bytes) -> Node:
        """The node at a path (b"" is the root), no links followed; raises `NotFound`."""
        raise NotImplementedError

    def walk(self, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
        """(path, node) of everything below `path`, depth-first, parents first, siblings by name.

        Paths are relative to the root of the tree; the node at `path` itself is not given. Raises
        `NotFound`.
        """
        raise NotImplementedError

    def reader(self, node: Node) -> FileReader:
        """A reader of a regular file; raises `IsADirectoryError` or `ValueError` for another node."""
        raise NotImplementedError


def open_tree(repository: Repository, *snapshot_ids: SnapshotId) -> Tree:
    """The files of the snapshots, later ones laid over earlier ones.

    Directories merge; otherwise the later one wins. Raises `NotStored`.
    """
    raise NotImplementedError


def diff_trees(left: Tree, right: Tree) -> Iterator[tuple[bytes, Node | None, Node | None]]:
    """(path, left node, right node) of what differs in type, content or mode, in the order of `walk`.

    A node is None where there is nothing; equal subtrees are not looked into.
    """
    raise NotImplementedError
