"""Whole plain files of the cache: verified when they are made, and never changed afterwards.

Readers, and the kernel where it passes reads through to such a file, get its bytes without anybody looking at
them. Invariant: a file can be opened only after its bytes had the hash that it is known by, and were on the
disk; by whoever changes it all the same, that is noticed by its length and times.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Final

from blake3 import blake3

from replicated.cache.disk import open_locked, whole_blocks
from replicated.cache.ledger import KeptFile, Ledger, OpenFile
from replicated.sparse import write_sparse

#: A file is not kept when it is longer than this part of the limit: one in so many bytes.
LARGEST_PARTS: Final = 2
#: Permissions prevent accidents; they prove nothing.
PLAIN_MODE: Final = 0o444

#: Parts that are smaller are joined until they are as long as this.
_MIN_PART_BYTES = 1 << 20

_log = logging.getLogger(__name__)


class PlainFile:
    """A whole file of the cache, open for reading. May be used by several threads; `close` by one of them.

    While it is open, or the kernel has it as what it passes reads through to, the file is not evicted.
    """

    def __init__(self, descriptor: int) -> None:
        """`descriptor` is of a verified file, and is closed by `close`."""
        info = os.fstat(descriptor)
        self.descriptor: Final = descriptor
        self.size: Final = info.st_size
        self._mtime_ns = info.st_mtime_ns
        self._ctime_ns = info.st_ctime_ns
        self._is_closed = False

    def __enter__(self) -> PlainFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the buffer from `offset`; how many bytes there were, fewer only at the end of the file.

        What was read counts only if `is_intact` says so afterwards. Raises `OSError`.
        """
        done = os.preadv(self.descriptor, [buffer], offset)
        while 0 < done < len(buffer):
            more = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            if not more:
                break
            done += more
        return done

    def is_intact(self) -> bool:
        """Whether nobody has changed the file since it was opened; it may have been deleted."""
        info = os.fstat(self.descriptor)
        # Deleting it changes the one time that nobody can set.
        is_untouched = info.st_ctime_ns == self._ctime_ns or info.st_nlink == 0
        return is_untouched and info.st_size == self.size and info.st_mtime_ns == self._mtime_ns

    def hold_lease(self) -> bool:
        """Let whoever wants to change the file wait, until `release_lease` or for the kernel's patience.

        False where that cannot be had. The kernel tells of it by SIGIO, which the process must ignore.
        """
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except (OSError, AttributeError):
            return False
        return True

    def is_broken(self) -> bool:
        """Whether somebody waits for the lease to be given up, or there is none, or none any more."""
        try:
            return fcntl.fcntl(self.descriptor, fcntl.F_GETLEASE) != fcntl.F_RDLCK
        except (OSError, AttributeError):
            return True

    def release_lease(self) -> None:
        """Let them go on; harmless without a lease."""
        with suppress(OSError, AttributeError):
            fcntl.fcntl(self.descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def close(self) -> None:
        """Give up the lease and close the file; may be called twice."""
        if not self._is_closed:
            self._is_closed = True
            self.release_lease()
            os.close(self.descriptor)


class PlainFiles:
    """The plain files of one cache. Thread-safe."""

    def __init__(self, ledger: Ledger, limit_bytes: int) -> None:
        self._ledger = ledger
        self._largest_bytes = limit_bytes // LARGEST_PARTS

    def has(self, digest: bytes) -> bool:
        """Whether there is a file of this hash."""
        return self._ledger.find_plain(digest) is not None

    def open(self, digest: bytes, size: int) -> PlainFile | None:
        """The file of this hash and length, if it is as it was when it was made."""
        kept = self._ledger.find_plain(digest)
        if kept is None or kept.size != size:
            return None
        descriptor = open_locked(kept.path, os.O_RDONLY, fcntl.LOCK_SH)
        if descriptor is None:
            if not os.path.exists(kept.path):  # else it is being evicted
                self._forget(kept)
            return None
        info = os.fstat(descriptor)
        if (info.st_size, info.st_mtime_ns, info.st_ctime_ns) != kept[2:]:
            os.close(descriptor)
            self._forget(kept)
            return None
        self._ledger.touch([kept.id])
        return PlainFile(descriptor)

    def build(self, digest: bytes, size: int, parts: Iterable[bytes | memoryview]) -> bool:
        """Make the file of this hash and length; whether there is one now.

        Parts are not asked for unless there is room for all. Whatever they raise passes.
        """
        if size > self._largest_bytes:
            return False
        file = self._ledger.create(whole_blocks(size), digest)
        if file is None:
            return self.has(digest)
        try:
            is_good = self._fill(file, digest, size, parts)
        except BaseException:
            self._ledger.discard(file)
            raise
        if not is_good:
            self._ledger.discard(file)
            return False
        return self._ledger.close_plain(file)

    def _fill(self, file: OpenFile, digest: bytes, size: int, parts: Iterable[bytes | memoryview]) -> bool:
        """Write a file, verify it and put it on the disk; whether it is what it should be."""
        whole = blake3()
        done = 0
        for part in _joined(parts):
            start, done = done, done + len(part)
            if done > size:
                break
            whole.update(part)
            try:
                write_sparse(file.descriptor, part, start)
            except OSError as error:
                self._ledger.pause(error)
                return False
        if done != size or whole.digest() != digest:
            _log.warning("not kept in the content cache, because it is not what was saved: %s", digest.hex())
            return False
        try:
            os.ftruncate(file.descriptor, size)
            os.fdatasync(file.descriptor)
            os.fchmod(file.descriptor, PLAIN_MODE)
        except OSError as error:
            self._ledger.pause(error)
            return False
        return True

    def _forget(self, kept: KeptFile) -> None:
        if self._ledger.forget_file(kept.id):
            _log.warning("a file of the content cache was changed or deleted: %s", kept.path)


def _joined(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes in parts that are worth a system call each."""
    waiting: list[bytes | memoryview] = []
    size = 0
    for part in parts:
        if not waiting and len(part) >= _MIN_PART_BYTES:
            yield part
            continue
        waiting.append(part)
        size += len(part)
        if size >= _MIN_PART_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)
