"""A fixed number of page-aligned buffers, so that storing files of any size takes the same memory.

Who has something to put in takes one and who is done with it gives it back; when all are in use, the next
taker waits. Used by `writer` and `packer`. Knows nothing of what is in them.
"""

from __future__ import annotations

import mmap
from queue import SimpleQueue
from typing import Final

#: Reading into memory that begins elsewhere than at a page or at a multiple of 64 bytes can take five times
#: as long (Zen 3, `rep movsb`), and using memory for the first time costs more than hashing what is in it.
PAGE_BYTES: Final = mmap.PAGESIZE
ALIGNMENT: Final = 64


class Buffers:
    """Up to `count` buffers of `size` bytes, made when first needed. May be used from several threads."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self._free: SimpleQueue[memoryview | None] = SimpleQueue()
        for _ in range(count):
            self._free.put(None)

    def take(self) -> memoryview:
        """A buffer with anything in it; waits until one is free."""
        buffer = self._free.get()
        return memoryview(mmap.mmap(-1, self.size)) if buffer is None else buffer

    def give_back(self, buffer: memoryview) -> None:
        """Let others have a buffer: it must not be looked at any more."""
        self._free.put(buffer)
