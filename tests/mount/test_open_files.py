"""Where the bytes of open files come from."""

import errno
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from replicate.errors import RepositoryDamaged
from replicated.file_reader import Piece
from replicated.mount.errors import Refused
from replicated.mount.reading import plain_reading
from replicated.mount.reading.open_files import MAX_IDLE_FILES, MAX_IDLE_PLAIN, OpenFiles
from replicated.mount.reading.streams import MAX_PARTS

MIB = 1 << 20
BIG = random.Random(1).randbytes(3 * MIB + 5)
SMALL = random.Random(2).randbytes(300_000)
DEADLINE_S = 20


class PlainFile:
    """A file on disk, as the cache gives it."""

    def __init__(self, path):
        self.descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.descriptor).st_size
        self._changed_ns = os.fstat(self.descriptor).st_mtime_ns
        self.is_closed = False

    def read_into(self, buffer, offset):
        return os.preadv(self.descriptor, [buffer], offset)

    def is_intact(self):
        info = os.fstat(self.descriptor)
        return (info.st_size, info.st_mtime_ns) == (self.size, self._changed_ns)

    def close(self):
        assert not self.is_closed
        self.is_closed = True
        os.close(self.descriptor)


class Cache:
    """Whole files by hash, in a directory."""

    def __init__(self, directory):
        self.directory = directory
        self.opened = []
        self.asked = 0

    def add(self, node, data):
        (self.directory / node.hash.hex()).write_bytes(data)

    def open_plain(self, digest, size):
        self.asked += 1
        path = self.directory / digest.hex()
        if not path.exists():
            return None
        self.opened.append(PlainFile(path))
        return self.opened[-1]


class Watch:
    def __init__(self):
        self.events = []

    def on_open(self, inode, node):
        self.events.append(("open", inode))

    def on_read(self, inode, node, offset, length, is_sequential):
        self.events.append(("read", inode, offset, length, is_sequential))

    def on_release(self, inode, node):
        self.events.append(("release", inode))


class Small:
    """Contents by inode; each is given once."""

    def __init__(self, contents):
        self.contents = contents

    def take(self, inode, node):
        return self.contents.pop(inode, None)


class Forbidden:
    """A reader that must not be used."""

    def pread(self, offset, length):
        raise AssertionError("it was read from the repository")


@pytest.fixture
def tree(memory_tree):
    content = {b"big": BIG, b"small": SMALL, b"tiny": b"tiny", b"empty": b""}
    return memory_tree(content | {b"%03d" % number: b"%03d" % number for number in range(200)})


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path)


@pytest.fixture
def open_files(tree):
    made = []

    def make(**options):
        made.append(OpenFiles(tree, **options))
        return made[-1]

    yield make
    for files in made:
        files.close()


def read(files, handle, offset, length):
    return b"".join(files.read(handle, offset, length))


@pytest.mark.parametrize("name", [b"big", b"small", b"tiny", b"empty"])
@pytest.mark.parametrize("is_near", [True, False])
def test_files_of_every_size_are_read_at_every_place(tree, open_files, name, is_near):
    files = open_files(is_near=is_near)
    node = tree.find(name)
    data = {b"big": BIG, b"small": SMALL, b"tiny": b"tiny", b"empty": b""}[name]
    handle = files.open(7, node)
    rnd = random.Random(3)
    for offset, length in [(0, node.size), (0, 1), (node.size, 10), (node.size + 5, 10), (0, 10 * MIB)] + [
        (rnd.randrange(node.size + 1), rnd.choice([1, 4096, MIB])) for _ in range(30)
    ]:
        assert read(files, handle, offset, length) == data[offset : offset + length]
        assert b"".join(files.read_unopened(7, node, offset, length)) == data[offset : offset + length]
    files.release(handle)


def test_handle_that_is_not_open_is_refused(tree, open_files):
    files = open_files()
    handle = files.open(7, tree.find(b"tiny"))
    assert files.inode_of(handle) == 7
    files.release(handle)
    files.release(handle)
    for ask in (
        lambda: files.inode_of(handle),
        lambda: files.read(handle, 0, 1),
        lambda: files.read(0, 0, 1),
    ):
        with pytest.raises(Refused) as refused:
            ask()
        assert refused.value.errno == errno.EBADF


