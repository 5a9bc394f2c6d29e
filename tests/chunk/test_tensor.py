"""Where files of tensors are cut, and what becomes of files that only look like them."""

import json
import random
import struct
import zipfile

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from replicated.chunk.containers.source import MAX_LOOKED_AT_BYTES, MAX_READS, Malformed, Source
from replicated.chunk.tensor import (
    MAX_GAP_BYTES,
    MAX_REGIONS,
    MIN_REGION_BYTES,
    PIECE_BYTES,
    Layout,
    Region,
    find_layout,
)

HEAD_BYTES = 8192
KIB = 1 << 10


def noise(length, seed=0):
    return random.Random(seed).randbytes(length)


class File:
    """A file that counts how it is read."""

    def __init__(self, data, size=None):
        self.data = data
        self.size = len(data) if size is None else size
        self.reads = 0
        self.bytes_read = 0

    def read_at(self, offset, length):
        assert 0 <= offset <= offset + length <= self.size
        self.reads += 1
        self.bytes_read += length
        return self.data[offset : offset + length]

    def layout(self):
        return find_layout(self.size, self.data[:HEAD_BYTES], self.read_at)


def layout_of(data):
    layout = File(data).layout()
    if layout is not None:
        check(layout, len(data))
    return layout


def places(layout):
    return [(region.start, region.size) for region in layout.regions]


def check(layout, size):
    """What everybody who is given a layout relies on."""
    assert layout.size == size
    assert 0 < len(layout.regions) <= MAX_REGIONS
    end = 0
    for region in layout.regions:
        assert (
            end <= region.start and region.size >= MIN_REGION_BYTES and region.item_bytes in (0, 1, 2, 4, 8)
        )
        end = region.start + region.size
    assert end <= size
    region_bytes = sum(region.size for region in layout.regions)
    assert all(length > 0 for _, length in layout.gaps)
    assert sum(length for _, length in layout.gaps) == size - region_bytes <= MAX_GAP_BYTES
    assert sum(layout.lengths) == size and min(layout.lengths[1:]) > 0
    assert sum(layout.lengths[1::2]) == region_bytes
    parts = sorted([*layout.gaps, *((piece.start, piece.size) for piece in layout.pieces)])
    position = 0
    for start, length in parts:
        assert start == position
        position += length
    assert position == size


# The layout


def test_lengths_alternate_between_gaps_and_regions():
    regions = (Region(10, 5000, 4), Region(6000, 4096, 0), Region(10096, 5000, 2), Region(15100, 4900, 0))
    layout = Layout("kind", 20000, regions)
    assert layout.lengths == [10, 5000, 990, 9096, 4, 4900]
    assert layout.gaps == [(0, 10), (5010, 990), (15096, 4)]


def test_a_region_at_the_beginning_has_a_gap_of_nothing_before_it():
    layout = Layout("kind", 5001, (Region(0, 5000, 4),))
    assert layout.lengths == [0, 5000, 1]
    assert layout.gaps == [(5000, 1)]


def test_regions_are_cut_into_pieces_from_their_starts():
    layout = Layout("kind", 3 * PIECE_BYTES, (Region(7, 5000, 2), Region(9000, 2 * PIECE_BYTES + 1, 8)))
    assert list(layout.pieces) == [
        (7, 5000, 2),
        (9000, PIECE_BYTES, 8),
        (9000 + PIECE_BYTES, PIECE_BYTES, 8),
        (9000 + 2 * PIECE_BYTES, 1, 8),
    ]


def test_the_signature_is_that_of_sizes_elements_and_kind():
    def signature(kind, *regions):
        return Layout(kind, 1 << 20, regions).signature

    known = signature("zip", Region(100, 5000, 4), Region(6000, 6000, 4))
    assert len(known) == 32
    assert known == signature("zip", Region(200, 5000, 4), Region(7000, 6000, 4))
    assert known != signature("hdf5", Region(100, 5000, 4), Region(6000, 6000, 4))
    assert known != signature("zip", Region(100, 5000, 4), Region(6000, 6000, 2))
    assert known != signature("zip", Region(100, 6000, 4), Region(6100, 5000, 4))


