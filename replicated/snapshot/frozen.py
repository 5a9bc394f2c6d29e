"""The captured contents of one snapshot, wherever they are: the spool, leased files, the user's files.

Everything is read with `preadv` into the reader's buffers, never mapped: a mapping of a file that gets
shorter, or of a disk that fails, ends the process. Holes are not read: their zeros are only filled in.
Called by `ingest`, in one thread; `recovery` opens the user's files as this does.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, TypeAlias

from replicate.errors import CaptureFailed
from replicated.contents import ReadInto
from replicated.snapshot import leases
from replicated.snapshot.entries import HELD, PACKED, SPOOLED, Row, Source
from replicated.snapshot.holes import DataMap

#: Opens a held file by its number: a descriptor, the receiver's to close, and the slot of its flag, or
#: None for a copy that nobody changes. Raises `CaptureFailed` when the file was lost.
OpenHeld: TypeAlias = Callable[[int], "tuple[int, int | None]"]

#: Small files in a row are read together; what lies between them may be so much.
READ_AHEAD_BYTES: Final = 1 << 20
_MAX_GAP_BYTES = 64 << 10

_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY
# What the kernel says when bytes are gone for good, as opposed to a lack of memory or descriptors.
_GONE = (errno.EIO, errno.ESTALE, errno.ENODATA, errno.EUCLEAN, errno.EBADMSG)
#: What fills holes, a step at a time.
_ZEROS = memoryview(bytes(1 << 20))
#: With holes between every few blocks, reading is better than asking for each of them.
_SMALLEST_READ_BYTES = 1 << 20


class FrozenFiles:
    """Readers of the captured files of one snapshot; a context manager."""

    def __init__(
        self,
        spool_directory: Path,
        open_held: OpenHeld,
        flags: Sequence[int] | mmap.mmap,
        is_whole: Callable[[int], bool] = leases.is_whole,
    ) -> None:
        """`flags` has a byte a slot: once it is not 0, what was read through that slot is not believed.

        Nor is what was read from a descriptor whose lease is not whole any more.
        """
        self._spool_directory = spool_directory
        self._open_held = open_held
        self._flags = flags
        self._is_whole = is_whole
        self._packed: dict[str, _PackedFile] = {}
        self._current: _PackedFile | None = None
        self._read_ahead = memoryview(mmap.mmap(-1, READ_AHEAD_BYTES))

    def __enter__(self) -> FrozenFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for packed in self._packed.values():
            packed.close()
        self._packed.clear()

    @contextmanager
    def open(self, source: Source) -> Iterator[ReadInto]:
        """Reads a frozen content; valid within the `with`.

        Raises `CaptureFailed` when it is gone, now or while reading; `OSError` for other troubles.
        """
        with ExitStack() as stack:
            if source[0] == PACKED:
                _, offset, name = source
                yield self._find_packed(name).reader_from(offset)
            elif source[0] == SPOOLED:
                descriptor = self._open_spooled(source[1])
                stack.callback(os.close, descriptor)
                yield _OpenFile(descriptor).read_into
            elif source[0] == HELD:
                held = _HeldFile(source[1], self._open_held, self._flags, self._is_whole)
                stack.callback(held.close)
                yield held.read_into
            else:
                raise CaptureFailed(f"what was captured cannot be read: a content of kind {source[0]}")

    def _find_packed(self, name: str) -> _PackedFile:
        packed = self._packed.get(name)
        if packed is None:
            packed = self._packed[name] = _PackedFile(self._open_spooled(name), self._read_ahead)
        if packed is not self._current:
            # They share the buffer: nearly all contents are in one file, in their order.
            if self._current is not None:
                self._current.forget()
            self._current = packed
        return packed

    def _open_spooled(self, name: str) -> int:
        path = self._spool_directory / name
        try:
            return os.open(path, _OPEN_FLAGS)
        except FileNotFoundError as error:
            raise CaptureFailed(f"a file is gone from the spool: {path}") from error


class _PackedFile:
    """Many small contents in one spool file, read in big slices while they are asked for in order."""

    def __init__(self, descriptor: int, buffer: memoryview) -> None:
        self._descriptor = descriptor
        self._buffer = buffer
        #: What of the file is in the buffer.
        self._start = self._end = 0
        #: Where the next content begins if they come in order.
        self._next = 0

    def reader_from(self, base: int) -> ReadInto:
        return lambda view, offset: self._read_into(view, base + offset)

    def forget(self) -> None:
        """The buffer is used for something else."""
        self._start = self._end = 0

    def close(self) -> None:
        os.close(self._descriptor)

    def _read_into(self, view: memoryview, offset: int) -> int:
        if not self._start <= offset < self._end:
            is_in_order = 0 <= offset - self._next <= _MAX_GAP_BYTES
            if not is_in_order or len(view) >= len(self._buffer):
                done = _read(self._descriptor, view, offset)
                self._next = offset + done
                return done
            self._start, self._end = offset, offset + _read(self._descriptor, self._buffer, offset)
        done = min(len(view), self._end - offset)
        view[:done] = self._buffer[offset - self._start : offset - self._start + done]
        self._next = offset + done
        return done


class _OpenFile:
    """Reads a file of its own that does not change, or does not matter any more once it has."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` stays the caller's."""
        self._descriptor = descriptor
        self._map = DataMap(descriptor)
        #: What was found last: a hole, and the data behind it; ends where the next of either begins.
        self._hole_start = self._data_start = self._data_end = 0

    def read_into(self, view: memoryview, offset: int) -> int:
        """Read, or fill in, some bytes from an offset on; 0 at the end of the file."""
        if not self._map.is_sparse:
            return _read(self._descriptor, view, offset)
        if not self._hole_start <= offset < self._data_end:
            size = os.fstat(self._descriptor).st_size
            start, end = self._map.find(offset, size)
            end = min(max(end, start + _SMALLEST_READ_BYTES), size)
            self._hole_start, self._data_start, self._data_end = offset, start, end
        if offset >= self._data_start:
            return _read(self._descriptor, view[: self._data_end - offset], offset)
        done = min(len(view), self._data_start - offset, len(_ZEROS))
        view[:done] = _ZEROS[:done]
        return done


