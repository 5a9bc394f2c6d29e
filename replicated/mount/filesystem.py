"""A snapshot as inodes: the plain, read-only operations that every mount engine calls.

It knows files, directories and symbolic links, but neither FUSE nor a repository: what it serves comes
from a `Source`, which is a `Tree`, or a view that grafts trees into directories of its own. Every
operation is thread-safe and either gives exactly what was saved or raises; `errno_for` is the one place
that turns what was raised into an errno.

Invariants: a number stands for the same object as long as the file system lives, and what is kept in
memory grows with the number of directories visited, not with the number of files.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from replicate.errors import RepositoryDamaged

if TYPE_CHECKING:
    from replicated.tree import Node

_LOG = logging.getLogger(__name__)

ROOT_INODE = 1
BLOCK_SIZE = 4096
NAME_MAX = 255
#: Name of the extended attribute of a file that holds its BLAKE3 hash in hexadecimal.
HASH_ATTRIBUTE = b"user.replicate.hash"

#: Directories are shown with one link, as Btrfs does: tools take that as "number of subdirectories not
#: known". The true number would cost a look into every subdirectory for each `stat`.
LINK_COUNT = 1

#: Entries of directory listings kept in memory, over all directories; about 50 MB at the very most.
_LISTED_ENTRIES_KEPT = 1 << 17
#: Numbers set aside for a directory whose listing can change.
_CHANGING_RANGE = 1 << 32

_TYPE_BITS = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "symlink": stat.S_IFLNK}
_PERMISSION_BITS = 0o777


class Reader(Protocol):
    """Reads one file; may be used from several threads."""

    def pread(self, offset: int, length: int) -> bytes:
        """The bytes from `offset`, fewer than `length` only at the end of the file."""
        ...


class Source(Protocol):
    """What a file system serves. Its methods may be called from many threads at once."""

    @property
    def root(self) -> Node:
        """The directory at the top."""
        ...

    def children(self, node: Node) -> Mapping[bytes, Node]:
        """The entries of a directory by name, sorted by name."""
        ...

    def reader(self, node: Node) -> Reader:
        """Something that reads the bytes of a file and verifies them."""
        ...


class Refused(Exception):
    """The operation cannot be done, for the reason that `errno` names."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


def errno_for(error: BaseException, operation: str) -> int:
    """The errno that a caller of `operation` is given for `error`.

    Only a `Refused` says more than EIO. In particular an `OSError` from the store does not come
    through: ENOENT for a missing pack would read as "no such file".
    """
    if isinstance(error, Refused):
        return error.errno
    _LOG.error("%s failed: %s", operation, error, exc_info=_unless_expected(error))
    return errno.EIO


def _unless_expected(error: BaseException) -> BaseException | None:
    return None if isinstance(error, RepositoryDamaged) else error


class Attributes(NamedTuple):
    """What `stat` shows of one object, apart from what is the same for all of them."""

    inode: int
    #: Type and permission bits.
    mode: int
    size: int
    mtime_ns: int

    @property
    def blocks(self) -> int:
        """Size in units of 512 bytes, as `st_blocks` counts."""
        return (self.size + 511) // 512


class Usage(NamedTuple):
    """What `statfs` shows: how much the file system holds. There is never anything free."""

    size_bytes: int = 0
    entries: int = 0


class _Listing(NamedTuple):
    """The entries of a directory; the position in `names` is the entry's slot."""

    names: Sequence[bytes]
    nodes: Mapping[bytes, Node]


class _Directory:
    """A directory that was visited, and the numbers of what is in it: `first` plus the slot.

    `seen` is there for a directory that can change: the slot of each (name, hash) that it ever had,
    so that what replaces an entry under the same name is another object. `listing` is its last one.
    """

    __slots__ = ("first", "inode", "listing", "node", "parent", "seen")

    def __init__(self, inode: int, parent: int, node: Node, changing: bool) -> None:
        self.inode = inode
        self.parent = parent
        self.node = node
        self.first = 0
        self.seen: dict[tuple[bytes, bytes], int] | None = {} if changing else None
        self.listing: _Listing | None = None


