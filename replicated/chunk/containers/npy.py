"""The array in an .npy file, or in an entry of an .npz archive: all that follows its header."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final

from replicated.chunk.containers.source import Extent, Malformed, Source

_MAGIC = b"\x93NUMPY"
# Magic, major and minor version; then the header's length, of four bytes since version 2.
_VERSION_OFFSET = len(_MAGIC)
_LENGTH_OFFSET = _VERSION_OFFSET + 2
# The element's type comes first in the header; what follows can be long (structured types).
_MAX_DESCRIPTION_BYTES = 1024
#: Kind and length of an element; dates have a unit in brackets behind them.
_DESCRIPTION = re.compile(rb"\{'descr': '[<>|=]([A-Za-z])([0-9]{1,8})['\[]")
#: Bytes of one number by kind, where it is not what the header says: the parts of complex numbers, the
#: characters of strings.
_PARTS: Final = {b"c": 2}
_CHARACTER_BYTES: Final = {b"S": 1, b"a": 1, b"U": 4}


def begins(head: bytes) -> bool:
    """Whether a file or an entry that begins like this is an array."""
    return head.startswith(_MAGIC)


def find_extents(source: Source, start: int, size: int) -> Iterator[Extent]:
    """The data of the array that lies at `start`."""
    length_format = "<H" if source.read(start + _VERSION_OFFSET, 1) == b"\x01" else "<I"
    header_offset = _LENGTH_OFFSET + struct.calcsize(length_format)
    (header_length,) = struct.unpack(
        length_format, source.read(start + _LENGTH_OFFSET, struct.calcsize(length_format))
    )
    data_offset = header_offset + header_length
    if data_offset > size:
        raise Malformed("the header is longer than the file")
    description = source.read(start + header_offset, min(header_length, _MAX_DESCRIPTION_BYTES))
    yield Extent(start + data_offset, size - data_offset, _item_bytes(description))


def _item_bytes(description: bytes) -> int:
    match = _DESCRIPTION.match(description)
    if match is None:
        return 0
    kind, digits = match.groups()
    item_bytes = _CHARACTER_BYTES.get(kind, int(digits) // _PARTS.get(kind, 1))
    return item_bytes if item_bytes in (1, 2, 4, 8) else 0
