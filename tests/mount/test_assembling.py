"""Files that are read much become plain files of the cache: once, in the background, where it is worth it."""

import threading

import pytest

from replicate.errors import RepositoryDamaged
from replicated.cache import ContentCache
from replicated.mount.reading.assembling import (
    OPENS,
    QUIET_S,
    RANDOM_READ_BYTES,
    RANDOM_READS,
    RETRY_S,
    Assembler,
)
from replicated.mount.reading.background import Stopped
from replicated.tree import open_tree

SIZE = 3 << 20


class Cache:
    """Keeps whole files in memory, and counts."""

    def __init__(self):
        self.built = []
        self.plain = {}
        self.has_room = True
        self.gate = None

    def has_plain(self, digest):
        return digest in self.plain

    def build_plain(self, digest, size, parts):
        self.built.append(digest)
        if not self.has_room:
            return False
        content = b""
        for part in parts:
            content += part
            if self.gate is not None:
                assert self.gate.wait(20)
        assert len(content) == size
        self.plain[digest] = content
        return True


@pytest.fixture
def tree(memory_tree):
    return memory_tree({b"large": b"abc" * (SIZE // 3), b"small": b"x" * 1000, b"other": b"y" * SIZE})


@pytest.fixture
def cache():
    return Cache()


@pytest.fixture
def make_assembler(tree, cache):
    made = []

    def make(*, is_near=False, is_passthrough=False):
        made.append(Clocked(tree, cache, is_near=is_near, is_passthrough=is_passthrough))
        return made[-1]

    yield make
    for assembler in made:
        assembler.close()


class Clocked(Assembler):
    """With a clock that is set by the test."""

    def __init__(self, *arguments, **options):
        self.now = 1000.0
        super().__init__(*arguments, **options, clock=lambda: self.now)

    def wait(self):
        """Until nothing is left to be done."""
        self._workers.wait_idle()


def read(assembler, node, count, *, is_sequential, length=4096):
    for number in range(count):
        assembler.on_read(2, node, number * length, length, is_sequential)


def test_a_file_that_is_read_at_random_is_completed(make_assembler, tree, cache):
    for is_near in (False, True):
        node = tree.find(b"large")
        cache.plain.clear()
        assembler = make_assembler(is_near=is_near)
        assembler.on_open(2, node)
        read(assembler, node, RANDOM_READS, is_sequential=False)
        assembler.wait()
        assert not cache.plain
        read(assembler, node, 1, is_sequential=False)
        assembler.wait()
        assert cache.plain == {node.hash: tree.reader(node).pread(0, SIZE)}


def test_half_of_a_far_file_is_enough_once_its_reader_is_done(make_assembler, tree, cache):
    node = tree.find(b"large")
    assembler = make_assembler()
    assembler.on_open(2, node)
    assembler.on_read(2, node, 0, SIZE // 2 - 1, True)
    assembler.on_release(2, node)
    assembler.wait()
    assert not cache.built
    assembler.on_read(2, node, SIZE // 2, 1, True)
    assembler.wait()
    assert cache.built == [node.hash]


def test_a_file_that_is_being_read_in_order_is_left_alone(make_assembler, tree, cache, wait_until):
    node = tree.find(b"large")
    assembler = make_assembler()
    assembler.on_open(2, node)
    assembler.on_read(2, node, 0, SIZE, True)
    # Looked at at least twice, by a worker that goes on to the next thing.
    seen = []
    original = assembler._workers.pause
    assembler._workers.pause = lambda seconds: (seen.append(seconds), original(0.001))
    wait_until(lambda: len(seen) >= 2)
    assert not cache.built
    assembler.now += QUIET_S
    wait_until(lambda: cache.plain)


def test_a_near_file_that_is_read_in_order_is_not_copied(make_assembler, tree, cache):
    node = tree.find(b"large")
    for is_passthrough, expected in ((False, []), (True, [node.hash])):
        assembler = make_assembler(is_near=True, is_passthrough=is_passthrough)
        for opened in range(OPENS):
            assembler.on_open(2, node)
            # The second time the kernel has it.
            assembler.on_read(2, node, 0, SIZE if not opened else 0, True)
            assembler.on_release(2, node)
        assembler.now += QUIET_S
        assembler.wait()
        assert cache.built == expected


def test_a_near_file_that_the_kernel_does_not_keep_is_completed(make_assembler, tree, cache):
    node = tree.find(b"large")
    assembler = make_assembler(is_near=True)
    assembler.on_open(2, node)
    assembler.on_read(2, node, 0, SIZE, True)
    assembler.on_read(2, node, 0, SIZE // 2 - 1, True)
    assembler.on_release(2, node)
    assembler.wait()
    assert not cache.built
    assembler.on_read(2, node, SIZE // 2, 1, True)
    assembler.wait()
    assert cache.built == [node.hash]


def test_looks_into_the_head_of_a_file_fetch_nothing_else(make_assembler, tree, cache):
    node = tree.find(b"large")
    assembler = make_assembler(is_passthrough=True)
    for _ in range(20):
        assembler.on_open(2, node)
        assembler.on_read(2, node, 0, 4096, True)
        assembler.on_release(2, node)
    assembler.wait()
    assert not cache.built


def test_of_a_long_file_more_reads_at_random_are_needed(make_assembler, tree, cache):
    node = tree.find(b"large")._replace(size=RANDOM_READ_BYTES * 1000)
    assembler = make_assembler()
    read(assembler, node, 1000, is_sequential=False)
    assembler.wait()
    assert not cache.built


def test_small_files_are_never_completed(make_assembler, tree, cache):
    node = tree.find(b"small")
    assembler = make_assembler(is_passthrough=True)
    for _ in range(5):
        assembler.on_open(3, node)
    read(assembler, node, 200, is_sequential=False)
    assembler.on_release(3, node)
    assembler.wait()
    assert not cache.built


def test_four_threads_that_ask_get_one_file(make_assembler, tree, cache, wait_until):
    node = tree.find(b"large")
    assembler = make_assembler()
    cache.gate = threading.Event()
    results = []
    askers = [threading.Thread(target=lambda: results.append(assembler.complete(node))) for _ in range(4)]
    for asker in askers:
        asker.start()
    wait_until(lambda: cache.built)
    cache.gate.set()
    for asker in askers:
        asker.join()
    assert results == [True] * 4
    assert cache.built == [node.hash]


def test_where_there_is_no_room_it_is_not_tried_again_at_once(make_assembler, tree, cache):
    node = tree.find(b"large")
    cache.has_room = False
    assembler = make_assembler()
    for _ in range(3):
        read(assembler, node, RANDOM_READS + 1, is_sequential=False)
        assembler.wait()
    assert len(cache.built) == 1
    assembler.now += RETRY_S
    cache.has_room = True
    read(assembler, node, RANDOM_READS + 1, is_sequential=False)
    assembler.wait()
    assert cache.plain


def test_a_file_that_cannot_be_read_is_a_line_in_the_log(make_assembler, tree, cache, caplog):
    class Damaged:
        def pread(self, offset, length):
            raise RepositoryDamaged("a chunk is damaged")

    node, other = tree.find(b"large"), tree.find(b"other")
    tree.readers[b"large"] = Damaged()
    assembler = make_assembler()
    for file in (node, other):
        read(assembler, file, RANDOM_READS + 1, is_sequential=False)
    assembler.wait()
    assert list(cache.plain) == [other.hash]
    assert [record.getMessage() for record in caplog.records] == ["assemble: a chunk is damaged"]
    caplog.clear()


def test_the_end_stops_what_is_being_completed(make_assembler, tree, cache, wait_until):
    node = tree.find(b"large")
    assembler = make_assembler()
    cache.gate = threading.Event()
    raised = []

    def complete():
        try:
            assembler.complete(node)
        except Stopped as error:
            raised.append(error)

    asker = threading.Thread(target=complete)
    asker.start()
    wait_until(lambda: cache.built)
    assembler.close()
    cache.gate.set()
    asker.join()
    assert raised
    assert not cache.plain


def test_a_completed_file_of_a_far_repository_costs_no_request_any_more(snapshots, open_far, home):
    content = bytes(range(256)) * (SIZE // 256)
    identifier, _ = snapshots.add({b"weights": content})
    cache = ContentCache(home.cache / "content", 1 << 30)
    repository, store = open_far(cache)
    tree = open_tree(repository, identifier)
    node = tree.find(b"weights")
    assembler = Assembler(tree, cache, is_near=False, is_passthrough=False)
    assert assembler.complete(node)
    store.gets.clear()
    assert assembler.complete(node)
    plain = cache.open_plain(node.hash, node.size)
    buffer = bytearray(SIZE)
    assert plain.read_into(memoryview(buffer), 0) == SIZE
    plain.close()
    assert buffer == content
    assert store.gets == []
    assembler.close()
    cache.close()
