"""Trees that no writer of ours made: refused, or at least read with bounded work."""

from collections.abc import Callable
from typing import Any

import pytest
from blake3 import blake3

from replicate.errors import RepositoryDamaged
from replicate.ids import ExperimentId, SnapshotId, new_id
from replicate.records import ExperimentRecord, utc_now
from replicated import file_reader
from replicated import reader as reader_module
from replicated.chunk.codec import Plain, decode
from replicated.file_reader import JOINED_BYTES
from replicated.format.canonical import pack
from replicated.format.manifest import (
    CHUNK_LIST_NODE,
    DIRECTORY,
    DIRECTORY_NODE,
    FILE,
    MAX_DEPTH,
    RootNode,
)
from replicated.format.metadata import Snapshot
from replicated.format.pack import TREE_PACK
from replicated.packer import Chunk, Packer, WriteStats
from replicated.repository import Repository
from replicated.tree import Tree, open_tree

Forge = Callable[..., Tree]

CHUNK = b"x" * 100
CHUNK_ID = blake3(CHUNK).digest()


def node(*members: Any) -> bytes:
    return pack(list(members))


def node_id(data: bytes) -> bytes:
    return blake3(data).digest()


def file_entry(name: bytes, size: int, digest: bytes = bytes(32), content: Any = ()) -> list[Any]:
    return [name, FILE, 0o644, 0, 0, size, digest, content]


def directory_entry(name: bytes, below: bytes) -> list[Any]:
    return [name, DIRECTORY, 0o755, 0, 0, 0, below, []]


@pytest.fixture
def forge(repository: Repository) -> Forge:
    """Stores nodes as they are and opens the tree whose root is the last of them."""

    def store(*nodes: bytes, entries: int = 1000) -> Tree:
        packer = Packer(repository.store, repository.index, WriteStats())
        packer.add([Chunk(CHUNK_ID, CHUNK)])
        packer.add([Chunk(node_id(data), data) for data in nodes], TREE_PACK)
        packer.finish()
        root = RootNode(node_id(nodes[-1]), 0o755, 0, files=entries)
        snapshot = Snapshot(SnapshotId(new_id()), root)
        repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
        return open_tree(repository, snapshot.id)

    return store


def leaf(*names: bytes) -> bytes:
    return node(DIRECTORY_NODE, 0, [file_entry(name, 100, CHUNK_ID) for name in names])


def test_forged_tree_that_is_right_is_read(forge: Forge) -> None:
    below = [leaf(b"a", b"b"), leaf(b"c")]
    root = node(DIRECTORY_NODE, 1, [[b"b", node_id(below[0]), 2], [b"c", node_id(below[1]), 1]])
    tree = forge(*below, root)
    assert list(tree.children(tree.root)) == [b"a", b"b", b"c"]
    assert tree.reader(tree.find(b"c")).pread(0, 100) == CHUNK


LEAF = leaf(b"b", b"d")


@pytest.mark.parametrize(
    "children",
    [
        [[b"e", node_id(LEAF), 2]],
        [[b"d", node_id(LEAF), 1]],
        [[b"d", node_id(LEAF), 3]],
        [[b"b", node_id(leaf(b"b")), 1], [b"d", node_id(LEAF), 2]],
        [[b"c", node_id(leaf(b"c")), 1], [b"d", node_id(LEAF), 2]],
        [[b"d", node_id(leaf()), 1]],
        [[b"d", node_id(node(DIRECTORY_NODE, 1, [[b"d", node_id(LEAF), 2]])), 2]],
        [[b"d", CHUNK_ID, 2]],
        [[b"d", bytes(32), 2]],
    ],
)
def test_node_that_is_not_what_the_one_above_says_is_damage(forge: Forge, children: Any) -> None:
    below = [LEAF, leaf(b"b"), leaf(b"c"), leaf(), node(DIRECTORY_NODE, 1, [[b"d", node_id(LEAF), 2]])]
    tree = forge(*below, node(DIRECTORY_NODE, 1, children))
    with pytest.raises(RepositoryDamaged):
        tree.children(tree.root)
    with pytest.raises(RepositoryDamaged):
        tree.find(b"d")


def test_root_of_another_kind_is_damage(forge: Forge) -> None:
    tree = forge(node(CHUNK_LIST_NODE, 0, CHUNK_ID, [100]))
    with pytest.raises(RepositoryDamaged, match="is damaged"):
        list(tree.walk())


def test_same_directory_below_itself_many_times_over_ends(forge: Forge) -> None:
    nodes = [leaf(b"file")]
    for _ in range(64):
        entries = [directory_entry(b"%d" % n, node_id(nodes[-1])) for n in range(9)]
        nodes.append(node(DIRECTORY_NODE, 0, entries))
    tree = forge(*nodes, entries=100)
    count = 0
    with pytest.raises(RepositoryDamaged, match="more entries or levels"):
        for _ in tree.walk():
            count += 1
    assert count <= 100


def test_deeper_tree_than_allowed_is_damage(forge: Forge) -> None:
    nodes = [leaf(b"file")]
    for _ in range(MAX_DEPTH + 1):
        nodes.append(node(DIRECTORY_NODE, 0, [directory_entry(b"d", node_id(nodes[-1]))]))
    tree = forge(*nodes, entries=10**6)
    with pytest.raises(RepositoryDamaged, match="more entries or levels"):
        list(tree.walk())


def listed(size: int, *lists: bytes) -> list[bytes]:
    """Nodes of a directory with one file whose chunks are listed in the last of `lists`."""
    entry = file_entry(b"file", size, bytes(32), [node_id(lists[-1])])
    return [*lists, node(DIRECTORY_NODE, 0, [entry])]


