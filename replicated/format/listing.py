"""Index objects: what several packs hold, so that nobody has to open the packs to find out.

A section a pack, with the same records and bases as in the pack's own end. An index object only repeats
what the packs say; it is written after them and can be made again from them. Sections can be put together
anew without being parsed (`compaction`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from replicated.chunk.codec import HASH_BYTES
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.pack import (
    DATA_PACK,
    MAX_PACK_BYTES,
    RECORD,
    SHARED_BITS,
    TREE_PACK,
    PackListing,
    pack_records,
    parse_records,
    split_shared,
)

INDEX_VERSION: Final = 1
INDEX_MAGIC: Final = b"REPLINDX"
#: Larger index objects are refused; ours hold some hundred thousand records at most.
MAX_INDEX_BYTES: Final = 256 << 20

#: Magic, version, zeros, number of sections.
INDEX_HEADER: Final = struct.Struct("<8sB3sI")
#: Pack name, kind with number of bases, size of the pack, number of records.
SECTION: Final = struct.Struct("<32sIII")


@dataclass(frozen=True, slots=True)
class Section:
    """What an index object says of one pack, not parsed yet."""

    #: Of the pack.
    name: bytes
    kind: int
    pack_size: int
    record_count: int
    base_count: int
    #: All of its bytes, which may be put into another index object.
    data: memoryview

    def parse(self) -> PackListing:
        """What the pack holds; raises `Malformed`."""
        middle = SECTION.size + self.record_count * RECORD.size
        records = parse_records(
            bytes(self.data[SECTION.size : middle]), bytes(self.data[middle:]), self.pack_size
        )
        return PackListing(self.name, self.kind, self.pack_size, records)


def build_index(listings: Sequence[PackListing]) -> bytes:
    """An index object for these packs."""
    return join_sections([_build_section(listing) for listing in listings])


def join_sections(sections: Sequence[bytes | memoryview]) -> bytes:
    """An index object of these sections, each as in `Section.data`."""
    body = b"".join([INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, b"", len(sections)), *sections])
    return body + blake3(body).digest()


def parse_index(data: bytes) -> list[PackListing]:
    """The packs that an index object lists, checked by its hash; raises `Malformed`, `NewerFormat`."""
    return [section.parse() for section in split_sections(data)]


def split_sections(data: bytes) -> list[Section]:
    """The sections of an index object, checked by its hash; raises `Malformed`, `NewerFormat`."""
    if not INDEX_HEADER.size + HASH_BYTES <= len(data) <= MAX_INDEX_BYTES:
        raise Malformed("its size is impossible")
    body = memoryview(data)[:-HASH_BYTES]
    if blake3(body).digest() != data[-HASH_BYTES:]:
        raise Malformed("its hash is wrong")
    magic, version, zeros, section_count = INDEX_HEADER.unpack_from(body)
    if magic != INDEX_MAGIC or zeros != bytes(3):
        raise Malformed("it does not begin like an index")
    if version != INDEX_VERSION:
        raise NewerFormat(f"an index of version {version}")
    sections = []
    position = INDEX_HEADER.size
    for _ in range(section_count):
        start = position
        if start + SECTION.size > len(body):
            raise Malformed("a section is cut short")
        name, shared, pack_size, record_count = SECTION.unpack_from(body, start)
        kind, base_count = split_shared(shared)
        position = start + SECTION.size + record_count * RECORD.size + base_count * HASH_BYTES
        if kind not in (DATA_PACK, TREE_PACK) or pack_size > MAX_PACK_BYTES:
            raise Malformed("a section is impossible")
        if position > len(body):
            raise Malformed("a section is cut short")
        sections.append(Section(name, kind, pack_size, record_count, base_count, body[start:position]))
    if position != len(body):
        raise Malformed("bytes follow the last section")
    return sections


def _build_section(listing: PackListing) -> bytes:
    records, bases = pack_records(listing.records)
    shared = listing.kind | len(bases) // HASH_BYTES << SHARED_BITS
    header = SECTION.pack(listing.name, shared, listing.size, len(listing.records))
    return header + records + bases
