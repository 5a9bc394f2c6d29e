"""What is read from a store that is not near: kept, fetched in parallel, fetched again when it was hit."""

import logging
import random
import threading

import pytest

from replicate.errors import RepositoryDamaged
from replicated.cache import ContentCache
from replicated.chunk.codec import hash_chunk
from replicated.damages import DAMAGE_KEPT_S
from replicated.file_reader import FileReader
from replicated.keys import PACK_PREFIX
from replicated.reader import ChunkMemory, ChunkReader
from replicated.references import iter_chunks
from replicated.repository import Repository
from replicated.store.base import Capabilities, KeyMissing
from replicated.store.memory import MemoryStore
from replicated.tree import open_tree

FILES = {
    f"file-{number:03}": bytes([number]) * 40 + number.to_bytes(2, "big") * 30_000 for number in range(40)
}


class FarStore(MemoryStore):
    """A store that is not near, that counts what it is asked for and can spoil it."""

    def __init__(self):
        super().__init__()
        self.fetched = []
        self.spoil = None
        self.told = Capabilities()
        self.hold = None

    @property
    def capabilities(self):
        return self.told

    def get(self, key, offset=0, length=None):
        data = super().get(key, offset, length)
        if key.startswith(PACK_PREFIX):
            self.fetched.append((key, offset, len(data)))
            if self.hold is not None:
                self.hold()
            if self.spoil is not None:
                return self.spoil(data)
        return data


@pytest.fixture
def store():
    return FarStore()


@pytest.fixture
def cache(tmp_path):
    opened = ContentCache(tmp_path / "content", 64 << 20)
    yield opened
    opened.close()


@pytest.fixture
def opened(store, cache, tmp_path):
    """Opens the repository, with empty memory each time."""
    made = []

    def open_one(content=cache):
        made.append(
            Repository.open_on(store, cache=tmp_path / "cache", create=True, content=content, memory_bytes=0)
        )
        return made[-1]

    yield open_one
    for repository in made:
        repository.close()


@pytest.fixture
def snapshot(opened, save):
    return save(opened(None), FILES)


def flip(data):
    return bytes([data[0] ^ 1]) + data[1:]


def test_what_was_read_is_not_fetched_again(opened, snapshot, load, store):
    assert load(opened(), snapshot.id) == FILES
    assert store.fetched
    store.fetched.clear()
    assert load(opened(), snapshot.id) == FILES
    assert store.fetched == []


def test_what_is_near_is_not_kept(cache, save, load, tmp_path):
    near = Repository.open_on(MemoryStore(), cache=tmp_path / "cache", create=True, content=cache)
    assert near.content is None
    saved = save(near, FILES)
    assert load(near, saved.id) == FILES
    assert cache.recall([chunk.id for chunk in iter_chunks(near, saved)]) == {}
    near.close()


def test_chunk_of_another_length_is_damage_wherever_it_comes_from(opened, snapshot, store):
    repository = opened()
    chunk = next(chunk for chunk in iter_chunks(repository, snapshot) if not chunk.is_node)
    repository.read_chunk(chunk.id)
    store.fetched.clear()
    with pytest.raises(RepositoryDamaged, match=chunk.id.hex()):
        opened().read_chunks([chunk.id], [chunk.plain_length + 1])
    assert store.fetched == []


def test_cache_that_lies_costs_a_fetch(opened, snapshot, load, store, tmp_path, caplog):
    assert load(opened(), snapshot.id) == FILES
    for path in (tmp_path / "content").glob("*/*"):
        with open(path, "r+b") as file:
            data = file.read()
            file.seek(0)
            file.write(bytes(byte ^ 0x55 for byte in data))
    store.fetched.clear()
    assert load(opened(), snapshot.id) == FILES
    assert store.fetched
    assert "damaged chunks in the content cache" in caplog.text


def test_runs_are_fetched_at_the_same_time(opened, store):
    repository = opened()
    with repository.writer() as writer:
        contents = [
            writer.add_file(bytes([number]) + number.to_bytes(4, "big") * 20_000) for number in range(8)
        ]
        writer.finish()
    ids = [content.ids()[0] for content in contents]
    # Each waits until the other is there as well.
    store.hold = threading.Barrier(2, timeout=60).wait
    store.told = Capabilities(max_read_bytes=100_000, max_gap_bytes=-1)
    assert len(opened().read_chunks(ids, [content.size for content in contents])) == 8
    assert len(store.fetched) == 8


def test_flip_on_the_way_heals(opened, snapshot, load, store):
    spoilt = []

    def spoil_once(data):
        if data in spoilt:
            return data
        spoilt.append(data)
        return flip(data)

    store.spoil = spoil_once
    assert load(opened(), snapshot.id) == FILES
    assert spoilt


@pytest.fixture
def reading(store, snapshot, opened, cache):
    """A reader whose clock stands still, and a chunk that is in a pack."""
    repository = opened()
    chunk = next(chunk for chunk in iter_chunks(repository, snapshot) if not chunk.is_node)
    now = [100.0]
    reader = ChunkReader(store, repository.index, ChunkMemory(0), cache, clock=lambda: now[0])
    return reader, chunk.id, now