# safetensors


def test_each_tensor_of_a_safetensors_file_is_a_region(files):
    tensors = {"a": ("F32", noise(40_000)), "b": ("BF16", noise(20_000)), "c": ("F6_E2M3", noise(30_000))}
    data, expected = files.safetensors(tensors, {"format": "pt"})
    layout = layout_of(data)
    assert layout.kind == "safetensors"
    assert places(layout) == expected
    assert [region.item_bytes for region in layout.regions] == [4, 2, 0]
    assert layout.gaps == [(0, expected[0][0])]


def test_short_tensors_are_gaps(files):
    tensors = {"a": ("F32", noise(40_000)), "b": ("F32", noise(MIN_REGION_BYTES - 4)), "c": ("F32", b"")}
    data, expected = files.safetensors(tensors)
    assert places(layout_of(data)) == expected[:1]


def with_header(header, data_bytes=100_000):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def tensor(begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": [1], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"__metadata__": {"a": "b"}},
        {"a": tensor(0, 50_000), "b": tensor(49_999, 100_000)},
        {"a": tensor(0, 50_000), "b": tensor(0, 50_000)},
        {"a": tensor(0, 100_001)},
        {"a": tensor(1 << 64, (1 << 64) + 50_000)},
        {"a": tensor(-50_000, 0)},
        {"a": tensor(50_000, 0)},
        {"a": tensor(0, 50_000.0)},
        {"a": tensor(0, "50000")},
        {"a": {"dtype": "F32", "data_offsets": [0]}},
        {"a": {"dtype": None, "data_offsets": [0, 50_000]}},
        {"a": {"dtype": "F32"}},
        {"a": [0, 50_000]},
        b"{",
        b"{}" + b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' + b"[]," * 300_000 + b"}",
        b'{"a":' + b"1" * 5000 + b"}",
        b'{"\xff": 1}',
        b"{\0",
    ],
    ids=lambda header: str(header)[:50],
)
def test_a_bad_header_of_safetensors_has_no_layout(header):
    assert layout_of(with_header(header)) is None


@pytest.mark.parametrize("length", [0, 1, 100_000, 1 << 32, (1 << 64) - 1])
def test_a_wrong_length_of_the_header_has_no_layout(length):
    assert layout_of(struct.pack("<Q", length) + b'{"a": 1}' + bytes(50_000)) is None


# npy and npz


@pytest.mark.parametrize(
    ("descr", "item_bytes"),
    [
        ("<f4", 4),
        (">i8", 8),
        ("|b1", 1),
        ("<f2", 2),
        ("|V2", 2),
        ("<c8", 4),
        ("<c16", 8),
        ("<U7", 4),
        ("|S9", 1),
        ("<M8[ns]", 8),
        ("|O", 0),
        ("<f16", 0),
        ([("a", "<f4"), ("b", "<i8")], 0),
    ],
)
def test_the_data_of_an_array_is_a_region(files, descr, item_bytes):
    data, expected = files.npy(descr, noise(50_000))
    layout = layout_of(data)
    assert (layout.kind, places(layout)) == ("npy", expected)
    assert layout.regions[0].item_bytes == item_bytes


def test_the_header_of_an_array_may_be_longer_than_64_kib(files):
    data, expected = files.npy(
        [(f"field_{number}", "<f4") for number in range(5000)], noise(400_000), version=2
    )
    assert places(layout_of(data)) == expected


def test_an_array_that_ends_in_its_header_has_no_layout(files):
    data, _ = files.npy("<f4", b"")
    assert layout_of(data) is None
    assert layout_of(data[:9]) is None
    assert layout_of(b"\x93NUMPY\2\0" + b"\xff" * 50_000) is None


