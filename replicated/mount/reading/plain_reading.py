"""Reads whole files of the cache, into memory that is used again and again.

Used by `open_files`. Memory that begins at a page and was used before is what the kernel copies to fastest
(`replicated.buffers`), and threads of libfuse have no memory of their own that lasts: so a buffer is lent for
as long as somebody has what lies in it. Invariant: what is given is what was verified when the file was made.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol

_LOG = logging.getLogger(__name__)

#: As much as the kernel asks for at once.
BUFFER_BYTES: Final = 1 << 20
#: Buffers that are kept although nobody uses them.
MAX_UNUSED: Final = 4


class PlainFile(Protocol):
    """A whole file in the cache, open."""

    @property
    def descriptor(self) -> int:
        """What it is open as."""
        ...

    @property
    def size(self) -> int:
        """How long it is."""
        ...

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer with what lies at `offset`; how much that was."""
        ...

    def is_intact(self) -> bool:
        """Whether nobody has written to it or cut it off; to be asked after each read."""
        ...

    def hold_lease(self) -> bool:
        """Let the system hold up whoever wants to change it; whether that is possible."""
        ...

    def is_broken(self) -> bool:
        """Whether somebody waits for the lease to be given up."""
        ...

    def release_lease(self) -> None:
        """Give up the lease."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class PlainReader:
    """A whole file that several threads read; it is closed when the last of them has let go of it."""

    def __init__(self, file: PlainFile) -> None:
        self._file = file

    def __del__(self) -> None:
        self._file.close()

    def read(self, offset: int, length: int) -> Sequence[memoryview] | None:
        """`length` bytes from `offset`; None when the file is not any more what it was."""
        parts = []
        try:
            for start in range(offset, offset + length, BUFFER_BYTES):
                part = _lend()[: min(BUFFER_BYTES, offset + length - start)]
                if self._file.read_into(part, start) != len(part):
                    return None
                parts.append(part)
            return parts if self._file.is_intact() else None
        except OSError as error:
            _LOG.warning("a file of the cache cannot be read: %s", error.strerror)
            return None


class _Lent(ctypes.c_ubyte * BUFFER_BYTES):  # type: ignore[misc]  # a class that is made by an expression
    """A buffer in use: views of it keep it alive, and without them the memory is free again."""

    memory: mmap.mmap

    def __del__(self) -> None:
        if len(_unused) < MAX_UNUSED:
            _unused.append(self.memory)


#: Appended to and popped from by any thread, which needs no lock.
_unused: deque[mmap.mmap] = deque()


def _lend() -> memoryview:
    try:
        memory = _unused.pop()
    except IndexError:
        memory = mmap.mmap(-1, BUFFER_BYTES)
    lent = _Lent.from_buffer(memory)
    lent.memory = memory
    return memoryview(lent).cast("B")
