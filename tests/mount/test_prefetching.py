"""Files are read in advance, into the cache or through the mount; progress is true and says why it ended."""

import os
import threading

import pytest

from replicate.errors import RepositoryUnreachable
from replicated.cache import ContentCache
from replicated.mount.filesystem import Filesystem, Usage
from replicated.mount.reading.assembling import Assembler
from replicated.mount.reading.prefetching import Prefetcher
from replicated.mount.reading.selecting import Pattern, Replay
from replicated.mount.reading.tracing import Recorder, Traces, trace_key
from replicated.tree import open_tree

LARGE = os.urandom(1 << 16) * 48
LIMIT = 1 << 30


@pytest.fixture
def content():
    return {
        b"large": LARGE,
        b"small": {b"%04d" % number: b"%d" % number * 300 for number in range(900)},
    }


class Warm:
    """Reads one snapshot in advance, behind a network or not."""

    def __init__(self, repository, identifier, home, *, cache_bytes=LIMIT, is_near=False, directory=b""):
        self.tree = open_tree(repository, identifier)
        self.filesystem = Filesystem(self.tree)
        self.cache = ContentCache(home.cache / "content", cache_bytes)
        self.assembler = Assembler(self.tree, self.cache, is_near=is_near, is_passthrough=False)
        self._options = {
            "assembler": self.assembler if cache_bytes else None,
            "cache": self.cache,
            "cache_bytes": cache_bytes,
            "is_near": is_near,
            "directory": os.fsencode(directory),
        }
        self.prefetchers = []

    def start(self, selection):
        prefetcher = Prefetcher(self.filesystem, self.tree, selection, **self._options)
        self.prefetchers.append(prefetcher)
        prefetcher.start()
        return prefetcher

    def close(self):
        for prefetcher in self.prefetchers:
            prefetcher.close()
        self.assembler.close()
        self.cache.close()


@pytest.fixture
def warm(home, wait_until):
    """Reads in advance until it is finished; gives what it says then."""
    made = []

    def warm(repository, identifier, selection, **options):
        made.append(Warm(repository, identifier, home, **options))
        prefetcher = made[-1].start(selection)
        wait_until(lambda: prefetcher.progress.is_finished)
        return prefetcher.progress

    warm.made = made
    yield warm
    for one in made:
        one.close()


@pytest.fixture
def far(snapshots, open_far, home, content):
    """A repository behind a network with a cache, its store, and the snapshot in it."""
    identifier, _ = snapshots.add(content)
    cache = ContentCache(home.cache / "content", LIMIT)
    repository, store = open_far(cache)
    yield repository, store, identifier
    cache.close()


def small_bytes(content):
    return sum(map(len, content[b"small"].values()))


def test_after_it_nothing_is_fetched_any_more(far, warm, content):
    repository, store, identifier = far
    progress = warm(repository, identifier, Pattern("**"))
    assert (progress.files_done, progress.files_total) == (901, 901)
    assert progress.bytes_done == progress.bytes_total == len(LARGE) + small_bytes(content)
    assert progress.error == ""
    assert len(store.gets) < 60
    tree = open_tree(repository, identifier)
    store.gets.clear()
    (one,) = tree.read_files([tree.find(b"small/0500")])
    assert one == content[b"small"][b"0500"]
    assert warm.made[0].cache.has_plain(tree.find(b"large").hash)
    assert store.gets == []


def test_a_large_file_is_in_the_cache_as_a_whole_and_not_as_chunks_too(far, warm):
    repository, _, identifier = far
    assert warm(repository, identifier, Pattern("large"), cache_bytes=len(LARGE) * 2).error == ""
    tree, cache = warm.made[0].tree, warm.made[0].cache
    node = tree.find(b"large")
    assert cache.has_plain(node.hash)
    repository.content.close()
    assert cache.recall([piece.chunk_id for piece in tree.reader(node).iter_pieces(0, node.size)]) == {}


def test_only_what_the_pattern_names_is_read(far, warm, content):
    repository, _, identifier = far
    progress = warm(repository, identifier, Pattern("small/00*"))
    assert (progress.files_done, progress.files_total, progress.error) == (100, 100, "")
    assert not warm.made[0].cache.has_plain(warm.made[0].tree.find(b"large").hash)


def test_a_pattern_that_names_nothing_says_so(far, warm):
    repository, _, identifier = far
    progress = warm(repository, identifier, Pattern("*.safetensors"))
    assert progress.error == "no file matches *.safetensors"
    assert progress.files_total == 0


def test_without_a_cache_a_far_repository_is_not_read(far, warm):
    repository, store, identifier = far
    before = len(store.gets)
    progress = warm(repository, identifier, Pattern("**"), cache_bytes=0)
    assert progress.error == "there is no cache to read into: `cache_size` is off"
    assert len(store.gets) <= before + 1


def test_it_ends_where_the_cache_is_full_and_says_so(far, warm, content):
    repository, _, identifier = far
    limit = small_bytes(content) // 2
    progress = warm(repository, identifier, Pattern("small"), cache_bytes=limit)
    assert progress.error.startswith("the cache is full: it may take ")
    assert 0 < progress.files_done < progress.files_total == 900
    assert progress.bytes_done <= limit * 0.9


def test_a_file_that_is_too_large_for_the_cache_ends_it(far, warm):
    repository, _, identifier = far
    progress = warm(repository, identifier, Pattern("large"), cache_bytes=len(LARGE))
    assert progress.error.startswith("the cache is full")
    assert progress.files_done == 0


def test_a_cache_that_keeps_nothing_ends_it(snapshots, open_far, home, warm, content):
    identifier, _ = snapshots.add(content)
    # The cache of the repository is another one: as if its disk were full.
    repository, _ = open_far(ContentCache(home.cache / "other", LIMIT))
    progress = warm(repository, identifier, Pattern("small"))
    assert progress.error.startswith("the cache has no room for small/")
    assert progress.files_done < 900


