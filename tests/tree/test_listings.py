"""The entries of directories by name, by slot and in order: all ways agree, and read no more than needed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replicate.errors import RepositoryDamaged
from replicate.ids import ExperimentId, SnapshotId, new_id
from replicate.records import ExperimentRecord, utc_now
from replicated.directories import Directories, FixedListing, Listing, Node
from replicated.format.manifest import TreeEntry, parse_directory
from replicated.format.metadata import Snapshot
from replicated.repository import Repository
from replicated.store.memory import MemoryStore
from replicated.tree import Tree, open_tree

Save = Callable[..., SnapshotId]
Spec = dict[bytes, Any]
Long = tuple[Repository, Tree, list[int]]

NAMES = [b"%06d" % n for n in range(30_000)]

names = st.sampled_from([b"a", b"b", b"c", b"d.e", b"\xff"])
directories: st.SearchStrategy[Spec] = st.dictionaries(
    names, st.binary(max_size=3) | st.just({}) | st.just("link"), max_size=5
)


def everything(listing: Listing, limit: int = 100) -> Iterator[tuple[int, Node]]:
    start = 0
    while entries := listing.entries(start, limit):
        assert len(entries) <= limit
        yield from entries
        start = entries[-1][0] + 1


def check_agreement(listing: Listing) -> list[tuple[int, Node]]:
    entries = list(everything(listing))
    slots = [slot for slot, _ in entries]
    assert slots == sorted(set(slots))
    for slot, node in entries:
        assert listing.find(node.name) == (slot, node)
        assert listing.at(slot) == node
    for slot in set(range(len(listing) + 3)) - set(slots):
        assert listing.at(slot) is None
    for limit in (1, 2, 7):
        assert list(everything(listing, limit)) == entries
    return entries


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(directories, min_size=1, max_size=4))
def test_all_ways_to_an_entry_agree_also_where_snapshots_lie_over_each_other(
    repository: Repository, save: Save, layers: list[Spec]
) -> None:
    tree = open_tree(repository, *map(save, layers))
    entries = check_agreement(tree.listing(tree.root))
    assert {node.name: node for _, node in entries} == tree.children(tree.root)
    assert {node.name for _, node in entries} == {name for layer in layers for name in layer}
    assert tree.listing(tree.root).find(b"zzz") is None


def test_entries_in_memory_are_listed_like_those_of_a_tree(repository: Repository, save: Save) -> None:
    tree = open_tree(repository, save({b"a": b"1", b"b": {}, b"c": "a"}))
    nodes = tree.children(tree.root).values()
    assert check_agreement(FixedListing(nodes)) == list(everything(tree.listing(tree.root)))
    assert check_agreement(FixedListing([])) == []


@pytest.fixture(scope="module")
def long_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Long]:
    """A directory of many nodes, and how many bytes each read of a pack gave."""
    reads: list[int] = []

    class Counting(MemoryStore):
        def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
            data = super().get(key, offset, length)
            if key.startswith("packs/"):
                reads.append(len(data))
            return data

    repository = Repository.open_on(Counting(), cache=tmp_path_factory.mktemp("cache"), create=True)
    with repository.writer() as writer:
        one = writer.add_file(b"x")
        root = writer.add_tree(TreeEntry(name, "file", 0o644, 0, one) for name in NAMES)
        writer.finish()
    snapshot = Snapshot(SnapshotId(new_id()), root)
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
    yield repository, open_tree(repository, snapshot.id), reads
    repository.close()


def fresh(long_directory: Long) -> tuple[Listing, list[int]]:
    """Its listing with nothing remembered."""
    repository, tree, reads = long_directory
    repository._reader.close()
    reads.clear()
    return Tree(repository, tree.root, len(NAMES)).listing(tree.root), reads


def test_length_of_a_long_directory_is_known_without_reading_it(long_directory: Long) -> None:
    listing, reads = fresh(long_directory)
    assert len(listing) == len(NAMES)
    assert sum(reads) < 10_000


@pytest.mark.parametrize("slot", [0, 1, 12_345, 29_999])
def test_one_entry_of_a_long_directory_is_found_by_few_reads(long_directory: Long, slot: int) -> None:
    listing, reads = fresh(long_directory)
    found = listing.at(slot)
    assert found is not None
    assert found.name == NAMES[slot]
    assert listing.find(NAMES[slot]) == (slot, found)
    assert len(reads) <= 3
    assert sum(reads) < 50_000


def test_long_directory_is_listed_page_by_page(long_directory: Long) -> None:
    listing, reads = fresh(long_directory)
    assert [node.name for _, node in listing.entries(0, 100)] == NAMES[:100]
    assert sum(reads) < 300_000, "a page, and what is read ahead"
    assert [node.name for _, node in everything(listing)] == NAMES
    assert len(reads) < 40, "several nodes are read at once"
    assert [slot for slot, _ in listing.entries(20_000, 700)] == list(range(20_000, 20_700))


def test_what_is_kept_of_long_directories_is_bounded(long_directory: Long) -> None:
    repository, tree, _ = long_directory
    kept = Directories(repository, cached_bytes=100_000)
    assert isinstance(tree.root.content, tuple)
    listing = kept.listing(tree.root.content)
    assert sum(1 for _ in everything(listing)) == len(NAMES)
    assert sum(node.size_bytes for node in kept._recent.values()) <= 100_000


def test_directories_are_loaded_in_advance_together(tmp_path: Path) -> None:
    reads: list[str] = []

    class Counting(MemoryStore):
        def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
            reads.append(key)
            return super().get(key, offset, length)

    repository = Repository.open_on(Counting(), cache=tmp_path, create=True)
    with repository.writer() as writer:
        entries = [TreeEntry(b"%03d" % n, "directory", 0o755, n) for n in range(50)]
        inner = [TreeEntry(b"%03d/%d" % (n, n), "directory", 0o755, n) for n in range(50)]
        root = writer.add_tree(sorted([*entries, *inner], key=lambda entry: entry.path))
        writer.finish()
    snapshot = Snapshot(SnapshotId(new_id()), root)
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
    repository._reader.close()
    tree = open_tree(repository, snapshot.id)
    nodes = list(tree.children(tree.root).values())
    reads.clear()
    tree.preload(nodes)
    assert len(reads) == 1
    assert [len(tree.listing(node)) for node in nodes] == [1] * 50
    assert len(reads) == 1
    repository.close()


def test_damage_in_what_is_loaded_in_advance_shows_when_it_is_asked_for(
    repository: Repository, save: Save
) -> None:
    tree = open_tree(repository, save({b"good": {b"x": b"1"}}))
    good = tree.find(b"good")
    bad = good._replace(content=(bytes(32),))
    tree.preload([good, bad])
    assert len(tree.listing(good)) == 1
    with pytest.raises(RepositoryDamaged):
        tree.listing(bad)


def test_checked_node_takes_little_memory(long_directory: Long) -> None:
    repository, tree, _ = long_directory
    assert isinstance(tree.root.content, tuple)
    (root_id,) = tree.root.content
    root = parse_directory(repository.read_node(root_id))
    leaf = parse_directory(repository.read_node(root.children[0].node))
    assert leaf.size_bytes < 100 * len(leaf)
    assert leaf.entries == leaf.slice_entries(0, len(leaf))
    assert [leaf.name_at(n) for n in range(len(leaf))] == NAMES[: len(leaf)]
    assert [leaf.position_of(name) for name in (b"", NAMES[3], NAMES[3] + b"x", b"x")] == [0, 3, 4, len(leaf)]
    assert [root.child_with(slot) for slot in (0, len(leaf) - 1, len(leaf))] == [0, 0, 1]
