"""Inode numbers: which number stands for which entry of which directory of a source.

Used by `filesystem`, which gives the attributes. The entries of a directory get consecutive numbers, by
slot, when it is first asked for; no list of them is kept, because the number leads to the directory and the
slot. Thread-safe. Invariants: a number stands for the same object as long as the mount lives; and what is
kept in memory is some bytes for each directory that was visited, and a bounded number of listings.
"""

from __future__ import annotations

import errno
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from blake3 import blake3

from replicate.errors import RepositoryDamaged
from replicated.mount.errors import Refused

if TYPE_CHECKING:
    from replicated.directories import Listing, Node

ROOT_INODE: Final = 1

#: Directories that are at hand; others are found again through those that hold them.
_RECENT_DIRECTORIES: Final = 2048
#: Numbers set aside for a directory whose entries can change.
_CHANGING_RANGE: Final = 1 << 32
#: Nobody has so many files in a directory, but somebody may have written that there are: then the others
#: still have numbers.
_MAX_ENTRIES: Final = 1 << 40
_MAX_INODE: Final = 1 << 63
#: Of what a changing directory ever held, this much is remembered of each entry.
_KEY_BYTES: Final = 16
_BATCH: Final = 512


class Listed(Protocol):
    """What has directories."""

    @property
    def root(self) -> Node:
        """The directory at the top."""
        ...

    def listing(self, node: Node) -> Listing:
        """What a directory holds; of one that can change the same object until it has changed."""
        ...


class Directory:
    """A directory at hand. Its entries have the numbers `first` plus their slots once it was listed."""

    __slots__ = ("first", "inode", "is_changing", "node", "numbered", "parent", "shown", "visits")

    def __init__(self, inode: int, parent: int, node: Node, first: int, *, is_changing: bool) -> None:
        self.inode = inode
        #: The inode of the directory that holds it; of the root itself.
        self.parent = parent
        self.node = node
        self.first = first
        self.is_changing = is_changing
        #: The listing that the source gave last, and as it is numbered.
        self.shown: Listing | None = None
        self.numbered: Listing | None = None
        #: How the directories in it are gone through; belongs to `filesystem`.
        self.visits = Visits()


class Visits:
    """In which order the directories within one are listed, to know which comes next."""

    __slots__ = ("in_order", "last_slot", "loaded_slot")

    def __init__(self) -> None:
        self.last_slot = -1
        #: How many were listed in the order of their slots until now.
        self.in_order = 0
        #: Up to here they were loaded in advance.
        self.loaded_slot = -1


