"""A whole repository as one tree: experiments with their code, checkpoints and records, and ways to them.

    experiments/<id>/{code,checkpoints/<step>-<id>[.json],metadata.json}, and links best, latest
    by-name/<name>, by-tag/<tag>/<id>, latest: links to experiments

It is a `Source` for a `Filesystem`. The directories of the view list what the catalog held at most `FRESH_S`
ago, and what the catalog holds of an experiment is brought up to date when the experiment is opened, as
often at most; below `code` and each checkpoint lies a snapshot, which never changes. What is not stored, or
was saved without files, has no directory; a record that cannot be read has no file, and hides no other.

Directories of experiments and checkpoints tell what they are in extended attributes: `extended`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from blake3 import blake3

from replicate.errors import RepositoryDamaged, RepositoryUnreachable
from replicate.ids import SnapshotId
from replicate.records import CheckpointRecord
from replicate.wire import encode_time
from replicated.catalog import Catalog, CatalogEntry, Place
from replicated.directories import FixedListing, Listing, Node
from replicated.file_reader import BytesReader
from replicated.format.metadata import encode_checkpoint, encode_experiment
from replicated.keys import snapshot_of
from replicated.mount.filesystem import NAME_MAX
from replicated.mount.reading.open_files import Reader
from replicated.repository import Repository
from replicated.tree import Tree, open_tree

if TYPE_CHECKING:
    from replicated.live_runs import LiveRuns

#: How old a listing may be, and what the catalog holds: looking up a path asks for several in a row.
FRESH_S: Final = 1.0

#: How old it may be which runs of other machines live.
LIVE_FRESH_S: Final = 10.0

#: Extended attributes of directories. Of experiments, `code` and checkpoints:
ID_ATTRIBUTE: Final = b"user.replicate.id"
STATE_ATTRIBUTE: Final = b"user.replicate.state"
#: Of experiments: how the run stands, as `replicate ls` shows it.
STATUS_ATTRIBUTE: Final = b"user.replicate.status"
#: Of `code` and checkpoints: the experiment that they belong to; of checkpoints, the step.
EXPERIMENT_ATTRIBUTE: Final = b"user.replicate.experiment"
STEP_ATTRIBUTE: Final = b"user.replicate.step"

_DIRECTORY_MODE = 0o555
_FILE_MODE = 0o444
_LINK_MODE = 0o777

#: Listings of directories of the view, and roots of snapshots, that are remembered.
_RECENT_LISTINGS: Final = 256
_RECENT_ROOTS: Final = 256

_log = logging.getLogger(__name__)


class _Folder(NamedTuple):
    """The content of a directory of the view."""

    #: `root`, `experiments`, `names`, `tags`, `tag`, `experiment` or `checkpoints`.
    kind: str
    #: The tag, or the id of the experiment.
    key: str = ""


class _Graft(NamedTuple):
    """The content of a directory that shows snapshots, laid over each other."""

    snapshot_ids: tuple[SnapshotId, ...]
    experiment_id: str
    #: Empty: it shows the code of the experiment.
    checkpoint_id: str
    step: int


class _Document(NamedTuple):
    """The content of a file that the view makes up: the record of an experiment, or of a checkpoint."""

    experiment_id: str
    checkpoint_id: str


class _Known(NamedTuple):
    """A listing as it was found last."""

    #: By the clock of the view.
    checked_at: float
    #: Of the catalog.
    version: tuple[int, int]
    #: Its entries; as long as they are the same, the listing is the same object.
    nodes: Sequence[Node]
    listing: Listing


class RepositoryView:
    """The tree of a whole repository. May be used from several threads."""

    def __init__(
        self, repository: Repository, catalog: Catalog, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._repository = repository
        self._catalog = catalog
        self._clock = clock
        # Guards the two below, and is never held while the catalog or the repository is asked.
        self._lock = threading.Lock()
        self._known: OrderedDict[_Folder, _Known] = OrderedDict()
        self._roots: OrderedDict[_Graft, Node] = OrderedDict()
        # Held while the repository is asked for what is new; who finds it taken shows what is known.
        self._refreshing = threading.Lock()
        self._refreshed_at = -FRESH_S
        # The experiments for which that was done by themselves since.
        self._refreshed: set[str] = set()
        #: Which runs of other machines live; replaced as a whole.
        self._live_runs: LiveRuns | None = None
        self.root: Node = _folder(b"", _Folder("root"), 0)
        # Any tree of the repository reads the nodes of every other; how long a directory may be is the matter
        # of those who number it.
        self._tree = Tree(repository, self.root, sys.maxsize)
        self._listers: Mapping[str, Callable[[str], Iterator[Node]]] = {
            "root": self._list_root,
            "experiments": self._list_experiments,
            "names": self._list_names,
            "tags": self._list_tags,
            "tag": self._list_tag,
            "experiment": self._list_experiment,
            "checkpoints": self._list_checkpoints,
        }

    @staticmethod
    def can_change(node: Node) -> bool:
        """Whether a directory can have other entries later."""
        return isinstance(node.content, _Folder)

    def listing(self, node: Node) -> Listing:
        """What a directory holds."""
        if isinstance(node.content, _Folder):
            return self._list(node.content)
        return self._tree.listing(self._root_of(node.content) if isinstance(node.content, _Graft) else node)

    def preload(self, nodes: Sequence[Node]) -> None:
        """Get ready for the listing of directories below a snapshot."""
        self._tree.preload([node for node in nodes if not isinstance(node.content, (_Folder, _Graft))])

    def reader(self, node: Node) -> Reader:
        """Something that reads the bytes of a file."""
        if isinstance(node.content, _Document):
            return BytesReader(self._document(node), node.hash)
        return self._tree.reader(node)

    def read_files(self, nodes: Sequence[Node]) -> list[bytes]:
        """The contents of small files, with few reads of the store."""
        stored = iter(
            self._tree.read_files([node for node in nodes if not isinstance(node.content, _Document)])
        )
        return [
            self._document(node) if isinstance(node.content, _Document) else next(stored) for node in nodes
        ]

    def extended(self, node: Node) -> Mapping[bytes, Callable[[], bytes | None]]:
        """The extended attributes of a directory of an experiment or checkpoint; of others none.

        Nothing is asked for the names, and for a value only when it is found; None once it is no more.
        """
        content = node.content
        if isinstance(content, _Folder) and content.kind == "experiment":
            return {
                ID_ATTRIBUTE: content.key.encode,
                STATE_ATTRIBUTE: lambda: self._tell(content, lambda entry: entry.state),
                STATUS_ATTRIBUTE: lambda: self._tell(content, self._status),
            }
        if not isinstance(content, _Graft):
            return {}
        told: dict[bytes, Callable[[], bytes | None]] = {
            ID_ATTRIBUTE: (content.checkpoint_id or content.experiment_id).encode,
            EXPERIMENT_ATTRIBUTE: content.experiment_id.encode,
            # Only what is stored has a directory.
            STATE_ATTRIBUTE: lambda: b"stored",
        }
        if content.checkpoint_id:
            told[STEP_ATTRIBUTE] = str(content.step).encode
        return told

    # -- freshness -----------------------------------------------------------------------------------

    def _list(self, folder: _Folder) -> Listing:
        with self._lock:
            known = self._known.get(folder)
            if known is not None:
                self._known.move_to_end(folder)
        now = self._clock()
        if known is not None and now - known.checked_at < FRESH_S:
            return known.listing
        if not self._refresh(folder, is_urgent=known is None) and known is not None:
            return known.listing
        version = self._catalog.version
        if known is not None and known.version == version:
            nodes, listing = known.nodes, known.listing
        else:
            # Later entries win where names collide.
            by_name = {node.name: node for node in self._listers[folder.kind](folder.key)}
            nodes = [by_name[name] for name in sorted(by_name)]
            is_same = known is not None and known.nodes == nodes
            listing = known.listing if known is not None and is_same else FixedListing(nodes)
        with self._lock:
            self._known[folder] = _Known(now, version, nodes, listing)
            while len(self._known) > _RECENT_LISTINGS:
                self._known.popitem(last=False)
        return listing

    def _refresh(self, folder: _Folder, *, is_urgent: bool) -> bool:
        """Take in what is new as far as a listing needs it; False when another thread is at it.

        When the repository is out of reach, what is known stays.
        """
        if not self._refreshing.acquire(blocking=is_urgent):
            return False
        try:
            if self._clock() - self._refreshed_at >= FRESH_S:
                self._catalog.refresh_experiments()
                self._refreshed_at = self._clock()
                self._refreshed.clear()
            if folder.kind in ("experiment", "checkpoints") and folder.key not in self._refreshed:
                self._catalog.refresh_experiment(folder.key)
                self._refreshed.add(folder.key)
        except RepositoryUnreachable as error:
            _log.warning("what is new cannot be shown: %s", error)
        finally:
            self._refreshing.release()
        return True

    def _root_of(self, graft: _Graft) -> Node:
        with self._lock:
            root = self._roots.get(graft)
            if root is not None:
                self._roots.move_to_end(graft)
        if root is None:
            root = open_tree(self._repository, *graft.snapshot_ids).root
            with self._lock:
                self._roots[graft] = root
                while len(self._roots) > _RECENT_ROOTS:
                    self._roots.popitem(last=False)
        return root

    # -- records -------------------------------------------------------------------------------------

    def _entry(self, experiment_id: str) -> CatalogEntry | None:
        return next(self._catalog.entries(experiment_id), None)

    def _tell(self, experiment: _Folder, tell: Callable[[CatalogEntry], str]) -> bytes | None:
        self._refresh(experiment, is_urgent=True)
        entry = self._entry(experiment.key)
        return None if entry is None else tell(entry).encode()

    def _status(self, entry: CatalogEntry) -> str:
        # Imported here: only who asks for this attribute needs it.
        from replicated.experiments import recorded_status
        from replicated.live_runs import LiveRuns

        if self._live_runs is None:
            self._live_runs = LiveRuns(self._repository, LIVE_FRESH_S)
        return recorded_status(entry, self._live_runs)[0]

    def _document(self, node: Node) -> bytes:
        """The bytes of a record, made again from the catalog."""
        assert isinstance(node.content, _Document)
        data = b""
        if node.content.checkpoint_id:
            checkpoint = self._catalog.checkpoint(node.content.checkpoint_id)
            if checkpoint is not None:
                data = encode_checkpoint(checkpoint)
        else:
            entry = self._entry(node.content.experiment_id)
            if entry is not None:
                data = encode_experiment(entry.record)
        if blake3(data).digest() != node.hash:
            raise RepositoryDamaged(f"the record is not there any more: {os.fsdecode(node.name)}")
        return data

    # -- directories ---------------------------------------------------------------------------------

    def _list_root(self, _: str) -> Iterator[Node]:
        newest = self._catalog.newest_place()
        newest_ns = newest.created_ns if newest else 0
        yield _folder(b"experiments", _Folder("experiments"), newest_ns)
        yield _folder(b"by-name", _Folder("names"), newest_ns)
        yield _folder(b"by-tag", _Folder("tags"), newest_ns)
        if newest:
            yield _link_to(newest, b"latest", b"")

    def _list_experiments(self, _: str) -> Iterator[Node]:
        for place in self._catalog.list_places():
            yield _folder(place.id.encode(), _Folder("experiment", place.id), place.created_ns)

    def _list_names(self, _: str) -> Iterator[Node]:
        for name, place in self._catalog.list_names():
            if file_name := _file_name(name):
                yield _link_to(place, file_name, b"../")

    def _list_tags(self, _: str) -> Iterator[Node]:
        for tag, newest_ns in self._catalog.list_tags():
            if file_name := _file_name(tag):
                yield _folder(file_name, _Folder("tag", tag), newest_ns)

    def _list_tag(self, tag: str) -> Iterator[Node]:
        for place in self._catalog.list_tagged(tag):
            yield _link_to(place, place.id.encode(), b"../../")

    def _list_experiment(self, experiment_id: str) -> Iterator[Node]:
        entry = self._entry(experiment_id)
        if entry is None:
            return
        created_ns = encode_time(entry.record.created)
        code = _code(entry)
        if code:
            yield _graft(b"code", _Graft(code, experiment_id, "", 0), created_ns)
        if created_ns:
            document = _Document(experiment_id, "")
            yield _record(b"metadata.json", document, encode_experiment(entry.record), created_ns)
        newest_ns = self._catalog.newest_checkpoint_ns(experiment_id) or created_ns
        yield _folder(b"checkpoints", _Folder("checkpoints", experiment_id), newest_ns)
        for name, chosen in ((b"best", entry.best), (b"latest", entry.latest)):
            if chosen is not None and _files(code, chosen):
                yield _link(name, b"checkpoints/" + _checkpoint_name(chosen), encode_time(chosen.created))

    def _list_checkpoints(self, experiment_id: str) -> Iterator[Node]:
        entry = self._entry(experiment_id)
        if entry is None:
            return
        code = _code(entry)
        for checkpoint in self._catalog.checkpoints(experiment_id):
            name, created_ns = _checkpoint_name(checkpoint), encode_time(checkpoint.created)
            files = _files(code, checkpoint)
            if files:
                yield _graft(name, _Graft(files, experiment_id, checkpoint.id, checkpoint.step), created_ns)
            if created_ns:
                document = _Document(experiment_id, checkpoint.id)
                yield _record(name + b".json", document, encode_checkpoint(checkpoint), created_ns)


def _code(entry: CatalogEntry) -> tuple[SnapshotId, ...]:
    """The snapshot of what `init` saved, if it saved something and that is stored."""
    return (snapshot_of(entry.record.id),) if entry.record.paths and entry.state == "stored" else ()


def _files(code: tuple[SnapshotId, ...], checkpoint: CheckpointRecord) -> tuple[SnapshotId, ...]:
    """What a checkpoint shows: its files over the experiment's, as `checkout` does; empty for nothing."""
    if checkpoint.state != "stored":
        return ()
    return (*code, snapshot_of(checkpoint.experiment_id, checkpoint.id)) if checkpoint.paths else code