def test_damaged_chunk_is_not_fetched_again_for_a_while(reading, store, caplog):
    caplog.set_level(logging.CRITICAL)
    reader, chunk_id, now = reading
    store.spoil = flip
    with pytest.raises(RepositoryDamaged, match=chunk_id.hex()) as first:
        reader.read(chunk_id)
    fetched = len(store.fetched)
    with pytest.raises(RepositoryDamaged, match=chunk_id.hex()) as second:
        reader.read(chunk_id)
    assert len(store.fetched) == fetched
    assert second.value.fields == first.value.fields
    assert second.value is not first.value
    now[0] += DAMAGE_KEPT_S
    with pytest.raises(RepositoryDamaged):
        reader.read(chunk_id)
    assert len(store.fetched) > fetched


def test_chunk_of_a_repaired_store_is_read_after_a_while(reading, store, caplog):
    caplog.set_level(logging.CRITICAL)
    reader, chunk_id, now = reading
    store.spoil = flip
    with pytest.raises(RepositoryDamaged):
        reader.read(chunk_id)
    store.spoil = None
    with pytest.raises(RepositoryDamaged):
        reader.read(chunk_id)
    now[0] += DAMAGE_KEPT_S
    assert hash_chunk(reader.read(chunk_id)) == chunk_id


def test_chunk_that_is_stored_elsewhere_by_now_is_read_at_once(opened, store, caplog):
    caplog.set_level(logging.CRITICAL)
    repository, content = opened(), b"content" * 1000
    chunk_id = hash_chunk(content)
    with pytest.raises(RepositoryDamaged, match="in no index"):
        repository.read_chunk(chunk_id)
    with repository.writer() as writer:
        writer.add_file(content)
        writer.finish()
    assert repository.read_chunk(chunk_id) == content


def test_good_chunks_are_kept_when_one_beside_them_is_damaged(opened, snapshot, store, cache, caplog):
    caplog.set_level(logging.CRITICAL)
    repository = opened()
    chunks = [chunk for chunk in iter_chunks(repository, snapshot) if not chunk.is_node]
    bad, *good = [chunk.id for chunk in chunks]
    place = repository.locate([bad])[bad]
    store.spoil = lambda data: data if len(data) < place.stored_length else damage(data)

    def damage(data):
        _, offset, _ = store.fetched[-1]
        position = place.offset - offset
        inside = 0 <= position < len(data)
        return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :] if inside else data

    with pytest.raises(RepositoryDamaged, match=bad.hex()):
        repository.read_chunks([chunk.id for chunk in chunks], [chunk.plain_length for chunk in chunks])
    assert cache.recall(good).keys() == set(good)
    assert cache.recall([bad]) == {}


def test_pack_that_vanishes_is_damage_and_what_is_kept_can_still_be_read(
    opened, snapshot, load, store, caplog
):
    caplog.set_level(logging.CRITICAL)
    assert load(opened(), snapshot.id) == FILES
    for info in list(store.list(PACK_PREFIX)):
        store.delete(info.key)
        with pytest.raises(KeyMissing):
            store.get(info.key)
    assert load(opened(), snapshot.id) == FILES
    with pytest.raises(RepositoryDamaged):
        load(opened(None), snapshot.id)


def test_chunk_of_another_length_is_looked_at_once_and_whoever_expects_the_right_one_gets_it(reading, store):
    reader, chunk_id, _ = reading
    length = reader.locate([chunk_id])[chunk_id].plain_length
    with pytest.raises(RepositoryDamaged, match=f"where a file says {length + 1}"):
        reader.read_many([chunk_id], [length + 1])
    fetched = len(store.fetched)
    assert fetched, "the pack itself says whether the index is right"
    for _ in range(3):
        with pytest.raises(RepositoryDamaged, match=f"where a file says {length + 1}"):
            reader.read_many([chunk_id], [length + 1])
    assert len(store.fetched) == fetched
    assert hash_chunk(reader.read_many([chunk_id], [length])[chunk_id]) == chunk_id


def test_what_is_not_to_be_cached_is_not_but_is_found_there(opened, snapshot, store, cache):
    repository = opened()
    tree = open_tree(repository, snapshot.id)
    node = tree.find(b"file-007")
    content = FILES["file-007"]
    assert b"".join(tree.reader(node).iter_parts(0, node.size, is_cached=False)) == content
    assert cache.recall([node.hash]) == {}
    assert b"".join(tree.reader(node).iter_parts(0, node.size)) == content
    assert cache.recall([node.hash]).keys() == {node.hash}
    store.fetched.clear()
    assert b"".join(tree.reader(node).iter_parts(0, node.size, is_cached=False)) == content
    assert store.fetched == []


def test_range_of_a_file_as_long_as_a_request_takes_one(opened, store):
    store.told = Capabilities(has_costly_requests=True, max_read_bytes=1 << 20, max_gap_bytes=1 << 19)
    # So much is stored in order by one thread.
    content = random.Random(1).randbytes(4_000_000)
    repository = opened(None)
    with repository.writer() as writer:
        saved = writer.add_file(content)
        writer.finish()
    reader = FileReader(opened(None), saved)
    offset = 1_500_000
    store.fetched.clear()
    # It begins and ends within chunks, so what is fetched is longer.
    assert reader.pread(offset, 1 << 20) == content[offset : offset + (1 << 20)]
    assert [size > 1 << 20 for key, _, size in store.fetched if size > 100_000] == [True]
