"""The bytes of a file for those who look for the tensors in it, within a budget.

Files of tensors say themselves where things lie, and a damaged or hostile one says anything. So every
look goes through a `Source`: it gives exactly the bytes that were asked for or raises `Malformed`, and it
raises that too when the looking costs more than a file worth it would. Positions and sizes are therefore
checked here, once, and nowhere else. The containers call it; `replicated.chunk.tensor` makes it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, NamedTuple

#: Shorter extents are not wanted: nobody has to look what they are.
MIN_EXTENT_BYTES: Final = 4096
#: Of a file, also when its layout is read; the layout then takes less than 2 MiB.
MAX_REGIONS: Final = 1 << 16
#: Four times the gaps of a file worth it, to which all that is looked at belongs.
MAX_LOOKED_AT_BYTES: Final = 16 << 20
#: Calls of `read_at`: one for each of the most regions that a layout has, and as many for what leads there.
MAX_READS: Final = 1 << 17
# What lies beside is read along: headers lie together (HDF5 keeps them in blocks of this size).
_WINDOW_BYTES = 2048
# Looking at a few bytes is not free either.
_LEAST_COST_BYTES = 64


class Malformed(Exception):
    """The file is not what its beginning promised, or not worth the looking."""


def unpack(form: struct.Struct, data: bytes, offset: int = 0) -> tuple[int, ...]:
    """The numbers at `offset` of bytes that may be too few for them; raises `Malformed`."""
    if len(data) < offset + form.size:
        raise Malformed(f"{len(data)} bytes instead of {offset + form.size}")
    return form.unpack_from(data, offset)


class Extent(NamedTuple):
    """Where a container says that data lies; it may say what is not so."""

    start: int
    size: int
    #: 1, 2, 4 or 8; 0 when the container does not say.
    item_bytes: int


class Source:
    """The bytes of one file; what `read_at` raises passes through."""

    def __init__(self, size: int, head: bytes, read_at: Callable[[int, int], bytes]) -> None:
        self.size = size
        self._read_at = read_at
        self._window = head
        self._window_start = 0
        self._reads_left = MAX_READS
        self._bytes_left = MAX_LOOKED_AT_BYTES

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes of the file; raises `Malformed`."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise Malformed(f"{length} bytes at {offset} of a file of {self.size}")
        self._bytes_left -= max(length, _LEAST_COST_BYTES)
        if self._bytes_left < 0:
            raise Malformed("too many bytes to look at")
        begin = offset - self._window_start
        if begin < 0 or begin + length > len(self._window):
            self._move_window(offset, length)
            begin = 0
        return self._window[begin : begin + length]

    def _move_window(self, offset: int, length: int) -> None:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise Malformed("too many places to look at")
        self._window = self._read_at(offset, max(length, min(_WINDOW_BYTES, self.size - offset)))
        self._window_start = offset
        if len(self._window) < length:
            raise Malformed("the file has become shorter")