def test_file_that_lies_in_the_cache_is_read_there(tree, open_files, cache):
    node = tree.find(b"big")
    cache.add(node, BIG)
    tree.readers[b"big"] = Forbidden()
    files = open_files(cache=cache)
    handle = files.open(7, node)
    assert read(files, handle, 0, len(BIG)) == BIG
    assert read(files, handle, MIB + 7, MIB) == BIG[MIB + 7 : 2 * MIB + 7]
    assert b"".join(files.read_unopened(7, node, 5, 10)) == BIG[5:15]
    assert len(cache.opened) == 1
    files.release(handle)


def test_small_files_are_not_looked_for_in_the_cache(tree, open_files, cache):
    files = open_files(cache=cache)
    assert b"".join(files.read_unopened(7, tree.find(b"small"), 0, MIB)) == SMALL
    assert cache.asked == 0


def test_cache_is_asked_once_until_something_is_added_to_it(tree, open_files, cache):
    node = tree.find(b"big")
    files = open_files(cache=cache)
    handle = files.open(7, node)
    for _ in range(3):
        assert read(files, handle, 0, 4096) == BIG[:4096]
    assert cache.asked == 1
    cache.add(node, BIG)
    files.look_again()
    tree.readers[b"big"] = Forbidden()
    assert read(files, handle, MIB, MIB) == BIG[MIB : 2 * MIB]
    assert len(cache.opened) == 1


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: os.truncate(path, 100),
        lambda path: path.write_bytes(bytes(len(BIG))),
        lambda path: os.utime(path, ns=(1, 1)),
    ],
)
def test_file_of_the_cache_that_was_changed_is_read_from_the_repository(tree, open_files, cache, harm):
    node = tree.find(b"big")
    cache.add(node, BIG)
    files = open_files(cache=cache)
    handle = files.open(7, node)
    assert read(files, handle, 0, 4096) == BIG[:4096]
    harm(cache.directory / node.hash.hex())
    assert read(files, handle, 0, len(BIG)) == BIG
    assert cache.opened[0].is_closed
    assert read(files, handle, 1, 2) == BIG[1:3]
    assert len(cache.opened) == 1, "it is not trusted again"


def test_file_of_the_cache_that_was_deleted_can_still_be_read(tree, open_files, cache):
    node = tree.find(b"big")
    cache.add(node, BIG)
    tree.readers[b"big"] = Forbidden()
    files = open_files(cache=cache)
    handle = files.open(7, node)
    assert read(files, handle, 0, 4096) == BIG[:4096]
    os.unlink(cache.directory / node.hash.hex())
    assert read(files, handle, 0, len(BIG)) == BIG


def test_what_was_read_stays_as_it_is_while_somebody_has_it(tree, open_files, cache):
    node = tree.find(b"big")
    cache.add(node, BIG)
    files = open_files(cache=cache)
    handle = files.open(7, node)
    offsets = range(0, 3 * MIB, 256 << 10)
    held = [files.read(handle, offset, 256 << 10) for offset in offsets]
    assert b"".join(part for parts in held for part in parts) == BIG[: 3 * MIB]


def test_memory_for_reading_is_used_again(tree, open_files, cache):
    node = tree.find(b"big")
    cache.add(node, BIG)
    files = open_files(cache=cache)
    handle = files.open(7, node)
    read(files, handle, 0, MIB)
    unused = list(plain_reading._unused)
    assert 0 < len(unused) <= plain_reading.MAX_UNUSED
    for _ in range(10):
        read(files, handle, 0, MIB)
    assert {id(memory) for memory in plain_reading._unused} == {id(memory) for memory in unused}


def test_files_of_the_cache_are_closed_with_the_last_handle(tree, open_files, cache):
    node = tree.find(b"big")
    cache.add(node, BIG)
    files = open_files(cache=cache)
    first, second = files.open(7, node), files.open(7, node)
    read(files, first, 0, 1)
    files.release(first)
    assert not cache.opened[0].is_closed
    files.release(second)
    assert cache.opened[0].is_closed, "the cache could not evict it"
    again = files.open(7, node)
    assert read(files, again, 0, len(BIG)) == BIG
    assert len(cache.opened) == 2