def _checkpoint_name(checkpoint: CheckpointRecord) -> bytes:
    return f"{checkpoint.step}-{checkpoint.id}".encode()


def _file_name(text: str) -> bytes:
    """A name or tag as the name of a file; empty when it cannot be one."""
    name = os.fsencode(text.replace("/", "%2F").replace("\0", "%00"))
    return b"" if name in (b".", b"..") or len(name) > NAME_MAX else name


def _folder(name: bytes, folder: _Folder, mtime_ns: int) -> Node:
    return Node(name, "directory", _DIRECTORY_MODE, mtime_ns, 0, b"", b"", folder)


def _graft(name: bytes, graft: _Graft, mtime_ns: int) -> Node:
    return Node(name, "directory", _DIRECTORY_MODE, mtime_ns, 0, b"", b"", graft)


def _link(name: bytes, target: bytes, mtime_ns: int) -> Node:
    digest = blake3(target).digest()
    return Node(name, "symlink", _LINK_MODE, mtime_ns, len(target), digest, target, None)


def _link_to(place: Place, name: bytes, way_up: bytes) -> Node:
    return _link(name, way_up + b"experiments/" + place.id.encode(), place.created_ns)


def _record(name: bytes, document: _Document, data: bytes, mtime_ns: int) -> Node:
    return Node(name, "file", _FILE_MODE, mtime_ns, len(data), blake3(data).digest(), b"", document)
