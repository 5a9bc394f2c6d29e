"""The files of the cache on the disk: made, locked, removed. What they hold is not known here.

A lock (flock) says that a file is in use: exclusive while it is written, shared while a plain file is open.
It belongs to the open file, so that it outlives the descriptor where the kernel goes on using the file, and
ends with the process. Invariant: what is locked by somebody is not removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from typing import Final

#: The unit in which file systems give out room.
BLOCK_BYTES: Final = 4096
FILE_MODE: Final = 0o600

# What flock(2) says when somebody has the lock.
_LOCKED = (errno.EWOULDBLOCK, errno.EACCES)
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def whole_blocks(size: int) -> int:
    """What a file of this length takes of the disk."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def size_of(path: str) -> int:
    """How long a file is; 0 when it is not there."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def make_file(path: str) -> int:
    """A new empty file, open for reading and writing, and locked. Raises `OSError`."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS
    try:
        descriptor = os.open(path, flags, FILE_MODE)
    except FileExistsError:
        # Left by a ledger that lost its last transactions in a power cut.
        os.unlink(path)
        descriptor = os.open(path, flags, FILE_MODE)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        descriptor = os.open(path, flags, FILE_MODE)
    lock(descriptor, fcntl.LOCK_EX)
    return descriptor


def open_file(path: str, access: int) -> int:
    """An existing file, whatever somebody may have put in its place. Raises `OSError`."""
    return os.open(path, access | _FLAGS)


def open_locked(path: str, access: int, kind: int = fcntl.LOCK_EX) -> int | None:
    """An existing file with a lock of this kind; None when it is not there or somebody is in the way."""
    try:
        descriptor = open_file(path, access)
    except OSError:
        return None
    # Between the two calls, somebody may have removed it.
    if lock(descriptor, kind) and os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)
    return None


def lock(descriptor: int, kind: int) -> bool:
    """Lock a file without waiting. On a file system without locks, everybody gets them."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _LOCKED
    return True


def remove(path: str, *, is_for_chunks: bool) -> bool:
    """Remove a file unless it is in use; whether its room is free."""
    try:
        descriptor = open_file(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    except OSError:
        return _remove_other(path)
    try:
        if not lock(descriptor, fcntl.LOCK_EX):
            return False
        os.unlink(path)
        if is_for_chunks:
            _empty(descriptor)
        return True
    except FileNotFoundError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _remove_other(path: str) -> bool:
    """Remove what somebody has put in the place of a file."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def _empty(descriptor: int) -> None:
    """Free the room of a file that others may have open to read chunks: those are missing then."""
    with suppress(OSError):
        writable = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.ftruncate(writable, 0)
        finally:
            os.close(writable)
