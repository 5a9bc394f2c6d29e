"""Nodes of a tree in a bucket come together: few requests, whatever lies around them, never a wrong one."""

import random

import pytest

from replicate.errors import RepositoryDamaged
from replicated import neighbours
from replicated.chunk.codec import encode, hash_chunk
from replicated.format.pack import ENTRY, ENTRY_MAGIC, HEADER, TREE_PACK, PackBuilder
from replicated.index import Location
from replicated.neighbours import Window, plan_windows, read_nodes
from replicated.repository import Repository
from replicated.store.base import Capabilities
from replicated.store.memory import MemoryStore
from replicated.tree import open_tree

KIB = 1 << 10


class CostlyStore(MemoryStore):
    """A store that is far away, that counts what it is asked for and can spoil it."""

    def __init__(self):
        super().__init__()
        self.fetched = []
        self.spoil = lambda data: data

    @property
    def capabilities(self):
        return Capabilities(has_costly_requests=True)

    def get(self, key, offset=0, length=None):
        data = super().get(key, offset, length)
        if not key.startswith("packs/"):
            return data
        self.fetched.append((offset, len(data)))
        return self.spoil(data)


@pytest.fixture
def store():
    return CostlyStore()


@pytest.fixture
def opened(store, tmp_path):
    """Opens the repository as on a machine that has seen nothing of its contents."""
    made = []

    def open_one(memory_bytes=48 << 20):
        cache = tmp_path / "cache"
        made.append(Repository.open_on(store, cache=cache, create=True, memory_bytes=memory_bytes))
        return made[-1]

    yield open_one
    for repository in made:
        repository.close()


FILES = {
    f"d{number % 20:02}/f{number:03}": random.Random(number).randbytes(number * 30 + 10)
    for number in range(400)
}
BIG = random.Random(0).randbytes(6 << 20)


@pytest.fixture
def snapshot(opened, save):
    return save(opened(), {**FILES, "d05/big": BIG})


def test_file_in_a_big_tree_costs_a_request_for_the_tree_and_one_for_its_data(opened, snapshot, store):
    tree = open_tree(opened(), snapshot.id)
    store.fetched.clear()
    node = tree.find(b"d07/f007")
    assert len(store.fetched) == 1
    assert tree.reader(node).pread(0, node.size) == FILES["d07/f007"]
    assert len(store.fetched) == 2


def test_machine_that_has_seen_nothing_asks_once_for_the_tree(snapshot, store, tmp_path):
    repository = Repository.open_on(store, cache=tmp_path / "other", create=False)
    store.fetched.clear()
    assert open_tree(repository, snapshot.id).find(b"d07/f007").size == len(FILES["d07/f007"])
    assert len(store.fetched) == 1
    repository.close()


def test_list_of_chunks_comes_with_the_tree(opened, snapshot, store):
    tree = open_tree(opened(), snapshot.id)
    store.fetched.clear()
    reader = tree.reader(tree.find(b"d05/big"))
    assert reader.pread(5 << 20, 10) == BIG[5 << 20 : (5 << 20) + 10]
    assert len(store.fetched) == 2


def test_all_directories_are_listed_with_one_request(opened, snapshot, store):
    tree = open_tree(opened(), snapshot.id)
    store.fetched.clear()
    assert {path.decode() for path, node in tree.walk() if node.type == "file"} == {*FILES, "d05/big"}
    assert len(store.fetched) == 1


def test_long_tree_is_read_in_windows(opened, snapshot, store, monkeypatch):
    monkeypatch.setattr("replicated.reader.WINDOW_BYTES", 8 * KIB)
    tree = open_tree(opened(), snapshot.id)
    store.fetched.clear()
    names = {path.decode() for path, node in tree.walk() if node.type == "file"}
    assert names == {*FILES, "d05/big"}
    sizes = [size for _, size in store.fetched]
    assert max(sizes) <= 8 * KIB
    assert 2 < len(sizes) < 20, "fewer than there are directories"


def test_where_requests_cost_nothing_only_the_node_is_read(store, opened, snapshot, monkeypatch):
    monkeypatch.setattr(CostlyStore, "capabilities", Capabilities())
    tree = open_tree(opened(), snapshot.id)
    store.fetched.clear()
    tree.find(b"d07/f007")
    assert len(store.fetched) == 2
    assert sum(size for _, size in store.fetched) < 8 * KIB


def test_little_memory_costs_requests_but_nothing_else(opened, snapshot, load, store):
    assert load(opened(memory_bytes=0), snapshot.id) == {**FILES, "d05/big": BIG}


