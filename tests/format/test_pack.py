"""Packs and index objects: what was put in is found, and damage is noticed."""

import os

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from replicated.chunk.codec import MAX_CHUNK_BYTES, RAW, decode, encode, hash_chunk
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
    builder_bytes,
    parse_pack,
    scan_pack,
)

NAME = bytes(range(32))
chunks = st.lists(st.binary(min_size=1, max_size=200) | st.just(b"a" * 5000), max_size=8)


def build(plains: list[bytes], kind: int = DATA_PACK) -> bytes:
    builder = PackBuilder(kind)
    for plain in plains:
        codec, stored = encode(plain)
        builder.add(hash_chunk(plain), codec, stored, len(plain))
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


def test_every_flipped_byte_of_header_records_and_footer_is_found() -> None:
    plains = [b"one", b"two" * 100]
    data = build(plains)
    end_of_chunks = len(data) - FOOTER.size - 2 * RECORD.size
    for position in (*range(HEADER.size), *range(end_of_chunks, len(data))):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        with pytest.raises((Malformed, NewerFormat)):
            parse_pack(NAME, bytes(damaged))


def test_truncated_pack_is_refused_and_its_whole_chunks_are_found_by_scanning() -> None:
    plains = [os.urandom(50), b"b" * 500, os.urandom(70)]
    data = build(plains)
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
    """An index with a good hash whose only record was changed."""
    fields = {"offset": 64, "stored": 10, "plain": 20, "codec": 1} | changes
    record = RECORD.pack(NAME, fields["offset"], fields["stored"], fields["plain"], fields["codec"], b"")
    body = INDEX_HEADER.pack(b"REPLINDX", fields.get("version", 1), b"", fields.get("sections", 1))
    body += SECTION.pack(NAME, fields.get("kind", 0), b"", 1000, fields.get("count", 1)) + record
    return body + blake3(body).digest()


def test_impossible_records_are_refused() -> None:
    assert len(parse_index(forge())[0].records) == 1
    for change in (
        {"offset": 63}, {"offset": 2**32 - 1}, {"stored": 21}, {"stored": 950, "plain": 950},
        {"plain": (16 << 20) + 1}, {"kind": 2}, {"count": 0}, {"count": 2}, {"count": 2**32 - 1},
        {"sections": 0}, {"sections": 2}, {"sections": 2**32 - 1},
    ):  # fmt: skip
        with pytest.raises(Malformed):
            parse_index(forge(**change))


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
    assert parse_index(build_index(listings)) == listings


def test_every_flipped_byte_of_an_index_is_found() -> None:
    data = build_index([parse_pack(NAME, build([b"one", b"two"])), PackListing(NAME[::-1], 1, 112, ())])
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        with pytest.raises(Malformed):
            parse_index(bytes(damaged))
    for length in range(len(data)):
        with pytest.raises(Malformed):
            parse_index(data[:length])