class _HeldFile:
    """A leased file, or once somebody wanted to write to it, the copy that was made before he could."""

    def __init__(
        self,
        number: int,
        open_held: OpenHeld,
        flags: Sequence[int] | mmap.mmap,
        is_whole: Callable[[int], bool],
    ) -> None:
        self._number = number
        self._open = open_held
        self._flags = flags
        self._is_whole = is_whole
        self._descriptor = -1
        self._begin()

    def read_into(self, view: memoryview, offset: int) -> int:
        while True:
            done = self._file.read_into(view, offset)
            # Looked at after the read: the flag is set before the lease is given up, and so before any
            # change; but for a daemon that hangs, whose lease the kernel takes away after a while.
            if self._slot is None or (not self._flags[self._slot] and self._is_whole(self._descriptor)):
                return done
            self.close()
            self._begin()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _begin(self) -> None:
        self._descriptor, self._slot = self._open(self._number)
        self._file = _OpenFile(self._descriptor)


@contextmanager
def open_unchanged(directory: bytes, path: bytes, row: Row) -> Iterator[ReadInto]:
    """Reads a file of the user's below `directory` that is as it was captured, and at the end still is.

    Symbolic links on the way are not followed. Raises `CaptureFailed` when it is not there as it was.
    """
    try:
        descriptor = open_below(directory, path)
    except OSError as error:
        raise _not_as_captured(path, f"it cannot be opened: {error.strerror}") from error
    try:
        _check_unchanged(descriptor, path, row)
        yield _OpenFile(descriptor).read_into
        _check_unchanged(descriptor, path, row)
    finally:
        os.close(descriptor)


def open_below(directory: bytes, path: bytes) -> int:
    """Open a file for reading, following no symbolic link below `directory`; raises OSError."""
    *parents, name = path.split(b"/")
    at = os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        for parent in parents:
            below = os.open(parent, _DIRECTORY_FLAGS, dir_fd=at)
            os.close(at)
            at = below
        return os.open(name, _OPEN_FLAGS, dir_fd=at)
    finally:
        os.close(at)


def is_unchanged(descriptor: int, row: Row) -> bool:
    """Whether an open file is the one that was captured, and as it was then."""
    info = os.fstat(descriptor)
    found = (info.st_mode, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    return stat.S_ISREG(row.mode) and found == (row.mode, row.inode, row.size, row.mtime_ns, row.ctime_ns)


def _check_unchanged(descriptor: int, path: bytes, row: Row) -> None:
    if not is_unchanged(descriptor, row):
        raise _not_as_captured(path, "it has changed since")


def _not_as_captured(path: bytes, reason: str) -> CaptureFailed:
    shown = os.fsdecode(path)
    return CaptureFailed(
        f"the repository does not hold the content of {shown} any more, and the file cannot be read"
        f" again: {reason}",
        fields={"path": shown},
    )


def _read(descriptor: int, view: memoryview, offset: int) -> int:
    try:
        return os.preadv(descriptor, [view], offset)
    except OSError as error:
        if error.errno in _GONE:
            raise CaptureFailed(f"what was captured cannot be read any more: {error.strerror}") from error
        raise
