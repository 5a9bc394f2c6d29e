"""How long sequences become trees of nodes, so that a small change rewrites few of them.

Directories and lists of chunks of any length are split into segments, a node each; the nodes of one
level are the items of the next, up to a single root. A segment ends where the hash of an item says so,
hence the same items are cut alike wherever they stand, and an insertion moves no other cut. Reading
accepts any segmentation: only deduplication depends on this one. No I/O here; the caller stores nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Generic, Protocol, TypeVar

#: A sequence no longer than this (and no larger than MAX_SEGMENT_BYTES) is one node.
MAX_UNSPLIT_ITEMS: Final = 512
#: No segment is shorter (but the last), so every level is at most a sixteenth of the one below it.
MIN_ITEMS: Final = 16
#: A segment is ended after so many items, whatever their hashes.
MAX_ITEMS: Final = 2048
#: And after so many bytes: entries with long names and link targets get there first.
MAX_SEGMENT_BYTES: Final = 1 << 20
#: Levels above the lowest; 16**9 items are more than any repository holds.
MAX_LEVEL: Final = 8


class Segmentable(Protocol):
    """An item that knows whether a segment ends after it."""

    @property
    def digest(self) -> bytes:
        """Evenly distributed bytes, such as a hash: on level L, byte L being zero ends a segment."""
        ...

    @property
    def size_bytes(self) -> int:
        """What the item adds to the size of its node."""
        ...


Item = TypeVar("Item", bound=Segmentable)


class NodeTree(Generic[Item]):
    """Builds the nodes over a sequence that is added item by item; holds few items at a time.

    `write_node(level, items)` stores a node and gives the item that stands for it one level above.
    """

    def __init__(self, write_node: Callable[[int, Sequence[Item]], Item]) -> None:
        self._write_node = write_node
        self._levels: list[_Level[Item]] = [_Level()]

    def add(self, item: Item) -> None:
        """Add the next item of the sequence."""
        self._add(0, item)

    def finish(self) -> Item:
        """Write what is left; the item that stands for the root node. Call once."""
        level = 0
        while True:
            current = self._levels[level]
            is_top = current.written_nodes == 0
            if is_top and level > 0 and len(current.items) == 1:
                return current.items[0]
            if is_top:
                return self._write_node(level, current.items)
            if current.items:
                self._add(level + 1, self._write_node(level, current.items))
            level += 1

    def _add(self, level: int, item: Item) -> None:
        if level == len(self._levels):
            self._levels.append(_Level())
        current = self._levels[level]
        current.add(item)
        if current.is_split:
            self._cut(level, current)
        elif len(current.items) > MAX_UNSPLIT_ITEMS or current.size_bytes > MAX_SEGMENT_BYTES:
            # It is a long one after all: cut what was held back as if it had been added just now.
            current.is_split = True
            for held in current.take():
                current.add(held)
                self._cut(level, current)

    def _cut(self, level: int, current: _Level[Item]) -> None:
        """Write the segment if it ends with the item added last."""
        is_boundary = len(current.items) >= MIN_ITEMS and current.items[-1].digest[level] == 0
        if is_boundary or len(current.items) >= MAX_ITEMS or current.size_bytes >= MAX_SEGMENT_BYTES:
            current.written_nodes += 1
            self._add(level + 1, self._write_node(level, current.take()))


class _Level(Generic[Item]):
    """The items of one level that are not in a node yet."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.size_bytes = 0
        self.written_nodes = 0
        self.is_split = False

    def add(self, item: Item) -> None:
        self.items.append(item)
        self.size_bytes += item.size_bytes

    def take(self) -> list[Item]:
        taken, self.items, self.size_bytes = self.items, [], 0
        return taken
