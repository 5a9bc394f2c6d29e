"""An empty repository, and a short way to save and read back trees."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from replicate.ids import ExperimentId, SnapshotId, new_id
from replicate.records import ExperimentRecord, utc_now
from replicated.format.manifest import TreeEntry
from replicated.format.metadata import Snapshot
from replicated.repository import Repository
from replicated.tree import open_tree


class Save(Protocol):
    """Saves files by path as a snapshot."""

    def __call__(self, repository: Repository, files: Mapping[str, bytes]) -> Snapshot: ...


class Load(Protocol):
    """Reads all files of a snapshot."""

    def __call__(self, repository: Repository, snapshot_id: SnapshotId) -> dict[str, bytes]: ...


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    opened = Repository.open(f"file://{tmp_path}/repository", cache=tmp_path / "cache", create=True)
    yield opened
    opened.close()


@pytest.fixture
def save() -> Save:
    def save_files(repository: Repository, files: Mapping[str, bytes]) -> Snapshot:
        with repository.writer() as writer:
            entries = []
            for path in sorted(files):
                *parents, _ = path.split("/")
                for depth in range(1, len(parents) + 1):
                    entries.append(TreeEntry("/".join(parents[:depth]).encode(), "directory", 0o755, 0))
                entries.append(TreeEntry(path.encode(), "file", 0o644, 0, writer.add_file(files[path])))
            unique = {entry.path: entry for entry in entries}
            root = writer.add_tree(sorted(unique.values(), key=lambda entry: entry.path.split(b"/")))
            writer.finish()
        snapshot = Snapshot(SnapshotId(new_id()), root)
        repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
        return snapshot

    return save_files


@pytest.fixture
def load() -> Load:
    def load_files(repository: Repository, snapshot_id: SnapshotId) -> dict[str, bytes]:
        tree = open_tree(repository, snapshot_id)
        return {
            path.decode(): tree.reader(node).pread(0, node.size)
            for path, node in tree.walk()
            if node.type == "file"
        }

    return load_files
