"""Packs and index objects: what was put in is found, and damage is noticed."""

import os

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from replicated.chunk.codec import DELTA, MAX_CHUNK_BYTES, RAW, ZSTD, decode, encode, hash_chunk
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.listing import INDEX_HEADER, SECTION, build_index, parse_index
from replicated.format.pack import (
    DATA_PACK,
    DATA_PACK_BYTES,
    ENTRY,
    FOOTER,
    HEADER,
    MAX_PACK_CHUNKS,
    RECORD,
    TREE_PACK,
    PackBuilder,
    PackListing,
    Record,
    builder_bytes,
    parse_pack,
    scan_pack,
)

NAME = bytes(range(32))
chunks = st.lists(st.binary(min_size=1, max_size=200) | st.just(b"a" * 5000), max_size=8)


ids = st.integers(0, 5).map(lambda number: bytes([number]) * 32)


def build(plains: list[bytes], kind: int = DATA_PACK) -> bytes:
    builder = PackBuilder(kind)
    for plain in plains:
        codec, stored = encode(plain)[:2]
        builder.add(hash_chunk(plain), codec, stored, len(plain))
    return b"".join(builder.seal())


def build_deltas(bases: list[bytes]) -> bytes:
    """A pack of as many chunks, each a delta of the base of its place, or plain where that is empty."""
    builder = PackBuilder(DATA_PACK)
    for number, base in enumerate(bases):
        chunk_id = hash_chunk(b"%d" % number)
        if base:
            builder.add(chunk_id, DELTA, base + b"stored", 100, base)
        else:
            builder.add(chunk_id, RAW, b"x" * 100, 100)
    return b"".join(builder.seal())


@given(chunks, st.sampled_from([DATA_PACK, TREE_PACK]))
def test_every_chunk_is_found_by_the_records_and_by_scanning(plains: list[bytes], kind: int) -> None:
    data = build(plains, kind)
    listing = parse_pack(NAME, data)
    assert (listing.name, listing.kind, listing.size) == (NAME, kind, len(data))
    assert list(scan_pack(data)) == list(listing.records)
    for plain, record in zip(plains, listing.records, strict=True):
        stored = data[record.offset : record.offset + record.stored_length]
        assert record.chunk_id == hash_chunk(plain)
        assert decode(record.codec, stored, record.plain_length) == plain


def test_sizes_of_the_structs_are_those_of_the_format() -> None:
    assert (HEADER.size, ENTRY.size, RECORD.size, FOOTER.size) == (16, 48, 48, 48)
    assert (INDEX_HEADER.size, SECTION.size) == (16, 44)


@given(st.lists(st.just(b"") | ids, max_size=12))
def test_base_of_every_delta_is_found_by_the_records_and_by_scanning(bases: list[bytes]) -> None:
    data = build_deltas(bases)
    records = parse_pack(NAME, data).records
    assert [record.base for record in records] == bases
    assert list(scan_pack(data)) == list(records)
    end_of_chunks = max((r.offset + r.stored_length for r in records), default=HEADER.size)
    different = len(set(bases) - {b""})
    assert len(data) - end_of_chunks == len(records) * RECORD.size + different * 32 + FOOTER.size


def test_delta_too_short_for_the_id_of_a_base_ends_a_scan() -> None:
    data = bytearray(build_deltas([b"", NAME]))
    last = parse_pack(NAME, bytes(data)).records[1]
    for length, found in ((32, 2), (31, 1)):
        data[last.offset - ENTRY.size + 8 : last.offset - ENTRY.size + 12] = length.to_bytes(4, "little")
        assert len(list(scan_pack(bytes(data)))) == found


def test_every_flipped_byte_of_header_records_bases_and_footer_is_found() -> None:
    bases = [b"", NAME, NAME[::-1]]
    data = build_deltas(bases)
    last = parse_pack(NAME, data).records[-1]
    end_of_chunks = last.offset + last.stored_length
    for position in (*range(HEADER.size), *range(end_of_chunks, len(data))):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        with pytest.raises((Malformed, NewerFormat)):
            parse_pack(NAME, bytes(damaged))


def test_truncated_pack_is_refused_and_its_whole_chunks_are_found_by_scanning() -> None:
    builder = PackBuilder(DATA_PACK)
    for plain in (os.urandom(50), b"b" * 500, os.urandom(70)):
        builder.add(hash_chunk(plain), *encode(plain)[:2], len(plain))
    builder.add(NAME, DELTA, NAME + b"the rest", 100, NAME)
    data = b"".join(builder.seal())
    records = parse_pack(NAME, data).records
    for length in range(len(data)):
        with pytest.raises(Malformed):
            parse_pack(NAME, data[:length])
        if length >= HEADER.size:
            whole = [record for record in records if record.offset + record.stored_length <= length]
            assert list(scan_pack(data[:length])) == whole