def test_few_files_of_the_cache_stay_open_that_nobody_opens(memory_tree, cache):
    count = MAX_IDLE_PLAIN + 10
    tree = memory_tree({b"%d" % number: b"%d" % number + bytes(MIB) for number in range(count)})
    files = OpenFiles(tree, cache=cache)
    for number in range(count):
        node = tree.find(b"%d" % number)
        cache.add(node, b"%d" % number + bytes(MIB))
        assert b"".join(files.read_unopened(number + 2, node, 0, 1)) == (b"%d" % number)[:1]
    assert sum(not file.is_closed for file in cache.opened) == MAX_IDLE_PLAIN
    files.close()
    assert all(file.is_closed for file in cache.opened)


def test_backing_is_the_file_in_the_cache(tree, open_files, cache):
    node = tree.find(b"big")
    files = open_files(cache=cache)
    assert files.backing(node) is None
    cache.add(node, BIG)
    backing = files.backing(node)
    assert backing.size == len(BIG)
    backing.close()
    assert open_files().backing(node) is None


def test_small_files_that_were_fetched_are_not_fetched_again(tree, open_files):
    tree.readers[b"small"] = tree.readers[b"tiny"] = Forbidden()
    files = open_files(small_files=Small({7: SMALL, 8: b"tiny"}))
    small, tiny = files.open(7, tree.find(b"small")), files.open(8, tree.find(b"tiny"))
    assert read(files, tiny, 0, 4096) == b"tiny"
    assert b"".join(read(files, small, offset, 4096) for offset in range(0, len(SMALL), 4096)) == SMALL
    assert files._content_bytes == 0
    files.release(small)
    files.release(tiny)


def test_content_of_small_files_is_let_go_when_nobody_reads_on(tree, open_files):
    files = open_files(small_files=Small({7: SMALL}))
    handle = files.open(7, tree.find(b"small"))
    assert read(files, handle, 0, 4096) == SMALL[:4096]
    assert files._content_bytes == len(SMALL)
    files.release(handle)
    assert files._content_bytes == 0


def test_content_of_another_length_is_not_believed(tree, open_files):
    files = open_files(small_files=Small({7: b"short"}))
    assert b"".join(files.read_unopened(7, tree.find(b"small"), 0, MIB)) == SMALL


def test_watcher_is_told_what_is_opened_read_and_released(tree, open_files):
    watch = Watch()
    files = open_files(watcher=watch)
    node = tree.find(b"big")
    first, second = files.open(7, node), files.open(7, node)
    read(files, first, 0, MIB)
    read(files, second, MIB, MIB)
    read(files, second, 100, 50)
    files.release(first)
    files.release(second)
    assert watch.events == [
        ("open", 7),
        ("open", 7),
        ("read", 7, 0, MIB, False),
        ("read", 7, MIB, MIB, True),
        ("read", 7, 100, 50, False),
        ("release", 7),
    ]


def test_watcher_is_told_of_files_that_nobody_opens(tree, open_files):
    watch = Watch()
    files = open_files(watcher=watch)
    for number in range(100):
        files.read_unopened(number + 2, tree.find(b"%03d" % number), 0, 4096)
    assert [event for event in watch.events if event[0] == "open"] == [("open", n + 2) for n in range(100)]
    released = [event for event in watch.events if event[0] == "release"]
    assert released == [("release", n + 2) for n in range(100 - MAX_IDLE_FILES)]
    assert len(files._idle) == MAX_IDLE_FILES


@pytest.mark.parametrize("name", [b"big", b"small", b"tiny"])
def test_error_is_for_the_read_that_meets_it(tree, open_files, name):
    data = {b"big": BIG, b"small": SMALL, b"tiny": b"tiny"}[name]

    class Failing:
        is_damaged = True

        def pread(self, offset, length):
            if self.is_damaged:
                raise RepositoryDamaged("a chunk is damaged")
            return data[offset : offset + length]

    tree.readers[name] = failing = Failing()
    files = open_files()
    handle = files.open(7, tree.find(name))
    for length in (2, len(data)):
        with pytest.raises(RepositoryDamaged):
            read(files, handle, 0, length)
    failing.is_damaged = False
    assert read(files, handle, 0, len(data)) == data


