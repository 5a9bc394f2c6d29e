"""Memory that takes what is captured at the speed of memory, and the thread that writes it to the spool.

A capture reads into slabs, whole pages from a pool that have been touched before: fresh memory costs five
times what copying into it costs. Full slabs are queued; one thread writes them behind the capture's back
and gives them back. Space on disk is reserved before a slab is queued, so that a full disk is known while
the caller can still be told. Used by `freeze` and `capture`; knows nothing of what the bytes mean.

Invariant: a spool has its `complete` marker only when all its files, also those that belong to other
spools too, have been written. One lock, a leaf; it is not held during writes of data.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from replicate.errors import CaptureFailed
from replicated.snapshot.spool import COMPLETE_FILE, spool_failure

SLAB_BYTES: Final = 4 << 20
BUDGET_BYTES: Final = 96 << 20

#: So many stay when the others are given back: the next small capture finds touched memory.
_KEPT_SLABS = 2
_IDLE_S = 30.0
_WRITE_BYTES = 1 << 20
_CANNOT_RESERVE = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV})


class Slab:
    """`SLAB_BYTES` of memory that begin with a page; from `take` until it is queued the caller's alone."""

    __slots__ = ("_memory", "view")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, SLAB_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._memory)


@dataclass(eq=False, slots=True)
class SpillFile:
    """A file of a spool that is written from slabs. Fields are guarded by the lock of the `Spill`."""

    path: Path
    descriptor: int
    #: Snapshots that need it: its own, and those whose spools have a hard link to it.
    snapshots: set[str]
    size_bytes: int = 0
    #: Writes that are queued or being done.
    queued: int = 0
    is_ended: bool = False
    is_written: bool = False
    #: False where the file system cannot promise the space.
    is_reserved: bool = True
    error: OSError | None = None


@dataclass(slots=True)
class _SpilledSnapshot:
    directory: Path
    files: dict[str, SpillFile] = field(default_factory=dict)
    #: All its files are known.
    is_sealed: bool = False


class _Write(NamedTuple):
    file: SpillFile
    slab: Slab
    offset: int
    length: int


