"""What is read ahead of the writing: in order, not too much, and what happens when either side fails."""

import random
import threading
import time

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from replicate.errors import InternalError, RepositoryDamaged
from replicate.ids import ExperimentId, SnapshotId, new_id
from replicate.records import ExperimentRecord, utc_now
from replicated.checkout.reading import BATCH_BYTES, MAX_BATCHES, ReadAhead
from replicated.file_reader import MAX_FETCH_BYTES
from replicated.format.manifest import TreeEntry
from replicated.format.metadata import Snapshot
from replicated.repository import Repository
from replicated.store.memory import MemoryStore
from replicated.tree import open_tree

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("checkout")] == []


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def files_of(tree):
    return [node for _, node in tree.walk() if node.type == "file"]


class Counting:
    """A reader of ones that says how far it got."""

    def __init__(self):
        self.end = 0

    def pread(self, offset, length):
        self.end = max(self.end, offset + length)
        return b"\1" * length


class Failing:
    def __init__(self, error, offset=0):
        self.error = error
        self.offset = offset

    def pread(self, offset, length):
        if offset + length > self.offset:
            raise self.error
        return b"\1" * length


@given(st.lists(st.sampled_from([0, 1, 20_000, 200_000, 300_000, 5 * MIB]), max_size=30))
def test_contents_come_in_the_order_in_which_they_are_named(memory_tree, sizes):
    data = random.Random(1).randbytes(5 * MIB)
    tree = memory_tree({b"%02d" % number: data[:size] for number, size in enumerate(sizes)})
    with ReadAhead(tree, files_of(tree)) as ahead:
        for file in files_of(tree):
            assert b"".join(ahead.parts(file)) == data[: file.size]


def test_no_more_is_read_ahead_than_some_batches(memory_tree):
    tree = memory_tree({b"big": b"\1" * (60 * MIB)})
    tree.readers[b"big"] = reader = Counting()
    limit = (MAX_BATCHES + 1) * BATCH_BYTES
    (file,) = files_of(tree)
    with ReadAhead(tree, [file]) as ahead:
        wait_until(lambda: reader.end >= limit)
        taken = 0
        for part in ahead.parts(file):
            taken += len(part)
            assert reader.end - taken <= limit + 2 * BATCH_BYTES
    assert limit + 2 * BATCH_BYTES + MAX_FETCH_BYTES <= 64 * MIB
    assert taken == reader.end == 60 * MIB


def test_leaving_early_ends_the_reading(memory_tree):
    tree = memory_tree({b"big": b"\1" * (60 * MIB)})
    tree.readers[b"big"] = reader = Counting()
    (file,) = files_of(tree)
    with ReadAhead(tree, [file]) as ahead:
        next(ahead.parts(file))
    assert reader.end < 40 * MIB


@pytest.mark.parametrize("error", [RepositoryDamaged("gone"), MemoryError(), OSError("no such host")])
@pytest.mark.parametrize("size", [100, 9 * MIB])
def test_what_reading_raises_is_raised_where_it_is_taken(memory_tree, error, size):
    tree = memory_tree({b"a": b"1", b"bad": b"\1" * size, b"c": b"3"})
    tree.readers[b"bad"] = Failing(error, size - 1)
    before, bad, _ = files_of(tree)
    with ReadAhead(tree, files_of(tree)) as ahead:
        if isinstance(error, RepositoryDamaged) or size > MIB:
            assert list(ahead.parts(before)) == [b"1"]
        with pytest.raises(type(error)) as raised:
            list(ahead.parts(bad))
    assert raised.value is error


@pytest.mark.parametrize("size", [100, 3 * MIB, BATCH_BYTES, 9 * MIB])
def test_content_that_is_not_what_was_saved_is_found_out_by_its_last_part(memory_tree, size):
    tree = memory_tree({b"a": b"\2" * size, b"b": b"\1" * size})
    tree.readers[b"a"] = Failing(AssertionError(), size)
    with ReadAhead(tree, files_of(tree)) as ahead, pytest.raises(RepositoryDamaged, match="recorded hash"):
        list(ahead.parts(files_of(tree)[0]))


def test_a_file_that_was_not_named_is_a_mistake_and_does_not_wait_for_ever(memory_tree):
    tree = memory_tree({b"a": b"1", b"b": b"2"})
    first, second = files_of(tree)
    with ReadAhead(tree, [first]) as ahead:
        assert list(ahead.parts(first)) == [b"1"]
        with pytest.raises(InternalError):
            list(ahead.parts(second))


class GoneAway(BaseException):
    pass


@pytest.mark.parametrize("error", [GoneAway, KeyboardInterrupt])
@pytest.mark.parametrize("limit", [1, 6 * MIB])
def test_who_gives_up_in_the_middle_leaves_no_part_of_a_file(
    memory_tree, checkout, described, tmp_path, error, limit
):
    tree = memory_tree({b"a": b"1", b"big": b"\1" * (40 * MIB), b"z": b"1"})
    tree.readers[b"big"] = reader = Counting()

    def give_up(files, size):
        if size > limit:
            raise error

    with pytest.raises(error):
        checkout(tree, tmp_path / "out", on_progress=give_up)
    assert set(described(tmp_path / "out")) == {b"a"}
    assert reader.end <= 40 * MIB - BATCH_BYTES


# From a repository


@pytest.fixture
def repository(tmp_path):
    opened = Repository.open_on(MemoryStore(), cache=tmp_path / "cache", create=True)
    yield opened
    opened.close()


def save(repository, contents):
    with repository.writer() as writer:
        entries = [TreeEntry(name, "file", 0o644, 5, writer.add_file(data)) for name, data in contents]
        root = writer.add_tree(entries)
        writer.finish()
    snapshot = Snapshot(SnapshotId(new_id()), root)
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
    return open_tree(repository, snapshot.id)


def test_many_small_files_take_few_reads_of_the_store(repository, checkout, tmp_path):
    chosen = random.Random(3)
    contents = [(b"%04d" % n, chosen.randbytes(chosen.randrange(3000))) for n in range(2000)]
    tree = save(repository, [*contents, (b"x", chosen.randbytes(5 * MIB))])
    store = repository.store
    reads = []
    get = store.get
    store.get = lambda *arguments: reads.append(arguments) or get(*arguments)
    checkout(tree, tmp_path / "out")
    assert len(reads) < 40
    for name, data in contents:
        assert (tmp_path / "out" / name.decode()).read_bytes() == data


def test_a_damaged_file_among_small_ones_is_the_one_that_is_named(repository, checkout, described, tmp_path):
    chosen = random.Random(4)
    contents = [(b"%02d" % n, chosen.randbytes(2000)) for n in range(20)]
    tree = save(repository, contents)
    bad = contents[7][1]
    store = repository.store
    for info in list(store.list("packs/")):
        data = store.get(info.key)
        if bad in data:
            store.replace(info.key, data.replace(bad, bytes(byte ^ 0xFF for byte in bad)))
    with pytest.raises(RepositoryDamaged, match="out/07") as raised:
        checkout(tree, tmp_path / "out")
    assert raised.value.fields["chunk"] == blake3(bad).hexdigest()
    assert set(described(tmp_path / "out")) == {b"%02d" % n for n in range(7)}
