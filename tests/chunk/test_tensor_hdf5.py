"""HDF5: the datasets of all groups are found, whatever the groups refer to."""

import random
import struct

import pytest

from replicated.chunk.tensor import find_layout

HEAD_BYTES = 8192


def noise(length, seed=0):
    return random.Random(seed).randbytes(length)


def layout_of(data):
    return find_layout(len(data), data[:HEAD_BYTES], lambda offset, length: data[offset : offset + length])


def places(layout):
    return [(region.start, region.size) for region in layout.regions]


@pytest.fixture(params=[False, True], ids=["classic", "newest"])
def h5(request, files):
    return files.Hdf5(newest=request.param)


def test_each_dataset_of_all_groups_is_a_region(h5):
    layers = {}
    for number in range(20):
        weights, bias = h5.dataset(noise(40_000, number)), h5.dataset(noise(400, number))
        layers[f"layer_{number}"] = h5.group({"vars": h5.group({"0": weights, "1": bias})})
    data, expected = h5.finish(h5.group({"layers": h5.group(layers)}))
    layout = layout_of(data)
    assert layout.kind == "hdf5"
    assert places(layout) == [place for place in expected if place[1] == 40_000]
    assert {region.item_bytes for region in layout.regions} == {4}


def test_each_chunk_of_a_dataset_is_a_region(h5):
    dataset = h5.chunked_dataset([noise(20_000, number) for number in range(5)], item_bytes=2)
    data, expected = h5.finish(h5.group({"rows": dataset}))
    layout = layout_of(data)
    assert places(layout) == expected
    assert {region.item_bytes for region in layout.regions} == {2}


def test_the_elements_of_filtered_chunks_are_unknown(h5):
    dataset = h5.chunked_dataset([noise(20_000)], filters=[b"\1\1" + bytes(6) + bytes(16)])
    layout = layout_of(h5.finish(h5.group({"rows": dataset}))[0])
    assert [region.item_bytes for region in layout.regions] == [0]


@pytest.mark.parametrize(
    ("datatype_class", "item_bytes", "flags", "expected"),
    [(0, 8, 0, 8), (1, 2, 0, 2), (8, 1, 0, 1), (5, 2, 0, 2), (6, 8, 0, 0), (1, 16, 0, 0), (1, 4, 2, 0)],
    ids=["integer", "float", "enumeration", "opaque", "compound", "long double", "shared"],
)
def test_the_element_is_what_the_datatype_says(h5, datatype_class, item_bytes, flags, expected):
    dataset = h5.dataset(noise(50_000), item_bytes, datatype_class, flags)
    layout = layout_of(h5.finish(h5.group({"a": dataset}))[0])
    assert [region.item_bytes for region in layout.regions] == [expected]


def test_a_dataset_of_two_names_is_one_region(h5):
    dataset = h5.dataset(noise(50_000))
    data, expected = h5.finish(h5.group({"a": dataset, "b": h5.group({"again": dataset})}))
    assert places(layout_of(data)) == expected


def test_groups_that_contain_themselves_are_visited_once(h5):
    dataset = h5.dataset(noise(50_000))
    group = h5.group({"a": dataset, "loop": 0x123456})
    data, expected = h5.finish(h5.group({"group": group}))
    looped = data.replace(struct.pack("<Q", 0x123456), struct.pack("<Q", group))
    assert looped != data
    assert places(layout_of(looped)) == expected


def test_a_tree_that_contains_itself_is_visited_once(files):
    h5 = files.Hdf5()
    dataset = h5.dataset(noise(50_000))
    own_address = len(h5.file) + -len(h5.file) % 8
    key = bytes(8)
    assert h5.tree(0, 1, 1, key + struct.pack("<Q", own_address) + key) == own_address
    loop = h5.object([(0x11, 0, struct.pack("<2Q", own_address, 0))])
    data, expected = h5.finish(h5.group({"a": dataset, "loop": loop}))
    assert places(layout_of(data)) == expected


def test_a_header_that_continues_in_itself_is_read_once(files):
    h5 = files.Hdf5()
    dataset = h5.dataset(noise(50_000))
    block = len(h5.file) + -len(h5.file) % 8 + 16
    loop = h5.object([(0x10, 0, struct.pack("<2Q", block, 24))])
    data, expected = h5.finish(h5.group({"a": dataset, "loop": loop}))
    assert places(layout_of(data)) == expected


@pytest.mark.parametrize("address", [(1 << 64) - 1, (1 << 64) - 2, 1 << 40, 0])
def test_an_object_that_is_nowhere_leaves_no_layout_or_is_not_there(files, address):
    h5 = files.Hdf5()
    dataset = h5.dataset(noise(50_000))
    data, expected = h5.finish(h5.group({"a": dataset, "b": address}))
    layout = layout_of(data)
    # Only the address that means nothing is allowed.
    assert (layout and places(layout)) == (expected if address == (1 << 64) - 1 else None)


def test_symbolic_links_are_not_followed(files):
    h5 = files.Hdf5()
    dataset = h5.dataset(noise(50_000))
    data, expected = h5.finish(h5.group({"a": dataset, "b": 0x123456}))
    assert layout_of(data) is None
    link = struct.pack("<QI", 0x123456, 0)
    assert places(layout_of(data.replace(link, struct.pack("<QI", 0x123456, 2)))) == expected


def test_a_dataset_without_data_is_no_region(h5):
    empty = h5.object([(8, 0, struct.pack("<2B2Q", 3, 1, (1 << 64) - 1, 50_000))])
    compact = h5.object([(8, 0, struct.pack("<2BH", 3, 0, 40) + bytes(40))])
    data, expected = h5.finish(h5.group({"a": h5.dataset(noise(50_000)), "b": empty, "c": compact}))
    assert places(layout_of(data)) == expected


def test_weights_within_a_keras_file_are_found(files):
    h5 = files.Hdf5()
    weights, inner = h5.finish(h5.group({"a": h5.dataset(noise(50_000)), "b": h5.dataset(noise(60_000))}))
    entries = {"metadata.json": b"{}", "config.json": b"{" + b" " * 5000 + b"}", "model.weights.h5": weights}
    data, outer = files.zip(entries)
    layout = layout_of(data)
    assert layout.kind == "zip"
    assert places(layout) == [(outer[2][0] + start, length) for start, length in inner]
    assert {region.item_bytes for region in layout.regions} == {4}


@pytest.mark.parametrize(
    ("offset", "value"), [(8, 4), (13, 4), (14, 4), (24, 1)], ids=["version", "addresses", "lengths", "base"]
)
def test_other_superblocks_are_not_understood(files, offset, value):
    h5 = files.Hdf5()
    data, _ = h5.finish(h5.group({"a": h5.dataset(noise(50_000))}))
    assert layout_of(data) is not None
    assert layout_of(data[:offset] + bytes([value]) + data[offset + 1 :]) is None


def test_a_header_of_too_many_messages_has_no_layout(files):
    h5 = files.Hdf5(newest=True)
    dataset = h5.dataset(bytes(4 << 20))
    nothing = (0, 0, b"")
    few = h5.finish(h5.group({"a": dataset, "b": h5.object([nothing] * 1000)}))
    assert places(layout_of(few[0])) == few[1]
    many, _ = h5.finish(h5.group({"a": dataset, "b": h5.object([nothing] * (1 << 18))}))
    assert layout_of(many) is None