ONE = node(CHUNK_LIST_NODE, 0, CHUNK_ID, [100])
SHORT = node(CHUNK_LIST_NODE, 0, CHUNK_ID, [99])


@pytest.mark.parametrize(
    "nodes",
    [
        listed(99, ONE),
        listed(101, ONE),
        listed(99, SHORT),
        listed(200, ONE, node(CHUNK_LIST_NODE, 1, node_id(ONE) * 2, [100, 101])),
        listed(199, ONE, node(CHUNK_LIST_NODE, 1, node_id(ONE) * 2, [99, 100])),
        listed(200, ONE, node(CHUNK_LIST_NODE, 2, node_id(ONE) * 2, [100, 100])),
        listed(100, leaf(b"a")),
        [node(DIRECTORY_NODE, 0, [file_entry(b"file", 99, CHUNK_ID)])],
        [node(DIRECTORY_NODE, 0, [file_entry(b"file", 150, bytes(32), [CHUNK_ID * 2, [100, 50]])])],
        [node(DIRECTORY_NODE, 0, [file_entry(b"file", 100, bytes(32))])],
    ],
)
def test_file_whose_chunks_do_not_fit_is_damage(forge: Forge, nodes: list[bytes]) -> None:
    tree = forge(*nodes)
    file = tree.find(b"file")
    with pytest.raises(RepositoryDamaged):
        tree.reader(file).pread(0, file.size)


LONG = b"z" * 100_000
LONG_ID = node_id(LONG)


@pytest.mark.parametrize(
    "nodes",
    [
        [node(DIRECTORY_NODE, 0, [file_entry(b"file", 1, LONG_ID)])],
        [node(DIRECTORY_NODE, 0, [file_entry(b"file", 2, bytes(32), [LONG_ID * 2, [1, 1]])])],
        [node(DIRECTORY_NODE, 0, [file_entry(b"file", 101, bytes(32), [CHUNK_ID + LONG_ID, [100, 1]])])],
        listed(1, node(CHUNK_LIST_NODE, 0, LONG_ID, [1])),
        listed(100_001, node(CHUNK_LIST_NODE, 0, LONG_ID * 2, [100_000, 1])),
        listed(100_001, node(CHUNK_LIST_NODE, 0, LONG_ID * 2, [1, 100_000])),
    ],
)
@pytest.mark.parametrize("is_known", [False, True])
def test_chunk_that_is_longer_than_a_file_says_is_refused_before_it_is_in_memory(
    forge: Forge, monkeypatch: pytest.MonkeyPatch, nodes: list[bytes], is_known: bool
) -> None:
    """Or a list of a few bytes could ask for many chunks of 16 MiB at once."""
    tree = forge(LONG, *nodes)
    file = tree.find(b"file")
    if is_known:
        assert tree._repository.read_chunk(LONG_ID) == LONG
    decoded: list[int] = []

    def watch(codec: int, stored: Plain, length: int, base: Plain | None) -> bytes:
        decoded.append(length)
        return decode(codec, stored, length, base)

    monkeypatch.setattr(reader_module, "decode", watch)
    for read in (
        lambda: tree.read_files([file, file]),
        lambda: tree.reader(file).pread(0, file.size),
        lambda: list(tree.reader(file).iter_parts(0, file.size)),
    ):
        with pytest.raises(
            RepositoryDamaged, match=f"{LONG_ID.hex()} .*has 100000 bytes where a file says 1"
        ):
            read()
    assert len(LONG) not in decoded


def test_file_that_repeats_itself_without_end_is_read_where_asked(forge: Forge) -> None:
    """A few nodes can describe more chunks than memory holds; only those that are asked for are listed."""
    lists = [ONE]
    size = 100
    for level in range(1, 6):
        lists.append(node(CHUNK_LIST_NODE, level, node_id(lists[-1]) * 2000, [size] * 2000))
        size *= 2000
    tree = forge(*listed(size, *lists))
    reader = tree.reader(tree.find(b"file"))
    assert reader.pread(size // 2 + 50, 200) == b"x" * 200
    assert reader.pread(size - 10, 100) == b"x" * 10


def test_file_of_chunks_of_a_byte_is_given_in_few_parts(forge: Forge) -> None:
    count = 20_000
    tree = forge(b"x", *listed(count, node(CHUNK_LIST_NODE, 0, node_id(b"x") * count, [1] * count)))
    reader = tree.reader(tree.find(b"file"))
    parts = list(reader.iter_parts(0, count))
    assert b"".join(parts) == b"x" * count
    assert len(parts) <= 1 + count // JOINED_BYTES
    assert reader.pread(100, 300) == b"x" * 300


def test_lists_of_very_many_chunks_are_not_kept_in_memory(
    forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_reader, "CACHED_ITEMS", 5000)
    leaves = [node(CHUNK_LIST_NODE, 0, node_id(b"x") * count, [1] * count) for count in range(1000, 1020)]
    size = sum(range(1000, 1020))
    root = node(CHUNK_LIST_NODE, 1, b"".join(map(node_id, leaves)), list(range(1000, 1020)))
    tree = forge(b"x", *listed(size, *leaves, root))
    reader = tree.reader(tree.find(b"file"))
    assert reader.pread(0, size) == b"x" * size
    assert reader._lists is not None
    kept = reader._lists._recent.values()
    assert 0 < sum(len(extents.ends) for extents in kept) <= 5000
