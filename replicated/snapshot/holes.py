"""Where an open file holds data, and where it has holes that need not be read, copied or given room.

Used by whatever reads or duplicates captured files. A hole is believed only on file systems that are known
to tell the truth about bytes that were written a moment ago; elsewhere the whole file is data.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from replicated import file_systems

#: Of `st_blocks`, whatever the file system has.
_BLOCK_BYTES = 512


class DataMap:
    """Where the data of an open file is at the moment of asking; moves the position of the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        #: Whether the file may have holes.
        self.is_sparse = _has_holes(descriptor, os.fstat(descriptor))

    def find(self, position: int, size: int) -> tuple[int, int]:
        """The first data from a position on and before `size`, as (start, end); (size, size) for none."""
        if not self.is_sparse:
            return position, size
        try:
            start = os.lseek(self._descriptor, position, os.SEEK_DATA)
            end = os.lseek(self._descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            # Only a hole is left, or else nobody can tell.
            return (size, size) if error.errno == errno.ENXIO else (position, size)
        return min(start, size), min(end, size)

    def ranges(self, size: int) -> Iterator[tuple[int, int]]:
        """The parts of the first `size` bytes that hold data, as (start, end)."""
        end = 0
        while end < size:
            start, end = self.find(end, size)
            if start < end:
                yield start, end


def data_bytes(descriptor: int, info: os.stat_result) -> int:
    """How many bytes of a file, of which `info` is the stat, are data."""
    return info.st_blocks * _BLOCK_BYTES if _has_holes(descriptor, info) else info.st_size


def _has_holes(descriptor: int, info: os.stat_result) -> bool:
    return info.st_blocks * _BLOCK_BYTES < info.st_size and file_systems.tells_holes(descriptor)
