"""Which directories of a tree have changed since it was captured, as the kernel tells it (inotify).

A walk asks before it lists, and says which directories it lists, so that they are watched from then on.
Told are changes by system calls in this mount namespace. Not told are stores to mapped memory, changes
of a file through a name of it outside the tree (a walk says `doubt` where it sees such a file), and what a
kernel that serves files to other machines does for them; so everything is walked again now and then.
Nothing depends on it: whatever is wrong makes a tree unknown, never an error. Invariant: of a directory that
`is_unchanged`, everything `lstat` says of it and its entries is what it was when the base was captured.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import select
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Set
from pathlib import Path
from typing import Final

from replicated.file_systems import tells_changes
from replicated.snapshot import inotify
from replicated.snapshot.inotify import Inotify
from replicated.snapshot.mount_points import MountPoints

#: A tree with fewer files is walked faster than it is worth its watches (12 ms for 2,000 files).
MIN_FILES: Final = 2000
#: Everything is walked again after so long.
FULL_WALK_S: Final = 600.0
#: Each needs an inotify instance, of which a user may have 128 by default.
MAX_TREES: Final = 8
#: Trees of which it is remembered that they are not worth watching, or cannot be watched.
_MAX_REFUSED = 1024
#: Queues are read so long after something arrived: a file that is written all the time would otherwise
#: keep the daemon busy. They hold 16,384 events by default; should more come, the tree is unknown.
_DRAIN_DELAY_S = 0.1
_DEFAULT_MAX_WATCHES = 8192
_LIMIT = "fs.inotify.max_user_watches is too low for it"
_MAX_WATCHES_FILE = Path("/proc/sys/fs/inotify/max_user_watches")

_ENTRY_CHANGES: Final = inotify.CREATE | inotify.DELETE | inotify.MOVED_FROM | inotify.MOVED_TO
_GONE: Final = inotify.IGNORED | inotify.DELETE_SELF | inotify.MOVE_SELF
#: What is the matter with one directory and not with the tree.
_OF_THE_DIRECTORY: Final = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE}
)

_log = logging.getLogger(__name__)


class TreeWatches:
    """The watched trees of a daemon; see the module's text.

    Any method may be called from any thread. Before `start` and after `stop` all walks are full ones.
    There is one lock, a leaf, held while a queue is read or a watch is made.
    `clock` gives seconds that only go forward, `tells` says of an open directory whether its file system
    tells all changes, and trees that would need more than `max_watches` in all are not watched.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        tells: Callable[[int], bool] = tells_changes,
        max_watches: int | None = None,
        min_files: int = MIN_FILES,
    ) -> None:
        self._clock = clock
        self._tells = tells
        self._max_watches = _share_of_watches() if max_watches is None else max_watches
        self._min_files = min_files
        self._lock = threading.Lock()
        #: By key, the one used last at the end.
        self._trees: OrderedDict[bytes, _Tree] = OrderedDict()
        #: Keys of trees that are not watched, and until when: the small ones for ever.
        self._refused: OrderedDict[bytes, float] = OrderedDict()
        #: Instances that are of no use any more; closing one can take long.
        self._closing: list[Inotify] = []
        self._mounts: MountPoints | None = None
        self._epoll: select.epoll | None = None
        self._wake = -1
        self._is_stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def watch_count(self) -> int:
        """Directories that are watched now."""
        return sum(len(tree.watches) for tree in list(self._trees.values()))

    def start(self) -> None:
        """Begin to watch."""
        try:
            self._mounts = MountPoints()
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._epoll = select.epoll()
            self._epoll.register(self._wake, select.EPOLLIN)
        except OSError as error:
            _log.warning("changes of files are not watched: %s", error)
            self._release()
            return
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all watches; may be called twice."""
        self._is_stopping.set()
        if self._thread is None:
            return
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        with self._lock:
            self._thread = None
            for tree in list(self._trees.values()):
                self._close(tree)
            self._release()

    def begin(self, tree_key: bytes) -> WatchedWalk:
        """Begin a walk of the tree with this key; each must be committed or abandoned.

        What was done before this call is in `changed`; what is done after it, the next walk gets to know.
        An empty key is a tree that is not watched.
        """
        with self._lock:
            return WatchedWalk(self, tree_key, self._find(tree_key))

    def watch(self, tree: _Tree, path: bytes) -> int | None:
        """For walks: the number of a new watch on this directory; None when it cannot be watched."""
        is_root = not tree.root
        real_path = os.path.realpath(path) if is_root else path
        # Without the lock: it may have to wait for a server that does not answer.
        is_told = self._tells_changes(path) if is_root or path in tree.mount_points else True
        with self._lock:
            if is_root and not tree.root and not tree.is_closed:
                assert self._mounts is not None
                tree.set_root(path, real_path, self._mounts)
                if not is_told:
                    self._give_up(tree, logging.INFO, "its file system does not tell them")
            if tree.is_closed or not is_told:
                return None
            if self.watch_count >= self._max_watches:
                self._give_up(tree, logging.WARNING, _LIMIT)
                return None
            try:
                return tree.watch(path)
            except OSError as error:
                if error.errno not in _OF_THE_DIRECTORY:
                    reason = _LIMIT if error.errno == errno.ENOSPC else str(error)
                    self._give_up(tree, logging.WARNING, reason)
                return None

    def end(self, walk: WatchedWalk, snapshot: str, file_count: int | None) -> None:
        """For walks: they have ended, successfully if this is the id of a snapshot."""
        with self._lock:
            tree, walk.tree = walk.tree, None
            if tree is not None:
                tree.walks -= 1
            if not snapshot:
                return
            if tree is not None and not tree.is_closed:
                tree.set_base(snapshot, walk)
            if file_count is not None and walk.key:
                self._judge(walk.key, file_count)

    # What follows is called with the lock held, but `_run`, `_release` and `_tells_changes`.

    def _find(self, key: bytes) -> _Tree | None:
        """The tree with this key, all events taken in, or a new one; None when it is not to be watched."""
        if not key or self._thread is None or self._is_stopping.is_set():
            return None
        assert self._mounts is not None
        now = self._clock()
        if self._refused.get(key, now) > now:
            return None
        tree = self._trees.get(key)
        if tree is not None:
            self._take_in(tree)
        if tree is not None and not tree.is_closed:
            if now - tree.begun_at < FULL_WALK_S and tree.has_mounts(self._mounts):
                self._trees.move_to_end(key)
                return tree
            self._close(tree)
        return self._begin_tree(key, now)

    def _begin_tree(self, key: bytes, now: float) -> _Tree | None:
        if len(self._trees) >= MAX_TREES:
            idle = next((tree for tree in self._trees.values() if not tree.walks), None)
            if idle is None:
                return None
            self._close(idle)
        assert self._epoll is not None
        instance = None
        try:
            instance = Inotify()
            self._epoll.register(instance.descriptor, select.EPOLLIN)
        except OSError as error:
            _log.warning("changes of files are not watched: %s", error)
            self._refuse(key, now + FULL_WALK_S)
            if instance is not None:
                instance.close()
            return None
        tree = self._trees[key] = _Tree(key, instance, now)
        return tree

    def _take_in(self, tree: _Tree) -> None:
        try:
            is_known = tree.take_in()
        except OSError as error:
            _log.warning("cannot read what changed below %s: %s", os.fsdecode(tree.root), error)
            is_known = False
        if not is_known:
            self._close(tree)

    def _judge(self, key: bytes, file_count: int) -> None:
        """A tree has so many files: whether it is worth watching."""
        if file_count < self._min_files:
            self._refuse(key, math.inf)
        elif self._refused.get(key) == math.inf:
            del self._refused[key]

    def _give_up(self, tree: _Tree, level: int, reason: str) -> None:
        _log.log(level, "changes below %s are not watched: %s", os.fsdecode(tree.root), reason)
        self._refuse(tree.key, self._clock() + FULL_WALK_S)

    def _refuse(self, key: bytes, until: float) -> None:
        """Do not watch the tree with this key for a time."""
        self._refused[key] = until
        self._refused.move_to_end(key)
        if len(self._refused) > _MAX_REFUSED:
            self._refused.popitem(last=False)
        if key in self._trees:
            self._close(self._trees[key])

    def _close(self, tree: _Tree) -> None:
        """End the watches of a tree: what happens there is not known from now on."""
        del self._trees[tree.key]
        tree.close()
        self._closing.append(tree.instance)
        os.eventfd_write(self._wake, 1)

    def _tells_changes(self, path: bytes) -> bool:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return self._tells(descriptor)
        finally:
            os.close(descriptor)

    def _run(self) -> None:
        """Read the queues, so that they do not overflow, and close what is to be closed."""
        epoll = self._epoll
        assert epoll is not None
        # Asked after `_wake` was read: `stop` sets it before it writes there.
        while not self._is_stopping.is_set():
            ready = epoll.poll()
            self._is_stopping.wait(_DRAIN_DELAY_S)
            descriptors = {descriptor for descriptor, _ in ready}
            with self._lock:
                for tree in list(self._trees.values()):
                    if tree.instance.descriptor in descriptors:
                        self._take_in(tree)
                if self._wake in descriptors:
                    os.eventfd_read(self._wake)
                closing, self._closing = self._closing, []
            for instance in closing:
                instance.close()

    def _release(self) -> None:
        for instance in self._closing:
            instance.close()
        self._closing.clear()
        if self._epoll is not None:
            self._epoll.close()
        if self._wake >= 0:
            os.close(self._wake)
        if self._mounts is not None:
            self._mounts.close()


class WatchedWalk:
    """One walk of a tree, by one thread.

    From the root downwards, the walk asks whether a directory `is_unchanged` and, if it is not, says `add`
    and lists it. An unchanged directory may hold others that have changed. A walk that commits without
    having asked or added anything says that there is nothing in `changed` and all is as it was.
    """

    def __init__(self, watches: TreeWatches, key: bytes, tree: _Tree | None) -> None:
        self._watches = watches
        self.key = key
        #: None when it is not watched, or the walk has ended.
        self.tree = tree
        #: The snapshot whose walk has seen what `is_unchanged`; empty: everything is to be listed.
        self.base = ""
        #: Absolute paths of directories where something happened since then, or that cannot be watched.
        #: Directories below those that were moved are not among them, but none of these `is_unchanged`.
        self.changed: frozenset[bytes] = frozenset()
        #: The watches that the walk of the base has visited, some of which may have ended, and this one.
        self.vouched: Set[int] = frozenset()
        self.visited: set[int] = set()
        #: Directories that the next walk has to list as well.
        self.doubted: set[bytes] = set()
        self.period = 0
        if tree is not None:
            tree.begin(self)

    def is_unchanged(self, path: bytes) -> bool:
        """Whether this directory was visited by the walk of the base and has not changed since."""
        if self.tree is None or path in self.changed:
            return False
        watch = self.tree.watches.get(path)
        if watch is None or watch not in self.vouched:
            return False
        self.visited.add(watch)
        return True

    def add(self, path: bytes) -> None:
        """Watch this directory, which is about to be listed."""
        if self.tree is None or self.tree.is_closed:
            return
        watch = self.tree.watches.get(path)
        if watch is None:
            watch = self._watches.watch(self.tree, path)
        if watch is None:
            self.doubted.add(path)
        else:
            self.visited.add(watch)

    def doubt(self, path: bytes) -> None:
        """Have this directory listed by the next walk: files in it have other names (hard links)."""
        self.doubted.add(path)

    def commit(self, snapshot: str, file_count: int | None = None) -> None:
        """All has been seen for this snapshot, `file_count` files: changes are counted since `begin`."""
        self._watches.end(self, snapshot, file_count)

    def abandon(self) -> None:
        """The walk has failed: as if it had not been. No effect after `commit`."""
        self._watches.end(self, "", None)


class _Tree:
    """What is known of one tree, from its first full walk to the first trouble.

    Time is counted in periods: each begin of a walk begins one. All of it is used with the lock of
    `TreeWatches` held, but `watches` is also looked into without.
    """

    def __init__(self, key: bytes, instance: Inotify, begun_at: float) -> None:
        self.key = key
        self.instance = instance
        self.begun_at = begun_at
        self.is_closed = False
        self.root = b""
        #: Where something else is mounted below the root.
        self.mount_points: frozenset[bytes] = frozenset()
        self._real_root = b""
        self._mounted: dict[bytes, bytes] = {}
        self._mounts_seen = 0
        #: Walks that have begun and not ended.
        self.walks = 0
        #: Watched directories by path. If a directory is here, so is the one that holds it.
        self.watches: dict[bytes, int] = {}
        self._paths: dict[int, bytes] = {}
        #: The watched directories directly in another one.
        self._below: dict[bytes, set[bytes]] = {}
        self._period = 0
        #: In which period something happened last in a directory.
        self._events: dict[bytes, int] = {}
        self._base = ""
        self._base_period = 0
        self._vouched: Set[int] = frozenset()
        self._doubted: Set[bytes] = frozenset()

    def set_root(self, path: bytes, real_path: bytes, mounts: MountPoints) -> None:
        """Where the tree begins, which its first walk tells."""
        self.root, self._real_root = path, real_path
        self._mounts_seen = mounts.refresh()
        self._mounted = mounts.below(real_path)
        self.mount_points = frozenset(path + point[len(real_path) :] for point in self._mounted)

    def has_mounts(self, mounts: MountPoints) -> bool:
        """Whether these are what is mounted below the root since it was set."""
        seen = mounts.refresh()
        if not self.root or seen == self._mounts_seen:
            return True
        self._mounts_seen = seen
        return self._mounted == mounts.below(self._real_root)

    def begin(self, walk: WatchedWalk) -> None:
        """Tell a walk what changed; what happens from now on belongs to its period or a later one."""
        walk.base = self._base
        if self._base:
            happened = {path for path, period in self._events.items() if period >= self._base_period}
            walk.changed = frozenset(self._doubted | happened)
            walk.vouched = self._vouched
        self._period += 1
        walk.period = self._period
        self.walks += 1

    def set_base(self, snapshot: str, walk: WatchedWalk) -> None:
        """Count changes from the begin of this walk, unless a walk that began later has been committed."""
        if walk.period <= self._base_period:
            return
        if walk.visited:
            self._vouched = walk.visited
        elif walk.base and not walk.changed:
            self._vouched = walk.vouched
        else:
            return
        self._base, self._base_period, self._doubted = snapshot, walk.period, walk.doubted
        self._events = {path: period for path, period in self._events.items() if period >= walk.period}
        if walk.visited and not self.walks:
            for watch in self._paths.keys() - walk.visited:
                if watch in self._paths:
                    self._drop(self._paths[watch])

    def watch(self, path: bytes) -> int | None:
        """Watch this directory; None when the one that holds it is not watched."""
        parent = os.path.dirname(path)
        # Without it nobody would tell that this path leads elsewhere.
        if path != self.root and parent not in self.watches:
            return None
        if path in self.watches:
            return self.watches[path]
        watch = self.instance.add(self._real_root + path[len(self.root) :])
        if watch in self._paths:
            # It was moved, which is yet to be read, or the same directory is mounted in two places.
            self._drop(self._paths[watch])
            return self.watch(path)
        self.watches[path] = watch
        self._paths[watch] = path
        if path != self.root:
            self._below.setdefault(parent, set()).add(path)
        return watch

    def take_in(self) -> bool:
        """Read the queue; False when what happened cannot be known."""
        for watch, mask, name in self.instance.read():
            if mask & (inotify.Q_OVERFLOW | inotify.UNMOUNT):
                return False
            path = self._paths.get(watch)
            if path is None:
                # Of a watch that has been removed since.
                continue
            self._events[path] = self._period
            if mask & _GONE:
                if path == self.root:
                    return False
                self._drop(path)
            elif mask & inotify.ISDIR and mask & _ENTRY_CHANGES:
                # What was below this name is elsewhere now, and what is there now was elsewhere.
                self._drop(path + b"/" + name)
        return True

    def close(self) -> None:
        """Forget everything; the instance is for the caller to close."""
        self.is_closed = True
        self._base = ""
        self.watches = {}
        self._paths = {}
        self._below = {}

    def _drop(self, path: bytes) -> None:
        """End the watches of a directory and of all below it, if it is watched: it is not known any more."""
        if path not in self.watches:
            return
        self._events[path] = self._period
        self._below.get(os.path.dirname(path), set()).discard(path)
        pending = [path]
        while pending:
            path = pending.pop()
            pending.extend(self._below.pop(path, ()))
            watch = self.watches.pop(path)
            del self._paths[watch]
            self.instance.remove(watch)


def _share_of_watches() -> int:
    """A third of the watches that a user may have: a tree that is walked anew has its old ones for a
    moment as well, and others need some."""
    try:
        return int(_MAX_WATCHES_FILE.read_text()) // 3
    except (OSError, ValueError):
        return _DEFAULT_MAX_WATCHES // 3
