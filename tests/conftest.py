"""Settings of the whole test suite: deterministic property tests by default, depth on demand, and a tree.

`HYPOTHESIS_PROFILE=deep pytest …` searches longer and with fresh seeds.
"""

import os
import stat
import sys
from pathlib import Path, PurePath

import blake3
import hypothesis
import pytest

from replicate.errors import NotFound
from replicated.directories import FixedListing, Node
from replicated.file_reader import Piece
from replicated.format.manifest import FileContent
from replicated.store.base import Capabilities

# Servers, and what is put before them, are shared by tests of many areas: `from servers import …`.
sys.path.append(str(Path(__file__).parent))

hypothesis.settings.register_profile("default", derandomize=True, max_examples=60, deadline=None)
hypothesis.settings.register_profile("deep", derandomize=False, max_examples=3000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


class MemoryReader:
    """Reads through a function, MiB by MiB."""

    def __init__(self, pread, node):
        self.pread = pread
        self._node = node

    def iter_parts(self, offset, length, *, is_cached=True):
        for start in range(offset, offset + length, 1 << 20):
            yield self.pread(start, min(1 << 20, offset + length - start))

    def iter_pieces(self, offset, length):
        for start in range(0, self._node.size, 1 << 20):
            size = min(1 << 20, self._node.size - start)
            begin, end = max(offset - start, 0), min(offset + length - start, size)
            if begin < end:
                yield Piece(self._node.hash + start.to_bytes(8, "big"), size, begin, end)

    def fetch(self, chunks):
        return {name: self.pread(int.from_bytes(name[-8:], "big"), size) for name, size in chunks.items()}


class MemoryTree:
    """The interface of `replicated.tree.Tree` over nested dictionaries, for what needs no repository.

    A dict is a directory, bytes are a file, a str is a link, and `(content, mode, mtime_ns)` sets what is
    otherwise a default. `readers` replaces the reader of the files of a name.
    """

    def __init__(self, content):
        self.readers = {}
        self.listings = 0
        self._entries = {}
        self.root = self._add(b"", content)

    def _add(self, name, content):
        content, mode, mtime_ns = content if isinstance(content, tuple) else (content, 0o750, 10**18 + 7)
        if isinstance(content, dict):
            key = len(self._entries)
            self._entries[key] = {}
            self._entries[key].update({entry: self._add(entry, content[entry]) for entry in sorted(content)})
            return Node(name, "directory", mode, mtime_ns, 0, b"", b"", (b"%d" % key,))
        if isinstance(content, str):
            target = os.fsencode(content)
            return Node(
                name, "symlink", mode, mtime_ns, len(target), blake3.blake3(target).digest(), target, None
            )
        node = FileContent(len(content), blake3.blake3(content).digest(), b"", (), content)
        return Node(name, "file", mode, mtime_ns, node.size, node.hash, b"", node)

    capabilities = Capabilities(is_near=True)

    def listing(self, node):
        return FixedListing(self.children(node).values())

    def preload(self, nodes):
        pass

    def children(self, node):
        self.listings += 1
        return self._entries[int(node.content[0])]

    def find(self, path):
        node = self.root
        for name in path.split(b"/") if path else []:
            if node.type != "directory" or name not in self.children(node):
                raise NotFound(f"not in the snapshot: {path!r}")
            node = self.children(node)[name]
        return node

    def walk(self, path=b""):
        for node in self.children(self.find(path)).values():
            below = path + b"/" + node.name if path else node.name
            yield below, node
            if node.type == "directory":
                yield from self.walk(below)

    def reader(self, node):
        data = node.content.node
        replaced = self.readers.get(node.name)
        pread = replaced.pread if replaced else lambda at, length: data[at : at + length]
        return MemoryReader(pread, node)

    def read_files(self, nodes):
        return [self.reader(node).pread(0, node.size) for node in nodes]


@pytest.fixture(scope="session")
def memory_tree():
    return MemoryTree


def describe_tree(tree):
    """path → (type, permission bits, mtime, bytes or target); links have no mode worth comparing."""
    described = {}
    for path, node in tree.walk():
        if node.type == "file":
            content = tree.reader(node).pread(0, node.size)
        else:
            content = node.target
        mode = None if node.type == "symlink" else node.mode & 0o777
        described[path] = (node.type, mode, node.mtime_ns, content)
    return described


def describe_directory(top):
    described = {}
    top = os.fsencode(top)
    for directory, directories, files in os.walk(top):
        for name in directories + files:
            path = os.path.join(directory, name)
            info = os.lstat(path)
            mode = stat.S_IMODE(info.st_mode)
            if stat.S_ISLNK(info.st_mode):
                entry = ("symlink", None, info.st_mtime_ns, os.readlink(path))
            elif stat.S_ISDIR(info.st_mode):
                entry = ("directory", mode, info.st_mtime_ns, b"")
            else:
                with open(path, "rb") as file:
                    entry = ("file", mode, info.st_mtime_ns, file.read())
            described[os.path.relpath(path, top)] = entry
    return described


@pytest.fixture(scope="session")
def described():
    """What a tree, or a directory, holds, in a form that can be compared."""
    return lambda thing: describe_directory(thing) if isinstance(thing, PurePath) else describe_tree(thing)