@given(st.binary(max_size=300))
def test_garbage_is_no_pack_and_no_index(data: bytes) -> None:
    for start in (b"", build([])[: HEADER.size]):
        with pytest.raises(Malformed):
            parse_pack(NAME, start + data)
    with pytest.raises(Malformed):
        parse_index(data)


def test_builder_is_full_by_bytes_or_by_chunks() -> None:
    builder = PackBuilder(DATA_PACK)
    builder.add(NAME, RAW, bytes(1000), 1000)
    assert not builder.is_full
    while not builder.is_full:
        builder.add(NAME, RAW, bytes(1 << 20), 1 << 20)
    assert DATA_PACK_BYTES <= builder.size < DATA_PACK_BYTES + (2 << 20)
    many = PackBuilder(TREE_PACK)
    for _ in range(MAX_PACK_CHUNKS):
        assert not many.is_full
        many.add(NAME, RAW, b"x", 1)
    assert many.is_full


@pytest.mark.parametrize("kind", [DATA_PACK, TREE_PACK])
def test_builder_needs_no_more_memory_than_it_says(kind: int) -> None:
    builder = PackBuilder(kind, memoryview(bytearray(builder_bytes(kind))))
    last_free = builder_bytes(kind) - MAX_CHUNK_BYTES - ENTRY.size - 1
    while builder.size < last_free:
        size = min(1 << 20, last_free - builder.size - ENTRY.size)
        builder.add(NAME, RAW, bytes(size), size)
        assert not builder.is_full
    builder.add(NAME, RAW, b"x" * MAX_CHUNK_BYTES, MAX_CHUNK_BYTES)
    assert builder.is_full
    packed = b"".join(builder.seal())
    last = parse_pack(NAME, packed).records[-1]
    assert packed[last.offset : last.offset + last.stored_length] == b"x" * MAX_CHUNK_BYTES


def forge(**changes: int) -> bytes:
    """An index with a good hash whose only record, and base, were changed."""
    fields = {"offset": 64, "stored": 40, "plain": 50, "codec": DELTA, "base": 1, "bases": 1} | changes
    shared = fields["codec"] | fields["base"] << 8
    record = RECORD.pack(NAME, fields["offset"], fields["stored"], fields["plain"], shared)
    body = INDEX_HEADER.pack(b"REPLINDX", fields.get("version", 1), b"", fields.get("sections", 1))
    kind = fields.get("kind", 0) | fields["bases"] << 8
    body += SECTION.pack(NAME, kind, 1000, fields.get("count", 1)) + record + NAME[::-1]
    return body + blake3(body).digest()


def test_impossible_records_are_refused() -> None:
    assert parse_index(forge())[0].records == (Record(NAME, 64, 40, 50, DELTA, NAME[::-1]),)
    for change in (
        {"offset": 63}, {"offset": 2**32 - 1}, {"stored": 51}, {"stored": 950, "plain": 950},
        {"plain": (16 << 20) + 1}, {"kind": 2}, {"count": 0}, {"count": 2}, {"count": 2**32 - 1},
        {"sections": 0}, {"sections": 2}, {"sections": 2**32 - 1},
        {"bases": 0}, {"bases": 2}, {"bases": 2**24 - 1}, {"base": 2}, {"base": 2**24 - 1},
        {"base": 0}, {"codec": RAW}, {"codec": ZSTD}, {"codec": 2},
    ):  # fmt: skip
        with pytest.raises(Malformed):
            parse_index(forge(**change))


@pytest.mark.parametrize("base", [0, 1])
def test_chunk_of_a_later_codec_is_listed_with_or_without_a_base(base: int) -> None:
    (record,) = parse_index(forge(codec=255, base=base))[0].records
    assert (record.codec, record.base) == (255, NAME[::-1] if base else b"")


def test_later_versions_are_told_apart_from_damage() -> None:
    with pytest.raises(NewerFormat):
        parse_index(forge(version=2))
    pack = bytearray(build([]))
    pack[8] = 2
    with pytest.raises(NewerFormat):
        parse_pack(NAME, bytes(pack))


@given(st.lists(chunks, max_size=3))
@settings(max_examples=30)
def test_index_says_what_the_packs_say(packs: list[list[bytes]]) -> None:
    listings = [parse_pack(bytes([n]) * 32, build(plains)) for n, plains in enumerate(packs)]
    listings.append(parse_pack(NAME, build_deltas([b"", NAME, NAME[::-1], NAME])))
    assert parse_index(build_index(listings)) == listings


def test_every_flipped_byte_of_an_index_is_found() -> None:
    data = build_index([parse_pack(NAME, build_deltas([b"", NAME])), PackListing(NAME[::-1], 1, 112, ())])
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        with pytest.raises(Malformed):
            parse_index(bytes(damaged))
    for length in range(len(data)):
        with pytest.raises(Malformed):
            parse_index(data[:length])
