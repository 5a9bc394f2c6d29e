"""Trees: directories, files and links of one snapshot as content-addressed nodes.

Bytes only: what a node consists of, and the strict parser of nodes that anybody may have written. It
reads and writes no store; `writer` and `tree` do. docs/format.md, section "Trees", is the normative text.
"""

from __future__ import annotations

from dataclasses import dataclass

from replicate.records import FileType


@dataclass(frozen=True, slots=True)
class FileContent:
    """Where the bytes of one regular file are: what `SnapshotWriter.add_file` gives.

    Exactly one form applies. `size` 0: nothing else. One chunk: nothing else, its id is `hash`. Few
    chunks: `chunk_ids` (concatenated, 32 bytes each) and `lengths`. Many: `node`, the id of the root of
    a list of chunks.
    """

    size: int
    #: BLAKE3 of the whole content, as `b3sum` prints it.
    hash: bytes
    chunk_ids: bytes = b""
    lengths: tuple[int, ...] = ()
    node: bytes = b""

    def encode(self) -> bytes:
        """The content as bytes, for caches; `decode` gives it back."""
        raise NotImplementedError

    @classmethod
    def decode(cls, data: bytes) -> FileContent:
        """What `encode` made; raises `ValueError` for anything else."""
        raise NotImplementedError


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
    bytes: int = 0