def test_each_array_of_an_archive_is_a_region(files):
    first, first_places = files.npy("<f4", noise(40_000))
    second, second_places = files.npy("<i8", noise(80_000))
    data, entries = files.zip({"first.npy": first, "second.npy": second})
    layout = layout_of(data)
    assert layout.kind == "zip"
    assert [(region.size, region.item_bytes) for region in layout.regions] == [(40_000, 4), (80_000, 8)]
    inner = [first_places[0][0], second_places[0][0]]
    assert [region.start for region in layout.regions] == [
        start + header for (start, _), header in zip(entries, inner, strict=True)
    ]


def test_a_compressed_entry_is_a_region_as_a_whole(files):
    array, _ = files.npy("<f4", noise(40_000))
    data, entries = files.zip({"first.npy": array, "second.npy": array}, zipfile.ZIP_DEFLATED)
    layout = layout_of(data)
    assert places(layout) == entries
    assert {region.item_bytes for region in layout.regions} == {0}


def test_an_entry_with_a_broken_array_leaves_no_layout(files):
    data, _ = files.zip({"first.npy": noise(50_000), "second.npy": b"\x93NUMPY\2\0" + b"\xff" * 50_000})
    assert layout_of(data) is None


# torch


@pytest.mark.parametrize("is_long", [False, True])
def test_each_storage_of_a_torch_file_is_a_region(files, is_long):
    storages = [
        noise(length, length) for length in (40_000, 4, 70_000, MIN_REGION_BYTES, MIN_REGION_BYTES - 1)
    ]
    data, expected = files.torch("epoch_1", storages, is_long=is_long)
    layout = layout_of(data)
    assert layout.kind == "zip"
    assert places(layout) == [place for place in expected if place[1] >= MIN_REGION_BYTES]
    assert all(region.start % 64 == 0 and region.item_bytes == 0 for region in layout.regions)


def test_checkpoints_under_other_names_are_of_the_same_tensors(files):
    storages = [noise(length, length) for length in (40_000, 4, 70_000)]
    first = layout_of(files.torch("epoch_9", storages)[0])
    second = layout_of(files.torch("the_tenth_epoch", storages, description=b"longer" * 50)[0])
    assert first.signature == second.signature
    assert places(first) != places(second)


def test_a_pickle_that_grows_does_not_make_it_other_tensors(files):
    """It holds counters: 255 takes two bytes and 256 three."""
    storages = [noise(100_000)]
    shorter = layout_of(files.torch("epoch", storages, description=bytes(10_000))[0])
    longer = layout_of(files.torch("epoch", storages, description=bytes(10_001))[0])
    assert len(shorter.regions) == 1
    assert shorter.signature == longer.signature


def test_a_huge_pickle_is_a_region(files):
    pickle = noise((1 << 20) + 1)
    layout = layout_of(files.torch("epoch", [noise(100_000)], description=pickle)[0])
    assert [region.size for region in layout.regions] == [len(pickle), 100_000]


@pytest.mark.parametrize("comment", [b"", b"a comment", b"c" * 0xFFFF])
def test_an_archive_may_end_with_a_comment(files, comment):
    data, entries = files.zip({"a": noise(200_000)})
    data = data[:-2] + struct.pack("<H", len(comment)) + comment
    assert places(layout_of(data)) == entries


@pytest.mark.parametrize("position", ["local header", "directory", "long end"])
def test_an_archive_whose_records_are_not_where_it_says_has_no_layout(files, position):
    data, _ = files.torch("epoch", [noise(50_000)], is_long=True)
    magic = {"local header": b"PK\3\4", "directory": b"PK\1\2", "long end": b"PK\6\6"}[position]
    at = data.rindex(magic)
    if position == "local header":
        at = data.index(b"epoch/data/0") - 30
    assert layout_of(data) is not None
    assert layout_of(data[:at] + b"PK\0\0" + data[at + 4 :]) is None


def test_an_archive_that_goes_on_behind_its_end_has_no_layout(files):
    data, _ = files.zip({"a": noise(50_000)})
    assert layout_of(data + b"\0") is None
    assert layout_of(data[:-1]) is None


