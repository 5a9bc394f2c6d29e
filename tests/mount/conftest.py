"""A repository with snapshots in it, and mounts that never outlive their test."""

import os
import signal
import subprocess
import time
from contextlib import suppress

import pytest

from replicate.errors import MountFailed
from replicate.home import Home
from replicate.ids import ExperimentId, new_id
from replicate.records import ExperimentRecord, utc_now
from replicated.format.manifest import TreeEntry
from replicated.mount.life.mountinfo import read_mountinfo
from replicated.mount.life.table import MountTable
from replicated.repository import Repository
from replicated.store.base import Capabilities
from replicated.store.local import LocalStore


class Snapshots:
    """Puts trees into a repository on disk."""

    def __init__(self, directory, cache, memory_tree):
        self.directory = directory
        self.url = f"file://{directory}"
        self._memory_tree = memory_tree
        self.repository = Repository.open(self.url, cache=cache, create=True)

    def add(self, content):
        """The id of a new snapshot, and the tree that it holds."""
        tree, root = self.store(content)
        identifier = new_id()
        self.repository.put_experiment(ExperimentRecord(ExperimentId(identifier), utc_now()), root)
        return identifier, tree

    def store(self, content):
        """A tree, and its root in the repository, where no record says it yet."""
        tree = self._memory_tree(content)
        with self.repository.writer() as writer:
            root = writer.add_tree(
                [TreeEntry(b"", "directory", tree.root.mode, tree.root.mtime_ns)]
                + [self._entry(writer, tree, path, node) for path, node in tree.walk()]
            )
            writer.finish()
        return tree, root

    def _entry(self, writer, tree, path, node):
        content = writer.add_file(tree.reader(node).pread(0, node.size)) if node.type == "file" else None
        return TreeEntry(path, node.type, node.mode, node.mtime_ns, content, node.target)

    def close(self):
        self.repository.close()


@pytest.fixture(scope="session")
def make_snapshots():
    return Snapshots


class FarStore:
    """A store as if behind a network: what is got from it is counted, and may be made to fail."""

    def __init__(self, store):
        self._store = store
        self.capabilities = Capabilities()
        self.gets = []
        self.failure = None

    def __getattr__(self, name):
        return getattr(self._store, name)

    def get(self, key, offset=0, length=None):
        self.gets.append((key, offset, length))
        if self.failure is not None:
            raise self.failure
        return self._store.get(key, offset, length)


@pytest.fixture
def open_far(snapshots, home):
    """Opens the repository of `snapshots` behind a network; gives it and its store."""
    opened = []

    def open_far(content=None):
        store = FarStore(LocalStore(snapshots.directory))
        repository = Repository.open_on(
            store, cache=home.cache, create=False, content=content, memory_bytes=1 << 20
        )
        opened.append(repository)
        return repository, store

    yield open_far
    for repository in opened:
        repository.close()


@pytest.fixture(scope="session")
def wait_until():
    """Waits for a condition, with a deadline."""

    def wait_until(condition, timeout_s=20.0):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "it has not come to pass in time"
            time.sleep(0.002)

    return wait_until


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
        if info.pid:
            with suppress(ProcessLookupError):
                os.kill(info.pid, signal.SIGKILL)
    for mounted in read_mountinfo():
        if mounted.is_ours and mounted.directory.startswith(os.fsencode(tmp_path)):
            subprocess.run(["fusermount3", "-u", "-z", "--", mounted.directory], check=False)
    table.list()


@pytest.fixture
def mount(snapshots, table, tmp_path):
    """Store a tree, mount it, and give the directory and the tree."""

    def mount(content, directory=None, **choices):
        identifier, tree = snapshots.add(content)
        directory = directory or tmp_path / "mnt"
        info = table.mount(snapshots.url, identifier, "", [identifier], directory, **choices)
        return info, directory, tree

    return mount
