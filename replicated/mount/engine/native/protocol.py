"""The FUSE protocol as bytes: requests of the kernel taken apart, and the fixed parts of answers.

The numbers and structures are those of <linux/fuse.h>, version 7.23 and later, in the byte order of the
machine. Pure; it knows neither a device nor a file system. `answers` puts together what describes files.
Invariant: bytes that are no request raise `ProtocolError`, whatever they are.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

MAJOR: Final = 7
#: What we speak. The kernel speaks the lower of its own and this.
MINOR: Final = 40
#: From here on the answer to INIT has the length that we give it (Linux 3.15).
MIN_MINOR: Final = 23

# Operations, in the order of their numbers.
LOOKUP: Final = 1
FORGET: Final = 2
GETATTR: Final = 3
READLINK: Final = 5
OPEN: Final = 14
READ: Final = 15
STATFS: Final = 17
RELEASE: Final = 18
GETXATTR: Final = 22
LISTXATTR: Final = 23
OPENDIR: Final = 27
READDIR: Final = 28
RELEASEDIR: Final = 29
INTERRUPT: Final = 36
DESTROY: Final = 38
BATCH_FORGET: Final = 42
READDIRPLUS: Final = 44

#: What those that can fail are called in the log.
NAMES: Final = {
    LOOKUP: "lookup",
    GETATTR: "getattr",
    READLINK: "readlink",
    OPEN: "open",
    READ: "read",
    STATFS: "statfs",
    RELEASE: "release",
    GETXATTR: "getxattr",
    LISTXATTR: "listxattr",
    OPENDIR: "opendir",
    READDIR: "readdir",
    READDIRPLUS: "readdirplus",
}

# Flags of INIT: what the kernel can do, and of that what we want.
ASYNC_READ: Final = 1 << 0
DO_READDIRPLUS: Final = 1 << 13
PARALLEL_DIROPS: Final = 1 << 18
MAX_PAGES: Final = 1 << 22
CACHE_SYMLINKS: Final = 1 << 23
#: There are 32 more flags in a second word.
INIT_EXT: Final = 1 << 30
PASSTHROUGH: Final = 1 << 37

# Flags of the answer to OPEN and OPENDIR.
OPEN_KEEP_CACHE: Final = 1 << 1
OPEN_CACHE_DIR: Final = 1 << 3
OPEN_NOFLUSH: Final = 1 << 5
OPEN_PASSTHROUGH: Final = 1 << 7

#: Drop what the kernel keeps of an inode. Sent without being asked: `unique` is 0.
NOTIFY_INVAL_INODE: Final = 2

# ioctl numbers of /dev/fuse and what they take: descriptor, flags, padding; backing id.
IOC_BACKING_OPEN: Final = 0x4010E501
IOC_BACKING_CLOSE: Final = 0x4004E502
BACKING_OPEN: Final = struct.Struct("=iIQ")
BACKING_CLOSE: Final = struct.Struct("=I")

#: length, operation, unique, inode, uid, gid, pid, length of extensions, padding.
REQUEST_HEADER: Final = struct.Struct("=IIQQIIIHH")
#: length, minus errno or notification, unique.
ANSWER_HEADER: Final = struct.Struct("=IiQ")

#: handle, offset, size; read flags, owner of locks, flags and padding follow. READDIR has the same.
READ_IN: Final = struct.Struct("=QQI20x")
#: handle; flags and owner of locks follow.
RELEASE_IN: Final = struct.Struct("=Q16x")
#: size, padding; a name follows for GETXATTR.
XATTR_IN: Final = struct.Struct("=I4x")
#: unique of the request that nobody waits for any more.
INTERRUPT_IN: Final = struct.Struct("=Q")
#: major, minor, most bytes to read ahead, flags; flags of the second word come with newer kernels.
INIT_IN: Final = struct.Struct("=IIII")
INIT_IN_FLAGS2: Final = struct.Struct("=I")

#: handle, flags, backing id.
OPEN_OUT: Final = struct.Struct("=QIi")
#: size, padding.
XATTR_OUT: Final = struct.Struct("=I4x")
#: blocks, free, available, files, free, block size, name length, fragment size; the rest is spare.
STATFS_OUT: Final = struct.Struct("=QQQQQIII28x")
#: inode, offset, length.
INVAL_INODE_OUT: Final = struct.Struct("=Qqq")
#: major, minor, most bytes to read ahead, flags, background requests, of these before congestion, most
#: bytes to write, granularity of times in ns, most pages a request, alignment of mappings, flags of the
#: second word, depth of stacked file systems; the rest is spare.
INIT_OUT: Final = struct.Struct("=IIIIHHIIHHII24x")


class ProtocolError(Exception):
    """These bytes are not what the kernel sends."""


class Request(NamedTuple):
    """One request."""

    operation: int
    #: Names the request, also in its answer.
    unique: int
    inode: int
    #: What comes after the header.
    body: bytes
    #: The thread that asks, as the system numbers it; 0 when that cannot be said.
    pid: int = 0


class Greeting(NamedTuple):
    """What the kernel says of itself first of all."""

    major: int
    minor: int
    max_readahead: int
    flags: int


def parse_request(data: memoryview) -> Request:
    """The request in exactly these bytes."""
    if len(data) < REQUEST_HEADER.size:
        raise ProtocolError(f"a request of {len(data)} bytes")
    length, operation, unique, inode, _, _, pid, *_ = REQUEST_HEADER.unpack_from(data)
    if length != len(data):
        raise ProtocolError(f"a request of {len(data)} bytes that says it has {length}")
    return Request(operation, unique, inode, bytes(data[REQUEST_HEADER.size :]), pid)


def parse_greeting(body: bytes) -> Greeting:
    """The body of INIT."""
    major, minor, max_readahead, flags = unpack(INIT_IN, body)
    if flags & INIT_EXT:
        flags |= unpack(INIT_IN_FLAGS2, body, INIT_IN.size)[0] << 32
    return Greeting(major, minor, max_readahead, flags)


def parse_name(body: bytes, offset: int = 0) -> bytes:
    """The name at the end of a body."""
    name, end, rest = body[offset:].partition(b"\0")
    if not name or not end or rest:
        raise ProtocolError(f"a name that does not end: {body[offset:]!r}")
    return name


def unpack(layout: struct.Struct, body: bytes, offset: int = 0) -> tuple[int, ...]:
    """The fields of a structure in a body."""
    try:
        return layout.unpack_from(body, offset)
    except struct.error as error:
        raise ProtocolError(f"a body of {len(body)} bytes: {error}") from None


def pack_greeting(
    greeting: Greeting,
    wanted: int,
    *,
    max_background: int,
    congestion_threshold: int,
    max_write: int,
    max_pages: int,
    stack_depth: int,
) -> tuple[bytes, int]:
    """The answer to INIT, and which of the `wanted` flags the kernel offered and were agreed on."""
    agreed = greeting.flags & (wanted | INIT_EXT)
    answer = INIT_OUT.pack(
        MAJOR,
        MINOR,
        greeting.max_readahead,
        agreed & 0xFFFFFFFF,
        max_background,
        congestion_threshold,
        max_write,
        1,
        max_pages,
        0,
        agreed >> 32,
        stack_depth if agreed & PASSTHROUGH else 0,
    )
    return answer, agreed