# Whether it is worth it


@pytest.mark.parametrize("data", [b"", b"P", b"PK\3\4", bytes(50_000), b"{" * 50_000, b"text\n" * 10_000])
def test_other_files_have_no_layout_and_are_hardly_read(data):
    file = File(data)
    assert file.layout() is None
    assert file.reads <= 1


def test_many_short_regions_are_not_worth_it(files):
    short = {f"t{number}": ("F32", noise(15 * KIB)) for number in range(20)}
    assert layout_of(files.safetensors(short)[0]) is None
    short |= {f"u{number}": ("F32", noise(17 * KIB)) for number in range(20)}
    assert len(layout_of(files.safetensors(short)[0]).regions) == 40


def test_long_gaps_are_not_worth_it(files):
    tensors = {"a": ("F32", bytes(2 * MAX_GAP_BYTES))}
    assert layout_of(files.safetensors(tensors, {"note": "n" * (MAX_GAP_BYTES - KIB)})[0]) is not None
    assert layout_of(files.safetensors(tensors, {"note": "n" * MAX_GAP_BYTES})[0]) is None


def test_more_gaps_than_regions_are_not_worth_it(files):
    tensors = {"a": ("F32", bytes(100 * KIB))}
    assert layout_of(files.safetensors(tensors, {"note": "n" * 99 * KIB})[0]) is not None
    assert layout_of(files.safetensors(tensors, {"note": "n" * 101 * KIB})[0]) is None


@pytest.mark.parametrize(("count", "is_worth_it"), [(MAX_REGIONS, True), (MAX_REGIONS + 1, False)])
def test_so_many_regions_a_layout_has(count, is_worth_it):
    size = 16 * KIB
    header = ",".join(
        f'"{n}":{{"dtype":"F32","data_offsets":[{n * size},{(n + 1) * size}]}}' for n in range(count)
    )
    data = with_header(f"{{{header}}}".encode(), 0)
    layout = File(data, len(data) + count * size).layout()
    assert (layout is not None) == is_worth_it


def test_a_file_that_has_become_shorter_has_no_layout(files):
    data, _ = files.torch("epoch", [noise(50_000)])
    assert File(data[:-10], len(data)).layout() is None


def test_trouble_with_reading_is_passed_on(files):
    data, _ = files.torch("epoch", [noise(50_000)])

    def read_at(offset, length):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        find_layout(len(data), data[:HEAD_BYTES], read_at)


def test_entries_are_read_at_their_beginnings_only(files):
    file = File(files.torch("epoch", [noise(100_000, seed) for seed in range(10)])[0])
    assert len(file.layout().regions) == 10
    assert file.reads <= 12
    assert file.bytes_read < 100 * KIB


# The budget


def test_only_so_many_places_are_looked_at():
    file = File(b"", 1 << 40)
    source = Source(file.size, b"", lambda offset, length: file.read_at(offset, length) or bytes(length))
    with pytest.raises(Malformed):
        for number in range(MAX_READS + 1):
            source.read(number << 20, 1)
    assert file.reads == MAX_READS


def test_only_so_many_bytes_are_looked_at():
    looked_at = 0
    source = Source(1 << 40, bytes(HEAD_BYTES), lambda offset, length: bytes(length))
    with pytest.raises(Malformed):
        while True:
            looked_at += len(source.read(100, KIB))
    assert looked_at == MAX_LOOKED_AT_BYTES


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (100, 1), (0, 101), (1 << 64, 1)])
def test_there_is_nothing_outside_of_a_file(offset, length):
    with pytest.raises(Malformed):
        Source(100, bytes(100), lambda offset, length: bytes(length)).read(offset, length)


# Any bytes


