"""docs/format.md says what the code does: its example, its tables and its limits."""

import re
import struct
from dataclasses import fields
from pathlib import Path

import pytest
from blake3 import blake3

from replicate.records import (
    CheckpointRecord,
    ExperimentRecord,
    GitState,
    Gpu,
    PrimaryMetric,
    ProcessIdentity,
    System,
)
from replicated.chunk import cdc, codec
from replicated.format import canonical, listing, manifest, pack, segments, settings
from replicated.format.metadata import Heartbeat
from replicated.store import base

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
BEGIN = "<!-- pack dump: made by tests/format/test_format_document.py -->\n"
END = "<!-- end of pack dump -->\n"

#: One hundred letters `a`: magic, single segment with a size of one byte, one block of run-length kind.
RUN = bytes.fromhex("28b52ffd 20 64 230300 61")
#: What makes 99 letters `a` and a `b` of those: 99 zeros, a run-length block, and twice 1, a raw block.
DIFFERENCE = bytes.fromhex("28b52ffd 20 64 1a0300 00 090000 02")
LETTERS = b"a" * 100
BASE = blake3(LETTERS).digest()
#: The base, width 1, plane 0 is a frame, its length, the frame.
DELTA = BASE + bytes.fromhex("01 01 0e000000") + DIFFERENCE


def make_pack() -> bytes:
    builder = pack.PackBuilder(pack.DATA_PACK)
    for plain, kind, stored, base_id in (
        (b"hello\n", codec.RAW, b"hello\n", b""),
        (LETTERS, codec.ZSTD, RUN, b""),
        (b"a" * 99 + b"b", codec.DELTA, DELTA, BASE),
    ):
        assert codec.decode(kind, stored, len(plain), LETTERS if base_id else None) == plain
        builder.add(codec.hash_chunk(plain), kind, stored, len(plain), base_id)
    return b"".join(builder.seal())


CODECS = {codec.RAW: "plain", codec.ZSTD: "zstd", codec.DELTA: "delta"}


def annotate(data: bytes) -> str:
    """The pack field by field: offset, bytes, meaning."""
    listed = pack.parse_pack(bytes(32), data)
    fields: list[tuple[int, str]] = [(8, 'magic "REPLPACK"'), (1, "version"), (1, "kind: data"), (6, "zeros")]
    for record in listed.records:
        fields += [
            (4, 'magic "CHNK"'),
            (1, f"codec: {CODECS[record.codec]}"),
            (3, "zeros"),
            (4, f"stored length: {record.stored_length}"),
            (4, f"plain length: {record.plain_length}"),
            (32, "chunk id"),
            (record.stored_length, "stored bytes"),
        ]
    for number, record in enumerate(listed.records):
        fields += [
            (32, f"record {number}: chunk id"),
            (4, f"offset: {record.offset}"),
            (4, f"stored length: {record.stored_length}"),
            (4, f"plain length: {record.plain_length}"),
            (4, f"codec: {CODECS[record.codec]}, {'base 1' if record.base else 'no base'}"),
        ]
    fields += [
        (32, "base 1"),
        (4, "number of records"),
        (4, "number of bases"),
        (8, 'magic "REPLPEND"'),
        (32, "hash"),
    ]
    lines = []
    position = 0
    for size, meaning in fields:
        for start in range(position, position + size, 16):
            part = data[start : min(start + 16, position + size)]
            lines.append(f"{start:04x}  {part.hex(' '):<47}  {meaning if start == position else ''}".rstrip())
        position += size
    assert position == len(data)
    return "\n".join(lines)


def test_example_is_what_the_code_writes() -> None:
    _, _, rest = DOCUMENT.read_text().partition(BEGIN)
    dump, _, _ = rest.partition(END)
    assert dump == f"```\n{annotate(make_pack())}\n```\n"


def test_example_in_the_document_is_a_pack() -> None:
    """Without the code that made it: the bytes alone, as a reader of the document would take them."""
    _, _, rest = DOCUMENT.read_text().partition(BEGIN)
    lines = rest.partition(END)[0].splitlines()[1:-1]
    data = bytes.fromhex("".join(line[6:53] for line in lines))
    records = pack.parse_pack(bytes(32), data).records
    assert [(record.chunk_id, record.codec, record.base) for record in records] == [
        (blake3(b"hello\n").digest(), 0, b""),
        (blake3(b"a" * 100).digest(), 1, b""),
        (blake3(b"a" * 99 + b"b").digest(), 3, blake3(b"a" * 100).digest()),
    ]


@pytest.mark.parametrize(
    ("heading", "layout"),
    [
        ("Header (16 bytes):", pack.HEADER),
        ("Entry header (48 bytes)", pack.ENTRY),
        ("Record (48 bytes)", pack.RECORD),
        ("Footer (48 bytes)", pack.FOOTER),
        ("## Index objects\n\nHeader (16 bytes):", listing.INDEX_HEADER),
        ("a section header (44 bytes)", listing.SECTION),
    ],
)
def test_table_is_that_of_the_struct(heading: str, layout: struct.Struct) -> None:
    _, found, rest = DOCUMENT.read_text().partition(heading)
    assert found
    table = rest.partition("\n\n|")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (u8|u32|bytes) \|", table, re.M)
    codes = {"u8": "B", "u32": "I"}
    described = "<" + "".join(f"{size}s" if kind == "bytes" else codes[kind] for _, size, kind in rows)
    assert described == layout.format
    position = 0
    for offset, size, _ in rows:
        assert int(offset) == position
        position += int(size)
    assert position == layout.size


def test_limits_are_those_of_the_code() -> None:
    modules = (codec, cdc, canonical, listing, manifest, pack, segments, settings, base)
    limits = re.findall(r"`([A-Z_]+)` = (\d+)", DOCUMENT.read_text())
    assert len(limits) > 10
    for name, value in limits:
        assert {getattr(module, name) for module in modules if hasattr(module, name)} == {int(value)}, name


def test_numbers_in_the_text_are_those_of_the_code() -> None:
    text = " ".join(DOCUMENT.read_text().split())
    default = cdc.ChunkerParameters()
    sizes = [f"({s.minimum}, {s.average}, {s.maximum})" for s in (default.text, default.binary)]
    assert f"`whole_below` ({default.whole_below})" in text
    assert f"`text` {sizes[0]} if the first {cdc.TEXT_SAMPLE_BYTES} bytes" in text
    assert f"`binary` {sizes[1]}" in text
    assert f'`algorithm` `"{cdc.ALGORITHM}"`, `normalization` {cdc.NORMALIZATION}' in text
    assert f"more than {canonical.MAX_PLAIN_INT_BITS} bits" in text
    assert settings.FORMAT_VERSION == pack.PACK_VERSION == listing.INDEX_VERSION == 1
    seal = len(canonical.seal({"a": 1})) - len('{\n "a": 1')
    assert f"these last {seal} bytes" in text


def test_members_of_records_are_all_described() -> None:
    text = DOCUMENT.read_text()
    records = (
        ExperimentRecord,
        CheckpointRecord,
        System,
        Gpu,
        GitState,
        ProcessIdentity,
        PrimaryMetric,
        Heartbeat,
    )
    for record in records:
        for field in fields(record):
            if field.name in ("part", "waits_for"):
                continue  # of a checkpoint that is on its way, and in no repository
            assert f"`{field.name}`" in text, f"{record.__name__}.{field.name}"


def test_files_that_the_text_names_exist() -> None:
    for path in re.findall(r"`((?:examples|replicated|tests)/[\w/.]+)`", DOCUMENT.read_text()):
        assert (DOCUMENT.parents[1] / path).exists(), path
