"""The repositories that this process reads through fsspec: each opened once, and shared by all threads.

File systems and open files only say which repository they mean, so that they can be sent to other processes
and survive a fork: a child opens its repositories anew, because neither databases nor threads are inherited.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

from replicate.errors import ConfigError
from replicate.home import PRIVATE_MODE, find_home
from replicate.ids import SnapshotId
from replicated.cache import ContentCache
from replicated.format.metadata import Snapshot
from replicated.fsspec_files.naming import Names
from replicated.repository import MEMORY_BYTES, Repository
from replicated.store import open_store
from replicated.tree import Tree, overlay_roots

#: How long a request that fails in passing is repeated: a job of many processes meets throttling.
PATIENCE_S: Final = 30.0
#: Snapshots whose nodes stay in memory, some MiB each.
_MAX_TREES: Final = 8
_MAX_SNAPSHOTS: Final = 256

_log = logging.getLogger(__name__)


class Source(NamedTuple):
    """Which repository is meant, and how it is read."""

    #: Absolute.
    url: str
    #: What may be kept on this machine's disk of a repository that is not near; 0: nothing.
    cache_bytes: int
    #: Variables of the SDKs of clouds beside those of the process, sorted by name.
    environment: tuple[tuple[str, str], ...] = ()


class OpenRepository:
    """One repository with what is known of it. Thread-safe."""

    def __init__(self, source: Source) -> None:
        """Raises what opening a repository raises."""
        #: Guards the two below; a leaf.
        self._lock = threading.Lock()
        self._snapshots: OrderedDict[SnapshotId, Snapshot] = OrderedDict()
        self._trees: OrderedDict[tuple[SnapshotId, ...], Tree] = OrderedDict()
        with ExitStack() as stack:
            environment = {**os.environ, **dict(source.environment)} if source.environment else None
            store = open_store(source.url, create=False, environment=environment, patience_s=PATIENCE_S)
            directory, is_lasting = _cache_directory()
            content = None
            # What is no place for caches may be a small one.
            if source.cache_bytes and is_lasting and not store.capabilities.is_near:
                content = ContentCache(directory / "content", source.cache_bytes)
                stack.callback(content.close)
            # A memory of its own: a lock of one that is shared could be held by nobody after a fork.
            self.repository = Repository.open_on(
                store, cache=directory, create=False, content=content, memory_bytes=MEMORY_BYTES
            )
            stack.callback(self.repository.close)
            self.names = Names(self.repository, directory / "file-catalogs", self._load_snapshot)
            stack.callback(self.names.close)
            self._stack = stack.pop_all()

    @property
    def is_near(self) -> bool:
        """Whether reading asks no other machine."""
        return self.repository.store.capabilities.is_near

    def tree(self, snapshot_ids: Sequence[SnapshotId]) -> Tree:
        """The files of snapshots, of which there is at least one; raises `NotStored`."""
        key = tuple(snapshot_ids)
        with self._lock:
            tree = self._trees.get(key)
            if tree is not None:
                self._trees.move_to_end(key)
        if tree is None:
            tree = overlay_roots(self.repository, [self._load_snapshot(one).root for one in key])
            with self._lock:
                self._trees[key] = tree
                while len(self._trees) > _MAX_TREES:
                    self._trees.popitem(last=False)
        return tree

    def _load_snapshot(self, snapshot_id: SnapshotId) -> Snapshot:
        """The snapshot; raises `NotStored`."""
        with self._lock:
            snapshot = self._snapshots.get(snapshot_id)
        if snapshot is None:
            snapshot = self.repository.load_snapshot(snapshot_id)
            with self._lock:
                self._snapshots[snapshot_id] = snapshot
                while len(self._snapshots) > _MAX_SNAPSHOTS:
                    self._snapshots.popitem(last=False)
        return snapshot

    def close(self) -> None:
        """Close everything; call when no thread uses it any more."""
        self._stack.close()


#: Guards what follows; held while a repository is being opened, so that others who need it wait.
_lock = threading.Lock()
_opened: dict[Source, OpenRepository] = {}
#: A directory of this process alone, where nothing lasts.
_temporary: list[str] = []
#: What a parent had open. A child must not close it: the databases in it are the parent's.
_inherited: list[OpenRepository] = []


def opened(source: Source) -> OpenRepository:
    """The repository, opened by this process; raises as `OpenRepository`."""
    known = _opened.get(source)
    if known is None:
        with _lock:
            known = _opened.get(source)
            if known is None:
                known = _opened[source] = OpenRepository(source)
    return known


def forget_names(source: Source) -> None:
    """Look up anew what names of a repository mean, if this process has it open."""
    known = _opened.get(source)
    if known is not None:
        known.names.forget()


def close_all() -> None:
    """Close every repository; call when no thread uses one any more."""
    with _lock:
        while _opened:
            _opened.popitem()[1].close()
        while _temporary:
            shutil.rmtree(_temporary.pop(), ignore_errors=True)


def _begin_as_child() -> None:
    global _lock
    _lock = threading.Lock()
    _inherited.extend(_opened.values())
    _opened.clear()
    _temporary.clear()


atexit.register(close_all)
os.register_at_fork(after_in_child=_begin_as_child)


def _cache_directory() -> tuple[Path, bool]:
    """Where caches are kept, and whether they outlive this process. Called with the lock held."""
    try:
        directory = find_home().cache
        directory.mkdir(mode=PRIVATE_MODE, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory, True
    except (OSError, RuntimeError, ConfigError) as error:
        # Without a home directory, or with one that cannot be written, as in many containers.
        if not _temporary:
            _log.warning("nothing that was read is kept on this machine: %s", error)
            _temporary.append(tempfile.mkdtemp(prefix="replicate-"))
        return Path(_temporary[0]), False