def sample_files(files):
    """One small file of each kind, still worth it."""
    array, _ = files.npy("<f4", noise(17_000))
    h5 = files.Hdf5()
    group = h5.group({"a": h5.dataset(noise(18_000)), "b": h5.chunked_dataset([noise(17_000)] * 2)})
    h5_data, _ = h5.finish(h5.group({"g": group}))
    newest = files.Hdf5(newest=True)
    newest_data, _ = newest.finish(newest.group({"a": newest.dataset(noise(18_000))}))
    tensors = {"a": ("F32", noise(17_000)), "b": ("F16", noise(18_000))}
    return [
        array,
        files.safetensors(tensors)[0],
        files.torch("epoch", [noise(17_000), noise(18_000)], is_long=True)[0],
        files.zip({"a.npy": array, "b.npy": array})[0],
        h5_data,
        newest_data,
        files.zip({"model.weights.h5": h5_data})[0],
    ]


@pytest.fixture(scope="module")
def samples(files):
    return sample_files(files)


def meaningful(data):
    """Positions outside of the data, where a change can matter."""
    layout = layout_of(data)
    return [position for start, length in layout.gaps for position in range(start, start + length)]


def test_the_samples_have_layouts(samples):
    assert [layout_of(data).kind for data in samples] == [
        "npy",
        "safetensors",
        "zip",
        "zip",
        "hdf5",
        "hdf5",
        "zip",
    ]


NUMBERS = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\xff" * 4, b"\xff" * 2, b"\0\0\0\x80", b"\xff" * 7 + b"\x7f"]),
    st.integers(0, 40_000).map(lambda number: struct.pack("<Q", number)),
)


@pytest.mark.parametrize("kind", range(7))
@given(choices=st.data())
def test_damage_never_raises(samples, kind, choices):
    data = bytearray(samples[kind])
    positions = meaningful(samples[kind])
    for _ in range(choices.draw(st.integers(1, 4))):
        position = positions[choices.draw(st.integers(0, len(positions) - 1))]
        new = choices.draw(NUMBERS)
        data[position : position + len(new)] = new
    file = File(bytes(data))
    layout = file.layout()
    if layout is not None:
        check(layout, len(data))
    assert file.reads < 1000


@pytest.mark.parametrize("kind", range(7))
def test_each_byte_may_be_damaged(samples, kind):
    """All bytes that are not data, one after the other, in two ways; headers are few hundred bytes."""
    data = bytearray(samples[kind])
    for position in meaningful(samples[kind])[:: 1 if kind < 4 else 3]:
        for flipped in (0xFF, 0x01):
            data[position] ^= flipped
            layout = find_layout(len(data), bytes(data[:HEAD_BYTES]), lambda o, n: bytes(data[o : o + n]))
            if layout is not None:
                check(layout, len(data))
            data[position] ^= flipped


@pytest.mark.parametrize("kind", range(7))
@given(choices=st.data())
def test_files_cut_off_and_joined_never_raise(samples, kind, choices):
    first = samples[kind]
    second = choices.draw(st.sampled_from(samples))
    middle = choices.draw(st.integers(0, len(first)))
    start = choices.draw(st.integers(0, len(second)))
    layout_of(first[:middle])
    layout_of(first[:middle] + second[start:])


END = b"PK\5\6" + bytes(18)
LONG_END = b"PK\5\6" + b"\xff" * 16 + bytes(2)


@given(
    magic=st.sampled_from(
        [b"", b"PK\3\4", b"\x93NUMPY", b"\x89HDF\r\n\x1a\n", b"\x20\0\0\0\0\0\0\0{", b"PK\5\6"]
    ),
    body=st.binary(max_size=300),
    tail=st.sampled_from(
        [b"", b"PK\5\6" + bytes(18), b"PK\6\7" + bytes(16) + b"PK\5\6" + b"\xff" * 16 + b"\0\0"]
    ),
    filler=st.integers(0, 50_000),
)
@example(magic=b"\x89HDF\r\n\x1a\n", body=b"", tail=b"", filler=0)
def test_any_bytes_never_raise(magic, body, tail, filler):
    layout_of(magic + body + bytes(filler) + tail)
