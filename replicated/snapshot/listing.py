"""The files of one open directory: which of them are captured, and each given to `freeze` or known already.

`Listing` is what a directory holds, `FileTaker` captures what of it is no directory. A file that has the
same stat in the tree cache, or in a capture that is not stored yet, is not read. Files that are gone,
become something else or change meanwhile are looked at one by one and again. Used by `walk`; never looks
into a directory below.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from replicate.errors import CaptureFailed, ChangedWhileReading, PathMissing
from replicated.snapshot.entries import (
    LINK,
    PlainRow,
    Source,
    pack_rows,
    pack_sources,
    unpack_rows,
    unpack_sources,
)
from replicated.snapshot.freeze import SMALL_FILE_BYTES, Freezer
from replicated.snapshot.ignore import IGNORE_FILE, IgnoreRules
from replicated.snapshot.pending import PendingFiles
from replicated.snapshot.selection import Omissions, Selection
from replicated.snapshot.treecache import CachedDirectory

#: A file that is written to all the time is taken this often, with growing pauses, 0.3 s in all.
ATTEMPTS: Final = 6
FIRST_PAUSE_S = 0.01
#: What a file became that was opened without following links.
OF_ANOTHER_TYPE: Final = frozenset({errno.ELOOP, errno.ENOTDIR})

# Regular files and symbolic links, and nothing else, are in between.
_FIRST_FILE_MODE, _LAST_FILE_MODE = stat.S_IFREG, stat.S_IFLNK | 0o7777


@dataclass(slots=True)
class Listing:
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

    def admit(self, omissions: Omissions) -> list[bytes]:
        """The names of the entries that the rules keep, in order, but for those that were asked for."""
        entries = self.entries
        chosen = self.selection.children
        for name in chosen:
            entries.pop(name, None)
        self.singles.extend(chosen)
        left_out = set()
        for name in self.rules.names(os.fsdecode(self.path)).concerned(entries):
            path = self.join(name)
            is_directory = entries[name].is_dir(follow_symlinks=False)
            decision = self.rules.decide(os.fsdecode(path), os.fsdecode(name), is_directory)
            if decision == "secret":
                omissions.add_secret(path)
            if decision != "keep":
                left_out.add(name)
        return sorted(entries.keys() - left_out if left_out else entries)

    def sort_out(self, names: list[bytes]) -> list[bytes]:
        """The regular files, by what the listing says of them."""
        files = []
        for name in names:
            entry = self.entries[name]
            if entry.is_file(follow_symlinks=False):
                files.append(name)
            elif entry.is_dir(follow_symlinks=False):
                self.directories.append(name)
            else:
                self.singles.append(name)
        return files

    def look_at(self, names: list[bytes]) -> list[PlainRow]:
        """The rows of files and links, before they are opened."""
        lstat, descriptor = os.lstat, self.descriptor
        rows = []
        for name in names:
            try:
                info = lstat(name, dir_fd=descriptor)
            except OSError:
                self.singles.append(name)
                continue
            mode = info.st_mode
            if _FIRST_FILE_MODE <= mode <= _LAST_FILE_MODE:
                rows.append((name, mode, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns))
                if info.st_nlink > 1:
                    self.has_hard_links = True
            elif stat.S_ISDIR(mode):
                self.directories.append(name)
            else:
                self.singles.append(name)
        return rows


class FileTaker:
    """Captures files and links, listing by listing."""

    def __init__(
        self,
        freezer: Freezer,
        omissions: Omissions,
        load: Callable[[bytes], CachedDirectory | None],
    ) -> None:
        """`load` gives what the cache has of a directory, by its relative path."""
        self._freezer = freezer
        self._omissions = omissions
        self._load = load

    def take(self, listing: Listing) -> tuple[bytes, bytes]:
        """Capture all that is no directory; packed rows and sources.

        Raises `PathMissing`, `ChangedWhileReading` or `CaptureFailed` naming the file.
        """
        names = listing.admit(self._omissions)
        cached = listing.cached
        is_in_order = True
        if cached is None and listing.pending is None:
            fresh = listing.sort_out(names)
        else:
            rows = listing.look_at(names)
            if cached is not None and not listing.singles and not listing.mapped:
                packed = pack_rows(rows)
                if packed == cached.rows:
                    listing.rows = rows
                    return packed, cached.sources
            fresh = self._take_known(listing, rows)
            is_in_order = not fresh
        listing.singles += self._freezer.pack(listing.descriptor, fresh, listing.rows, listing.sources)
        listing.has_hard_links |= self._freezer.take_hard_links_seen()
        for name in listing.singles:
            self._take_single(listing, name)
        self._freezer.additions.end_directory(listing.path)
        if listing.singles or not is_in_order:
            pairs = sorted(zip(listing.rows, listing.sources, strict=True), key=lambda pair: pair[0][0])
            listing.rows = [row for row, _ in pairs]
            listing.sources = [source for _, source in pairs]
        return pack_rows(listing.rows), pack_sources(listing.sources)

    def _take_known(self, listing: Listing, rows: list[PlainRow]) -> list[bytes]:
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

    def _find(self, listing: Listing, row: PlainRow) -> Source | None:
        """The source of a file or link whose content the repository or another capture has."""
        source = listing.find_known(row)
        if source is not None or listing.pending is None or row[0] in listing.mapped:
            return source
        pending = listing.pending.find(row)
        return self._freezer.link(pending[0], row, pending[1]) if pending is not None else None

    def _take_single(self, listing: Listing, name: bytes) -> None:
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
                    self._omissions.add_special(path)
                    return
                if self._take_one(listing, name, path, info):
                    return
            except FileNotFoundError:
                if is_asked_for:
                    raise missing(path) from None
                return  # deleted since the directory was listed
            except OSError as error:
                if error.errno not in OF_ANOTHER_TYPE:
                    raise read_error(error, path) from error
            if pause is not None:
                time.sleep(pause)
        raise changing(path)

    def _take_one(self, listing: Listing, name: bytes, path: bytes, info: os.stat_result) -> bool:
        """Capture one file or link; False when it is to be taken again."""
        row = (name, info.st_mode, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        if info.st_nlink > 1:
            listing.has_hard_links = True
        if listing.cached is None and not listing.selection.everything:
            listing.cached = self._load_part(listing, row)
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

    def _load_part(self, listing: Listing, row: PlainRow) -> CachedDirectory | None:
        """What the cache has of a directory of which only some entries are wanted, if it has this one."""
        cached = self._load(listing.path)
        info = os.fstat(listing.descriptor)
        if cached is None or (cached.device, cached.inode) != (info.st_dev, info.st_ino):
            return None
        # To unpack the rows of a large directory takes longer than to hold a file. The first byte is
        # the beginning of the array.
        return cached if pack_rows([row])[1:] in cached.rows else None


def missing(path: bytes) -> PathMissing:
    """What to raise when a path that was asked for is not there."""
    return PathMissing(f"no such file or directory: {os.fsdecode(path)}")


def changing(path: bytes) -> ChangedWhileReading:
    """What to raise when a file was changed at each attempt to take it."""
    return ChangedWhileReading(
        f"the file kept changing while it was saved: {os.fsdecode(path)}",
        hint=f"save it when it is not being written, or exclude it in {IGNORE_FILE}",
        fields={"path": os.fsdecode(path)},
    )


def read_error(error: OSError, path: bytes) -> CaptureFailed:
    """What to raise when something of the user's cannot be read."""
    shown = os.fsdecode(path)
    return CaptureFailed(
        f"cannot read {shown}: {error.strerror}",
        hint=f"make it readable, or exclude it in {IGNORE_FILE}",
        fields={"path": shown, "errno": errno.errorcode.get(error.errno or 0, "")},
    )


def _pauses() -> Iterator[float]:
    return (FIRST_PAUSE_S * 2**attempt for attempt in range(ATTEMPTS - 1))
