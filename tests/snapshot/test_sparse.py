"""Sparse files: holes are neither read nor copied, and what is read is the same."""

import os
import random
from contextlib import ExitStack, contextmanager

import pytest

from replicate.errors import CaptureFailed
from replicated import file_systems
from replicated.snapshot import duplicate
from replicated.snapshot.entries import HELD, SPOOLED, Row
from replicated.snapshot.frozen import FrozenFiles, open_unchanged
from replicated.snapshot.holes import DataMap, data_bytes

MIB = 1 << 20


@pytest.fixture
def sparse(tmp_path):
    """A file of 300 MiB that holds 2 MiB of data, one in the middle and one at the end."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(300 * MIB)
        for offset in (100 * MIB, 299 * MIB):
            file.seek(offset)
            file.write(random.Random(offset).randbytes(MIB))
    return path


@pytest.fixture
def read_bytes(monkeypatch):
    """Counts what is read from files."""
    counts = []
    preadv = os.preadv

    def count(descriptor, buffers, offset):
        counts.append(preadv(descriptor, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", count)
    return lambda: sum(counts)


@contextmanager
def opened(path):
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_all(read_into, size, step=8 * MIB):
    view = memoryview(bytearray(b"\xff") * size)
    done = 0
    while done < size:
        count = read_into(view[done : done + step], done)
        assert count > 0
        done += count
    assert read_into(memoryview(bytearray(1)), size) == 0
    return view


def as_spooled(path, stack):
    files = stack.enter_context(FrozenFiles(path.parent, None, b""))
    return stack.enter_context(files.open((SPOOLED, path.name)))


def as_held(path, stack):
    files = stack.enter_context(
        FrozenFiles(
            path.parent, lambda number: (os.open(path, os.O_RDONLY), number), bytes(1), lambda _: True
        )
    )
    return stack.enter_context(files.open((HELD, 0)))


def as_the_users(path, stack):
    info = path.stat()
    row = Row(
        os.fsencode(path.name), info.st_mode, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
    )
    return stack.enter_context(open_unchanged(os.fsencode(path.parent), row.name, row))


@pytest.mark.parametrize("open_as", [as_spooled, as_held, as_the_users])
def test_holes_are_not_read(sparse, read_bytes, open_as):
    with ExitStack() as stack:
        assert read_all(open_as(sparse, stack), 300 * MIB) == sparse.read_bytes()
    assert 2 * MIB <= read_bytes() <= 5 * MIB


def test_everything_is_read_where_holes_are_not_to_be_believed(sparse, read_bytes, monkeypatch):
    monkeypatch.setattr(file_systems, "tells_holes", lambda descriptor: False)
    with ExitStack() as stack:
        assert read_all(as_spooled(sparse, stack), 300 * MIB) == sparse.read_bytes()
    assert read_bytes() == 300 * MIB
    with opened(sparse) as descriptor:
        assert data_bytes(descriptor, os.fstat(descriptor)) == 300 * MIB


def test_a_file_without_holes_costs_no_question(tmp_path, monkeypatch):
    path = tmp_path / "dense"
    path.write_bytes(b"data" * MIB)
    with opened(path) as descriptor:
        os.fsync(descriptor)
    with ExitStack() as stack:
        read_into = as_spooled(path, stack)
        monkeypatch.setattr(os, "lseek", None)
        assert read_all(read_into, 4 * MIB) == b"data" * MIB


def test_whatever_holes_there_are_and_wherever_it_is_read_it_is_the_same(tmp_path):
    chance = random.Random(5)
    for number in range(20):
        path = tmp_path / f"{number}"
        size = chance.randrange(1, 12 * MIB)
        with path.open("wb") as file:
            file.truncate(size)
            for _ in range(chance.randrange(12)):
                file.seek(chance.randrange(size))
                file.write(chance.randbytes(chance.choice((1, 5000, MIB)))[: size - file.tell()])
        expected = path.read_bytes()
        with ExitStack() as stack:
            read_into = as_spooled(path, stack)
            assert read_all(read_into, size, step=chance.choice((70_001, 3 * MIB))) == expected
            for _ in range(50):
                offset = chance.randrange(size)
                view = memoryview(bytearray(chance.randrange(1, 2 * MIB)))
                count = read_into(view, offset)
                assert count > 0
                assert view[:count] == expected[offset : offset + count]


def test_a_copy_that_replaces_a_held_file_has_holes_of_its_own(sparse, tmp_path):
    copy = tmp_path / "copy"
    copy.write_bytes(sparse.read_bytes())  # dense
    opens = iter((sparse, copy))
    flags = bytearray(1)
    size = 300 * MIB

    def open_held(number):
        return os.open(next(opens), os.O_RDONLY), 0 if not flags[0] else None

    view = memoryview(bytearray(b"\xff") * MIB)
    with FrozenFiles(tmp_path, open_held, flags, lambda _: True) as files, files.open((HELD, 0)) as read_into:
        assert read_into(view, 0) == MIB
        assert view == bytes(MIB)
        flags[0] = 1
        # What the writer left is not seen.
        sparse.write_bytes(b"new" * MIB)
        assert read_all(read_into, size) == copy.read_bytes()


def test_what_became_shorter_ends_there(sparse):
    with ExitStack() as stack:
        read_into = as_spooled(sparse, stack)
        os.truncate(sparse, 50 * MIB)
        assert read_all(read_into, 50 * MIB) == bytes(50 * MIB)
    with ExitStack() as stack:
        read_into = as_the_users(sparse, stack)
        os.truncate(sparse, 10 * MIB)
        with pytest.raises(CaptureFailed, match="it has changed since"):
            stack.close()


# Duplicates


def test_the_data_of_a_file_is_counted_and_found(sparse):
    with opened(sparse) as descriptor:
        found = DataMap(descriptor)
        assert found.is_sparse
        assert list(found.ranges(300 * MIB)) == [(100 * MIB, 101 * MIB), (299 * MIB, 300 * MIB)]
        assert list(found.ranges(100 * MIB + 5)) == [(100 * MIB, 100 * MIB + 5)]
        assert list(found.ranges(50 * MIB)) == []
        assert found.find(101 * MIB, 200 * MIB) == (200 * MIB, 200 * MIB)
        assert 2 * MIB <= data_bytes(descriptor, os.fstat(descriptor)) < 3 * MIB


@pytest.mark.parametrize("offset", [0, 100 * MIB, 200 * MIB, 300 * MIB - 1])
def test_a_copy_is_no_prefix_once_one_byte_of_the_source_differs(sparse, tmp_path, offset):
    (tmp_path / "copy").touch()
    with opened(sparse) as source, opened(tmp_path / "copy") as copy:
        duplicate.copy(source, copy, 300 * MIB, lambda: None)
        assert os.fstat(copy).st_blocks * 512 < 3 * MIB
        assert duplicate.is_prefix(copy, source)
        os.pwrite(source, b"x", 400 * MIB)
        assert duplicate.is_prefix(copy, source)
        before = os.pread(source, 1, offset)
        os.pwrite(source, bytes([before[0] ^ 0xFF]), offset)
        assert not duplicate.is_prefix(copy, source)
        os.pwrite(source, before, offset)
        assert duplicate.is_prefix(copy, source)
        os.ftruncate(source, 200 * MIB)
        assert not duplicate.is_prefix(copy, source)


# Captures


@pytest.mark.parametrize(("rung", "is_held"), [("lease", True), ("memory", False), ("copy", False)])
def test_a_hole_is_not_counted_as_waiting(captures, project, sparse, rung, is_held):
    sparse.rename(project / "sparse")
    captured, entries = captures.capture(project, ".", rung=rung)
    assert entries[b"sparse"].source[0] == (HELD if is_held else SPOOLED)
    assert captured.size_bytes == 300 * MIB
    assert 2 * MIB <= captured.frozen_bytes < 3 * MIB
    assert captured.spooled_bytes == (0 if is_held else captured.frozen_bytes)


def test_a_sparse_file_whose_data_fits_is_read_into_memory(captures, project, sparse):
    sparse.rename(project / "sparse")
    with (project / "sparse").open("r+b"):
        _, entries = captures.capture(project, ".")
    assert entries[b"sparse"].source[0] == SPOOLED
    captures.capturer.finish("a" * 64)
    assert (captures.spool.path("a" * 64) / "complete").exists(), "it was written by the spill"
    assert captures.spool.size_bytes() < 3 * MIB
