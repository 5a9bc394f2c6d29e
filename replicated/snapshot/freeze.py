"""Freeze one file after another: the first rung of the ladder that holds makes its content the daemon's own.

Small files are read into one packed file. A bigger one is held by a read lease, at any size in
microseconds; where that is refused it is reflinked, else read into memory, else copied. Every rung that
reads compares what `fstat` says before and after: a file that somebody wrote meanwhile is not taken.
Called by `walk`, which gives names below open directories, and by `capture`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from typing import Final

from replicate.config import RUNG_VARIABLE
from replicate.errors import CaptureFailed
from replicated.snapshot import duplicate
from replicated.snapshot.additions import Additions
from replicated.snapshot.entries import HELD, PACKED, SPOOLED, PlainRow, Source
from replicated.snapshot.held import HeldFiles
from replicated.snapshot.holes import DataMap, data_bytes
from replicated.snapshot.spill import SLAB_BYTES, Slab, Spill, SpillFile
from replicated.snapshot.spool import PACKED_FILE, SnapshotSpool

#: Up to here a file is read into the packed file: a spool file of its own costs ten times as much.
SMALL_FILE_BYTES: Final = 1 << 20

#: Never follow a link, and never wait for the writer of a pipe.
OPEN_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

#: Reading to memory that is not so aligned is five times slower on some processors (Zen 3).
_ALIGNMENT = 64
#: The packed file has this much space in advance, so that reserving seldom waits for the write in progress.
_RESERVE_AHEAD_BYTES = 64 << 20
_CANNOT_REFLINK = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.ENOSYS})
_TYPE_BITS = 0o170000
_REGULAR = stat.S_IFREG


class Freezer:
    """What one capture freezes; `end` once when all is frozen, `abandon` in any case."""

    def __init__(
        self,
        spool: SnapshotSpool,
        spill: Spill,
        held: HeldFiles,
        *,
        is_durable: bool,
        rung: str,
        no_reflink: set[int],
    ) -> None:
        self._spool = spool
        self._spill = spill
        self._held = held
        self._is_durable = is_durable
        self._rung = rung
        self._changing: set[bytes] = set()
        #: Devices that are known to have no reflinks; shared by all captures.
        self._no_reflink = no_reflink
        self._small_bytes = SMALL_FILE_BYTES if rung in ("", "memory") else 0
        self._packed: SpillFile | None = None
        self._slab: Slab | None = None
        #: Offset in the packed file of the beginning of the slab, and what is used of the slab.
        self._slab_offset = 0
        self._used = 0
        self._reserved = 0
        #: What the files of other snapshots are called here; empty when they are gone.
        self._links: dict[tuple[str, str], str] = {}
        self._hard_links_seen = False
        #: What has been frozen: held, in memory, or in the spool.
        self.additions = Additions()
        #: Of its bytes those in the spool.
        self.spooled_bytes = 0

    def pack(
        self, directory: int, names: Iterable[bytes], rows: list[PlainRow], sources: list[Source]
    ) -> list[bytes]:
        """Read the small ones of the named files, and append to rows and sources; return the other names.

        Those are for `freeze`: bigger ones, and whatever cannot be opened or read or is being changed.
        """
        # Per file this is a dozen microseconds, half of them Python's: no calls, no objects that can be
        # done without.
        open_, fstat, read, close = os.open, os.fstat, os.readv, os.close
        small_bytes = self._small_bytes
        left = []
        view = self._slab.view if self._slab is not None else memoryview(b"")
        base, used, total, taken = self._slab_offset, self._used, 0, len(rows)
        for name in names:
            try:
                descriptor = open_(name, OPEN_FLAGS, dir_fd=directory)
            except OSError:
                left.append(name)
                continue
            try:
                before = fstat(descriptor)
                mode, size = before.st_mode, before.st_size
                if size > small_bytes or mode & _TYPE_BITS != _REGULAR:
                    left.append(name)
                    continue
                # One byte more than expected shows growth.
                if used + size >= len(view):
                    self._used = used
                    view = self._next_slab()
                    base, used = self._slab_offset, 0
                count = read(descriptor, (view[used : used + size + 1],))
                after = fstat(descriptor)
            except OSError:
                left.append(name)
                continue
            finally:
                close(descriptor)
            mtime, ctime = before.st_mtime_ns, before.st_ctime_ns
            if before.st_nlink > 1:
                self._hard_links_seen = True
            if count != size or after.st_mtime_ns != mtime or after.st_ctime_ns != ctime:
                left.append(name)
                continue
            rows.append((name, mode, before.st_ino, size, mtime, ctime))
            sources.append((PACKED, base + used, PACKED_FILE))
            total += size
            used = (used + size + _ALIGNMENT - 1) & -_ALIGNMENT
        self._used = used
        self.additions.add_small(len(rows) - taken, total)
        self.spooled_bytes += total
        return left

    def freeze(
        self, directory: int, name: bytes, path: bytes, *, is_mapped: bool = False
    ) -> tuple[PlainRow, Source] | None:
        """Take one bigger file; None when it changed meanwhile and is to be taken again.

        `path` is relative to the project directory. With `is_mapped` no other capture's view of it is good
        enough.

        Raises OSError when it cannot be opened or read, and `CaptureFailed` for all else.
        """
        descriptor = os.open(name, OPEN_FLAGS, dir_fd=directory)
        try:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode) or before.st_size <= self._small_bytes:
                return None
            info = before
            # Holes take neither memory nor disk, and no time to store.
            size_bytes = data_bytes(descriptor, before)
            source: Source | None = None
            is_shared = False
            if self._may_use("lease"):
                holding = None if is_mapped else self._held.share(self._spool.identifier, before)
                is_shared = holding is not None
                if holding is None:
                    holding = self._held.hold(self._spool.identifier, descriptor)
                    if holding is not None:
                        descriptor = -1
                if holding is not None:
                    info, source = holding.info, (HELD, holding.number)
            if source is None:
                placed = self._place(descriptor, before, size_bytes, path)
                if placed is None:
                    return None
                source = (SPOOLED, placed)
                self.spooled_bytes += size_bytes
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        if not is_shared:  # else another snapshot keeps it, and counts it
            self.additions.add_big(path, size_bytes)
        row = (name, info.st_mode, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        return row, source

    def take_hard_links_seen(self) -> bool:
        """Whether `pack` has read files with several names since this was asked last."""
        seen, self._hard_links_seen = self._hard_links_seen, False
        return seen

    def link(self, snapshot: str, row: PlainRow, source: Source) -> Source | None:
        """The source of a file that another snapshot has in its spool; None when it is gone from there."""
        name = source[-1]
        if (snapshot, name) not in self._links:
            path = self._spool.new_file(name.partition("-")[0])
            is_shared = self._spill.share(snapshot, name, self._spool.identifier, path)
            self._links[snapshot, name] = path.name if is_shared else ""
        linked = self._links[snapshot, name]
        if not linked:
            return None
        return (*source[:-1], linked)

    def end(self) -> None:
        """Give the rest of the packed file to the writer; then the spool, if there is one, is complete."""
        if self._used:
            self._write_slab(is_last=True)
        if self._packed is not None:
            self._spill.end(self._packed, self._slab_offset)
        if self._spool.exists:
            self._spill.seal(self._spool.identifier, self._spool.make())

    def abandon(self) -> None:
        """Give back the memory that is not used; harmless after `end`."""
        if self._slab is not None:
            self._spill.give_back(self._slab)
            self._slab = None

    def _may_use(self, rung: str) -> bool:
        return self._rung == rung or (not self._rung and not (rung == "lease" and self._is_durable))

    def _next_slab(self) -> memoryview:
        if self._used:
            self._write_slab(is_last=False)
        elif self._slab is not None:
            return self._slab.view
        self._slab = self._spill.take()
        return self._slab.view

    def _write_slab(self, *, is_last: bool) -> None:
        slab = self._slab
        assert slab is not None
        end = self._slab_offset + self._used
        try:
            if self._packed is None:
                path = self._spool.make() / PACKED_FILE
                self._packed = self._spill.create(self._spool.identifier, path)
            if end > self._reserved:
                self._reserve(self._packed, end, is_last=is_last)
        except OSError as error:
            raise self._spool.failure(error) from error
        self._spill.write(self._packed, slab, self._slab_offset, self._used)
        self._slab, self._slab_offset, self._used = None, end, 0

    def _reserve(self, packed: SpillFile, end: int, *, is_last: bool) -> None:
        # As much again as there is already, so that many files need few steps.
        ahead = 0 if is_last else min(self._slab_offset, _RESERVE_AHEAD_BYTES)
        try:
            self._spill.reserve(packed, self._reserved, end + ahead)
        except OSError:
            if not ahead:
                raise
            ahead = 0
            self._spill.reserve(packed, self._reserved, end)
        self._reserved = end + ahead

    def _place(self, descriptor: int, before: os.stat_result, size_bytes: int, path: bytes) -> str | None:
        """Put a copy into the spool and return its name, or None when the file changed meanwhile."""
        if self._may_use("reflink"):
            name = self._reflink(descriptor, before)
            if name != "":
                return name
        if self._rung == "memory" or (
            self._may_use("memory")
            and not self._is_durable
            and path not in self._changing
            and self._spill.has_room(size_bytes)
        ):
            name = self._read_into_memory(descriptor, before)
            if name is None:
                # The next time copied: a copy can be compared with what the file has become meanwhile.
                self._changing.add(path)
            return name
        if self._may_use("copy"):
            return self._copy(descriptor, before)
        raise CaptureFailed(
            f"no {self._rung} can be had of this file, and nothing else is allowed: {os.fsdecode(path)}",
            hint=f"unset {RUNG_VARIABLE}",
        )

    def _reflink(self, descriptor: int, before: os.stat_result) -> str | None:
        """As `_place`; an empty name when there are no reflinks between the file and the spool."""
        if before.st_dev in self._no_reflink:
            return ""
        path = self._spool.new_file("large")
        target = self._create(path)
        try:
            if not duplicate.reflink(descriptor, target):
                self._no_reflink.add(before.st_dev)
                os.unlink(path)
                return ""
            if os.fstat(target).st_size == before.st_size and _is_same(before, os.fstat(descriptor)):
                return path.name
        except OSError as error:
            raise self._spool.failure(error) from error
        finally:
            os.close(target)
        os.unlink(path)
        return None

    def _copy(self, descriptor: int, before: os.stat_result) -> str | None:
        path = self._spool.new_file("large")
        target = self._create(path)
        try:
            duplicate.copy(descriptor, target, before.st_size, lambda: None)
        except OSError as error:
            # Shorter than it was, or else there is no space.
            if _is_same(before, os.fstat(descriptor)):
                os.close(target)
                raise self._spool.failure(error) from error
            os.close(target)
            os.unlink(path)
            return None
        try:
            if _is_same(before, os.fstat(descriptor)) or duplicate.is_prefix(target, descriptor):
                return path.name
        finally:
            os.close(target)
        os.unlink(path)
        return None

    def _read_into_memory(self, descriptor: int, before: os.stat_result) -> str | None:
        path = self._spool.new_file("large")
        try:
            file = self._spill.create(self._spool.identifier, path)
        except OSError as error:
            raise self._spool.failure(error) from error
        try:
            duplicate.wait_for_write(descriptor)
            for start, end in DataMap(descriptor).ranges(before.st_size):
                try:
                    self._spill.reserve(file, start, end)
                except OSError as error:
                    raise self._spool.failure(error) from error
                if not self._read_range(file, descriptor, start, end):
                    break
            if _is_same(before, os.fstat(descriptor)):
                self._spill.end(file, before.st_size)
                return path.name
        except BaseException:
            self._spill.cancel(file)
            raise
        self._spill.cancel(file)
        return None

    def _read_range(self, file: SpillFile, descriptor: int, start: int, end: int) -> bool:
        """Read these bytes and queue them; False when the file ends before."""
        while start < end:
            slab = self._spill.take()
            try:
                count = os.preadv(descriptor, (slab.view[: min(SLAB_BYTES, end - start)],), start)
            except BaseException:
                self._spill.give_back(slab)
                raise
            if count == 0:
                self._spill.give_back(slab)
                return False
            self._spill.write(file, slab, start, count)
            start += count
        return True

    def _create(self, path: os.PathLike[str]) -> int:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._spool.failure(error) from error


def _is_same(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_size, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )
