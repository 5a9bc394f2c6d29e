"""Reads files of a mount as everybody does, in a program of its own, so that the kernel has them afterwards.

The process that serves a mount must never wait for that mount: killed while it does, it could not end,
because what it waits for is itself, and the kernel would keep the mount for ever with readers that hang. So
`read_through` starts this file as a program, which needs nothing but the standard library.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import IO, Final

_BUFFER_BYTES: Final = 1 << 20
_POLL_S: Final = 0.2
#: Of a range: its offset, its length, and that of the path, which follows.
_RANGE: Final = struct.Struct("<QQI")


def read_through(
    directory: bytes, ranges: Iterable[tuple[bytes, int, int]], check: Callable[[], None]
) -> None:
    """Read ranges of files below a mounted directory: (path, offset, length).

    Raises `OSError` for the first that cannot be read, and what `check` raises, which is called now and then.
    """
    wanted = b"".join(
        _RANGE.pack(offset, length, len(path)) + path
        for path, offset, length in ((os.path.join(directory, p), o, n) for p, o, n in ranges)
    )
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    unsent: bytes | None = wanted
    try:
        while process.returncode is None:
            check()
            with suppress(subprocess.TimeoutExpired):
                process.communicate(unsent, timeout=_POLL_S)
            unsent = None
    finally:
        process.kill()
        if process.stdin is not None:
            process.stdin.close()
        # Not longer: that would be waiting for our own mount.
        with suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_S)
    if process.returncode:
        # Killed by somebody, it says nothing.
        number = process.returncode if process.returncode > 0 else errno.EINTR
        raise OSError(number, os.strerror(number))


def main(wanted: IO[bytes]) -> int:
    """Read what is asked for; 0, or the errno of the first range that could not be read."""
    with mmap.mmap(-1, _BUFFER_BYTES) as memory, memoryview(memory) as buffer:
        while head := wanted.read(_RANGE.size):
            offset, length, path_length = _RANGE.unpack(head)
            try:
                if not _read(wanted.read(path_length), offset, offset + length, buffer):
                    return errno.EIO
            except OSError as error:
                return error.errno or errno.EIO
    return 0


def _read(path: bytes, offset: int, end: int, buffer: memoryview) -> bool:
    """Whether a range could be read as far as it goes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while offset < end:
            read = os.preadv(descriptor, [buffer[: end - offset]], offset)
            if not read:
                return False
            offset += read
        return True
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(sys.stdin.buffer))
