"""A snapshot as inodes: the plain, read-only operations that every mount engine calls.

It knows files, directories and symbolic links, but neither FUSE nor a repository: what it serves comes
from a `Source`, which is a `Tree`, or a view that grafts trees into directories of its own. Every
operation is thread-safe and either gives exactly what was saved or raises, which `errors.errno_for` turns
into an errno. The bytes of files are the matter of `open_files`.

Engines that pack many entries into one answer call `read_entries`, which costs less an entry than
`readdir`; what an engine may let the kernel keep is said by `Attributes.is_lasting` for an entry, by
`is_lasting_directory` for a listing, and by `is_immutable` for everything.

Invariant: what is kept in memory grows with the number of directories visited (see `numbering`), not with
the number of files.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from replicated.mount.errors import Refused
from replicated.mount.numbering import ROOT_INODE, Directory, Inodes, Listed
from replicated.mount.reading.open_files import OpenFiles, Part, PlainFile, Readable

if TYPE_CHECKING:
    from replicated.directories import Node

__all__ = ["ROOT_INODE", "Attributes", "Filesystem", "Source", "Usage"]

BLOCK_SIZE = 4096
NAME_MAX = 255
#: Name of the extended attribute of a file that holds its BLAKE3 hash in hexadecimal.
HASH_ATTRIBUTE = b"user.replicate.hash"
#: Others are asked for by `ls -l` and the like, of everything they list, and never there.
_ATTRIBUTE_PREFIX: Final = b"user.replicate."

#: Directories are shown with one link, as Btrfs does: tools take that as "number of subdirectories not
#: known". The true number would cost a look into every subdirectory for each `stat`.
LINK_COUNT = 1

#: Entries that `readdir` takes at once.
_READDIR_BATCH: Final = 128
#: Directories that are loaded together when those beside them are listed one after the other, at first and
#: at most: with stores far away each read counts.
_FEWEST_AHEAD: Final = 4
_MOST_AHEAD: Final = 64

_TYPE_BITS = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "symlink": stat.S_IFLNK}
_PERMISSION_BITS = 0o777


class Source(Readable, Listed, Protocol):
    """What a file system serves. Its methods may be called from many threads at once."""

    def preload(self, nodes: Sequence[Node]) -> None:
        """Get ready for the listing of directories; says nothing when that fails."""
        ...


class Attributes(NamedTuple):
    """What `stat` shows of one object, apart from what is the same for all of them."""

    inode: int
    #: Type and permission bits.
    mode: int
    size: int
    mtime_ns: int
    #: Whether neither the object, nor the name by which it was found, ever changes.
    is_lasting: bool = True

    @property
    def blocks(self) -> int:
        """Size in units of 512 bytes, as `st_blocks` counts."""
        return (self.size + 511) // 512


class Usage(NamedTuple):
    """What `statfs` shows: how much the file system holds. There is never anything free."""

    size_bytes: int = 0
    entries: int = 0


class Filesystem:
    """The read-only file system of a source.

    `changing` tells which directories of the source can have other entries later; the default, that of
    a snapshot, is none. Then everything that an engine was given may be cached for ever. `extended` gives
    the names of the extended attributes of a node besides the hash of a file, each with what finds its
    value, None for what is no more. Objects belong to the user who mounts.
    """

    def __init__(
        self,
        source: Source,
        *,
        files: OpenFiles | None = None,
        usage: Usage | None = None,
        changing: Callable[[Node], bool] | None = None,
        extended: Callable[[Node], Mapping[bytes, Callable[[], bytes | None]]] | None = None,
    ) -> None:
        self.uid = os.getuid()
        self.gid = os.getgid()
        self.usage = usage or Usage()
        self.is_immutable = changing is None
        #: Where the files lie that `backing` gives; None when that is not known.
        self.backing_directory: Path | None = None
        self._source = source
        self._inodes = Inodes(source, changing or (lambda node: False))
        self._extended = extended
        self._files = files or OpenFiles(source)

    # -- finding -------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Attributes:
        """The entry `name` of the directory `parent`."""
        directory = self._inodes.directory(parent)
        found = self._inodes.listing(directory).find(name)
        if found is None:
            raise Refused(errno.ENAMETOOLONG if len(name) > NAME_MAX else errno.ENOENT)
        slot, node = found
        return _attributes(directory.first + slot, node, not directory.is_changing)

    def resolve(self, path: bytes) -> int:
        """The inode at an absolute path, for engines that are given paths; no link is followed."""
        inode = ROOT_INODE
        for name in path.split(b"/"):
            if name:
                inode = self.lookup(inode, name).inode
        return inode

    def getattr(self, inode: int) -> Attributes:
        """The attributes of an inode."""
        if inode == ROOT_INODE:
            return _attributes(inode, self._source.root, self.is_immutable)
        parent, node = self._inodes.locate(inode)
        return _attributes(inode, node, not parent.is_changing)

    def readdir(self, inode: int, offset: int = 0) -> Iterator[tuple[bytes, Attributes, int]]:
        """The entries of a directory from `offset` on, `.` and `..` first: name, attributes, next offset.

        An offset is 0 or one that came with an entry, and stays good while the directory changes.
        """
        while entries := self.read_entries(inode, offset, _READDIR_BATCH):
            yield from entries
            offset = entries[-1][2]

    def read_entries(self, inode: int, offset: int, limit: int) -> list[tuple[bytes, Attributes, int]]:
        """The first `limit` of what `readdir` gives, in one go; nothing after the last entry."""
        directory = self._inodes.directory(inode)
        if not offset:
            self._look_ahead(directory)
        listing = self._inodes.listing(directory)
        entries: list[tuple[bytes, Attributes, int]] = []
        if offset < 1:
            entries.append((b".", self.getattr(inode), 1))
        if offset < 2:
            entries.append((b"..", self.getattr(directory.parent), 2))
        is_lasting = not directory.is_changing
        first = directory.first
        entries.extend(
            (node.name, _attributes(first + slot, node, is_lasting), slot + 3)
            for slot, node in listing.entries(max(offset - 2, 0), max(limit - len(entries), 0))
        )
        return entries[:limit]

    def is_lasting_directory(self, inode: int) -> bool:
        """Whether the listing of a directory never changes."""
        return not self._inodes.directory(inode).is_changing

    def following(self, inode: int, count: int) -> list[tuple[int, Node]]:
        """The next `count` regular files after `inode` in the listing of its directory, with their inodes."""
        directory, _ = self._inodes.locate(inode)
        listing = self._inodes.listing(directory)
        found: list[tuple[int, Node]] = []
        slot = inode - directory.first + 1
        while len(found) < count and (entries := listing.entries(slot, count)):
            found.extend((directory.first + slot, node) for slot, node in entries if node.type == "file")
            slot = entries[-1][0] + 1
        return found[:count]

    def node_of(self, inode: int) -> Node:
        """What an inode stands for, for those who read in advance."""
        return self._node(inode)

    def path_of(self, inode: int) -> bytes:
        """The path of an inode, relative to the root."""
        names: list[bytes] = []
        while inode != ROOT_INODE:
            directory, node = self._inodes.locate(inode)
            names.append(node.name)
            inode = directory.inode
        return b"/".join(reversed(names))

    def _look_ahead(self, directory: Directory) -> None:
        """Load the directories that come after one that is about to be listed, if that is how it goes on."""
        if directory.inode == ROOT_INODE:
            return
        parent = self._inodes.directory(directory.parent)
        visits, slot = parent.visits, directory.inode - parent.first
        # Several threads may list at once: then a guess is wrong at worst.
        visits.in_order = visits.in_order + 1 if slot > visits.last_slot else 0
        visits.last_slot = slot
        if visits.in_order < 2 or slot < visits.loaded_slot or parent.is_changing:
            return
        count = min(_FEWEST_AHEAD << min(visits.in_order, 8), _MOST_AHEAD)
        entries = self._inodes.listing(parent).entries(slot, 2 * count)
        following = [(slot, node) for slot, node in entries if node.type == "directory"][:count]
        if following:
            visits.loaded_slot = following[-1][0]
            self._source.preload([node for _, node in following])

    # -- reading -------------------------------------------------------------------------------------

    def open(self, inode: int) -> int:
        """A handle on a file for `read`, which must be given back with `release`."""
        return self._files.open(inode, self._file(inode))

    def read(self, inode: int, handle: int, offset: int, length: int) -> Sequence[Part]:
        """`length` bytes of a file from `offset` in parts, fewer only at its end.

        `handle` is 0 for an engine that opens nothing.
        """
        if handle:
            return self._files.read(handle, offset, length)
        return self._files.read_unopened(inode, self._file(inode), offset, length)

    def inode_of(self, handle: int) -> int:
        """The file that a handle is open on."""
        return self._files.inode_of(handle)

    def release(self, handle: int) -> None:
        """End the use of a handle."""
        self._files.release(handle)

    def backing(self, inode: int) -> PlainFile | None:
        """The whole file in the cache, for the kernel to read by itself; whoever gets it closes it."""
        return self._files.backing(self._file(inode))

    def readlink(self, inode: int) -> bytes:
        """The target of a symbolic link."""
        node = self._node(inode)
        if node.type != "symlink":
            raise Refused(errno.EINVAL)
        return node.target

    def listxattr(self, inode: int) -> list[bytes]:
        """The names of the extended attributes of an inode."""
        return list(self._extended_attributes(inode))

    def getxattr(self, inode: int, name: bytes) -> bytes:
        """The value of an extended attribute."""
        find = self._extended_attributes(inode).get(name) if name.startswith(_ATTRIBUTE_PREFIX) else None
        value = find() if find is not None else None
        if value is None:
            raise Refused(errno.ENODATA)
        return value

    def _extended_attributes(self, inode: int) -> Mapping[bytes, Callable[[], bytes | None]]:
        node = self._node(inode)
        if node.type == "file":
            return {HASH_ATTRIBUTE: lambda: node.hash.hex().encode()} if node.hash else {}
        return self._extended(node) if self._extended is not None else {}

    def _file(self, inode: int) -> Node:
        node = self._node(inode)
        if node.type != "file":
            raise Refused(errno.EISDIR if node.type == "directory" else errno.ELOOP)
        return node

    def _node(self, inode: int) -> Node:
        return self._source.root if inode == ROOT_INODE else self._inodes.locate(inode)[1]


def _attributes(inode: int, node: Node, is_lasting: bool) -> Attributes:
    mode = _TYPE_BITS[node.type] | (node.mode & _PERMISSION_BITS)
    size = len(node.target) if node.type == "symlink" else node.size
    return Attributes(inode, mode, size, node.mtime_ns, is_lasting)
