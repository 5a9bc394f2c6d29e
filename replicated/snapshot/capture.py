"""Freeze the files of a project: on return the daemon owns what they held, whatever the script does next.

`Capturer` puts the parts together: `walk` finds the files, `freeze` makes each the daemon's own with as
little work as can be, `spill` writes to the spool what was read into memory, and `entries` describe all of
it for `ingest`. What the repository has already (tree cache), what another capture froze (`pending`,
`held`) and what a watched tree did not change is not read again. Called by `intake`, from several threads
at once, and by the workers of `jobs` when they begin and end a snapshot. Invariant: a failed capture
leaves nothing behind, and there is never a mixed file.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgpack
from blake3 import blake3

from replicate.config import RUNG_VARIABLE
from replicate.errors import CaptureFailed, PathMissing
from replicated import file_systems
from replicated.snapshot.additions import Additions
from replicated.snapshot.entries import Header, SameTree, pack_header, pack_same_tree
from replicated.snapshot.freeze import Freezer
from replicated.snapshot.held import HeldFiles
from replicated.snapshot.ignore import IgnoreRules
from replicated.snapshot.pending import Pending
from replicated.snapshot.selection import Selection
from replicated.snapshot.spill import Spill
from replicated.snapshot.spool import EntriesWriter, SnapshotSpool, Spool
from replicated.snapshot.treecache import CachedTree, TreeCache
from replicated.snapshot.unchanged import Base
from replicated.snapshot.walk import Walk
from replicated.snapshot.watch import TreeWatches, WatchedWalk

#: More trees than are ever watched.
_TREES_REMEMBERED: Final = 64


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """What to freeze: `paths` are relative to `project_directory`, "." is all of it."""

    identifier: str
    project_directory: bytes
    paths: tuple[bytes, ...]
    ignore: tuple[str, ...] = ()
    #: Survive a power cut on return (`capture: copy`); else only the death of trainer and daemon.
    durable: bool = False
    #: Relative paths of files that are mapped for writing: their times do not tell of changes.
    mapped: frozenset[bytes] = frozenset()
    #: One of `config.RUNGS`: capture all files that way or fail; empty for the first that can be had.
    rung: str = ""
    #: How many new bytes are unusual enough to be told of; 0: none are.
    warn_above: int = 0


@dataclass(frozen=True, slots=True)
class Captured:
    """What was frozen."""

    file_count: int
    size_bytes: int
    warnings: tuple[str, ...]
    #: For `entries.read_entries`; empty when they are in the spool.
    entries: bytes = b""
    #: Held, in memory or in the spool until it is stored: all but what the repository has already.
    frozen_bytes: int = 0
    #: Of it on the disk of the spool, and not for another snapshot as well.
    spooled_bytes: int = 0
    has_spool: bool = False
    #: What is new, when that is more than `CaptureRequest.warn_above`.
    unusual: Additions | None = None


@dataclass(frozen=True, slots=True)
class _SeenTree:
    """What the last capture of a whole tree saw."""

    #: The snapshot that listed it, and those since for which nothing had changed, in order.
    snapshots: tuple[str, ...]
    warnings: tuple[str, ...]
    #: Absolute paths of the directories that the warnings are about.
    noted: frozenset[bytes]


class Capturer:
    """Captures, and keeps what they need until they are stored.

    `private` directories (our own state) are never captured. One lock of its own, a leaf, for `_seen`.
    """

    def __init__(self, spool: Spool, held: HeldFiles, watches: TreeWatches, private: Iterable[Path]) -> None:
        self._spool = spool
        self._held = held
        self._watches = watches
        self._private = frozenset(_identities(private))
        self._spill = Spill()
        self._pending = Pending()
        self._no_reflink: set[int] = set()
        self._lock = threading.Lock()
        #: By key of the tree.
        self._seen: OrderedDict[bytes, _SeenTree] = OrderedDict()

    def capture(
        self, request: CaptureRequest, repository_directory: Path | None, cache: TreeCache | None
    ) -> Captured:
        """Freeze the paths of a request.

        The repository's own directory is skipped. Raises `PathMissing`, `ChangedWhileReading` or
        `CaptureFailed` naming the file; then nothing is left.
        """
        if request.rung == "lease" and request.durable:
            raise CaptureFailed(
                "`capture: copy` takes no leases, and nothing else is allowed", hint=f"unset {RUNG_VARIABLE}"
            )
        selection = Selection.of(request.paths)
        skipped = self._private.union(_identities([repository_directory] if repository_directory else []))
        # What a daemon that died, or a request that was given up, may have left.
        self.forget(request.identifier)
        try:
            capture = _Capture(self, request, selection, skipped, None if request.rung else cache)
            captured = capture.run()
            if captured.has_spool and (request.durable or not self._spill.is_reserved(request.identifier)):
                self.finish(request.identifier)
            if captured.has_spool and request.durable:
                self._sync(request.identifier)
        except BaseException:
            self.forget(request.identifier)
            raise
        return captured

    def finish(self, identifier: str) -> None:
        """Wait until nothing of a snapshot is in memory only; `CaptureFailed` when it cannot be written."""
        self._spill.finish(identifier)

    def forget(self, identifier: str) -> None:
        """Drop all that is kept for a snapshot: it is stored, or never will be. May be called twice."""
        self._pending.forget(identifier)
        self._spill.forget(identifier)
        self._held.release(identifier)
        self._spool.remove(identifier)

    def stop(self) -> None:
        """Write what is in memory; nothing may be captured after this."""
        self._spill.stop()

    def _sync(self, identifier: str) -> None:
        try:
            self._spool.sync(identifier)
        except OSError as error:
            raise SnapshotSpool(self._spool, identifier).failure(error) from error

    def _find_seen(self, tree_key: bytes) -> _SeenTree | None:
        with self._lock:
            return self._seen.get(tree_key)

    def _set_seen(self, tree_key: bytes, seen: _SeenTree | None) -> None:
        with self._lock:
            self._seen.pop(tree_key, None)
            if seen is not None:
                self._seen[tree_key] = seen
            if len(self._seen) > _TREES_REMEMBERED:
                self._seen.popitem(last=False)


class _Capture:
    """One capture in progress."""

    def __init__(
        self,
        capturer: Capturer,
        request: CaptureRequest,
        selection: Selection,
        skipped: frozenset[tuple[int, int]],
        cache: TreeCache | None,
    ) -> None:
        self._capturer = capturer
        self._request = request
        self._selection = selection
        self._skipped = skipped
        self._cache = cache
        #: Whether files whose stat is the same are the same.
        self._may_share = not request.rung
        self._spool = SnapshotSpool(capturer._spool, request.identifier)
        self._entries = EntriesWriter(self._spool)

    def run(self) -> Captured:
        project = self._request.project_directory
        try:
            root = os.open(project, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise PathMissing(
                f"cannot open the project directory {os.fsdecode(project)}: {error.strerror}"
            ) from error
        with ExitStack() as stack:
            stack.callback(os.close, root)
            info = os.fstat(root)
            if not file_systems.times_tell_of_stores(root):
                self._cache, self._may_share = None, False
            tree_key = self._tree_key(info)
            watched = self._capturer._watches.begin(tree_key)
            stack.callback(watched.abandon)
            stack.callback(self._entries.close)
            self._entries.write(pack_header(Header(project, tree_key)))
            seen = self._capturer._find_seen(tree_key) if watched.base else None
            tree = self._find_base(tree_key, watched, seen)
            if tree is not None and seen is not None and not watched.changed and not self._request.mapped:
                return self._same_tree(tree_key, tree, seen, watched)
            # Below names that were chosen, a base cannot tell what else is: it is all or nothing there.
            root_of_base = tree.root if tree is not None and self._selection.is_whole else None
            base = Base(watched, self._cache, root_of_base, seen.noted if seen else ())
            return self._walk(root, info, tree_key, base, watched)

    def _tree_key(self, info: os.stat_result) -> bytes:
        """Names this walk, so that another one of the same key finds the same if nothing has changed."""
        paths = sorted(set(self._request.paths))
        if self._cache is None or not any(map(self._is_directory, paths)):
            return b""  # a few files are looked at in less time than it takes to watch them
        identity = (self._request.project_directory, info.st_dev, info.st_ino, self._request.ignore, paths)
        return blake3(msgpack.packb(identity, unicode_errors="surrogateescape")).digest()

    def _is_directory(self, path: bytes) -> bool:
        try:
            info = os.lstat(os.path.join(self._request.project_directory, path))
        except OSError:
            return False
        return stat.S_ISDIR(info.st_mode)

    def _find_base(self, tree_key: bytes, watched: WatchedWalk, seen: _SeenTree | None) -> CachedTree | None:
        """The stored tree since whose capture changes are known."""
        if seen is None or self._cache is None or watched.base not in seen.snapshots:
            return None
        tree = self._cache.load_tree(tree_key)
        return tree if tree is not None and tree.snapshot in seen.snapshots else None

    def _same_tree(
        self, tree_key: bytes, tree: CachedTree, seen: _SeenTree, watched: WatchedWalk
    ) -> Captured:
        self._entries.write(pack_same_tree(SameTree(tree.root)))
        # Older ones will not be stored any more.
        snapshots = seen.snapshots[seen.snapshots.index(tree.snapshot) :]
        seen = _SeenTree((*snapshots, self._request.identifier), seen.warnings, seen.noted)
        self._capturer._set_seen(tree_key, seen)
        watched.commit(self._request.identifier, tree.root.files)
        return Captured(tree.root.files, tree.root.size_bytes, seen.warnings, self._entries.finish())

    def _walk(
        self, root: int, info: os.stat_result, tree_key: bytes, base: Base, watched: WatchedWalk
    ) -> Captured:
        capturer, request = self._capturer, self._request
        freezer = Freezer(
            self._spool,
            capturer._spill,
            capturer._held,
            is_durable=request.durable,
            rung=request.rung,
            no_reflink=capturer._no_reflink,
        )
        walk = Walk(
            request.project_directory,
            freezer,
            base,
            watched,
            capturer._pending if self._may_share else None,
            self._entries.write,
            skipped=self._skipped,
            mapped=request.mapped,
        )
        try:
            walk.run(root, info, self._selection, IgnoreRules(request.ignore))
            entries = self._entries.finish()
            freezer.end()
        finally:
            freezer.abandon()
        capturer._pending.add(request.identifier, walk.read)
        warnings = walk.omissions.warnings()
        if walk.has_unseen_rules or request.mapped:
            # No base for the next: nobody tells of changes of the rules, or of stores into mapped files.
            capturer._set_seen(tree_key, None)
        elif tree_key:
            noted = frozenset(map(walk.absolute, walk.omissions.directories))
            capturer._set_seen(tree_key, _SeenTree((request.identifier,), warnings, noted))
            watched.commit(request.identifier, walk.file_count)
        return Captured(
            walk.file_count,
            walk.size_bytes,
            warnings,
            entries,
            freezer.additions.size_bytes,
            freezer.spooled_bytes,
            self._spool.exists,
            freezer.additions if 0 < request.warn_above < freezer.additions.size_bytes else None,
        )


def _identities(directories: Iterable[Path]) -> Iterator[tuple[int, int]]:
    for directory in directories:
        try:
            info = os.stat(directory)
        except OSError:
            continue
        yield info.st_dev, info.st_ino
