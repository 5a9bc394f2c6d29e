"""Walk the chosen paths of a project: one captured directory after another, each file given to `freeze`.

Directories are walked by descriptor and no symbolic link is ever followed, so nothing outside the project
can get in. What the tree cache or a capture that is not stored yet knows by the same stat is not read
again; of a watched tree, directories without changes are not even listed. Called by `capture`, once a
capture; which entries are left out is decided by `ignore`.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Final, NamedTuple

from replicate.errors import CaptureFailed, ChangedWhileReading, PathMissing
from replicated.snapshot.entries import (
    LINK,
    PACKED,
    SPOOLED,
    CapturedDirectory,
    PlainRow,
    Source,
    pack_directory,
    pack_rows,
    pack_sources,
    unpack_children,
    unpack_rows,
    unpack_sources,
)
from replicated.snapshot.freeze import OPEN_FLAGS, SMALL_FILE_BYTES, Freezer
from replicated.snapshot.ignore import IGNORE_FILE, IgnoreRules
from replicated.snapshot.pending import Pending, PendingDirectory, PendingFiles
from replicated.snapshot.selection import Omissions, Selection
from replicated.snapshot.treecache import CachedDirectory
from replicated.snapshot.unchanged import Base, UnchangedChild, count_files
from replicated.snapshot.watch import WatchedWalk

#: A file that is written to all the time is taken this often, with growing pauses, 0.3 s in all.
ATTEMPTS: Final = 6
FIRST_PAUSE_S = 0.01

_DIRECTORY_FLAGS = OPEN_FLAGS | os.O_DIRECTORY
_ENCODING, _ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
_IGNORE_FILE = os.fsencode(IGNORE_FILE)
_VIRTUAL_ENVIRONMENT_MARK = b"pyvenv.cfg"
#: What a file became that was opened without following links.
_OF_ANOTHER_TYPE = frozenset({errno.ELOOP, errno.ENOTDIR})
_TYPE_BITS = 0o170000
_name_of = itemgetter(0)
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


@dataclass(slots=True)
class _Listing:
    """One open directory while its files are taken."""

    descriptor: int
    path: bytes
    rules: IgnoreRules
    selection: Selection
    cached: CachedDirectory | None
    pending: PendingFiles | None
    #: Names of files that somebody may be changing unseen: they are read in any case.
    mapped: set[bytes]
    entries: dict[bytes, os.DirEntry[str]]
    rows: list[PlainRow] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    directories: list[bytes] = field(default_factory=list)
    #: Entries that are to be looked at one by one.
    singles: list[bytes] = field(default_factory=list)
    has_hard_links: bool = False
    _known: dict[bytes, tuple[PlainRow, Source]] | None = None

    def find_known(self, row: PlainRow) -> Source | None:
        """The source of a file or link that has the same stat in the cache."""
        if self._known is None:
            self._known = {}
            if self.cached is not None:
                rows, sources = unpack_rows(self.cached.rows), unpack_sources(self.cached.sources)
                self._known = {row.name: (row, source) for row, source in zip(rows, sources, strict=True)}
        found = self._known.get(row[0])
        return found[1] if found is not None and found[0] == row and row[0] not in self.mapped else None

    def is_known(self, name: bytes) -> bool:
        """Whether this file, which has been taken, has the same stat in the cache."""
        return any(row[0] == name and self.find_known(row) is not None for row in self.rows)

    def join(self, name: bytes) -> bytes:
        """The relative path of an entry."""
        return self.path + b"/" + name if self.path else name


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
        self._freezer = freezer
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
            try:
                frame.below = iter(
                    self._capture(_Below(b"", rules, selection, node=self._base.root_node), frame)
                )
            except OSError as error:
                raise _read_error(error, self._project_directory) from error
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
                raise _missing(path) from None
        except OSError as error:
            if error.errno not in _OF_ANOTHER_TYPE:
                raise _read_error(error, path) from error
            if below.is_asked_for:
                raise _changing(path) from error

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
        listed_ns = time.time_ns()
        entries: dict[bytes, os.DirEntry[str]] = {}
        if is_complete:
            with os.scandir(frame.descriptor) as found:
                entries = {entry.name.encode(_ENCODING, _ERRORS): entry for entry in found}
            is_environment = _VIRTUAL_ENVIRONMENT_MARK in entries
            if is_environment and frame.path and not below.is_asked_for:
                return []
        rules = below.rules
        if not is_complete or _IGNORE_FILE in entries:
            rules = _with_ignore_file(frame.descriptor, frame.path, rules)
        pending = self._pending.find(absolute, info.st_dev) if self._pending is not None else None
        mapped = self._mapped.get(frame.path, set())
        listing = _Listing(
            frame.descriptor, frame.path, rules, below.selection, cached, pending, mapped, entries
        )
        files = self._sort_out(listing)
        packed = self._take_files(listing, files)
        if packed is None:
            packed = pack_rows(listing.rows), pack_sources(listing.sources)
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

    def _sort_out(self, listing: _Listing) -> list[bytes]:
        """Find directories and single entries of a listing; the files and links that are left, by name."""
        entries = listing.entries
        chosen = listing.selection.children
        for name in chosen:
            entries.pop(name, None)
        listing.singles.extend(chosen)
        exact, suffixes, other = listing.rules.names(os.fsdecode(listing.path))
        matches = other.fullmatch if other is not None else None
        files = []
        for name in sorted(entries):
            entry = entries[name]
            text = entry.name
            if text in exact or text.endswith(suffixes) or (matches is not None and matches(text)):
                path = listing.join(name)
                is_directory = entry.is_dir(follow_symlinks=False)
                decision = listing.rules.decide(os.fsdecode(path), text, is_directory)
                if decision == "secret":
                    self.omissions.add_secret(path)
                if decision != "keep":
                    continue
            if entry.is_file(follow_symlinks=False):
                files.append(name)
            elif entry.is_dir(follow_symlinks=False):
                listing.directories.append(name)
            elif entry.is_symlink():
                files.append(name)
            else:
                listing.singles.append(name)
        return files

    def _directories_below(self, below: _Below, listing: _Listing) -> list[_Below]:
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

    def _count(self, listing: _Listing) -> None:
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

    # ------------------------------------------------------------------- files

    def _take_files(self, listing: _Listing, files: list[bytes]) -> tuple[bytes, bytes] | None:
        """Capture all that is no directory; packed rows and sources, if they are those of the cache."""
        fresh = files
        if listing.cached is not None or listing.pending is not None:
            rows = self._look_at(listing, files)
            if listing.cached is not None and not listing.singles and not listing.mapped:
                packed = pack_rows(rows)
                if packed == listing.cached.rows:
                    listing.rows = rows
                    return packed, listing.cached.sources
            fresh = self._take_known(listing, rows)
        listing.singles += self._freezer.pack(listing.descriptor, fresh, listing.rows, listing.sources)
        listing.has_hard_links |= self._freezer.take_hard_links_seen()
        singles = bool(listing.singles)
        for name in listing.singles:
            self._take_single(listing, name)
        if singles or len(fresh) < len(files):
            pairs = sorted(zip(listing.rows, listing.sources, strict=True), key=lambda pair: pair[0][0])
            listing.rows = [row for row, _ in pairs]
            listing.sources = [source for _, source in pairs]
        return None

    def _look_at(self, listing: _Listing, files: list[bytes]) -> list[PlainRow]:
        """The rows of files and links, before they are opened."""
        entries = listing.entries
        rows = []
        for name in files:
            try:
                info = entries[name].stat(follow_symlinks=False)
            except OSError:
                listing.singles.append(name)
                continue
            rows.append((name, info.st_mode, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns))
            if info.st_nlink > 1:
                listing.has_hard_links = True
        return rows

    def _take_known(self, listing: _Listing, rows: list[PlainRow]) -> list[bytes]:
        """Take the files that need not be read; the names of the others."""
        fresh = []
        for row in rows:
            source = self._find(listing, row)
            if source is not None:
                listing.rows.append(row)
                listing.sources.append(source)
            elif stat.S_ISREG(row[1]):
                fresh.append(row[0])
            else:
                listing.singles.append(row[0])
        return fresh

    def _find(self, listing: _Listing, row: PlainRow) -> Source | None:
        """The source of a file or link whose content the repository or another capture has."""
        source = listing.find_known(row)
        if source is not None or listing.pending is None or row[0] in listing.mapped:
            return source
        pending = listing.pending.find(row)
        return self._freezer.link(pending[0], row, pending[1]) if pending is not None else None

    def _take_single(self, listing: _Listing, name: bytes) -> None:
        """Capture one entry that may be of any type, or be gone, or be changing."""
        path = listing.join(name)
        is_asked_for = name in listing.selection.children
        for pause in (*_pauses(), None):
            try:
                info = os.stat(name, dir_fd=listing.descriptor, follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    listing.directories.append(name)
                    return
                if not (stat.S_ISREG(info.st_mode) or stat.S_ISLNK(info.st_mode)):
                    self.omissions.add_special(path)
                    return
                if self._take_one(listing, name, path, info):
                    return
            except FileNotFoundError:
                if is_asked_for:
                    raise _missing(path) from None
                return  # deleted since the directory was listed
            except OSError as error:
                if error.errno not in _OF_ANOTHER_TYPE:
                    raise _read_error(error, path) from error
            if pause is not None:
                time.sleep(pause)
        raise _changing(path)

    def _take_one(self, listing: _Listing, name: bytes, path: bytes, info: os.stat_result) -> bool:
        """Capture one file or link; False when it is to be taken again."""
        row = (name, info.st_mode, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        if info.st_nlink > 1:
            listing.has_hard_links = True
        if listing.cached is None and not listing.selection.everything:
            listing.cached = self._load_part(listing)
        source = self._find(listing, row)
        if source is None and stat.S_ISLNK(info.st_mode):
            source = LINK, os.readlink(name, dir_fd=listing.descriptor)
        if source is None:
            if info.st_size <= SMALL_FILE_BYTES and not self._freezer.pack(
                listing.descriptor, (name,), listing.rows, listing.sources
            ):
                return True
            frozen = self._freezer.freeze(listing.descriptor, name, path, is_mapped=name in listing.mapped)
            if frozen is None:
                return False
            row, source = frozen
        listing.rows.append(row)
        listing.sources.append(source)
        return True

    def _load_part(self, listing: _Listing) -> CachedDirectory | None:
        """What the cache has of a directory of which only some entries are wanted."""
        cached = self._base.load(self.absolute(listing.path))
        info = os.fstat(listing.descriptor)
        if cached is None or (cached.device, cached.inode) != (info.st_dev, info.st_ino):
            return None
        return cached


def _with_ignore_file(directory: int, path: bytes, rules: IgnoreRules) -> IgnoreRules:
    try:
        file = os.open(IGNORE_FILE, OPEN_FLAGS, dir_fd=directory)
    except OSError:
        return rules
    with open(file, encoding="utf-8", errors="surrogateescape") as text:
        if not stat.S_ISREG(os.fstat(text.fileno()).st_mode):
            return rules
        return rules.below(os.fsdecode(path), text.read().splitlines())


def _pauses() -> Iterator[float]:
    return (FIRST_PAUSE_S * 2**attempt for attempt in range(ATTEMPTS - 1))


def _close(frame: _Frame) -> None:
    if frame.descriptor >= 0 and frame.path:
        os.close(frame.descriptor)


def _missing(path: bytes) -> PathMissing:
    return PathMissing(f"no such file or directory: {os.fsdecode(path)}")


def _changing(path: bytes) -> ChangedWhileReading:
    return ChangedWhileReading(
        f"the file kept changing while it was saved: {os.fsdecode(path)}",
        hint=f"save it when it is not being written, or exclude it in {IGNORE_FILE}",
        fields={"path": os.fsdecode(path)},
    )


def _read_error(error: OSError, path: bytes) -> CaptureFailed:
    shown = os.fsdecode(path)
    return CaptureFailed(
        f"cannot read {shown}: {error.strerror}",
        hint=f"make it readable, or exclude it in {IGNORE_FILE}",
        fields={"path": shown, "errno": errno.errorcode.get(error.errno or 0, "")},
    )