class Inodes:
    """The numbers of one mount. `changing` tells which directories can have other entries later."""

    def __init__(self, source: Listed, changing: Callable[[Node], bool]) -> None:
        self._source = source
        self._changing = changing
        # Guards all below; never held while the source is asked.
        self._lock = threading.Lock()
        root = Directory(ROOT_INODE, ROOT_INODE, source.root, 0, is_changing=changing(source.root))
        self._root = root
        self._recent: OrderedDict[int, Directory] = OrderedDict()
        # The first numbers that were set aside, in order, and for which directories; and the other way round.
        self._firsts = array("Q")
        self._owners = array("Q")
        self._first_of: dict[int, int] = {}
        self._next = ROOT_INODE + 1
        #: For each directory that can change, a key of each entry that it ever had, in the order of slots.
        self._keys: dict[int, bytearray] = {}

    def directory(self, inode: int) -> Directory:
        """The directory of this number; refuses what is none, or is no more."""
        # Not recursive: a tree may be deeper than Python's stack.
        wanted: list[int] = []
        while (known := self._recall(inode)) is None:
            wanted.append(inode)
            inode = self._owner(inode)
        while wanted:
            inode = wanted.pop()
            node = self._entry(known, inode)
            if node.type != "directory":
                raise Refused(errno.ENOTDIR)
            known = self._keep(Directory(inode, known.inode, node, 0, is_changing=self._changing(node)))
        return known

    def locate(self, inode: int) -> tuple[Directory, Node]:
        """The directory that holds an inode other than the root, and its node."""
        directory = self.directory(self._owner(inode))
        return directory, self._entry(directory, inode)

    def listing(self, directory: Directory) -> Listing:
        """What a directory holds; afterwards its entries have numbers."""
        if directory.numbered is not None and not directory.is_changing:
            return directory.numbered
        shown = self._source.listing(directory.node)
        with self._lock:
            if directory.numbered is None or directory.shown is not shown:
                self._number(directory, _CHANGING_RANGE if directory.is_changing else len(shown))
                directory.numbered = self._fix_slots(directory, shown) if directory.is_changing else shown
                directory.shown = shown
            return directory.numbered

    def _entry(self, directory: Directory, inode: int) -> Node:
        node = self.listing(directory).at(inode - directory.first)
        if node is None:
            raise Refused(errno.ESTALE)
        return node

    def _owner(self, inode: int) -> int:
        """The directory that gave a number."""
        with self._lock:
            position = bisect_right(self._firsts, inode) - 1
            if position < 0 or inode >= self._next:
                raise Refused(errno.ESTALE)
            return self._owners[position]

    def _recall(self, inode: int) -> Directory | None:
        if inode == ROOT_INODE:
            return self._root
        with self._lock:
            known = self._recent.get(inode)
            if known is not None:
                self._recent.move_to_end(inode)
            return known

    def _keep(self, directory: Directory) -> Directory:
        with self._lock:
            # Another thread may have come here at the same time.
            kept = self._recent.setdefault(directory.inode, directory)
            kept.first = self._first_of.get(directory.inode, 0)
            while len(self._recent) > _RECENT_DIRECTORIES:
                self._recent.popitem(last=False)
            return kept

    def _number(self, directory: Directory, count: int) -> None:
        """Set numbers aside for the entries of a directory, once; the lock is held."""
        directory.first = self._first_of.get(directory.inode, 0)
        if directory.first:
            had = self._count_from(directory.first)
            if count != had:
                # More would have the numbers of another directory.
                raise RepositoryDamaged(f"a directory of another length than before: {count}, not {had}")
            return
        if count > _MAX_ENTRIES or self._next + count > _MAX_INODE:
            raise RepositoryDamaged(f"a directory of an impossible length: {count} entries")
        if not count:
            return
        directory.first = self._next
        self._next += count
        self._firsts.append(directory.first)
        self._owners.append(directory.inode)
        self._first_of[directory.inode] = directory.first

    def _count_from(self, first: int) -> int:
        """How many numbers were set aside for the directory whose first this is; the lock is held."""
        after = bisect_right(self._firsts, first)
        return (self._firsts[after] if after < len(self._firsts) else self._next) - first

    def _fix_slots(self, directory: Directory, shown: Listing) -> Listing:
        """A listing in which what was there before has the slot that it had; the lock is held."""
        return _FixedSlots(shown, self._keys.setdefault(directory.inode, bytearray()))


class _FixedSlots:
    """A listing of a directory that can change, which is all in memory.

    What replaces an entry under the same name is another object, and has another slot, if its bytes, or the
    content of a directory, differ.
    """

    def __init__(self, shown: Listing, keys: bytearray) -> None:
        known = {
            bytes(keys[start : start + _KEY_BYTES]): start // _KEY_BYTES
            for start in range(0, len(keys), _KEY_BYTES)
        }
        nodes: dict[int, Node] = {}
        start = 0
        while entries := shown.entries(start, _BATCH):
            start = entries[-1][0] + 1
            for _, node in entries:
                key = blake3(node.name + b"\0" + _identity(node)).digest(_KEY_BYTES)
                slot = known.setdefault(key, len(known))
                if len(known) * _KEY_BYTES > len(keys):
                    keys += key
                nodes[slot] = node
        self._slots = sorted(nodes)
        self._nodes = [nodes[slot] for slot in self._slots]
        self._places = {node.name: place for place, node in enumerate(self._nodes)}

    def __len__(self) -> int:
        return self._slots[-1] + 1 if self._slots else 0

    def find(self, name: bytes) -> tuple[int, Node] | None:
        place = self._places.get(name)
        return None if place is None else (self._slots[place], self._nodes[place])

    def at(self, slot: int) -> Node | None:
        place = bisect_left(self._slots, slot)
        is_there = place < len(self._slots) and self._slots[place] == slot
        return self._nodes[place] if is_there else None

    def entries(self, start: int, limit: int) -> Sequence[tuple[int, Node]]:
        place = bisect_left(self._slots, start)
        chosen = slice(place, place + limit)
        return list(zip(self._slots[chosen], self._nodes[chosen], strict=True))


def _identity(node: Node) -> bytes:
    """What tells a node from others of the same name."""
    if node.type == "directory":
        return hash(node.content).to_bytes(8, "little", signed=True)
    return node.hash
