"""Answers that describe files: attributes, entries, listings, the file system as a whole.

Pure: they turn what `filesystem` says into the structures of <linux/fuse.h>. One `Answers` serves all
threads. A listing is packed in one go, since `find` over many files is bound by it.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from typing import Final

from replicated.mount.engine.native import protocol
from replicated.mount.filesystem import BLOCK_SIZE, LINK_COUNT, NAME_MAX, Attributes, Usage

#: For how long the kernel may keep what never changes: a day, then it asks again.
LASTING_S: Final = 86400
#: And what may change: new entries show within a second.
PASSING_S: Final = 1

# inode, size, blocks; seconds of access, modification and change, which may be before 1970; their
# nanoseconds, mode, links, uid, gid, device, block size, flags.
_ATTRIBUTES = "QQQqqqIIIIIIIIII"
# inode, generation, seconds that name and attributes are good for, and their nanoseconds.
_ENTRY = "QQQQII"
# inode, offset of the next entry, length of the name, type.
_NAMED = "QQII"

_ATTRIBUTES_OUT = struct.Struct("=QII" + _ATTRIBUTES)
_ENTRY_OUT = struct.Struct("=" + _ENTRY + _ATTRIBUTES)


class Answers:
    """Packs answers about files that belong to one user."""

    def __init__(self, uid: int, gid: int) -> None:
        self._uid = uid
        self._gid = gid
        #: How often the kernel was told to forget an inode for good; those that are not here, never.
        self.generations: dict[int, int] = {}

    def attributes(self, attributes: Attributes) -> bytes:
        """The answer to GETATTR."""
        seconds = LASTING_S if attributes.is_lasting else PASSING_S
        return _ATTRIBUTES_OUT.pack(seconds, 0, 0, *self._fields(attributes))

    def entry(self, attributes: Attributes) -> bytes:
        """The answer to LOOKUP."""
        inode = attributes.inode
        seconds = LASTING_S if attributes.is_lasting else PASSING_S
        generation = self.generations.get(inode, 0)
        return _ENTRY_OUT.pack(inode, generation, seconds, seconds, 0, 0, *self._fields(attributes))

    def listing(self, entries: Iterable[tuple[bytes, Attributes, int]], room: int) -> tuple[bytes, bool]:
        """As many entries as fit into `room` bytes with their attributes, and whether that was all."""
        packed: list[bytes] = []
        uid, gid, generations = self._uid, self._gid, self.generations
        for name, (inode, mode, size, mtime_ns, is_lasting), following in entries:
            layout = _named_entry(len(name))
            room -= layout.size
            if room < 0:
                return b"".join(packed), False
            seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
            valid = LASTING_S if is_lasting else PASSING_S
            packed.append(
                layout.pack(
                    # The kernel knows these two by themselves, and must not count them.
                    0 if name in (b".", b"..") else inode,
                    generations.get(inode, 0) if generations else 0,
                    valid,
                    valid,
                    0,
                    0,
                    inode,
                    size,
                    (size + 511) >> 9,
                    seconds,
                    seconds,
                    seconds,
                    nanoseconds,
                    nanoseconds,
                    nanoseconds,
                    mode,
                    LINK_COUNT,
                    uid,
                    gid,
                    0,
                    BLOCK_SIZE,
                    0,
                    inode,
                    following,
                    len(name),
                    mode >> 12,
                    name,
                )
            )
        return b"".join(packed), True

    def plain_listing(
        self, entries: Iterable[tuple[bytes, Attributes, int]], room: int
    ) -> tuple[bytes, bool]:
        """As `listing`, without attributes."""
        packed: list[bytes] = []
        for name, attributes, following in entries:
            layout = _named(len(name))
            room -= layout.size
            if room < 0:
                return b"".join(packed), False
            packed.append(layout.pack(attributes.inode, following, len(name), attributes.mode >> 12, name))
        return b"".join(packed), True

    def _fields(self, attributes: Attributes) -> tuple[int, ...]:
        """What `_ATTRIBUTES` holds; the time of modification stands for all three times."""
        inode, mode, size, mtime_ns, _ = attributes
        seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
        return (
            inode,
            size,
            attributes.blocks,
            seconds,
            seconds,
            seconds,
            nanoseconds,
            nanoseconds,
            nanoseconds,
            mode,
            LINK_COUNT,
            self._uid,
            self._gid,
            0,
            BLOCK_SIZE,
            0,
        )


def absent_entry() -> bytes:
    """The answer to LOOKUP that lets the kernel remember that there is no such entry."""
    return _ENTRY_OUT.pack(0, 0, LASTING_S, *([0] * 19))


def usage(usage: Usage) -> bytes:
    """The answer to STATFS."""
    blocks = -(-usage.size_bytes // BLOCK_SIZE)
    return protocol.STATFS_OUT.pack(blocks, 0, 0, usage.entries, 0, BLOCK_SIZE, NAME_MAX, BLOCK_SIZE)


@functools.lru_cache(maxsize=NAME_MAX + 1)
def _named_entry(length: int) -> struct.Struct:
    """An entry of READDIRPLUS with a name of `length` bytes, filled up to a multiple of eight."""
    return struct.Struct(f"={_ENTRY}{_ATTRIBUTES}{_NAMED}{-(-length // 8) * 8}s")


@functools.lru_cache(maxsize=NAME_MAX + 1)
def _named(length: int) -> struct.Struct:
    """An entry of READDIR."""
    return struct.Struct(f"={_NAMED}{-(-length // 8) * 8}s")
