"""Writes files so that long runs of zeros take no room on the disk. Called by `checkout` and `cache`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

#: Zeros of this length become a hole: small enough for sparse files, big enough to cost nothing.
HOLE_BYTES: Final = 64 << 10

_ZEROS = bytes(HOLE_BYTES)


def write_sparse(descriptor: int, part: bytes | memoryview, offset: int) -> None:
    """Write all of `part` but its blocks of zeros; the caller gives the file its length in the end."""
    view = memoryview(part)
    for begin, end in _data_ranges(view):
        while begin < end:
            begin += os.pwrite(descriptor, view[begin:end], offset + begin)


def _data_ranges(view: memoryview) -> Iterator[tuple[int, int]]:
    """The ranges outside blocks of zeros."""
    begin = 0
    for position in range(0, len(view), HOLE_BYTES):
        block = view[position : position + HOLE_BYTES]
        # Most blocks show at one end what they are; a memoryview is slow to compare.
        if block[0] == 0 == block[-1] and _ZEROS.startswith(bytes(block)):
            if begin < position:
                yield begin, position
            begin = position + len(block)
    if begin < len(view):
        yield begin, len(view)
