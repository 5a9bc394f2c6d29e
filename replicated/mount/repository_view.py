"""A whole repository as one tree: experiments with their code, checkpoints and metadata, and ways to them.

    experiments/<id>/{code,checkpoints/<step>-<id>,metadata.json}, and links best, latest
    by-name/<name>, by-tag/<tag>/<id>, latest: links to experiments

It is a `Source` for a `Filesystem`. The directories of the view list what the catalog holds now, at most
`FRESH_S` old; below `code` and each checkpoint lies a snapshot, which never changes. What is not stored,
or was saved without files, has no directory.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import blake3

from replicate.ids import SnapshotId
from replicate.records import CheckpointRecord
from replicate.wire import encode_time
from replicated.catalog import Catalog, CatalogEntry
from replicated.format.metadata import encode_experiment
from replicated.mount.filesystem import NAME_MAX, Reader
from replicated.repository import Repository
from replicated.tree import Node, Tree, open_tree

#: How old a listing may be: looking up a path asks for several in a row.
FRESH_S = 1.0

_DIRECTORY_MODE = 0o555
_FILE_MODE = 0o444
_LINK_MODE = 0o777


@dataclass(frozen=True, slots=True)
class _Folder(Node):
    """A directory of the view."""

    #: Its place in the view, by which its listing is remembered.
    place: bytes
    list_entries: Callable[[], Iterable[Node]]


@dataclass(frozen=True, slots=True)
class _Graft(Node):
    """A directory that shows snapshots, laid over each other."""

    snapshot_ids: tuple[SnapshotId, ...]


@dataclass(frozen=True, slots=True)
class _Document(Node):
    """A file that the view makes up."""

    data: bytes


class _DocumentReader:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def pread(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


class RepositoryView:
    """The tree of a whole repository. May be used from several threads."""

    def __init__(
        self, repository: Repository, catalog: Catalog, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._repository = repository
        self._catalog = catalog
        self._clock = clock
        # Guards the three below.
        self._lock = threading.Lock()
        self._listed_at = -FRESH_S
        self._listings: dict[bytes, Mapping[bytes, Node]] = {}
        self._entries: Sequence[CatalogEntry] | None = None
        # Any tree of the repository reads the nodes of every other; there is one once a graft was listed.
        self._tree: Tree | None = None
        self.root: Node = self._folder(b"", b"", self._list_root, 0)

    @staticmethod
    def can_change(node: Node) -> bool:
        """Whether a directory can have other entries later."""
        return isinstance(node, _Folder)

    def children(self, node: Node) -> Mapping[bytes, Node]:
        """The entries of a directory by name, sorted by name."""
        if isinstance(node, _Folder):
            return self._list(node)
        if isinstance(node, _Graft):
            self._tree = open_tree(self._repository, *node.snapshot_ids)
            return self._tree.children(self._tree.root)
        return self._any_tree().children(node)

    def reader(self, node: Node) -> Reader:
        """Something that reads the bytes of a file."""
        return _DocumentReader(node.data) if isinstance(node, _Document) else self._any_tree().reader(node)

    def _any_tree(self) -> Tree:
        assert self._tree is not None, "its nodes come from trees only"
        return self._tree

    def _list(self, folder: _Folder) -> Mapping[bytes, Node]:
        with self._lock:
            if self._clock() - self._listed_at >= FRESH_S:
                self._listings.clear()
                self._entries = None
                self._listed_at = self._clock()
            listing = self._listings.get(folder.place)
        if listing is None:
            # Later entries win where names collide.
            listing = {node.name: node for node in folder.list_entries()}
            listing = dict(sorted(listing.items()))
            with self._lock:
                listing = self._listings.setdefault(folder.place, listing)
        return listing

    def _experiments(self) -> Sequence[CatalogEntry]:
        """All experiments, oldest first."""
        with self._lock:
            entries = self._entries
        if entries is None:
            self._catalog.refresh()
            entries = list(self._catalog.entries())
            with self._lock:
                self._entries = entries
        return entries

    # -- directories ---------------------------------------------------------------------------------

    def _list_root(self) -> Iterator[Node]:
        entries = self._experiments()
        newest_ns = encode_time(entries[-1].record.created) if entries else 0
        for name, lister in (
            (b"experiments", self._list_experiments),
            (b"by-name", self._list_names),
            (b"by-tag", self._list_tags),
        ):
            yield self._folder(b"", name, lister, newest_ns)
        if entries:
            yield _link(b"latest", b"experiments/" + entries[-1].record.id.encode(), newest_ns)

    def _list_experiments(self) -> Iterator[Node]:
        for entry in self._experiments():
            yield self._folder(
                b"experiments",
                entry.record.id.encode(),
                lambda entry=entry: self._list_experiment(entry),  # type: ignore[misc]
                encode_time(entry.record.created),
            )

    def _list_experiment(self, entry: CatalogEntry) -> Iterator[Node]:
        record, created_ns = entry.record, encode_time(entry.record.created)
        code = _code(entry)
        if code:
            yield _graft(b"code", code, created_ns)
        yield _document(b"metadata.json", encode_experiment(record), created_ns)
        checkpoints = {
            _checkpoint_name(checkpoint): checkpoint
            for checkpoint in self._catalog.checkpoints(record.id)
            if _files(code, checkpoint)
        }
        yield self._folder(
            b"experiments/" + record.id.encode(),
            b"checkpoints",
            lambda: [
                _graft(name, _files(code, checkpoint), encode_time(checkpoint.created))
                for name, checkpoint in checkpoints.items()
            ],
            max((encode_time(checkpoint.created) for checkpoint in checkpoints.values()), default=created_ns),
        )
        for name, chosen in ((b"best", entry.best), (b"latest", entry.latest)):
            if chosen is not None and _checkpoint_name(chosen) in checkpoints:
                yield _link(name, b"checkpoints/" + _checkpoint_name(chosen), encode_time(chosen.created))

    def _list_names(self) -> Iterator[Node]:
        for entry in self._experiments():
            name = _file_name(entry.record.name)
            if name:
                yield _link(
                    name, b"../experiments/" + entry.record.id.encode(), encode_time(entry.record.created)
                )

    def _list_tags(self) -> Iterator[Node]:
        tagged: dict[bytes, list[CatalogEntry]] = {}
        for entry in self._experiments():
            for tag in entry.record.tags:
                tagged.setdefault(_file_name(tag), []).append(entry)
        tagged.pop(b"", None)
        for name, entries in tagged.items():
            yield self._folder(
                b"by-tag",
                name,
                lambda entries=entries: [  # type: ignore[misc]
                    _link(
                        entry.record.id.encode(),
                        b"../../experiments/" + entry.record.id.encode(),
                        encode_time(entry.record.created),
                    )
                    for entry in entries
                ],
                encode_time(entries[-1].record.created),
            )

    def _folder(
        self, parent: bytes, name: bytes, list_entries: Callable[[], Iterable[Node]], mtime_ns: int
    ) -> _Folder:
        place = parent + b"/" + name
        return _Folder(name, "directory", _DIRECTORY_MODE, mtime_ns, 0, b"", b"", None, place, list_entries)


def _code(entry: CatalogEntry) -> tuple[SnapshotId, ...]:
    """The snapshot of what `init` saved, if it saved something and that is stored."""
    return (SnapshotId(entry.record.id),) if entry.record.paths and entry.state == "stored" else ()


def _files(code: tuple[SnapshotId, ...], checkpoint: CheckpointRecord) -> tuple[SnapshotId, ...]:
    """What a checkpoint shows: its files over the experiment's, as `checkout` does; empty for nothing."""
    if not checkpoint.paths:
        return code
    return (*code, SnapshotId(checkpoint.id)) if checkpoint.state == "stored" else ()


def _checkpoint_name(checkpoint: CheckpointRecord) -> bytes:
    return f"{checkpoint.step}-{checkpoint.id}".encode()


def _file_name(text: str) -> bytes:
    """A name or tag as the name of a file; empty when it cannot be one."""
    name = os.fsencode(text.replace("/", "%2F").replace("\0", "%00"))
    return b"" if name in (b".", b"..") or len(name) > NAME_MAX else name


def _graft(name: bytes, snapshot_ids: tuple[SnapshotId, ...], mtime_ns: int) -> _Graft:
    return _Graft(name, "directory", _DIRECTORY_MODE, mtime_ns, 0, b"", b"", None, snapshot_ids)


def _link(name: bytes, target: bytes, mtime_ns: int) -> Node:
    digest = blake3.blake3(target).digest()
    return Node(name, "symlink", _LINK_MODE, mtime_ns, len(target), digest, target, None)


def _document(name: bytes, data: bytes, mtime_ns: int) -> _Document:
    digest = blake3.blake3(data).digest()
    return _Document(name, "file", _FILE_MODE, mtime_ns, len(data), digest, b"", None, data)
