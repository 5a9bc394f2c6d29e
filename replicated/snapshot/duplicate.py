"""Duplicate an open file: at once where blocks can be shared, else by copying. Holes stay holes.

Called by `freeze`, `held` and `recovery`; knows nothing of leases and spools.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from typing import Final

from replicated.snapshot.holes import DataMap

#: ioctl of linux/fs.h
_FICLONE: Final = 0x40049409
#: Between two looks at whether to go on; at most a second on the slowest of disks.
_STEP_BYTES: Final = 64 << 20
_COMPARE_BYTES: Final = 1 << 20
#: Flag of fallocate(2): the size of the file stays.
_KEEP_SIZE: Final = 1
#: The kernel will not copy within itself between these two files.
_CANNOT_COPY: Final = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM})

_libc = ctypes.CDLL(None, use_errno=True)


def reflink(source: int, destination: int) -> bool:
    """Make the destination share all blocks of the source; False where that cannot be.

    Data of the source that is not on its disk yet is written first. Raises OSError when the disk is full.
    """
    try:
        fcntl.ioctl(destination, _FICLONE, source)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    return True


def wait_for_write(source: int) -> None:
    """Wait for the end of a `write` that is going on, if one is.

    Its time was set when it began, so half of it would else be taken for a file that nobody changes.
    """
    try:
        # Takes the lock that a write holds (ext4, btrfs, tmpfs); on XFS every read takes it.
        os.lseek(source, 0, os.SEEK_DATA)
    except OSError:
        pass  # nothing but a hole, or a file system that knows of none


def is_prefix(duplicated: int, source: int) -> bool:
    """Whether the source still begins with what was copied of it: then that was its content at one moment.

    Two readings in a row that find the same leave a moment between them at which all of it was so. This
    is how a log that somebody appends to all the time can be taken.
    """
    size = os.fstat(duplicated).st_size
    if os.fstat(source).st_size < size:
        return False
    wait_for_write(source)
    maps = DataMap(duplicated), DataMap(source)
    position = 0
    while (position := min(data.find(position, size)[0] for data in maps)) < size:
        mine = os.pread(duplicated, min(_COMPARE_BYTES, size - position), position)
        if not mine or os.pread(source, len(mine), position) != mine:
            return False
        position += len(mine)
    # Nothing is read of holes, also where it has become shorter.
    return os.fstat(source).st_size >= size


def copy(source: int, destination: int, size: int, go_on: Callable[[], None]) -> None:
    """Copy the first `size` bytes; `go_on` is called between steps and may raise to end it.

    Raises OSError, at once when it can be seen that there is not enough space, or when the source has
    become shorter.
    """
    _check_space(source, destination)
    os.ftruncate(destination, size)
    wait_for_write(source)
    for start, end in DataMap(source).ranges(size):
        _reserve(destination, start, end - start)
        position = start
        while position < end:
            go_on()
            position += _copy_some(source, destination, position, min(end - position, _STEP_BYTES))


def _copy_some(source: int, destination: int, start: int, count: int) -> int:
    try:
        copied = os.copy_file_range(source, destination, count, start, start)
    except OSError as error:
        if error.errno not in _CANNOT_COPY:
            raise
        os.lseek(destination, start, os.SEEK_SET)
        copied = os.sendfile(destination, source, start, count)
    if copied == 0:
        raise OSError(errno.EIO, "the file became shorter while it was copied")
    return copied


def _reserve(destination: int, start: int, count: int) -> None:
    """Reserve room on the disk: copying into reserved blocks of ext4 takes a quarter less time.

    Not `os.posix_fallocate`, which writes to every block of a file system that cannot reserve.
    """
    arguments = (
        ctypes.c_int(destination),
        ctypes.c_int(_KEEP_SIZE),
        ctypes.c_int64(start),
        ctypes.c_int64(count),
    )
    if _libc.fallocate(*arguments) != 0 and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _check_space(source: int, destination: int) -> None:
    there = os.fstatvfs(destination)
    if there.f_blocks and os.fstat(source).st_blocks * 512 > there.f_bavail * there.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
