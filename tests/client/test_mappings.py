"""Files that this process has mapped shared and writable."""

import mmap
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate import mappings
from replicate.mappings import find_shared_mappings, parse_maps


@pytest.fixture(params=["asked for one by one", "read"])
def way(request, monkeypatch):
    """Both ways to find them: that of new kernels, and that of all."""
    if request.param == "read":
        monkeypatch.setattr(mappings, "_PROCMAP_QUERY", 0)


@pytest.fixture
def map_file(tmp_path):
    """Map a new file of the project; the mapping."""
    mapped = []

    def make(name, access=mmap.ACCESS_WRITE):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w+b") as file:
            file.write(bytes(mmap.PAGESIZE))
            file.flush()
            mapped.append(mmap.mmap(file.fileno(), 0, access=access))
        return mapped[-1]

    yield make
    for mapping in mapped:
        mapping.close()


def found(directory):
    return find_shared_mappings(os.fsencode(directory))


def test_nothing_is_mapped_by_itself(way, tmp_path):
    assert found(tmp_path) == []


@pytest.mark.parametrize("name", [b"a", b"below/a", b"with space", b"\xff\xfe", b"n\nl", b"tab\t\\x", b"%41"])
def test_a_file_that_is_mapped_writable_is_found(way, tmp_path, map_file, name):
    mapping = map_file(name)
    assert found(tmp_path) == [name]
    mapping.close()
    assert found(tmp_path) == []


def test_a_memmap_of_numpy_is_found(way, tmp_path):
    array = np.memmap(tmp_path / "data.npy", np.float32, "w+", shape=(1000,))
    assert found(tmp_path) == [b"data.npy"]
    del array
    array = np.memmap(tmp_path / "data.npy", np.float32, "r", shape=(1000,))
    assert found(tmp_path) == []
    del array
    array = np.memmap(tmp_path / "data.npy", np.float32, "c", shape=(1000,))
    assert found(tmp_path) == []
    del array


def test_only_files_below_the_directory_are_named_and_once(way, tmp_path, map_file):
    for name in (b"project/b", b"project/a", b"projects/c", b"other"):
        map_file(name)
    with open(tmp_path / "project/a", "r+b") as file, mmap.mmap(file.fileno(), 0):
        assert found(tmp_path / "project") == [b"a", b"b"]
    assert b"project/a" in found(tmp_path)
    assert [path for path in found("/") if path.endswith(b"/project/a")] == [
        os.fsencode(tmp_path / "project/a")[1:]
    ]


def test_the_directory_may_be_given_by_a_link(way, tmp_path, map_file):
    map_file(b"project/a")
    (tmp_path / "link").symlink_to("project")
    assert found(tmp_path / "link") == [b"a"]


def test_a_file_that_was_removed_is_not_named(way, tmp_path, map_file):
    map_file(b"a")
    map_file(b"b (deleted)")
    os.unlink(tmp_path / "a")
    assert found(tmp_path) == [b"b (deleted)"]


def test_memory_and_devices_are_not_named(way, tmp_path, map_file):
    map_file(b"a")
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    descriptor = os.memfd_create("memory")
    os.ftruncate(descriptor, mmap.PAGESIZE)
    memory = mmap.mmap(descriptor, 0)
    assert found("/") == [os.fsencode(tmp_path / "a")[1:]]
    memory.close()
    os.close(descriptor)
    shared.close()


def test_a_system_without_proc_has_no_mappings_to_be_known(tmp_path, map_file, monkeypatch):
    map_file(b"a")
    monkeypatch.setattr(mappings, "_MAPS", str(tmp_path / "missing"))
    assert found(tmp_path) == []


LINES = {
    b"7f00-7f01 rw-s 00000000 fd:01 42                         /data/a": [b"/data/a"],
    b"7f00-7f01 rwxs 00001000 00:2a 7   /d/ b": [b"/d/ b"],
    b"7f00-7f01 rw-s 00001000 fd:01 7   /d/n\\012l": [b"/d/n\\012l", b"/d/n\nl"],
    b"7f00-7f01 rw-p 00000000 fd:01 42                         /data/private": [],
    b"7f00-7f01 r--s 00000000 fd:01 42                         /data/read-only": [],
    b"7f00-7f01 rw-p 00000000 00:00 0 ": [],
    b"7ffc-7ffd rw-p 00000000 00:00 0                          [stack]": [],
    b"7f00-7f01 rw-p 00000000 fd:01 9   /lib/x rw-s y": [],
}


@given(st.lists(st.sampled_from(sorted(LINES))))
def test_lines_are_taken_one_by_one(lines):
    text = b"".join(line + b"\n" for line in lines)
    assert parse_maps(text) == [path for line in lines for path in LINES[line]]


@given(st.binary())
def test_any_bytes_can_be_parsed(text):
    assert all(path.startswith(b"/") for path in parse_maps(text))
