"""Who reads all files of a snapshot from a repository far away fills, and uses, the cache of contents."""

from contextlib import closing
from dataclasses import replace

import pytest

from replicate.ids import ExperimentId, SnapshotId, new_id
from replicate.records import ExperimentRecord, utc_now
from replicated.browse import Browser, Opened
from replicated.format.manifest import TreeEntry
from replicated.repositories import OpenRepositories
from replicated.repository import Repository
from replicated.tree import open_tree


class Placed:
    """A store that says that it is near, or not."""

    def __init__(self, store, is_near):
        self._store = store
        self.capabilities = replace(store.capabilities, is_near=is_near)

    def __getattr__(self, name):
        return getattr(self._store, name)


@pytest.fixture(params=[True, False], ids=["near", "far"])
def reading(request, tmp_path):
    """What `reading_all` gives for a snapshot of one file: a context manager; and whether it is near."""
    url = f"file://{tmp_path / 'repository'}"
    identifier = SnapshotId(new_id())
    with closing(Repository.open(url, cache=tmp_path / "cache", create=True)) as repository:
        with repository.writer() as writer:
            root = writer.add_tree(
                [
                    TreeEntry(b"", "directory", 0o755, 0),
                    TreeEntry(b"f", "file", 0o644, 0, writer.add_file(b"content" * 1000)),
                ]
            )
            writer.finish()
        repository.put_experiment(ExperimentRecord(ExperimentId(identifier), utc_now()), root)
    repositories = OpenRepositories(tmp_path / "cache", lambda store: Placed(store, request.param))
    tree = open_tree(repositories.get(url), identifier)
    browser = Browser(None, repositories, tmp_path / "cache")
    yield browser.reading_all(url, Opened(None, (identifier,), tree), 10**8), request.param
    repositories.close()


def test_only_what_comes_from_far_away_is_kept(reading, tmp_path):
    files, is_near = reading
    with files as (tree, content):
        node = tree.find(b"f")
        assert tree.reader(node).pread(0, node.size) == b"content" * 1000
        assert (content is None) is is_near
    assert (tmp_path / "cache" / "content").exists() is not is_near
