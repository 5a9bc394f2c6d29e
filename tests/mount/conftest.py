"""A repository with snapshots in it, and mounts that never outlive their test."""

import os
import signal
import subprocess
from contextlib import suppress

import pytest

from replicate.errors import MountFailed
from replicate.home import Home
from replicate.ids import new_id
from replicated.format.manifest import TreeEntry
from replicated.format.metadata import Snapshot
from replicated.mount.mountinfo import read_mountinfo
from replicated.mount.table import MountTable
from replicated.repository import Repository


class Snapshots:
    """Puts trees into a repository on disk."""

    def __init__(self, directory, cache, memory_tree):
        self.directory = directory
        self.url = f"file://{directory}"
        self._memory_tree = memory_tree
        self.repository = Repository.open(self.url, cache=cache, create=True)

    def add(self, content, identifier=None):
        """The id of a new snapshot, and the tree that it holds."""
        tree = self._memory_tree(content)
        with self.repository.writer() as writer:
            root = writer.add_tree(
                [TreeEntry(b"", "directory", tree.root.mode, tree.root.mtime_ns)]
                + [self._entry(writer, tree, path, node) for path, node in tree.walk()]
            )
            writer.finish()
        identifier = identifier or new_id()
        self.repository.put_snapshot(Snapshot(identifier, root))
        return identifier, tree

    def _entry(self, writer, tree, path, node):
        content = writer.add_file(tree.reader(node).pread(0, node.size)) if node.type == "file" else None
        return TreeEntry(path, node.type, node.mode, node.mtime_ns, content, node.target)

    def close(self):
        self.repository.close()


@pytest.fixture
def home(tmp_path):
    root = tmp_path / "home"
    root.mkdir()
    return Home(root / "state", root / "cache", root / "run", root / "logs")


@pytest.fixture
def snapshots(tmp_path, home, memory_tree):
    made = Snapshots(tmp_path / "repository", home.cache, memory_tree)
    yield made
    made.close()


@pytest.fixture
def table(home, tmp_path):
    table = MountTable(home)
    yield table
    with suppress(MountFailed):
        table.unmount(everything=True)
    # Whatever a failed test left behind, and whatever state it is in.
    for info in table.list():
        with suppress(ProcessLookupError):
            os.kill(info.pid, signal.SIGKILL)
    for mounted in read_mountinfo():
        if mounted.is_ours and mounted.directory.startswith(os.fsencode(tmp_path)):
            subprocess.run(["fusermount3", "-u", "-z", "--", mounted.directory], check=False)
    table.list()


@pytest.fixture
def mount(snapshots, table, tmp_path):
    """Store a tree, mount it, and give the directory and the tree."""

    def mount(content, directory=None):
        identifier, tree = snapshots.add(content)
        directory = directory or tmp_path / "mnt"
        info = table.mount(snapshots.url, identifier, "", [identifier], directory)
        return info, directory, tree

    return mount
