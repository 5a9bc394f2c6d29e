"""A fixed number of page-aligned buffers, so that storing files of any size takes the same memory.

Who has something to put in takes one and who is done with it gives it back; when all are in use, the next
taker waits. Used by `writer` and `packer`. Knows nothing of what is in them.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from queue import Empty, LifoQueue
from typing import Final

#: Reading into memory that begins elsewhere than at a page or at a multiple of 64 bytes can take five times
#: as long (Zen 3, `rep movsb`), and using memory for the first time costs more than hashing what is in it.
PAGE_BYTES: Final = mmap.PAGESIZE
ALIGNMENT: Final = 64


class Buffers:
    """Up to `count` buffers of `size` bytes, made when first needed. May be used from several threads."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        # Last in, first out: what was used before is used again, and the others need not be made.
        self._free: LifoQueue[memoryview | None] = LifoQueue()
        self._made: list[mmap.mmap] = []
        for _ in range(count):
            self._free.put(None)

    def take(self) -> memoryview:
        """A buffer with anything in it; waits until one is free."""
        buffer = self._free.get()
        if buffer is not None:
            return buffer
        made = mmap.mmap(-1, self.size)
        self._made.append(made)
        return memoryview(made)

    def give_back(self, buffer: memoryview) -> None:
        """Let others have a buffer: it must not be looked at any more."""
        self._free.put(buffer)

    def close(self) -> None:
        """Give the memory back now, and not when the garbage collector gets round to it.

        Buffers that are not given back keep theirs; nothing may be taken any more.
        """
        with suppress(Empty):
            while True:
                buffer = self._free.get_nowait()
                if buffer is not None:
                    buffer.release()
        for made in self._made:
            with suppress(BufferError):
                made.close()
        self._made.clear()