class _OpenFile(NamedTuple):
    inode: int
    size: int
    reader: Reader


class Filesystem:
    """The read-only file system of a source.

    `changing` tells which directories of the source can have other entries later; the default, that of
    a snapshot, is none. Then everything that an engine was given may be cached for ever. Objects belong
    to the user who mounts.
    """

    def __init__(
        self,
        source: Source,
        *,
        usage: Usage | None = None,
        changing: Callable[[Node], bool] | None = None,
    ) -> None:
        self.uid = os.getuid()
        self.gid = os.getgid()
        self.usage = usage or Usage()
        self.is_immutable = changing is None
        self._changing = changing or (lambda node: False)
        self._source = source
        # Guards the numbering and the kept listings; never held while the source is asked.
        self._lock = threading.Lock()
        root = _Directory(ROOT_INODE, ROOT_INODE, source.root, self._changing(source.root))
        self._directories: dict[int, _Directory] = {ROOT_INODE: root}
        # The directories that have numbers to give, ordered by their first number.
        self._firsts: list[int] = []
        self._owners: list[_Directory] = []
        self._next_inode = ROOT_INODE + 1
        self._kept: OrderedDict[int, _Listing] = OrderedDict()
        self._kept_entries = 0
        self._open_files: dict[int, _OpenFile] = {}
        self._handles = itertools.count(1)

    # -- finding -------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Attributes:
        """The entry `name` of the directory `parent`."""
        directory = self._directory(parent)
        listing = self._listing(directory)
        node = listing.nodes.get(name)
        if node is None:
            raise Refused(errno.ENOENT)
        return _attributes(directory.first + _slot(directory, listing, node), node)

    def resolve(self, path: bytes) -> int:
        """The inode at an absolute path, for engines that are given paths; no link is followed."""
        inode = ROOT_INODE
        for name in path.split(b"/"):
            if name:
                inode = self.lookup(inode, name).inode
        return inode

    def getattr(self, inode: int) -> Attributes:
        """The attributes of an inode."""
        return _attributes(inode, self._node(inode))

    def readdir(self, inode: int, offset: int = 0) -> Iterator[tuple[bytes, Attributes, int]]:
        """The entries of a directory from `offset` on, `.` and `..` first: name, attributes, next offset.

        An offset is 0 or one that came with an entry, and stays good while the directory changes.
        """
        directory = self._directory(inode)
        if offset < 1:
            yield b".", _attributes(inode, directory.node), 1
        if offset < 2:
            parent = self._directory(directory.parent)
            yield b"..", _attributes(parent.inode, parent.node), 2
        listing = self._listing(directory)
        for slot in range(max(offset - 2, 0), len(listing.names)):
            name = listing.names[slot]
            node = listing.nodes.get(name)
            if node is not None and _slot(directory, listing, node, slot) == slot:
                yield name, _attributes(directory.first + slot, node), slot + 3

    # -- reading -------------------------------------------------------------------------------------

    def open(self, inode: int) -> int:
        """A handle on a file for `read`, which must be given back with `release`."""
        node = self._node(inode)
        if node.type != "file":
            raise Refused(errno.EISDIR if node.type == "directory" else errno.ELOOP)
        handle = next(self._handles)
        self._open_files[handle] = _OpenFile(inode, node.size, self._source.reader(node))
        return handle

    def read(self, handle: int, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, fewer only at the end of the file."""
        file = self._open_file(handle)
        wanted = min(length, file.size - offset)
        if wanted <= 0:
            return b""
        data = file.reader.pread(offset, wanted)
        if len(data) != wanted:
            raise RepositoryDamaged(f"{wanted} bytes expected at offset {offset}, got {len(data)}")
        return data

    def inode_of(self, handle: int) -> int:
        """The file that a handle is open on."""
        return self._open_file(handle).inode

    def release(self, handle: int) -> None:
        """End the use of a handle."""
        self._open_files.pop(handle, None)

    def readlink(self, inode: int) -> bytes:
        """The target of a symbolic link."""
        node = self._node(inode)
        if node.type != "symlink":
            raise Refused(errno.EINVAL)
        return node.target

    def listxattr(self, inode: int) -> list[bytes]:
        """The names of the extended attributes of an inode."""
        node = self._node(inode)
        return [HASH_ATTRIBUTE] if node.type == "file" and node.hash else []

    def getxattr(self, inode: int, name: bytes) -> bytes:
        """The value of an extended attribute."""
        if name != HASH_ATTRIBUTE or not self.listxattr(inode):
            raise Refused(errno.ENODATA)
        return self._node(inode).hash.hex().encode()

    # -- numbering -----------------------------------------------------------------------------------

    def _node(self, inode: int) -> Node:
        if inode == ROOT_INODE:
            return self._directories[ROOT_INODE].node
        return self._locate(inode)[1]

    def _locate(self, inode: int) -> tuple[_Directory, Node]:
        """The directory that holds an inode, and its node."""
        with self._lock:
            position = bisect_right(self._firsts, inode) - 1
        if position < 0:
            raise Refused(errno.ESTALE)
        parent = self._owners[position]
        listing = self._listing(parent)
        slot = inode - parent.first
        node = listing.nodes.get(listing.names[slot]) if slot < len(listing.names) else None
        if node is None or _slot(parent, listing, node, slot) != slot:
            raise Refused(errno.ESTALE)
        return parent, node

    def _directory(self, inode: int) -> _Directory:
        known = self._directories.get(inode)
        if known is not None:
            return known
        parent, node = self._locate(inode)
        if node.type != "directory":
            raise Refused(errno.ENOTDIR)
        directory = _Directory(inode, parent.inode, node, self._changing(node))
        # Two threads may come here at once: the first entry stays, so that numbers are given once.
        return self._directories.setdefault(inode, directory)

    def _listing(self, directory: _Directory) -> _Listing:
        """The entries of a directory; afterwards its entries have numbers."""
        if directory.seen is not None:
            return self._changing_listing(directory, directory.seen)
        with self._lock:
            kept = self._kept.get(directory.inode)
            if kept is not None:
                self._kept.move_to_end(directory.inode)
                return kept
        nodes = self._source.children(directory.node)
        listing = _Listing(tuple(nodes), nodes)
        with self._lock:
            self._number(directory, len(listing.names))
            if directory.inode not in self._kept:
                self._kept[directory.inode] = listing
                self._kept_entries += len(listing.names)
            while self._kept_entries > _LISTED_ENTRIES_KEPT and len(self._kept) > 1:
                _, dropped = self._kept.popitem(last=False)
                self._kept_entries -= len(dropped.names)
        return listing

    def _changing_listing(self, directory: _Directory, seen: dict[tuple[bytes, bytes], int]) -> _Listing:
        nodes = self._source.children(directory.node)
        with self._lock:
            if directory.listing is None or directory.listing.nodes is not nodes:
                self._number(directory, _CHANGING_RANGE)
                for name, node in nodes.items():
                    seen.setdefault((name, node.hash), len(seen))
                directory.listing = _Listing([name for name, _ in seen], nodes)
            return directory.listing

    def _number(self, directory: _Directory, count: int) -> None:
        """Set `count` numbers aside for the entries of a directory, once; the lock is held."""
        if directory.first or not count:
            return
        directory.first = self._next_inode
        self._next_inode += count
        self._owners.append(directory)
        self._firsts.append(directory.first)

    def _open_file(self, handle: int) -> _OpenFile:
        try:
            return self._open_files[handle]
        except KeyError:
            raise Refused(errno.EBADF) from None


def _slot(directory: _Directory, listing: _Listing, node: Node, expected: int = 0) -> int:
    """The slot of an entry of a listing; in a snapshot, `expected` is right when it names the node."""
    if directory.seen is not None:
        return directory.seen[node.name, node.hash]
    if listing.names[expected] == node.name:
        return expected
    return bisect_left(listing.names, node.name)


def _attributes(inode: int, node: Node) -> Attributes:
    mode = _TYPE_BITS[node.type] | (node.mode & _PERMISSION_BITS)
    size = len(node.target) if node.type == "symlink" else node.size
    return Attributes(inode, mode, size, node.mtime_ns)
