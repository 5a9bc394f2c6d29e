"""The view of one snapshot, of one laid over another, and the difference of two."""

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replicate.errors import NotFound, NotStored
from replicate.ids import ExperimentId, SnapshotId, new_id
from replicate.records import ExperimentRecord, utc_now
from replicated.format.manifest import TreeEntry
from replicated.format.metadata import Snapshot
from replicated.repository import Repository
from replicated.store.memory import MemoryStore
from replicated.tree import Node, Tree, diff_trees, open_tree

Spec = dict[bytes, Any]
Save = Callable[..., SnapshotId]

names = st.sampled_from([b"a", b"b", b"a.b", b"a b\n", b"\xff\xfe", b"-rf", "ö".encode()])
specs = st.recursive(
    st.binary(max_size=5) | st.sampled_from(["a", "../b", "/etc"]),
    lambda inner: st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
).filter(lambda spec: isinstance(spec, dict))

#: A repository outlives one example; that is fine, as what is stored is never changed.
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def flatten(spec: Mapping[bytes, Any], parent: bytes = b"") -> Iterator[tuple[bytes, Any]]:
    """The paths below a directory in the order of `walk`, with what is there."""
    for name, value in sorted(spec.items()):
        yield parent + name, value
        if isinstance(value, dict):
            yield from flatten(value, parent + name + b"/")


def content(tree: Tree, node: Node) -> Any:
    """What a node was made of, directories without what they hold."""
    if node.type == "file":
        return tree.reader(node).pread(0, node.size + 1)
    return node.target.decode() if node.type == "symlink" else {}


def shallow(value: Any) -> Any:
    return {} if isinstance(value, dict) else value


# One snapshot


@shared
@given(specs, st.integers(0, 0o7777), st.integers(-(2**64), 2**64))
def test_tree_is_what_was_saved(
    repository: Repository, save: Save, spec: Spec, mode: int, mtime_ns: int
) -> None:
    tree = open_tree(repository, save(spec, mode, mtime_ns))
    walked = list(tree.walk())
    assert [(path, content(tree, node)) for path, node in walked] == [
        (path, shallow(value)) for path, value in flatten(spec)
    ]
    for path, node in walked:
        assert node.name == path.split(b"/")[-1]
        assert node.mtime_ns == mtime_ns
        assert node.mode == {"file": mode, "directory": mode | 0o111, "symlink": 0o777}[node.type]
        assert tree.find(path) == node
        if node.type == "directory":
            assert (node.size, node.hash) == (0, b"")
            assert list(tree.children(node)) == sorted(tree.children(node))
        else:
            data = node.target or tree.reader(node).pread(0, node.size)
            assert (node.size, node.hash) == (len(data), blake3(data).digest())
    assert (tree.root.mode, tree.root.mtime_ns) == (mode | 0o111, mtime_ns)


def test_walk_begins_below_the_path_that_is_asked_for(repository: Repository, save: Save) -> None:
    tree = open_tree(repository, save({b"a": {b"b": {b"c": b"1"}, b"d": b"2"}, b"e": b"3"}))
    assert [path for path, _ in tree.walk(b"a")] == [b"a/b", b"a/b/c", b"a/d"]
    assert list(tree.walk(b"a/d")) == []
    with pytest.raises(NotFound):
        list(tree.walk(b"x"))


@pytest.mark.parametrize(
    "path", [b"x", b"a/x", b"a/b/c", b"link/b", b"a/", b"/a", b"a//b", b"..", b".", b"a/."]
)
def test_what_is_not_there_is_not_found(repository: Repository, save: Save, path: bytes) -> None:
    tree = open_tree(repository, save({b"a": {b"b": b"1"}, b"link": "a"}))
    with pytest.raises(NotFound, match="no such file"):
        tree.find(path)