def test_damage_beside_a_node_is_passed_over(opened, snapshot, store):
    """What is damaged beside it is found when it is asked for, not before."""
    repository = opened()
    root = repository.load_snapshot(snapshot.id).root.node
    store.fetched.clear()

    def damage_beginning(data):
        offset, _ = store.fetched[-1]
        start = max(0, HEADER.size + ENTRY.size - offset)
        return data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :] if offset == 0 else data

    store.spoil = damage_beginning
    assert repository.read_directory(root).entries
    assert len(store.fetched) == 1


def test_damaged_node_is_reported_and_not_fetched_again_at_once(opened, snapshot, store):
    repository = opened()
    root = repository.load_snapshot(snapshot.id).root.node
    store.spoil = lambda data: bytes(byte ^ 0x55 for byte in data)
    with pytest.raises(RepositoryDamaged, match=root.hex()):
        repository.read_directory(root)
    fetched = len(store.fetched)
    with pytest.raises(RepositoryDamaged, match=root.hex()):
        repository.read_directory(root)
    assert len(store.fetched) == fetched


def test_nodes_in_many_packs_are_read_alone(opened, store, save):
    repository = opened()
    roots = []
    for number in range(neighbours.MAX_WINDOWS + 1):
        saved = save(repository, {f"file{n}": bytes([number, n]) for n in range(50)})
        roots.append(saved.root.node)
    other = opened(memory_bytes=0)
    store.fetched.clear()
    assert len(other._reader.read_directories(roots)) == len(roots)
    packs = [info.size for info in store.list("packs/")]
    assert all(size < min(packs) for _, size in store.fetched)


# The parts themselves


def pack_of(nodes):
    """A tree pack with these nodes, and where they lie."""
    builder = PackBuilder(TREE_PACK)
    for node in nodes:
        encoded = encode(node, None)
        builder.add(hash_chunk(node), encoded.codec, encoded.stored, len(node))
    data = b"".join(builder.seal())
    return data, {record.chunk_id: Location(b"p" * 32, *record[1:]) for record in builder.records}


def look(data, place, window_bytes):
    (window,) = plan_windows({b"": place}, window_bytes)
    return read_nodes(window, data[window.start : window.start + window.length])


def test_window_in_the_middle_of_a_pack_gives_what_lies_before_the_node():
    nodes = [random.Random(number).randbytes(1000) for number in range(100)]
    data, places = pack_of(nodes)
    found = look(data, places[hash_chunk(nodes[60])], 10_500)
    assert [found[hash_chunk(node)] for node in nodes[51:61]] == nodes[51:61]
    assert len(found) == 10


def test_bytes_that_look_like_entries_mislead_nobody():
    lie = ENTRY.pack(ENTRY_MAGIC, 0, b"", 5, 5, hash_chunk(b"other")) + b"other"
    nodes = [
        (ENTRY_MAGIC * 3 + lie) * 20 + bytes([number]) + random.Random(number).randbytes(300)
        for number in range(30)
    ]
    data, places = pack_of([random.Random(1).randbytes(99), *nodes])
    wanted = places[hash_chunk(nodes[-1])]
    for window_bytes in range(wanted.stored_length + ENTRY.size, 4000, 97):
        found = look(data, wanted, window_bytes)
        assert nodes[-1] in found.values()
        assert all(hash_chunk(plain) == chunk_id for chunk_id, plain in found.items())


def test_node_longer_than_the_window_is_left_out():
    _, places = pack_of([random.Random(1).randbytes(5000)])
    assert plan_windows(places, 4000) == []


def test_nodes_close_together_share_a_window():
    nodes = [random.Random(number).randbytes(1000) for number in range(100)]
    _, places = pack_of(nodes)
    wanted = {hash_chunk(node): places[hash_chunk(node)] for node in (nodes[50], nodes[55], nodes[90])}
    windows = plan_windows(wanted, 10_000)
    assert [window.wanted for window in windows] == [
        wanted[hash_chunk(nodes[90])],
        wanted[hash_chunk(nodes[55])],
    ]


def test_nodes_that_would_become_huge_are_left_out():
    nodes = [bytes(1 << 20), b"last"]
    data, places = pack_of(nodes)
    found = look(data, places[hash_chunk(b"last")], 10_000)
    assert bytes(1 << 20) not in found.values()


@pytest.mark.parametrize("data", [b"", b"short", bytes(500), random.Random(1).randbytes(10_000)])
@pytest.mark.parametrize("start", [0, 100])
def test_anything_else_gives_nothing(data, start):
    place = Location(b"p" * 32, start + 200, 10, 10, 0, b"")
    assert read_nodes(Window(b"p" * 32, start, 10_000, place), data) == {}
