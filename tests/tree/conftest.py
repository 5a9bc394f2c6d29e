"""An empty repository and a short way to save trees."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest

from replicate.ids import ExperimentId, SnapshotId, new_id
from replicate.records import ExperimentRecord, utc_now
from replicated.format.manifest import TreeEntry
from replicated.format.metadata import Snapshot
from replicated.repository import Repository
from replicated.store.memory import MemoryStore


class Save(Protocol):
    """Saves nested directories: names to bytes (files), str (links) or dictionaries."""

    def __call__(self, spec: Mapping[bytes, Any], mode: int = 0o644, mtime_ns: int = 0) -> SnapshotId: ...


def iter_entries(
    writer: Any, spec: Mapping[bytes, Any], mode: int, mtime_ns: int, parent: bytes = b""
) -> Iterator[TreeEntry]:
    for name, value in sorted(spec.items()):
        path = parent + name
        if isinstance(value, bytes):
            yield TreeEntry(path, "file", mode, mtime_ns, writer.add_file(value))
        elif isinstance(value, str):
            yield TreeEntry(path, "symlink", 0o777, mtime_ns, target=value.encode())
        else:
            yield TreeEntry(path, "directory", mode | 0o111, mtime_ns)
            yield from iter_entries(writer, value, mode, mtime_ns, path + b"/")


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    opened = Repository.open_on(MemoryStore(), cache=tmp_path, create=True)
    yield opened
    opened.close()


@pytest.fixture
def save(repository: Repository) -> Save:
    def save_tree(spec: Mapping[bytes, Any], mode: int = 0o644, mtime_ns: int = 0) -> SnapshotId:
        with repository.writer() as writer:
            root = TreeEntry(b"", "directory", mode | 0o111, mtime_ns)
            stored = writer.add_tree([root, *iter_entries(writer, spec, mode, mtime_ns)])
            writer.finish()
        snapshot = Snapshot(SnapshotId(new_id()), stored)
        repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
        return snapshot.id

    return save_tree