def test_a_store_that_is_away_ends_it_with_its_reason(far, warm, home, wait_until):
    repository, store, identifier = far
    made = Warm(repository, identifier, home)
    warm.made.append(made)
    # The listings are known, what is in the files is not.
    made.tree.children(made.tree.find(b"small"))
    store.failure = RepositoryUnreachable("the store is away")
    prefetcher = made.start(Pattern("**"))
    wait_until(lambda: prefetcher.progress.is_finished)
    assert prefetcher.progress.error == "the store is away"
    assert (prefetcher.progress.files_done, prefetcher.progress.files_total) == (0, 901)


def test_files_that_are_damaged_are_counted_and_the_others_read(snapshots, open_far, home, warm, content):
    identifier, _ = snapshots.add(content)
    repository, store = open_far(ContentCache(home.cache / "content", LIMIT))
    tree = open_tree(repository, identifier)
    node = tree.find(b"small/0300")
    place = repository.locate([node.hash])[node.hash]
    damaged = range(place.offset, place.offset + place.stored_length)
    original = store.get

    def get(key, offset=0, length=None):
        data = bytearray(original(key, offset, length))
        if place.pack.hex() in key:
            for position in damaged:
                if offset <= position < offset + len(data):
                    data[position - offset] ^= 0xFF
        return bytes(data)

    store.get = get
    progress = warm(repository, identifier, Pattern("small"))
    assert progress.error.startswith("1 file could not be read: small/0300: ")
    assert (progress.files_done, progress.files_total) == (899, 900)


def test_a_tree_that_goes_on_for_ever_is_not_read_for_ever(far, warm, home, wait_until):
    repository, _, identifier = far
    made = Warm(repository, identifier, home)
    made.filesystem = Filesystem(made.tree, usage=Usage(entries=10))
    warm.made.append(made)
    prefetcher = made.start(Pattern("**"))
    wait_until(lambda: prefetcher.progress.is_finished)
    assert prefetcher.progress.error == "a tree has more entries than its snapshot says"


def test_the_end_of_the_mount_ends_it(far, warm, home, wait_until):
    repository, _, identifier = far
    made = Warm(repository, identifier, home)
    warm.made.append(made)
    prefetcher = made.start(Pattern("**"))
    prefetcher.close()
    wait_until(lambda: prefetcher.progress.is_finished)
    assert prefetcher.progress.error in ("the mount ended", "")


def test_what_one_mount_has_read_is_replayed_in_the_next_in_the_same_order(far, warm, home):
    repository, _, identifier = far
    tree = open_tree(repository, identifier)
    traces, key = Traces(home.cache / "traces"), trace_key(tree.root)
    read = [b"small/%04d" % (number * 389 % 900) for number in range(700)]
    filesystem = Filesystem(tree)
    recorder = Recorder(filesystem.path_of, lambda node: False, lambda trace: traces.save(key, trace))
    for path in read:
        inode = filesystem.resolve(b"/" + path)
        recorder.on_read(inode, filesystem.node_of(inode), 0, 4096, True)
    recorder.close()

    made = Warm(repository, identifier, home)
    warm.made.append(made)
    asked = []
    original = made.tree.read_files
    made.tree.read_files = lambda nodes: (asked.append([node.name for node in nodes]), original(nodes))[1]
    selection = Replay(traces.load(key))
    assert [wanted.path for wanted in selection.iter_wanted(made.filesystem)] == read
    prefetcher = made.start(selection)
    prefetcher._thread.join(20)
    assert prefetcher.progress.files_done == prefetcher.progress.files_total == 700
    # Several threads read, each a part of the record.
    batches = sorted(asked, key=lambda names: read.index(b"small/" + names[0]))
    assert [b"small/" + name for names in batches for name in names] == read


def test_without_a_record_it_says_that_there_will_be_one(far, warm):
    repository, _, identifier = far
    progress = warm(repository, identifier, Replay(None))
    assert progress.error.startswith("there is no record of an earlier run")


def test_a_near_repository_is_read_through_the_mount(snapshots, content, mount, warm):
    _, directory, _ = mount(content)
    identifier, _ = snapshots.add(content)
    # Through the mount of the same files, as this one has none of its own.
    progress = warm(
        snapshots.repository, identifier, Pattern("**"), is_near=True, directory=os.fspath(directory)
    )
    assert progress.error == ""
    assert progress.files_done == progress.files_total == 901
    assert warm.made[0].cache.has_plain(warm.made[0].tree.find(b"large").hash)


def test_a_file_that_cannot_be_read_through_the_mount_is_counted(snapshots, content, warm, tmp_path):
    identifier, _ = snapshots.add(content)
    (tmp_path / "elsewhere" / "small").mkdir(parents=True)
    for name, data in content[b"small"].items():
        (tmp_path / "elsewhere" / "small" / os.fsdecode(name)).write_bytes(data)
    (tmp_path / "elsewhere" / "small" / "0007").unlink()
    progress = warm(
        snapshots.repository,
        identifier,
        Pattern("small"),
        is_near=True,
        cache_bytes=0,
        directory=os.fspath(tmp_path / "elsewhere"),
    )
    assert progress.error.startswith("1 file could not be read: small/0007: ")
    assert (progress.files_done, progress.files_total) == (899, 900)


def test_without_a_thread_it_is_over_and_says_why(far, warm, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    repository, _, identifier = far
    monkeypatch.setattr(threading.Thread, "start", refuse)
    progress = warm(repository, identifier, Pattern("**"))
    assert progress.is_finished
    assert progress.error == "can't start new thread"
