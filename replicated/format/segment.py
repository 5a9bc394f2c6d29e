"""Segments: objects below `log/records/` that hold many records, so that all can be had in few requests.

A segment repeats what the records say under their own keys, and what was removed. Untrusted: everything is
checked before it is believed, and the records in it are sealed each on its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgpack
import zstandard
from blake3 import blake3

from replicate.ids import is_id
from replicated.format.canonical import Malformed, NewerFormat

MAGIC: Final = b"REPLRECS"
VERSION: Final = 1
#: Magic, version, zeros, number of names, length of the frame.
HEADER: Final = struct.Struct("<8sB3sII")
NAME_BYTES: Final = 67
HASH_BYTES: Final = 32
#: Of the records before compression; more go into another segment.
MAX_SEGMENT_PLAIN_BYTES: Final = 32 << 20
#: One record may be as large as any JSON object, and is then alone.
MAX_PLAIN_BYTES: Final = MAX_SEGMENT_PLAIN_BYTES + (64 << 20) + 4096
#: As many names as a header may have.
MAX_NAMES: Final = 65536
_MAX_WINDOW: Final = 128 << 20
_LETTERS: Final = frozenset("ecdx")


class SegmentRecord(NamedTuple):
    """One record, or one removal."""

    #: As in the key of its announcement.
    letter: str
    experiment_id: str
    id: str
    #: The sealed object; of a removal, that of its announcement.
    data: bytes


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What stands at the beginning of a segment."""

    #: The segments that were merged into this one, which holds nothing else; empty when it was not merged.
    merged: tuple[str, ...]
    frame_length: int


def build_segment(records: Iterable[SegmentRecord], merged: Sequence[str] = ()) -> bytes:
    """A segment of records that have at most `MAX_SEGMENT_PLAIN_BYTES` together."""
    packer = msgpack.Packer(use_bin_type=True)
    plain = b"".join(packer.pack(tuple(record)) for record in records)
    frame = zstandard.ZstdCompressor(level=3, write_content_size=True).compress(plain)
    names = "".join(merged).encode("ascii")
    data = HEADER.pack(MAGIC, VERSION, bytes(3), len(merged), len(frame)) + names + frame
    return data + blake3(data).digest()


def parse_header(data: bytes) -> SegmentHeader | None:
    """The header of a segment of which this is the beginning; None when more of it is needed."""
    if len(data) < HEADER.size:
        return None
    magic, version, zeros, count, frame_length = HEADER.unpack_from(data)
    if magic != MAGIC or zeros != bytes(3):
        raise Malformed("it is not a segment")
    if version > VERSION:
        raise NewerFormat(f"a segment of version {version}")
    if count > MAX_NAMES:
        raise Malformed("it names too many segments")
    end = HEADER.size + count * NAME_BYTES
    if len(data) < end:
        return None
    try:
        names = data[HEADER.size : end].decode("ascii")
    except UnicodeDecodeError as error:
        raise Malformed("a name of a segment is not text") from error
    merged = tuple(names[start : start + NAME_BYTES] for start in range(0, len(names), NAME_BYTES))
    return SegmentHeader(merged, frame_length)


def parse_segment(data: bytes) -> tuple[SegmentHeader, list[SegmentRecord]]:
    """A whole segment; raises `Malformed` and `NewerFormat`."""
    header = parse_header(data)
    if header is None:
        raise Malformed("it ends too early")
    body = memoryview(data)[: -HASH_BYTES or None]
    if len(data) < HASH_BYTES or blake3(body).digest() != data[-HASH_BYTES:]:
        raise Malformed("its hash is wrong")
    start = HEADER.size + len(header.merged) * NAME_BYTES
    if start + header.frame_length + HASH_BYTES != len(data):
        raise Malformed("its length is wrong")
    return header, list(_read_records(_decompress(data[start : start + header.frame_length])))


def _decompress(frame: bytes) -> bytes:
    try:
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= MAX_PLAIN_BYTES:
            raise Malformed("its records are too long")
        opened = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(frame)
        plain = opened.read(size + 1)
    except zstandard.ZstdError as error:
        raise Malformed(f"its frame is damaged: {error}") from error
    if len(plain) != size:
        raise Malformed("its frame has another length than it says")
    return plain


def _read_records(plain: bytes) -> Iterator[SegmentRecord]:
    unpacker = msgpack.Unpacker(
        raw=False, strict_map_key=True, max_buffer_size=max(1, len(plain)), max_array_len=4, max_map_len=0
    )
    unpacker.feed(plain)
    try:
        for item in unpacker:
            match item:
                case [str(letter), str(experiment_id), str(identifier), bytes(data)] if (
                    letter in _LETTERS and is_id(experiment_id) and is_id(identifier)
                ):
                    yield SegmentRecord(letter, experiment_id, identifier, data)
                case _:
                    raise Malformed("it holds something that is not a record")
    except (ValueError, msgpack.UnpackException) as error:
        raise Malformed(f"its records are damaged: {error}") from error
    if unpacker.tell() != len(plain):
        raise Malformed("its last record is cut off")
