"""Lets the C library keep the memory that chunks are decoded into, instead of giving it back after each.

Chunks are as long as what glibc takes from and gives back to the system every time, so that each of their
pages is made anew: that takes longer than decoding them. Called at the start of each process that reads or
writes chunks; elsewhere than with glibc nothing happens.
"""

from __future__ import annotations

import ctypes
from typing import Final

#: Longer blocks are still taken from the system one by one.
MAX_KEPT_BLOCK_BYTES: Final = 16 << 20
#: What may stay unused at the end of a heap.
MAX_UNUSED_BYTES: Final = 16 << 20

# From <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_memory() -> None:
    """Keep what chunks are decoded into, within bounds; to be called before there are other threads."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, MAX_KEPT_BLOCK_BYTES)
    mallopt(_M_TRIM_THRESHOLD, MAX_UNUSED_BYTES)
