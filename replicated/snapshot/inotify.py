"""The kernel's inotify by its system calls: one instance, its watches and its queue.

Knows nothing of trees; used by `watch`. Invariant: what was queued when `read` is called is returned by
that call. The kernel queues an event before the system call that caused it returns, so a reader that has
read misses nothing that somebody else has finished.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import termios
from collections.abc import Iterator
from typing import Final

# From linux/inotify.h.
MODIFY: Final = 0x00000002
ATTRIB: Final = 0x00000004
CLOSE_WRITE: Final = 0x00000008
MOVED_FROM: Final = 0x00000040
MOVED_TO: Final = 0x00000080
CREATE: Final = 0x00000100
DELETE: Final = 0x00000200
DELETE_SELF: Final = 0x00000400
MOVE_SELF: Final = 0x00000800
UNMOUNT: Final = 0x00002000
Q_OVERFLOW: Final = 0x00004000
IGNORED: Final = 0x00008000
ONLYDIR: Final = 0x01000000
DONT_FOLLOW: Final = 0x02000000
ISDIR: Final = 0x40000000

#: Whatever changes the listing of a directory, and nothing that comes from reading it. Without
#: IN_EXCL_UNLINK: a file that was made under another name, linked to its own and unlinked from the other
#: is still written through the name that is gone.
# CLOSE_WRITE tells of what was stored through a mapping, or asynchronously, by whoever has closed it since.
_OF_FILES: Final = MODIFY | ATTRIB | CLOSE_WRITE
_CHANGES: Final = _OF_FILES | MOVED_FROM | MOVED_TO | CREATE | DELETE | DELETE_SELF | MOVE_SELF

_NONBLOCK: Final = os.O_NONBLOCK
_CLOEXEC: Final = os.O_CLOEXEC
_READ_BYTES: Final = 1 << 16
#: wd, mask, cookie, length of the name that follows.
_EVENT: Final = struct.Struct("iIII")
_COUNT: Final = struct.Struct("i")

_libc = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """One inotify instance. Not for several threads at once; raises `OSError` as the kernel says."""

    def __init__(self) -> None:
        self.descriptor = _check(_libc.inotify_init1(ctypes.c_int(_NONBLOCK | _CLOEXEC)))

    def close(self) -> None:
        """End all watches; takes as long as there are many."""
        os.close(self.descriptor)

    def add(self, path: bytes) -> int:
        """Watch the directory at `path`, not one that a link there leads to; the number of the watch.

        The same number as before when that directory is watched already, under whatever name.
        """
        mask = _CHANGES | ONLYDIR | DONT_FOLLOW
        descriptor = ctypes.c_int(self.descriptor)
        return _check(_libc.inotify_add_watch(descriptor, ctypes.c_char_p(path), ctypes.c_uint32(mask)), path)

    def remove(self, watch: int) -> None:
        """End a watch; no error when it has ended by itself. Events may follow for a while."""
        _libc.inotify_rm_watch(ctypes.c_int(self.descriptor), ctypes.c_int(watch))

    def read(self) -> Iterator[tuple[int, int, bytes]]:
        """What is queued now, each the number of a watch, a mask, and the name of an entry, or none.

        Names are those of directories only. What is queued meanwhile may be left for the next time.
        """
        answer = bytearray(_COUNT.size)
        fcntl.ioctl(self.descriptor, termios.FIONREAD, answer)
        (remaining,) = _COUNT.unpack(answer)
        while remaining > 0:
            data = os.read(self.descriptor, _READ_BYTES)
            remaining -= len(data)
            position = 0
            while position < len(data):
                watch, mask, _, length = _EVENT.unpack_from(data, position)
                end = position + _EVENT.size + length
                # Most are of files, by the thousand.
                yield watch, mask, data[end - length : end].rstrip(b"\0") if mask & ISDIR else b""
                position = end


def _check(result: int, path: bytes | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result