def test_asking_a_node_for_what_it_is_not_is_an_error(repository: Repository, save: Save) -> None:
    tree = open_tree(repository, save({b"dir": {}, b"file": b"1", b"link": "file"}))
    for name in (b"file", b"link"):
        with pytest.raises(NotADirectoryError):
            tree.children(tree.find(name))
    with pytest.raises(IsADirectoryError):
        tree.reader(tree.find(b"dir"))
    with pytest.raises(ValueError, match="not a regular file"):
        tree.reader(tree.find(b"link"))


def test_snapshot_that_is_not_stored_cannot_be_opened(repository: Repository, save: Save) -> None:
    with pytest.raises(NotStored):
        open_tree(repository, save({}), SnapshotId(new_id()))


# Long directories


def test_long_directory_is_listed_in_order_and_one_name_is_found_by_few_reads(tmp_path: Path) -> None:
    reads: list[tuple[str, int]] = []

    class Counting(MemoryStore):
        def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
            data = super().get(key, offset, length)
            reads.append((key, len(data)))
            return data

    repository = Repository.open_on(Counting(), cache=tmp_path, create=True)
    with repository.writer() as writer:
        one = writer.add_file(b"x")
        root = writer.add_tree(TreeEntry(b"%06d" % n, "file", 0o644, 0, one) for n in range(100_000))
        writer.finish()
    snapshot = Snapshot(SnapshotId(new_id()), root)
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
    tree = open_tree(repository, snapshot.id)
    reads.clear()
    assert tree.find(b"054321").name == b"054321"
    assert sum(length for key, length in reads if key.startswith("packs/")) < 50_000
    for missing in (b"", b"0", b"054321x", b"zzz"):
        if missing:
            with pytest.raises(NotFound):
                tree.find(missing)
    assert list(tree.children(tree.root)) == [b"%06d" % n for n in range(100_000)]
    reads.clear()
    assert tree.find(b"099999").name == b"099999"
    assert reads == [], "the directory is remembered"
    repository.close()


# Files


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Repository, SnapshotId, bytes]]:
    """A file of hundreds of chunks, so that their list is a node, and beside it one with an inline list."""
    data = random.Random(9).randbytes(4_000_000) * 12
    repository = Repository.open_on(MemoryStore(), cache=tmp_path_factory.mktemp("cache"), create=True)
    with repository.writer() as writer:
        contents = {b"inline": writer.add_file(data[:2_000_000]), b"long": writer.add_file(data)}
        assert contents[b"inline"].chunk_ids
        assert contents[b"long"].node
        root = writer.add_tree(TreeEntry(n, "file", 0o644, 0, c) for n, c in sorted(contents.items()))
        writer.finish()
    snapshot = Snapshot(SnapshotId(new_id()), root)
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
    yield repository, snapshot.id, data
    repository.close()


@given(st.integers(0, 48_100_000), st.integers(0, 3_000_000), st.sampled_from([b"inline", b"long"]))
def test_any_part_of_a_file_is_read(
    long_file: tuple[Repository, SnapshotId, bytes], offset: int, length: int, name: bytes
) -> None:
    repository, snapshot_id, data = long_file
    tree = open_tree(repository, snapshot_id)
    expected = data[:2_000_000] if name == b"inline" else data
    assert tree.reader(tree.find(name)).pread(offset, length) == expected[offset : offset + length]


def test_whole_file_is_read_at_once_and_past_the_end_is_nothing(
    long_file: tuple[Repository, SnapshotId, bytes],
) -> None:
    repository, snapshot_id, data = long_file
    tree = open_tree(repository, snapshot_id)
    reader = tree.reader(tree.find(b"long"))
    assert reader.pread(0, 1 << 40) == data
    assert reader.pread(len(data), 1) == reader.pread(1 << 60, 1) == reader.pread(0, 0) == b""
    for offset, length in ((-1, 5), (0, -1)):
        with pytest.raises(ValueError, match="negative"):
            reader.pread(offset, length)


