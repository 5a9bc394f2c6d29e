"""The entries of a ZIP archive: what `torch.save`, `numpy.savez` and Keras write.

Reads the directory at the archive's end and the beginning of each entry; nothing is decompressed. An
entry that is stored as it is may be an array or an HDF5 file; then the data is what these say, and their
headers belong to the gaps.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from replicated.chunk.containers import hdf5, npy
from replicated.chunk.containers.source import MIN_EXTENT_BYTES, Extent, Malformed, Source

_LOCAL_MAGIC = b"PK\x03\x04"
#: Lengths of name and extra field, which may be others than those in the directory.
_LOCAL_LENGTHS = struct.Struct("<26x2H")
_CENTRAL_MAGIC = b"PK\x01\x02"
#: Method, stored and plain length, lengths of name, extra field and comment, position of the entry.
_CENTRAL = struct.Struct("<10xH8x2I3H8xI")
_END_MAGIC = b"PK\x05\x06"
#: Length and position of the directory, length of the comment that follows.
_END = struct.Struct("<12x2IH")
_MAX_COMMENT_BYTES = 0xFFFF
_LOCATOR_MAGIC = b"PK\x06\x07"
#: Position of the long form of the end.
_LOCATOR = struct.Struct("<8xQ4x")
_LONG_END_MAGIC = b"PK\x06\x06"
_LONG_END = struct.Struct("<40x2Q")

#: A number that does not fit: the long form says it.
_ELSEWHERE = 0xFFFFFFFF
#: Of each part of an extra field: what it is, and how long.
_EXTRA = struct.Struct("<2H")
_LONG_NUMBERS_ID = 1
_LONG_NUMBER = struct.Struct("<Q")
_STORED = 0
#: Endings of the names of entries that describe the tensors. Counters and rates in them make them longer
#: and shorter, which must not make a checkpoint one of other tensors, so they belong to the gaps.
_DESCRIPTIONS = (b".pkl", b".json")
_MAX_DESCRIPTION_BYTES = 1 << 20
# Enough of an entry's data to know what it is.
_HEAD_BYTES = 8
_NESTED: Final = (npy, hdf5)


class _Entry(NamedTuple):
    name: bytes
    offset: int
    stored_length: int
    is_compressed: bool

    @property
    def is_wanted(self) -> bool:
        if self.name.endswith(_DESCRIPTIONS):
            return self.stored_length > _MAX_DESCRIPTION_BYTES
        return self.stored_length >= MIN_EXTENT_BYTES


def begins(head: bytes) -> bool:
    """Whether a file that begins like this is an archive."""
    return head.startswith(_LOCAL_MAGIC)


def find_extents(source: Source, start: int, size: int) -> Iterator[Extent]:
    """The data of the entries of the archive that lies at `start`, in the order of its directory."""
    for entry in _entries(_read_directory(source, start, size)):
        if entry.is_wanted:
            local_start = start + entry.offset
            header = source.read(local_start, _LOCAL_LENGTHS.size)
            if not header.startswith(_LOCAL_MAGIC):
                raise Malformed("an entry is not where the directory says")
            data_start = local_start + len(header) + sum(_LOCAL_LENGTHS.unpack(header))
            yield from _find_in_entry(source, data_start, entry)


def _find_in_entry(source: Source, data_start: int, entry: _Entry) -> Iterator[Extent]:
    if not entry.is_compressed:
        head = source.read(data_start, _HEAD_BYTES)
        for container in _NESTED:
            if container.begins(head):
                yield from container.find_extents(source, data_start, entry.stored_length)
                return
    yield Extent(data_start, entry.stored_length, 0)


def _read_directory(source: Source, start: int, size: int) -> bytes:
    """The directory's records; raises `Malformed` when the archive's end is not found."""
    tail_length = min(size, _END.size + _MAX_COMMENT_BYTES)
    tail = source.read(start + size - tail_length, tail_length)
    end = tail.rfind(_END_MAGIC)
    if end < 0 or end + _END.size > tail_length:
        raise Malformed("the archive has no end")
    length, offset, comment_length = _END.unpack_from(tail, end)
    if end + _END.size + comment_length != tail_length:
        raise Malformed("something follows the archive's end")
    locator = end - _LOCATOR.size
    if _ELSEWHERE in (length, offset) and locator >= 0 and tail.startswith(_LOCATOR_MAGIC, locator):
        (long_end_offset,) = _LOCATOR.unpack_from(tail, locator)
        long_end = source.read(start + long_end_offset, _LONG_END.size)
        if not long_end.startswith(_LONG_END_MAGIC):
            raise Malformed("the archive has no long end")
        length, offset = _LONG_END.unpack(long_end)
    return source.read(start + offset, length)


def _entries(directory: bytes) -> Iterator[_Entry]:
    position = 0
    while position < len(directory):
        name_start = position + _CENTRAL.size
        if name_start > len(directory) or not directory.startswith(_CENTRAL_MAGIC, position):
            raise Malformed("the directory is damaged")
        record = _CENTRAL.unpack_from(directory, position)
        method, stored_length, plain_length, name_length, extra_length, comment_length, offset = record
        extra_start = name_start + name_length
        position = extra_start + extra_length + comment_length
        if _ELSEWHERE in (stored_length, plain_length, offset):
            extra = directory[extra_start : extra_start + extra_length]
            stored_length, offset = _long_numbers(extra, stored_length, plain_length, offset)
        yield _Entry(directory[name_start:extra_start], offset, stored_length, method != _STORED)


def _long_numbers(extra: bytes, stored_length: int, plain_length: int, offset: int) -> tuple[int, int]:
    """The stored length and the position of an entry, of which some are in its extra field."""
    position = 0
    while position + _EXTRA.size <= len(extra):
        field_id, length = _EXTRA.unpack_from(extra, position)
        position += _EXTRA.size
        if field_id == _LONG_NUMBERS_ID:
            field = extra[position : position + length]
            whole = len(field) // _LONG_NUMBER.size * _LONG_NUMBER.size
            numbers = (number for (number,) in _LONG_NUMBER.iter_unpack(field[:whole]))
            # Only numbers that do not fit are there, in this order.
            in_order = (plain_length, stored_length, offset)
            _, stored_length, offset = (
                next(numbers, _ELSEWHERE) if number == _ELSEWHERE else number for number in in_order
            )
            break
        position += length
    return stored_length, offset
