"""Lets the C library keep the memory that chunks are decoded into, instead of giving it back after each.

Chunks are as long as what glibc takes from and gives back to the system every time, so that each of their
pages is made anew: that takes longer than decoding them. And each thread gets a heap of its own, where what
was freed lies idle while that of another thread grows: with one for all, a mount that reads ahead takes half
the memory (two processors, four readers: 56 MB instead of 101) and no more time. Elsewhere than with glibc
nothing happens. Called at the start of each process that reads or writes chunks.

Mounts also let Python look for cycles of garbage rarely: there are next to none, and entries of directories
come by the ten thousands, so that looking for them took longer than making them (20,000 files listed: 6.9 µs
of the processor an entry, 4.4 so).
"""

from __future__ import annotations

import ctypes
import gc
from typing import Final

#: Longer blocks are still taken from the system one by one.
MAX_KEPT_BLOCK_BYTES: Final = 16 << 20
#: What may stay unused at the end of a heap.
MAX_UNUSED_BYTES: Final = 16 << 20

#: So many objects more than before are there when cycles are looked for.
MAX_UNCOLLECTED: Final = 100_000

# From <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def keep_memory() -> None:
    """Keep what chunks are decoded into, within bounds; to be called before there are other threads."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, MAX_KEPT_BLOCK_BYTES)
    mallopt(_M_TRIM_THRESHOLD, MAX_UNUSED_BYTES)
    mallopt(_M_ARENA_MAX, 1)


def collect_rarely() -> None:
    """Look for cycles of garbage only among many new objects; what is there now stays out of it."""
    gc.freeze()
    gc.set_threshold(MAX_UNCOLLECTED)
