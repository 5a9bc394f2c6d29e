"""Small files are fetched together when their neighbours are read in order, and only then."""

import random
import threading

import pytest

from replicate.errors import RepositoryUnreachable
from replicated.mount.filesystem import Filesystem
from replicated.mount.reading.scanning import MEMORY_BYTES, SMALL_FILE_BYTES, SmallFiles
from replicated.tree import open_tree


class Directory:
    """Files with the inodes 1000, 1001, …; counts what is asked for."""

    def __init__(self, make_node, sizes):
        self.nodes = {1000 + slot: make_node(b"%06d" % slot, size) for slot, size in enumerate(sizes)}
        self.fetches = []
        self.gate = None
        self.failure = None

    def following(self, inode, count):
        return [(i, node) for i, node in self.nodes.items() if i > inode][:count]

    def read_files(self, nodes):
        self.fetches.append([node.name for node in nodes])
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.failure is not None:
            raise self.failure
        return [content_of(node) for node in nodes]


def content_of(node):
    return (node.name * (node.size // len(node.name) + 1))[: node.size]


@pytest.fixture
def make_directory(memory_tree):
    pattern = memory_tree({b"file": b"x"}).find(b"file")
    return lambda sizes: Directory(lambda name, size: pattern._replace(name=name, size=size), sizes)


@pytest.fixture
def make_small_files():
    made = []

    def make(directory, *, is_near=False):
        made.append(SmallFiles(directory.read_files, directory.following, is_near=is_near))
        return made[-1]

    yield make
    for small_files in made:
        small_files.close()


def take_all(small_files, directory, inodes):
    """Ask for files in turn, as a reader does that has what follows in time; how many were there."""
    hits = 0
    for inode in inodes:
        node = directory.nodes[inode]
        content = small_files.take(inode, node)
        assert content in (None, content_of(node))
        hits += content is not None
    return hits


def begin_scan(small_files, directory, wait_until, first=1000):
    """Ask for as many neighbours as it takes for the next ones to be fetched."""
    before = len(directory.fetches)
    assert take_all(small_files, directory, [first, first + 1, first + 2]) == 0
    wait_until(lambda: len(directory.fetches) > before and small_files._fetched)


def test_two_neighbours_fetch_nothing(make_directory, make_small_files):
    directory = make_directory([100] * 50)
    small_files = make_small_files(directory)
    assert take_all(small_files, directory, [1000, 1001]) == 0
    small_files.close()
    assert directory.fetches == []


def test_three_neighbours_fetch_what_follows(make_directory, make_small_files, wait_until):
    directory = make_directory([100] * 50)
    small_files = make_small_files(directory)
    begin_scan(small_files, directory, wait_until)
    assert take_all(small_files, directory, range(1003, 1050)) == 47
    assert directory.fetches == [[b"%06d" % slot for slot in range(3, 50)]]


def test_a_scan_of_five_thousand_files_makes_few_fetches(make_directory, make_small_files, wait_until):
    directory = make_directory([1000] * 5000)
    small_files = make_small_files(directory)
    begin_scan(small_files, directory, wait_until)
    hits = take_all(small_files, directory, range(1003, 6000))
    # Who is faster than the fetches reads some himself.
    assert hits > 4000
    assert len(directory.fetches) < 20


def test_gaps_are_tolerated(make_directory, make_small_files, wait_until):
    directory = make_directory([100] * 100)
    small_files = make_small_files(directory)
    take_all(small_files, directory, range(1000, 1012, 2))
    wait_until(lambda: directory.fetches and small_files._fetched)
    assert take_all(small_files, directory, range(1012, 1060, 2)) >= 20


def test_a_random_reader_causes_no_fetch(make_directory, make_small_files):
    directory = make_directory([100] * 5000)
    small_files = make_small_files(directory)
    order = list(directory.nodes)
    random.Random(7).shuffle(order)
    assert take_all(small_files, directory, order) == 0
    small_files.close()
    assert directory.fetches == []


def test_reading_a_small_directory_at_random_fetches_little_that_is_not_read(
    make_directory, make_small_files
):
    directory = make_directory([100] * 60)
    small_files = make_small_files(directory)
    generator = random.Random(7)
    hits = reads = 0
    for _ in range(50):
        order = list(directory.nodes)
        generator.shuffle(order)
        reads += len(order)
        hits += take_all(small_files, directory, order)
    small_files.close()
    assert sum(map(len, directory.fetches)) - hits < reads // 4


def test_several_readers_in_one_directory_are_told_apart(make_directory, make_small_files, wait_until):
    directory = make_directory([100] * 4000)
    small_files = make_small_files(directory)
    starts = (1000, 2000, 3000, 4000)
    for start in starts:
        begin_scan(small_files, directory, wait_until, start)
    interleaved = [start + step for step in range(3, 60) for start in starts]
    assert take_all(small_files, directory, interleaved) == len(interleaved)


def test_a_file_that_is_on_its_way_is_waited_for(make_directory, make_small_files, wait_until):
    directory = make_directory([100] * 50)
    directory.gate = threading.Event()
    small_files = make_small_files(directory)
    begin_scan(small_files, directory, wait_until)
    taken = []
    reader = threading.Thread(target=lambda: taken.append(small_files.take(1003, directory.nodes[1003])))
    reader.start()
    wait_until(lambda: 1003 not in small_files._fetched)
    assert taken == []
    directory.gate.set()
    reader.join()
    assert taken == [content_of(directory.nodes[1003])]
    assert len(directory.fetches) == 1


def test_a_failed_fetch_leaves_the_error_to_the_reader(make_directory, make_small_files, wait_until, caplog):
    directory = make_directory([100] * 50)
    directory.gate = threading.Event()
    directory.failure = RepositoryUnreachable("the store is away")
    small_files = make_small_files(directory)
    begin_scan(small_files, directory, wait_until)
    taken = []
    reader = threading.Thread(target=lambda: taken.append(small_files.take(1003, directory.nodes[1003])))
    reader.start()
    wait_until(lambda: 1003 not in small_files._fetched)
    directory.gate.set()
    reader.join()
    assert taken == [None]
    wait_until(lambda: caplog.records)
    assert [record.getMessage() for record in caplog.records] == ["scan-fetch: the store is away"]
    caplog.clear()
    assert small_files._held_bytes == 0
    directory.failure = None
    # Neighbours are fetched again, from where the reader goes on.
    take_all(small_files, directory, range(1010, 1020))
    wait_until(lambda: small_files._fetched)


def test_no_more_than_the_bound_is_held(make_directory, make_small_files, wait_until):
    directory = make_directory([SMALL_FILE_BYTES // 2] * 400)
    small_files = make_small_files(directory)
    for start in range(1000, 1400, 50):
        take_all(small_files, directory, range(start, start + 4))
        assert small_files._held_bytes <= MEMORY_BYTES
    small_files.close()
    assert directory.fetches
    assert small_files._held_bytes == 0


def test_files_that_are_not_small_are_not_fetched(make_directory, make_small_files, wait_until):
    directory = make_directory([100, 100, 100, SMALL_FILE_BYTES + 1, 100, 0, 100])
    small_files = make_small_files(directory)
    begin_scan(small_files, directory, wait_until)
    assert directory.fetches == [[b"000004", b"000006"]]
    assert small_files.take(1003, directory.nodes[1003]) is None


def test_after_a_whole_directory_the_next_one_is_fetched_at_its_first_file(
    make_directory, make_small_files, wait_until
):
    directory = make_directory([100] * 20)
    small_files = make_small_files(directory)
    begin_scan(small_files, directory, wait_until)
    take_all(small_files, directory, range(1003, 1020))
    other = make_directory([100] * 20)
    directory.nodes = {inode + 50_000: node for inode, node in other.nodes.items()}
    before = len(directory.fetches)
    assert small_files.take(51_000, directory.nodes[51_000]) is None
    wait_until(lambda: len(directory.fetches) > before and small_files._fetched)
    assert take_all(small_files, directory, range(51_001, 51_020)) == 19


def test_what_was_taken_is_not_here_any_more(make_directory, make_small_files, wait_until):
    directory = make_directory([100] * 50)
    small_files = make_small_files(directory)
    begin_scan(small_files, directory, wait_until)
    assert small_files.take(1003, directory.nodes[1003]) is not None
    assert small_files.take(1003, directory.nodes[1003]) is None


def test_many_threads_get_only_what_was_saved(make_directory, make_small_files):
    directory = make_directory([300] * 3000)
    small_files = make_small_files(directory, is_near=True)
    wrong = []

    def read(start):
        for inode in range(start, start + 500):
            node = directory.nodes[inode]
            if small_files.take(inode, node) not in (None, content_of(node)):
                wrong.append(inode)

    readers = [threading.Thread(target=read, args=(start,)) for start in range(1000, 3400, 200)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert wrong == []


def test_nothing_is_given_after_the_end(make_directory, make_small_files, wait_until):
    directory = make_directory([100] * 50)
    small_files = make_small_files(directory)
    begin_scan(small_files, directory, wait_until)
    small_files.close()
    small_files.close()
    assert take_all(small_files, directory, range(1003, 1020)) == 0
    assert len(directory.fetches) == 1


def test_a_scan_over_a_far_store_makes_a_fetch_for_many_files(snapshots, open_far):
    content = {b"many": {b"%05d" % n: b"content %d" % n * 20 for n in range(5000)}}
    identifier, _ = snapshots.add(content)
    repository, store = open_far()
    tree = open_tree(repository, identifier)
    filesystem = Filesystem(tree)
    small_files = SmallFiles(tree.read_files, filesystem.following, is_near=False)
    directory = filesystem.resolve(b"/many")
    files = [(found.inode, name) for name, found, _ in filesystem.readdir(directory, 2)]
    store.gets.clear()
    own = 0
    for inode, name in files:
        node = filesystem.node_of(inode)
        data = small_files.take(inode, node)
        if data is None:
            own += 1
            (data,) = tree.read_files([node])
        assert data == content[b"many"][name]
    small_files.close()
    # A reader that does nothing else is faster than the background now and then.
    assert len(store.gets) - own < 40
    assert own < 1000


def test_a_fetch_that_fails_while_its_file_is_looked_up_leaves_it_to_the_reader(
    make_directory, make_small_files, wait_until, caplog
):
    directory = make_directory([100] * 50)
    directory.gate = threading.Event()
    directory.failure = RepositoryUnreachable("the store is away")
    small_files = make_small_files(directory)
    begin_scan(small_files, directory, wait_until)

    class BetweenLocks:
        """The lock, after the first use of which the fetch fails."""

        def __init__(self, lock):
            self._lock = lock
            self._is_first = True

        def __enter__(self):
            return self._lock.__enter__()

        def __exit__(self, *error):
            self._lock.__exit__(*error)
            if threading.current_thread() is reader and self._is_first:
                self._is_first = False
                directory.gate.set()
                assert batch.came.wait(20)

    batch = small_files._fetched[1003]
    reader = threading.current_thread()
    small_files._lock = BetweenLocks(small_files._lock)
    assert small_files.take(1003, directory.nodes[1003]) is None
    wait_until(lambda: caplog.records)
    assert [record.getMessage() for record in caplog.records] == ["scan-fetch: the store is away"]
    caplog.clear()
    assert small_files._held_bytes == 0


def test_what_no_thread_can_be_started_to_fetch_is_not_waited_for(
    make_directory, make_small_files, wait_until, monkeypatch, caplog
):
    directory = make_directory([100] * 50)
    small_files = make_small_files(directory)
    start = threading.Thread.start
    refused = threading.Event()

    def refuse(thread):
        if thread.name == "scan-fetch":
            refused.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert take_all(small_files, directory, [1000, 1001, 1002]) == 0
    assert refused.wait(20)
    wait_until(lambda: not small_files._fetched)
    assert small_files._held_bytes == 0
    caplog.clear()