def test_many_threads_read_one_file(long_file: tuple[Repository, SnapshotId, bytes]) -> None:
    repository, snapshot_id, data = long_file
    tree = open_tree(repository, snapshot_id)
    reader = tree.reader(tree.find(b"long"))
    wrong: list[int] = []

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(50):
            offset = chosen.randrange(len(data))
            if reader.pread(offset, 100_000) != data[offset : offset + 100_000]:
                wrong.append(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Overlays


def overlay(*layers: Spec) -> Spec:
    """What laying one directory over another means."""
    merged: Spec = {}
    for layer in layers:
        for name, value in layer.items():
            both = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = overlay(merged[name], value) if both else value
    return merged


@shared
@given(st.lists(specs, min_size=1, max_size=2), st.lists(st.integers(0, 1), min_size=1, max_size=4))
def test_later_snapshots_lie_over_earlier_ones(
    repository: Repository, save: Save, layers: list[Spec], order: list[int]
) -> None:
    chosen = [layers[number % len(layers)] for number in order]
    tree = open_tree(repository, *map(save, chosen))
    expected = overlay(*chosen)
    assert [(path, content(tree, node)) for path, node in tree.walk()] == [
        (path, shallow(value)) for path, value in flatten(expected)
    ]
    for path, value in flatten(expected):
        # A tree of its own, so that nothing is remembered from walking.
        fresh = open_tree(repository, *map(save, chosen))
        assert content(fresh, fresh.find(path)) == shallow(value)


def test_attributes_of_merged_directories_are_those_of_the_later_one(
    repository: Repository, save: Save
) -> None:
    early = save({b"d": {b"a": b"1"}}, 0o600, 1)
    late = save({b"d": {b"b": b"2"}}, 0o644, 2)
    tree = open_tree(repository, early, late)
    assert (tree.root.mode, tree.root.mtime_ns) == (0o755, 2)
    assert (tree.find(b"d").mode, tree.find(b"d").mtime_ns) == (0o755, 2)
    assert (tree.find(b"d/a").mode, tree.find(b"d/b").mode) == (0o600, 0o644)


# Differences


@shared
@given(specs, specs)
def test_difference_is_what_differs(repository: Repository, save: Save, left: Spec, right: Spec) -> None:
    left_tree, right_tree = open_tree(repository, save(left)), open_tree(repository, save(right))
    before, after = dict(flatten(left)), dict(flatten(right))
    expected = {
        path: (shallow(before.get(path)), shallow(after.get(path)))
        for path in before.keys() | after.keys()
        if shallow(before.get(path)) != shallow(after.get(path))
    }
    found = {
        path: (a and content(left_tree, a), b and content(right_tree, b))
        for path, a, b in diff_trees(left_tree, right_tree)
    }
    assert found == expected
    paths = [path for path, _, _ in diff_trees(left_tree, right_tree)]
    assert paths == sorted(paths, key=lambda path: path.split(b"/"))


def test_mode_is_a_difference_and_time_is_not(repository: Repository, save: Save) -> None:
    spec = {b"d": {b"f": b"1"}}
    before = open_tree(repository, save(spec, 0o644, 1))
    assert list(diff_trees(before, open_tree(repository, save(spec, 0o644, 2)))) == []
    changed = diff_trees(before, open_tree(repository, save(spec, 0o600, 1)))
    assert [path for path, _, _ in changed] == [b"d", b"d/f"]


def test_equal_subtrees_are_not_looked_into(repository: Repository, save: Save) -> None:
    big = {b"%d" % n: b"%d" % n for n in range(50)}
    left = open_tree(repository, save({b"big": big, b"x": b"1"}))
    right = open_tree(repository, save({b"big": big, b"x": b"2"}))
    looked: list[bytes] = []

    class Watched(Tree):
        def children(self, node: Node) -> Mapping[bytes, Node]:
            looked.append(node.name)
            return super().children(node)

    watched = Watched(repository, left.root, 1000)
    assert [path for path, _, _ in diff_trees(watched, right)] == [b"x"]
    assert looked == [b""]
