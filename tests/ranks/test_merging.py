"""One tree made of the trees of several ranks."""

import pytest

from replicated.format.manifest import TreeEntry
from replicated.merging import MergeConflict, merge_trees
from replicated.repository import Repository
from replicated.tree import overlay_roots


@pytest.fixture
def repository(tmp_path):
    opened = Repository.open(f"file://{tmp_path}/repository", cache=tmp_path / "cache", create=True)
    yield opened
    opened.close()


def save(repository, files, *, mode=0o755, mtime_ns=5):
    """Store a tree; a value that is a str is a link, None an empty directory."""
    with repository.writer() as writer:
        entries = {b"": TreeEntry(b"", "directory", mode, mtime_ns)}
        for path, value in files.items():
            parts = path.split("/")
            parents = parts if value is None else parts[:-1]
            for depth in range(1, len(parents) + 1):
                name = "/".join(parts[:depth]).encode()
                entries[name] = TreeEntry(name, "directory", mode, mtime_ns)
            name = path.encode()
            if isinstance(value, str):
                entries[name] = TreeEntry(name, "symlink", 0o777, mtime_ns, target=value.encode())
            elif value is not None:
                entries[name] = TreeEntry(name, "file", 0o644, mtime_ns, writer.add_file(value))
        root = writer.add_tree(sorted(entries.values(), key=lambda entry: entry.path.split(b"/")))
        writer.finish()
    return root


def merge(repository, *roots):
    with repository.writer() as writer:
        root = merge_trees(repository, writer, dict(enumerate(roots)))
        writer.finish()
    return root


def load(repository, root):
    tree = overlay_roots(repository, [root])
    return {
        path.decode(): node.target.decode()
        if node.type == "symlink"
        else None
        if node.type == "directory"
        else tree.read_files([node])[0]
        for path, node in tree.walk()
    }


SHARED = {"model/config.json": b"{}", "model/latest": "shard-0"}


def test_directories_are_merged_and_counted_once(repository):
    merged = merge(
        repository,
        save(
            repository,
            {**SHARED, "model/shard-0": b"zero", "own-0/a": b"a", "same/x": b"x", "same/y/z": b"z"},
        ),
        save(repository, {**SHARED, "model/shard-1": b"one", "same/x": b"x", "same/y/z": b"z"}),
        save(repository, {"model/deep/shard-2": b"two", "empty": None}),
    )
    found = load(repository, merged)
    assert found == {
        "empty": None,
        "model": None,
        "model/config.json": b"{}",
        "model/deep": None,
        "model/deep/shard-2": b"two",
        "model/latest": "shard-0",
        "model/shard-0": b"zero",
        "model/shard-1": b"one",
        "own-0": None,
        "own-0/a": b"a",
        "same": None,
        "same/x": b"x",
        "same/y": None,
        "same/y/z": b"z",
    }
    files = [value for value in found.values() if isinstance(value, bytes)]
    assert (merged.files, merged.size_bytes) == (len(files), sum(map(len, files)))
    assert merged.directories == sum(value is None for value in found.values())
    assert merged.symlinks == 1


def test_whoever_merges_gets_the_same_root(repository):
    roots = [
        save(
            repository,
            {f"shard-{rank}": bytes([rank]), "common/a": b"a", f"common/{rank}": b"r"},
            mtime_ns=rank,
        )
        for rank in range(4)
    ]
    assert merge(repository, *roots) == merge(repository, *roots)


def test_attributes_are_those_of_the_lowest_rank_and_the_latest_time(repository):
    merged = merge(
        repository,
        save(repository, {"d/a": b"a", "same": b"s"}, mode=0o700, mtime_ns=20),
        save(repository, {"d/b": b"b", "same": b"s"}, mode=0o755, mtime_ns=30),
    )
    tree = overlay_roots(repository, [merged])
    assert (merged.mode, merged.mtime_ns) == (0o700, 30)
    assert (tree.find(b"d").mode, tree.find(b"d").mtime_ns) == (0o700, 30)
    assert tree.find(b"same").mtime_ns == 20


def test_one_tree_is_itself(repository):
    root = save(repository, SHARED)
    assert merge(repository, root) == root


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"m/a": b"1"}, {"m/a": b"2"}, "ranks 0 and 1 have saved different contents as m/a"),
        ({"a": "x"}, {"a": "y"}, "different contents as a"),
        ({"a": b"x"}, {"a": "x"}, "different things as a: a file and a link"),
        ({"a/b": b"x"}, {"a": b"x"}, "different things as a: a directory and a file"),
    ],
)
def test_what_differs_is_a_conflict(repository, first, second, message):
    with pytest.raises(MergeConflict, match=message):
        merge(repository, save(repository, first), save(repository, second))
