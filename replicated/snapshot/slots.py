"""One byte in shared memory for each held file, by which its readers see that it is held no more.

Owned by `held`; the store process maps the same memory. A reader looks at the byte *after* it has read from
the file: 0 says that what it read was the file as it was held.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from typing import Final

SLOT_COUNT: Final = 1 << 16


class Slots:
    """The bytes, and which of them are in use; at most `limit`. The caller sees to mutual exclusion."""

    def __init__(self, limit: int) -> None:
        self.descriptor = os.memfd_create("replicate-held", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, SLOT_COUNT)
        self._flags = mmap.mmap(self.descriptor, SLOT_COUNT)
        # Used again as late as possible: a reader that is being ended may still look at one.
        self._free = deque(range(min(limit, SLOT_COUNT)))

    def take(self) -> int | None:
        """A slot with its byte 0; None when all are in use."""
        if not self._free:
            return None
        slot = self._free.popleft()
        self._flags[slot] = 0
        return slot

    def flag(self, slot: int) -> None:
        """Set the byte: from now on nothing that is read from the file counts."""
        self._flags[slot] = 1

    def give_back(self, slot: int) -> None:
        """Nobody reads that file any more."""
        self._free.append(slot)

    def close(self) -> None:
        """Nobody holds anything any more."""
        self._flags.close()
        os.close(self.descriptor)
