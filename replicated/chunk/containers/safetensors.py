"""The tensors of a safetensors file: a JSON header at its beginning names their types and places."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Final

from replicated.chunk.containers.source import Extent, Malformed, Source

_LENGTH = struct.Struct("<Q")
# What 65,536 tensors of four dimensions have. Objects, arrays and numbers take up to thirty times as much
# memory as they take in JSON.
_MAX_BRACKETS = 4 << 16
_MAX_COMMAS = 8 << 16
#: Bytes of one number; what is not here (types shorter than a byte, types to come) is unknown.
_ITEM_BYTES: Final = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "C64": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


def begins(head: bytes) -> bool:
    """Whether a file that begins like this has such a header."""
    return head[_LENGTH.size : _LENGTH.size + 1] == b"{"


def find_extents(source: Source, start: int, size: int) -> Iterator[Extent]:
    """The data of each tensor, in the order of the header."""
    header_length = _header_length(source.read(start, _LENGTH.size))
    if header_length > size - _LENGTH.size:
        raise Malformed("the header is longer than the file")
    data_start = start + _LENGTH.size + header_length
    for name, entry in _parse(source.read(start + _LENGTH.size, header_length)).items():
        if name != "__metadata__":
            begin, end, item_bytes = _take_apart(entry)
            yield Extent(data_start + begin, end - begin, item_bytes)


def _header_length(head: bytes) -> int:
    length: int
    (length,) = _LENGTH.unpack_from(head)
    return length


def _parse(header: bytes) -> dict[str, object]:
    if header.count(b"[") + header.count(b"{") > _MAX_BRACKETS or header.count(b",") > _MAX_COMMAS:
        raise Malformed("too many tensors")
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise Malformed("the header is not JSON") from error
    if not isinstance(entries, dict):
        raise Malformed("the header is not an object")
    return entries


def _take_apart(entry: object) -> tuple[int, int, int]:
    """Begin and end of a tensor in the data, and the bytes of one number."""
    match entry:
        case {"dtype": str(dtype), "data_offsets": [int(begin), int(end)]}:
            return begin, end, _ITEM_BYTES.get(dtype, 0)
    raise Malformed("an entry of the header is not a tensor")
