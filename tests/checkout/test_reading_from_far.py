"""What a checkout reads ahead from a bucket: several requests at a time, in order, not too much."""

import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate.errors import RepositoryDamaged, RepositoryUnreachable
from replicated.checkout.reading import BATCH_BYTES, MAX_BATCHES, MAX_RANGE_BYTES, MAX_RANGES, ReadAhead
from replicated.store.base import Capabilities

MIB = 1 << 20
FAR = Capabilities(has_costly_requests=True, parallel_requests=16, max_read_bytes=16 * MIB)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("checkout")] == []


@pytest.fixture
def far_tree(memory_tree):
    def make(content, capabilities=FAR):
        tree = memory_tree(content)
        tree.capabilities = capabilities
        return tree

    return make


def files_of(tree):
    return [node for _, node in tree.walk() if node.type == "file"]


class Ones:
    """A reader of ones that says how far it got, and does something before."""

    def __init__(self, before=lambda offset: None):
        self.before = before
        self.end = 0
        self.lock = threading.Lock()

    def pread(self, offset, length):
        self.before(offset)
        with self.lock:
            self.end = max(self.end, offset + length)
        return b"\1" * length


@given(st.lists(st.sampled_from([0, 1, 20_000, 200_000, 300_000, 5 * MIB, 20 * MIB]), max_size=12))
def test_contents_come_in_the_order_in_which_they_are_named(memory_tree, sizes):
    data = random.Random(1).randbytes(20 * MIB)
    tree = memory_tree({b"%02d" % number: data[:size] for number, size in enumerate(sizes)})
    tree.capabilities = FAR
    with ReadAhead(tree, files_of(tree)) as ahead:
        for file in files_of(tree):
            assert b"".join(ahead.parts(file)) == data[: file.size]


def test_ranges_of_a_file_are_fetched_at_the_same_time(far_tree):
    tree = far_tree({b"big": b"\1" * (MAX_RANGES * MAX_RANGE_BYTES)})
    together = threading.Barrier(MAX_RANGES)

    def wait_for_others(offset):
        if offset % MAX_RANGE_BYTES == 0:
            together.wait(60)

    tree.readers[b"big"] = Ones(wait_for_others)
    (file,) = files_of(tree)
    with ReadAhead(tree, [file]) as ahead:
        assert sum(map(len, ahead.parts(file))) == file.size


def test_ranges_are_as_long_and_as_many_as_the_store_says(far_tree):
    begun = []
    told = Capabilities(has_costly_requests=True, parallel_requests=2, max_read_bytes=2 * MIB)
    tree = far_tree({b"big": b"\1" * (20 * MIB)}, told)
    held = threading.Event()

    def note(offset):
        if offset % (2 * MIB) == 0:
            begun.append(offset)
            assert held.wait(60)

    tree.readers[b"big"] = Ones(note)
    (file,) = files_of(tree)
    with ReadAhead(tree, [file]) as ahead:
        deadline = time.monotonic() + 60
        while len(begun) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert sorted(begun) == [0, 2 * MIB]
        held.set()
        assert sum(map(len, ahead.parts(file))) == file.size


def test_no_more_is_read_ahead_than_some_ranges(far_tree):
    tree = far_tree({b"big": b"\1" * (150 * MIB)})
    tree.readers[b"big"] = reader = Ones()
    limit = (MAX_RANGES + 1) * MAX_RANGE_BYTES + (MAX_BATCHES + 2) * BATCH_BYTES
    (file,) = files_of(tree)
    with ReadAhead(tree, [file]) as ahead:
        taken = 0
        for part in ahead.parts(file):
            taken += len(part)
            assert reader.end - taken <= limit
    assert limit <= 64 * MIB
    assert taken == reader.end == file.size


@pytest.mark.parametrize("at", [0, MAX_RANGE_BYTES + 5, 39 * MIB])
def test_error_is_raised_where_it_is_met(far_tree, at):
    error = RepositoryUnreachable("gone")
    tree = far_tree({b"a": b"1" * 300_000, b"bad": b"\1" * (40 * MIB), b"c": b"3"})

    def fail(offset):
        if offset + MIB > at:
            raise error

    tree.readers[b"bad"] = Ones(fail)
    before, bad, _ = files_of(tree)
    with ReadAhead(tree, files_of(tree)) as ahead:
        assert b"".join(ahead.parts(before)) == b"1" * 300_000
        got = 0
        with pytest.raises(RepositoryUnreachable) as raised:
            for part in ahead.parts(bad):
                got += len(part)
    assert raised.value is error
    assert got <= at


def test_small_files_before_a_damaged_one_are_given(far_tree):
    tree = far_tree({b"a": b"1", b"b": b"2" * 100, b"c": b"3"})
    tree.readers[b"b"] = Ones()
    first, second, _ = files_of(tree)
    with ReadAhead(tree, files_of(tree)) as ahead:
        assert list(ahead.parts(first)) == [b"1"]
        with pytest.raises(RepositoryDamaged, match="recorded hash"):
            list(ahead.parts(second))


@pytest.mark.parametrize("size", [3 * MIB, MAX_RANGE_BYTES, MAX_RANGE_BYTES + 1, 30 * MIB])
def test_content_that_is_not_what_was_saved_is_found_out_by_its_last_part(far_tree, size):
    tree = far_tree({b"a": b"\2" * size})
    tree.readers[b"a"] = Ones()
    with ReadAhead(tree, files_of(tree)) as ahead, pytest.raises(RepositoryDamaged, match="recorded hash"):
        list(ahead.parts(files_of(tree)[0]))


def test_file_that_ends_early_is_damaged(far_tree):
    class Short(Ones):
        def pread(self, offset, length):
            return super().pread(offset, length)[: max(0, 12 * MIB - offset)]

    tree = far_tree({b"a": b"\1" * (20 * MIB)})
    tree.readers[b"a"] = Short()
    with ReadAhead(tree, files_of(tree)) as ahead, pytest.raises(RepositoryDamaged, match="shorter"):
        list(ahead.parts(files_of(tree)[0]))


def test_leaving_early_ends_the_reading(far_tree):
    tree = far_tree({b"big": b"\1" * (300 * MIB)})
    tree.readers[b"big"] = reader = Ones()
    (file,) = files_of(tree)
    with ReadAhead(tree, [file]) as ahead:
        next(ahead.parts(file))
    assert reader.end < 150 * MIB
