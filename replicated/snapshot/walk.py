"""Walk the chosen paths of a project: one captured directory after another, parents first.

Directories are walked by descriptor and no symbolic link is ever followed, so nothing outside the project
can get in. Of a watched tree, directories without changes are not even listed. Called by `capture`, once a
capture; the files of each directory are the part of `listing`, what is left out that of `ignore`.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

from replicated import file_systems
from replicated.snapshot.entries import (
    PACKED,
    SPOOLED,
    CapturedDirectory,
    pack_directory,
    unpack_children,
)
from replicated.snapshot.freeze import OPEN_FLAGS, Freezer
from replicated.snapshot.ignore import IGNORE_FILE, IgnoreRules
from replicated.snapshot.listing import OF_ANOTHER_TYPE, FileTaker, Listing, changing, missing, read_error
from replicated.snapshot.pending import Pending, PendingDirectory
from replicated.snapshot.selection import Omissions, Selection
from replicated.snapshot.treecache import CachedDirectory
from replicated.snapshot.unchanged import Base, UnchangedChild, count_files
from replicated.snapshot.watch import WatchedWalk

_DIRECTORY_FLAGS = OPEN_FLAGS | os.O_DIRECTORY
_ENCODING, _ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
_IGNORE_FILE = os.fsencode(IGNORE_FILE)
_VIRTUAL_ENVIRONMENT_MARK = b"pyvenv.cfg"
_TYPE_BITS = 0o170000
_size_of = itemgetter(3)


class _Below(NamedTuple):
    """A directory in a directory, to be entered."""

    name: bytes
    rules: IgnoreRules
    selection: Selection
    is_asked_for: bool = False
    #: Id of its node in the base; empty when that is not known, or other rules held.
    node: bytes = b""
    #: What the base has of it, when the directory that it is in was not listed.
    unchanged: UnchangedChild | None = None


@dataclass(slots=True)
class _Frame:
    """One directory of the walk, while those in it are walked."""

    path: bytes
    name: bytes
    #: -1 when it need not be open.
    descriptor: int
    below: Iterator[_Below] = field(default_factory=lambda: iter(()))


class Walk:
    """One walk; after `run` it says what was found."""

    def __init__(
        self,
        project_directory: bytes,
        freezer: Freezer,
        base: Base,
        watched: WatchedWalk,
        pending: Pending | None,
        emit: Callable[[bytes], None],
        *,
        skipped: frozenset[tuple[int, int]],
        mapped: Iterable[bytes] = (),
    ) -> None:
        """`skipped` directories, by device and inode, are left out; `emit` gets packed directories.

        Without `pending`, files are frozen though another capture has them.
        """
        self._project_directory = project_directory
        self._base = base
        self._watched = watched
        self._pending = pending
        self._emit = emit
        self._skipped = skipped
        self._mapped: dict[bytes, set[bytes]] = {}
        for path in mapped:
            directory, _, name = path.rpartition(b"/")
            self._mapped.setdefault(directory, set()).add(name)
        self._device = 0
        self._stack: list[_Frame] = []
        self._own_mounts: frozenset[int] | None = None
        self.omissions = Omissions()
        self._files = FileTaker(freezer, self.omissions, lambda path: base.load(self.absolute(path)))
        #: Directories with files that are in the spool now.
        self.read: list[PendingDirectory] = []
        #: Whether rules came from a file that is itself left out, so that no capture shows its changes.
        self.has_unseen_rules = False
        self.file_count = 0
        self.size_bytes = 0

    def run(self, root: int, info: os.stat_result, selection: Selection, rules: IgnoreRules) -> None:
        """Walk the project directory, which is open as `root` and stays so.

        Raises `PathMissing`, `ChangedWhileReading` or `CaptureFailed` naming the file.
        """
        self._device = info.st_dev
        frame = _Frame(b"", b"", root)
        self._stack.append(frame)
        try:
            top = _Below(b"", rules, selection, node=self._base.root_node)
            try:
                frame.below = iter(self._capture(top, frame))
            except OSError as error:
                raise read_error(error, self._project_directory) from error
            while self._stack:
                below = next(self._stack[-1].below, None)
                if below is None:
                    _close(self._stack.pop())
                else:
                    self._enter(self._stack[-1], below)
        finally:
            while self._stack:
                _close(self._stack.pop())

    # ------------------------------------------------------------- directories

    def _enter(self, parent: _Frame, below: _Below) -> None:
        """Capture a directory, and go on with those in it."""
        path = parent.path + b"/" + below.name if parent.path else below.name
        frame = _Frame(path, below.name, -1)
        self._stack.append(frame)
        try:
            frame.below = iter(self._capture(below, frame))
        except FileNotFoundError:
            # Deleted since its name was read; else the user wanted it.
            if below.is_asked_for:
                raise missing(path) from None
        except OSError as error:
            if error.errno not in OF_ANOTHER_TYPE:
                raise read_error(error, path) from error
            if below.is_asked_for:
                raise changing(path) from error

    def _capture(self, below: _Below, frame: _Frame) -> list[_Below]:
        """Capture the files of one directory, and find the directories in it."""
        if below.unchanged is not None:
            _, mode, mtime_ns, _, cached = below.unchanged
            found = self._take_over(below, frame, mode, mtime_ns, cached)
            if found is not None:
                return found
        if frame.descriptor < 0:
            above = self._descriptor(len(self._stack) - 2)
            info = os.stat(below.name, dir_fd=above, follow_symlinks=False)
            if self._leaves_out(frame.path, info):
                return []
        else:
            above, info = -1, os.fstat(frame.descriptor)
        cached = self._base.load(self.absolute(frame.path)) if below.selection.everything else None
        if cached is not None and (cached.device, cached.inode) != (info.st_dev, info.st_ino):
            cached = None
        found = self._take_over(below, frame, info.st_mode, info.st_mtime_ns, cached)
        if found is not None:
            return found
        if frame.descriptor < 0:
            frame.descriptor = os.open(below.name, _DIRECTORY_FLAGS, dir_fd=above)
            info = os.fstat(frame.descriptor)
        return self._list(below, frame, info, cached)

    def _take_over(
        self, below: _Below, frame: _Frame, mode: int, mtime_ns: int, cached: CachedDirectory | None
    ) -> list[_Below] | None:
        """Take a directory as the base has it; None when it has to be listed."""
        if frame.path in self._mapped:
            return None
        children = self._base.children(self.absolute(frame.path), below.node, cached)
        if children is None:
            return None
        assert cached is not None
        if cached.device != self._device:
            return None  # another file system, of which other things hold
        rules = below.rules
        if _IGNORE_FILE in cached.rows:
            rules = _with_ignore_file(self._descriptor(len(self._stack) - 1), frame.path, rules)
        file_count, size_bytes = count_files(cached, children)
        self.file_count += file_count
        self.size_bytes += size_bytes
        self._emit_directory(
            frame.path, mode, mtime_ns, cached.device, cached.inode, cached.rows, cached.sources
        )
        everything = Selection(everything=True)
        return [_Below(child.name, rules, everything, node=child.node, unchanged=child) for child in children]

    def _leaves_out(self, path: bytes, info: os.stat_result) -> bool:
        if (info.st_dev, info.st_ino) in self._skipped:
            return True
        if info.st_dev != self._device and info.st_dev in self._mounted_snapshots():
            self.omissions.add_mount(path)
            return True
        return False

    def _mounted_snapshots(self) -> frozenset[int]:
        """Devices of our own mounts: to save a mounted snapshot would be to save everything twice."""
        if self._own_mounts is None:
            devices = set()
            with open("/proc/self/mountinfo", "rb") as table:
                for line in table:
                    fields, _, rest = line.partition(b" - ")
                    if rest.startswith(b"fuse.replicate "):
                        major, minor = fields.split()[2].split(b":")
                        devices.add(os.makedev(int(major), int(minor)))
            self._own_mounts = frozenset(devices)
        return self._own_mounts

    def _descriptor(self, depth: int) -> int:
        """A directory of the stack, opened if it was not needed until now."""
        first = depth
        while self._stack[first].descriptor < 0:
            first -= 1
        for index in range(first + 1, depth + 1):
            frame, above = self._stack[index], self._stack[index - 1]
            frame.descriptor = os.open(frame.name, _DIRECTORY_FLAGS, dir_fd=above.descriptor)
        return self._stack[depth].descriptor

    # ----------------------------------------------------------------- listing

    def _list(
        self, below: _Below, frame: _Frame, info: os.stat_result, cached: CachedDirectory | None
    ) -> list[_Below]:
        absolute = self.absolute(frame.path)
        is_complete = below.selection.everything
        # Before the listing: what changes after it is for the next walk, which has to hear of it.
        self._watched.add(absolute)
        mapped = self._mapped.get(frame.path, set())
        # Whoever has a file mapped may change it after this without a change of its times: what is captured
        # of it now is not to be believed by the next capture. As if all had changed in the year 1970.
        listed_ns = 0 if mapped else time.time_ns()
        pending = self._pending.find(absolute, info.st_dev) if self._pending is not None else None
        if info.st_dev != self._device and not file_systems.times_tell_of_stores(frame.descriptor):
            cached = pending = None
        entries: dict[bytes, os.DirEntry[str]] = {}
        if is_complete:
            with os.scandir(frame.descriptor) as found:
                entries = {entry.name.encode(_ENCODING, _ERRORS): entry for entry in found}
            if _VIRTUAL_ENVIRONMENT_MARK in entries and frame.path and not below.is_asked_for:
                return []
        rules = below.rules
        if not is_complete or _IGNORE_FILE in entries:
            rules = _with_ignore_file(frame.descriptor, frame.path, rules)
        listing = Listing(
            frame.descriptor, frame.path, rules, below.selection, cached, pending, mapped, entries
        )
        packed = self._files.take(listing)
        if any(source[0] in (PACKED, SPOOLED) for source in listing.sources):
            self.read.append(PendingDirectory(absolute, info.st_dev, listed_ns, *packed))
        self._count(listing)
        if listing.has_hard_links:
            self._watched.doubt(absolute)
        self._emit_directory(
            frame.path,
            info.st_mode,
            info.st_mtime_ns,
            info.st_dev,
            info.st_ino,
            *packed,
            listed_ns=listed_ns,
            is_complete=is_complete,
        )
        return self._directories_below(below, listing)

    def _directories_below(self, below: _Below, listing: Listing) -> list[_Below]:
        nodes: dict[bytes, bytes] = {}
        cached = listing.cached
        has_rules = _IGNORE_FILE in listing.entries
        if has_rules and not any(row[0] == _IGNORE_FILE for row in listing.rows):
            self.has_unseen_rules = True
        elif cached is not None and below.node and cached.node == below.node:
            # The base can be relied on below only if the same rules hold there.
            had_rules = _IGNORE_FILE in cached.rows
            if not (has_rules or had_rules) or listing.is_known(_IGNORE_FILE):
                nodes = {name: node for name, _, _, node in unpack_children(cached.children)}
        found = []
        for name in sorted(listing.directories):
            rules = listing.rules
            chosen = listing.selection.children.get(name)
            if chosen is not None and chosen.everything:
                rules = rules.with_path_asked_for(os.fsdecode(listing.join(name)))
            found.append(
                _Below(
                    name,
                    rules,
                    listing.selection.below(name),
                    is_asked_for=chosen is not None,
                    node=nodes.get(name, b""),
                )
            )
        return found

    def _count(self, listing: Listing) -> None:
        rows = listing.rows
        links = [row for row in rows if row[1] & _TYPE_BITS == stat.S_IFLNK]
        self.file_count += len(rows) - len(links)
        self.size_bytes += sum(map(_size_of, rows)) - sum(map(_size_of, links))

    def _emit_directory(
        self,
        path: bytes,
        mode: int,
        mtime_ns: int,
        device: int,
        inode: int,
        rows: bytes,
        sources: bytes,
        *,
        # Rows of the base were judged when they were stored.
        listed_ns: int = 2**63 - 1,
        is_complete: bool = True,
    ) -> None:
        directory = CapturedDirectory(
            path, stat.S_IMODE(mode), mtime_ns, device, inode, listed_ns, is_complete, rows, sources
        )
        self._emit(pack_directory(directory))

    def absolute(self, path: bytes) -> bytes:
        """The absolute path of a relative one."""
        return self._project_directory + b"/" + path if path else self._project_directory


def _with_ignore_file(directory: int, path: bytes, rules: IgnoreRules) -> IgnoreRules:
    try:
        file = os.open(IGNORE_FILE, OPEN_FLAGS, dir_fd=directory)
    except OSError:
        return rules
    with open(file, encoding="utf-8", errors="surrogateescape") as text:
        if not stat.S_ISREG(os.fstat(text.fileno()).st_mode):
            return rules
        return rules.below(os.fsdecode(path), text.read().splitlines())


def _close(frame: _Frame) -> None:
    if frame.descriptor >= 0 and frame.path:
        os.close(frame.descriptor)