def test_big_files_of_a_far_store_are_begun_when_they_are_opened(tree, open_files):
    seen = []

    class Seen:
        def pread(self, offset, length):
            seen.append(offset)
            return BIG[offset : offset + length]

    tree.readers[b"big"] = Seen()
    files = open_files(is_near=False)
    handle = files.open(7, tree.find(b"big"))
    deadline = time.monotonic() + DEADLINE_S
    while len(seen) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert sorted(seen)[0] == 0
    assert sorted(seen)[-1] == 3 * MIB
    files.release(handle)


def test_many_threads_read_and_release_at_once(tree, open_files, cache):
    cache.add(tree.find(b"big"), BIG)
    contents = {b"big": BIG, b"small": SMALL, b"tiny": b"tiny"}
    files = open_files(cache=cache)
    barrier = threading.Barrier(8)

    def work(seed):
        rnd = random.Random(seed)
        barrier.wait(DEADLINE_S)
        for _ in range(100):
            name = rnd.choice(list(contents))
            node = tree.find(name)
            inode = 7 + list(contents).index(name)
            offset, length = rnd.randrange(node.size), rnd.choice([1, 4096, MIB])
            if rnd.random() < 0.5:
                handle = files.open(inode, node)
                assert read(files, handle, offset, length) == contents[name][offset : offset + length]
                files.release(handle)
            else:
                parts = files.read_unopened(inode, node, offset, length)
                assert b"".join(parts) == contents[name][offset : offset + length]
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert not files._open
    assert not files._handles


def test_file_that_two_threads_open_in_the_cache_is_open_once(tree, open_files, cache):
    node = tree.find(b"big")
    cache.add(node, BIG)
    both = threading.Barrier(2, timeout=DEADLINE_S)
    open_plain = cache.open_plain

    def open_together(digest, size):
        found = open_plain(digest, size)
        both.wait()
        return found

    cache.open_plain = open_together
    files = open_files(cache=cache)
    handle = files.open(7, node)
    with ThreadPoolExecutor(2) as pool:
        for data in pool.map(lambda _: read(files, handle, 0, 4096), range(2)):
            assert data == BIG[:4096]
    assert sorted(file.is_closed for file in cache.opened) == [False, True]
    files.release(handle)
    assert all(file.is_closed for file in cache.opened)


def test_content_of_a_file_that_was_given_back_meanwhile_is_not_held(tree, open_files):
    node = tree.find(b"small")

    class ReleasedMeanwhile(Small):
        def take(self, inode, node):
            files.release(handle)
            return super().take(inode, node)

    files = open_files(small_files=ReleasedMeanwhile({7: SMALL}))
    handle = files.open(7, node)
    # Without what remembers how it was read, nothing of it is kept when it is closed.
    file = files._handles[handle]
    assert files._content(file, 4096) == SMALL
    assert file.content is None
    assert files._content_bytes == 0


def test_small_files_that_fail_are_asked_no_more_and_cost_no_reader_anything(tree, open_files, caplog):
    class Failing:
        def __init__(self):
            self.asked = 0

        def take(self, inode, node):
            self.asked += 1
            raise IndexError("a mistake of ours")

    failing = Failing()
    files = open_files(small_files=failing)
    assert b"".join(files.read_unopened(7, tree.find(b"small"), 0, MIB)) == SMALL
    assert b"".join(files.read_unopened(8, tree.find(b"tiny"), 0, MIB)) == b"tiny"
    assert failing.asked == 1
    (record,) = caplog.records
    assert "fetching small files together has failed" in record.getMessage()
    caplog.clear()


def test_small_file_of_chunks_of_a_byte_is_given_in_few_parts(tree, open_files):
    data = bytes(range(256)) * 40
    node = tree.find(b"small")._replace(size=len(data))
    sizes = []

    class Bytewise:
        def iter_pieces(self, offset, length):
            return (Piece(b"%d" % place, 1, 0, 1) for place in range(offset, offset + length))

        def fetch(self, chunks):
            sizes.append(len(chunks))
            return {name: data[int(name) : int(name) + 1] for name in chunks}

    class Source:
        def reader(self, node):
            return Bytewise()

    files = OpenFiles(Source())
    parts = files.read_unopened(7, node, 0, len(data))
    files.close()
    assert b"".join(parts) == data
    assert len(parts) <= MAX_PARTS
    assert max(sizes) <= MAX_PARTS
