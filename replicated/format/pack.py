"""Packs: many chunks in one object, each findable without the object's index.

    header | entry header, stored bytes | … | records | bases | footer

The records say where each chunk lies, and which chunk it needs to be decoded, its base; the same records
and bases make up index objects (`format.listing`). A pack is written once and never changed.
docs/format.md has the bytes; a test compares it with the structs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from blake3 import blake3

from replicated.chunk.codec import DELTA, HASH_BYTES, MAX_CHUNK_BYTES
from replicated.format.canonical import Malformed, NewerFormat

PACK_VERSION: Final = 1

DATA_PACK: Final = 0
TREE_PACK: Final = 1

#: A pack is sealed once it is this large; listing reads tree packs only, so they are smaller.
DATA_PACK_BYTES: Final = 32 << 20
TREE_PACK_BYTES: Final = 8 << 20
#: Or once it has this many chunks, so that its records stay below 3 MiB.
MAX_PACK_CHUNKS: Final = 1 << 16
#: Offsets are 32 bits.
MAX_PACK_BYTES: Final = (1 << 32) - 1

HEADER_MAGIC: Final = b"REPLPACK"
ENTRY_MAGIC: Final = b"CHNK"
FOOTER_MAGIC: Final = b"REPLPEND"

#: Magic, version, kind, zeros.
HEADER: Final = struct.Struct("<8sBB6s")
#: Magic, codec, zeros, stored length, plain length, chunk id.
ENTRY: Final = struct.Struct("<4sB3sII32s")
#: Chunk id, offset of the stored bytes, stored length, plain length, codec with number of the base.
RECORD: Final = struct.Struct("<32sIIII")
#: Number of records, number of bases, magic, BLAKE3 of the header, records, bases and the footer before it.
FOOTER: Final = struct.Struct("<II8s32s")
#: Numbers that share 32 bits with a codec or a kind are above these.
SHARED_BITS: Final = 8

_SHARED_MASK: Final = (1 << SHARED_BITS) - 1
_FOOTER_HASHED: Final = FOOTER.size - HASH_BYTES


class Record(NamedTuple):
    """Where one chunk lies in a pack."""

    chunk_id: bytes
    #: Of the stored bytes; the entry header is just before.
    offset: int
    stored_length: int
    plain_length: int
    codec: int
    #: Id of the chunk without which this one cannot be decoded; empty: it stands on its own.
    base: bytes = b""


@dataclass(frozen=True, slots=True)
class PackListing:
    """What one pack holds."""

    name: bytes
    kind: int
    #: Of the whole object.
    size: int
    records: tuple[Record, ...]


class PackBuilder:
    """Collects chunks for one pack in `memory`; not for several threads at once."""

    def __init__(self, kind: int, memory: memoryview | None = None) -> None:
        """`memory` has `builder_bytes(kind)` and is borrowed for as long as the builder is used."""
        self.kind = kind
        self.records: list[Record] = []
        self.memory = memoryview(bytearray(builder_bytes(kind))) if memory is None else memory
        HEADER.pack_into(self.memory, 0, HEADER_MAGIC, PACK_VERSION, kind, b"")
        self._size = HEADER.size

    @property
    def size(self) -> int:
        """Bytes collected."""
        return self._size

    @property
    def is_full(self) -> bool:
        """Whether the pack should be sealed; to be asked after each chunk."""
        return self._size >= _limit(self.kind) or len(self.records) >= MAX_PACK_CHUNKS

    def add(
        self,
        chunk_id: bytes,
        codec: int,
        stored: bytes | bytearray | memoryview,
        plain_length: int,
        base: bytes = b"",
    ) -> None:
        """Copy one chunk into the pack; `base` as in `Record`."""
        length = len(stored)
        ENTRY.pack_into(self.memory, self._size, ENTRY_MAGIC, codec, b"", length, plain_length, chunk_id)
        offset = self._size + ENTRY.size
        self.memory[offset : offset + length] = stored
        self._size = offset + length
        self.records.append(Record(chunk_id, offset, length, plain_length, codec, base))

    def seal(self) -> list[bytes | memoryview]:
        """The parts of the object, which borrow the builder; call once."""
        records, bases = pack_records(self.records)
        base_count = len(bases) // HASH_BYTES
        footer = FOOTER.pack(len(self.records), base_count, FOOTER_MAGIC, b"")[:_FOOTER_HASHED]
        digest = _trailer_hash(bytes(self.memory[: HEADER.size]), records + bases, footer)
        return [self.memory[: self._size], records, bases, footer, digest]


def builder_bytes(kind: int) -> int:
    """The memory that a builder needs: it is full after the chunk that goes beyond the limit."""
    return _limit(kind) + ENTRY.size + MAX_CHUNK_BYTES


def _limit(kind: int) -> int:
    return DATA_PACK_BYTES if kind == DATA_PACK else TREE_PACK_BYTES


def pack_records(records: Sequence[Record]) -> tuple[bytes, bytes]:
    """The bytes of records, one after the other, and of the list of their bases."""
    numbers: dict[bytes, int] = {b"": 0}
    packed = [
        RECORD.pack(*place, codec | numbers.setdefault(base, len(numbers)) << SHARED_BITS)
        for *place, codec, base in records
    ]
    del numbers[b""]
    return b"".join(packed), b"".join(numbers)


def parse_records(data: bytes, bases: bytes, pack_size: int) -> tuple[Record, ...]:
    """What `pack_records` made of the records of a pack of this size; raises `Malformed`."""
    base_count = len(bases) // HASH_BYTES
    by_number = [b"", *(bases[start : start + HASH_BYTES] for start in range(0, len(bases), HASH_BYTES))]
    records = []
    for chunk_id, offset, stored_length, plain_length, shared in RECORD.iter_unpack(data):
        codec, number = split_shared(shared)
        if (
            plain_length > MAX_CHUNK_BYTES
            or stored_length > plain_length
            or offset < HEADER.size + ENTRY.size
            or offset + stored_length > pack_size - FOOTER.size
            or number > base_count
            # Later codecs may need a base or not.
            or (codec <= DELTA and (codec == DELTA) != (number > 0))
        ):
            raise Malformed(f"an impossible record of chunk {chunk_id.hex()}")
        records.append(Record(chunk_id, offset, stored_length, plain_length, codec, by_number[number]))
    return tuple(records)


def split_shared(value: int) -> tuple[int, int]:
    """The codec or kind in the low bits of a field, and the number above it."""
    return value & _SHARED_MASK, value >> SHARED_BITS


def parse_header(data: bytes) -> int:
    """The kind of a pack that begins with these bytes; raises `Malformed`, `NewerFormat`."""
    if len(data) < HEADER.size:
        raise Malformed("it is shorter than a pack's header")
    magic, version, kind, zeros = HEADER.unpack_from(data)
    if magic != HEADER_MAGIC or zeros != bytes(6) or kind not in (DATA_PACK, TREE_PACK):
        raise Malformed("it does not begin like a pack")
    if version != PACK_VERSION:
        raise NewerFormat(f"a pack of version {version}")
    return int(kind)


def parse_pack(name: bytes, data: bytes) -> PackListing:
    """What a whole pack's own index says, checked by its hash; raises `Malformed`.

    The chunks themselves are not looked at.
    """
    kind = parse_header(data)
    if len(data) < HEADER.size + FOOTER.size:
        raise Malformed("it is shorter than a pack's header and footer")
    footer = data[-FOOTER.size :]
    record_count, base_count, magic, digest = FOOTER.unpack(footer)
    end = len(data) - FOOTER.size
    middle = end - base_count * HASH_BYTES
    start = middle - record_count * RECORD.size
    if magic != FOOTER_MAGIC or start < HEADER.size:
        raise Malformed("it does not end like a pack")
    if _trailer_hash(data[: HEADER.size], data[start:end], footer[:_FOOTER_HASHED]) != digest:
        raise Malformed("the hash of its records is wrong")
    return PackListing(name, kind, len(data), parse_records(data[start:middle], data[middle:end], len(data)))


def scan_pack(data: bytes) -> Iterator[Record]:
    """The chunks of a pack found by their entry headers, up to the first that is not whole.

    For packs whose end is lost. The caller decodes each chunk and compares its hash: headers are not
    protected otherwise. Raises `Malformed` when even the beginning is not that of a pack.
    """
    parse_header(data)
    return scan_entries(data, HEADER.size)


def scan_entries(data: bytes, position: int) -> Iterator[Record]:
    """The same of any part of a pack from an entry header on, with offsets from the part's beginning."""
    while position + ENTRY.size <= len(data):
        magic, codec, zeros, stored_length, plain_length, chunk_id = ENTRY.unpack_from(data, position)
        offset = position + ENTRY.size
        position = offset + stored_length
        # A delta begins with the id of its base.
        base = data[offset : offset + HASH_BYTES] if codec == DELTA else b""
        if (
            magic != ENTRY_MAGIC
            or zeros != bytes(3)
            or not len(base) <= stored_length <= plain_length <= MAX_CHUNK_BYTES
            or position > len(data)
        ):
            return
        yield Record(chunk_id, offset, stored_length, plain_length, codec, base)


def _trailer_hash(header: bytes, records_and_bases: bytes, footer: bytes) -> bytes:
    return blake3(header).update(records_and_bases).update(footer).digest()