class Spill:
    """The pool, the queue, and what is still to be written for each snapshot."""

    def __init__(self, *, budget_bytes: int = BUDGET_BYTES) -> None:
        self._slab_limit = max(1, budget_bytes // SLAB_BYTES)
        self._condition = threading.Condition()
        self._free: list[Slab] = []
        self._slab_count = 0
        self._queue: deque[_Write] = deque()
        self._in_flight = 0
        self._snapshots: dict[str, _SpilledSnapshot] = {}
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    def take(self) -> Slab:
        """A slab; waits for the writer when the budget is used up."""
        with self._condition:
            while True:
                if self._free:
                    return self._free.pop()
                # The rest is in the hands of other captures, which may wait for one as well.
                if self._slab_count < self._slab_limit or self._in_flight == 0:
                    slab = Slab()
                    self._slab_count += 1
                    return slab
                self._condition.wait()

    def give_back(self, slab: Slab) -> None:
        """Return a slab that is not to be written."""
        with self._condition:
            self._give_back(slab)

    def has_room(self, size_bytes: int) -> bool:
        """Whether so many bytes fit into what is free now."""
        return size_bytes <= (self._slab_limit - self._slab_count + len(self._free)) * SLAB_BYTES

    def create(self, snapshot: str, path: Path) -> SpillFile:
        """A new file in the spool of a snapshot; OSError when it cannot be made."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        file = SpillFile(path, descriptor, {snapshot})
        with self._condition:
            self._snapshot(snapshot, path.parent).files[path.name] = file
        return file

    def reserve(self, file: SpillFile, start: int, end: int) -> None:
        """Make sure of the space for these bytes; OSError when there is not so much."""
        if not file.is_reserved:
            return
        try:
            os.posix_fallocate(file.descriptor, start, end - start)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise
            file.is_reserved = False

    def write(self, file: SpillFile, slab: Slab, offset: int, length: int) -> None:
        """Queue the beginning of a slab, which is not the caller's any more; its space has been reserved."""
        with self._condition:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="spill", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads
                    self._give_back(slab)
                    raise OSError(errno.EAGAIN, str(error)) from error
                self._thread = thread
            file.queued += 1
            self._in_flight += 1
            self._queue.append(_Write(file, slab, offset, length))
            self._condition.notify_all()

    def end(self, file: SpillFile, size_bytes: int) -> None:
        """No more writes come to a file, and it has this size."""
        with self._condition:
            file.is_ended = True
            file.size_bytes = size_bytes
            if file.queued == 0:
                self._close(file)

    def cancel(self, file: SpillFile) -> None:
        """Undo `create`."""
        with self._condition:
            for snapshot in file.snapshots:
                self._snapshots[snapshot].files.pop(file.path.name, None)
            self._drop(file)
        file.path.unlink(missing_ok=True)

    def share(self, snapshot: str, name: str, other: str, path: Path) -> bool:
        """Make `path`, in the spool of `other`, a hard link to a file of a snapshot.

        False when that cannot be, because the snapshot has been forgotten for example.
        """
        with self._condition:
            shared = self._snapshots.get(snapshot)
            if shared is None:
                return False
            file = shared.files.get(name)
            try:
                os.link(shared.directory / name, path, follow_symlinks=False)
            except OSError:
                return False
            files = self._snapshot(other, path.parent).files
            if file is not None:
                file.snapshots.add(other)
                files[path.name] = file
        return True

    def seal(self, snapshot: str, directory: Path) -> None:
        """All files of a snapshot are known; once they are written, its spool is complete."""
        with self._condition:
            self._snapshot(snapshot, directory).is_sealed = True
            self._complete_if_written(snapshot)

    def is_reserved(self, snapshot: str) -> bool:
        """Whether the disk is certain to have the space for all that is still to be written."""
        with self._condition:
            found = self._snapshots.get(snapshot)
            return found is None or all(file.is_reserved or file.is_written for file in found.files.values())

    def finish(self, snapshot: str) -> None:
        """Wait until nothing is to be written any more; raises `CaptureFailed` when it could not be."""
        with self._condition:
            while (found := self._snapshots.get(snapshot)) is not None:
                for file in found.files.values():
                    if file.error is not None:
                        raise spool_failure(file.error, found.directory.parent) from file.error
                if all(file.is_written for file in found.files.values()):
                    return
                if self._is_stopping and self._thread is None:
                    raise CaptureFailed("the daemon ended before the captured files were written")
                self._condition.wait()

    def forget(self, snapshot: str) -> None:
        """Write nothing more for a snapshot, unless another one shares it."""
        with self._condition:
            found = self._snapshots.pop(snapshot, None)
            if found is not None:
                for file in found.files.values():
                    file.snapshots.discard(snapshot)
                    if not file.snapshots:
                        self._drop(file)
                self._condition.notify_all()

    def stop(self) -> None:
        """Write what is queued, then end the thread; nothing may be captured after this."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
        with self._condition:
            self._thread = None
            self._condition.notify_all()

    def _run(self) -> None:
        while (write := self._next()) is not None:
            error = None
            if write.file.error is None and write.file.snapshots:
                try:
                    _write_all(write)
                except OSError as failure:
                    error = failure
            with self._condition:
                self._in_flight -= 1
                self._give_back(write.slab)
                write.file.queued -= 1
                write.file.error = write.file.error or error
                if write.file.queued == 0 and write.file.is_ended:
                    self._close(write.file)
                self._condition.notify_all()
            del write

    def _next(self) -> _Write | None:
        with self._condition:
            while not self._queue:
                if self._is_stopping:
                    return None
                has_many = len(self._free) > _KEPT_SLABS
                if not self._condition.wait(_IDLE_S if has_many else None):
                    self._shrink()
            return self._queue.popleft()

    # What follows is called with the lock held.

    def _snapshot(self, snapshot: str, directory: Path) -> _SpilledSnapshot:
        return self._snapshots.setdefault(snapshot, _SpilledSnapshot(directory))

    def _give_back(self, slab: Slab) -> None:
        if self._slab_count > self._slab_limit:
            self._slab_count -= 1
        else:
            self._free.append(slab)
        self._condition.notify_all()

    def _shrink(self) -> None:
        self._slab_count -= len(self._free) - _KEPT_SLABS
        del self._free[_KEPT_SLABS:]

    def _drop(self, file: SpillFile) -> None:
        file.snapshots.clear()
        file.is_ended = True
        if file.queued == 0:
            self._close(file)

    def _close(self, file: SpillFile) -> None:
        """All that was to be written is; called once or, after `_drop`, twice."""
        if file.descriptor < 0:
            return
        try:
            if file.error is None and file.snapshots:
                os.ftruncate(file.descriptor, file.size_bytes)
        except OSError as error:
            file.error = error
        finally:
            os.close(file.descriptor)
            file.descriptor = -1
        file.is_written = file.error is None
        for snapshot in file.snapshots:
            self._complete_if_written(snapshot)
        self._condition.notify_all()

    def _complete_if_written(self, snapshot: str) -> None:
        found = self._snapshots[snapshot]
        if found.is_sealed and all(file.is_written for file in found.files.values()):
            try:
                (found.directory / COMPLETE_FILE).touch(mode=0o600)
            except OSError:
                pass  # Only a restart would miss it, and then reads the files again if they are unchanged.


def _write_all(write: _Write) -> None:
    position = 0
    while position < write.length:
        # Small steps: who reserves space in this file waits for the one in progress.
        end = min(position + _WRITE_BYTES, write.length)
        position += os.pwrite(write.file.descriptor, write.slab.view[position:end], write.offset + position)
