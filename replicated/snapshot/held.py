"""Files that were captured without being read: read leases keep them from changing until they are stored.

Whoever opens such a file for writing waits in the kernel. The thread `leases` hears of it, a `rescue`
thread copies the whole file into the spool, and only then is the lease given up and the writer goes on.
The invariant: what `open` gives is the file as it was when it was held, or an error says why it is lost;
and the byte of a slot is set before a writer can change what a reader of that slot reads. Called by
`capture` (hold, share), by the side of the store process (open, release) and at recovery (adopt); stores
nothing itself.

One lock guards all state and nothing slow is done under it: who copies a file sets `is_busy` on it, and
who would do something else with that file waits for the end of that.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from replicate.errors import CaptureFailed
from replicated import file_systems
from replicated.snapshot import duplicate, leases
from replicated.snapshot.entries import held_name
from replicated.snapshot.held_copies import HeldCopies, Owner
from replicated.snapshot.held_queues import Delayed, SmallestFirst
from replicated.snapshot.holdings import HeldFile, Holding, Holdings
from replicated.snapshot.slots import Slots

#: The kernel tells of a break at once; this finds what it could not tell.
_SCAN_INTERVAL_S: Final = 2.0
#: Descriptors that the daemon needs for other things than held files.
_OTHER_DESCRIPTORS: Final = 128
#: The part of the kernel's time that is not used: it began before we knew.
_MARGIN: Final = 0.1
#: A file that is stored within this time is not reflinked: that would flush what was just written.
_REFLINK_AFTER_S: Final = 1.0
#: One rescue thread leaves files above this to the others, so that a small one never waits for big ones.
_SMALL_BYTES: Final = 64 << 20
_LOST_HINT: Final = "`capture: copy` in the configuration copies every file before the call returns"

_log = logging.getLogger(__name__)


class OpenedHeld(NamedTuple):
    """A held file to be read; the descriptor is the caller's to close."""

    descriptor: int
    #: Bytes that were read while the byte of this slot is 0 are good. None: a copy that nobody changes.
    slot: int | None


class _Abandoned(Exception):
    """Nobody wants the copy any more."""


class HeldFiles:
    """All files that are held for snapshots; every method may be called from any thread.

    `spool_path` says where the spool directory of a snapshot is; it is made when a copy goes there. At most
    `descriptor_limit` files are held, by default three quarters of what the process may open and does not
    need otherwise. The kernel breaks a lease after `break_time_s()`.
    """

    def __init__(
        self,
        spool_path: Callable[[str], Path],
        *,
        descriptor_limit: int | None = None,
        break_time_s: Callable[[], float] = leases.break_time_s,
    ) -> None:
        self._copies = HeldCopies(spool_path)
        self._break_time_s = break_time_s
        if descriptor_limit is None:
            spare = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHER_DESCRIPTORS
            descriptor_limit = max(0, spare * 3 // 4)
        self._slots = Slots(descriptor_limit)
        self._lock = threading.Lock()
        #: A file is not busy any more.
        self._not_busy = threading.Condition(self._lock)
        self._is_running = False
        self._is_stopped = False
        self._holdings = Holdings(self._slots)
        #: When the last look at all leases began.
        self._scanned_at = 0.0
        #: Files that writers wait for.
        self._rescues: SmallestFirst[HeldFile] = SmallestFirst()
        self._reflinks: Delayed[HeldFile] = Delayed(_REFLINK_AFTER_S)
        #: Devices whose files cannot share blocks with the spool.
        self._unshared: set[int] = set()
        #: A file of this size could not be copied in time once.
        self._too_large = float("inf")
        self._waiter: leases.BreakWaiter | None = None
        self._watcher: threading.Thread | None = None
        self._workers: list[threading.Thread] = []

    # ------------------------------------------------------------------- life

    def start(self) -> None:
        """Begin to answer writers; before this `hold` refuses everything."""
        ready = threading.Event()
        self._is_running = True
        self._watcher = _begin("leases", self._watch, ready)
        self._workers = [_begin("rescue-0", self._rescue, _SMALL_BYTES), _begin("reflink", self._reflink)]
        self._workers += [_begin(f"rescue-{number}", self._rescue, None) for number in range(1, 4)]
        ready.wait()
        if self._waiter is None:
            raise RuntimeError("the thread that waits for broken leases has died")

    def stop(self) -> None:
        """Finish the copies that writers wait for, then give up all leases; the copies stay. Final.

        May be called twice, and without a start.
        """
        with self._lock:
            if self._is_stopped:
                return
            self._is_stopped = True
            self._is_running = False
        self._rescues.close()
        self._reflinks.close()
        for worker in self._workers:
            worker.join()
        with self._lock:
            held_files = list(self._holdings.leased.values())
            self._wait_until_not_busy(held_files)
            descriptors = [self._end_lease(held) for held in held_files if held.is_leased]
        for descriptor in descriptors:
            leases.close(descriptor)
        if self._waiter is not None and self._watcher is not None:
            self._waiter.wake()
            self._watcher.join()
            self._waiter.close()
        self._slots.close()

    @property
    def flags_descriptor(self) -> int:
        """The shared memory with the byte of each slot, to be handed to the store process; see `slots`."""
        return self._slots.descriptor

    @property
    def count(self) -> int:
        """How many files are leased now."""
        return len(self._holdings.leased)

    @property
    def size_bytes(self) -> int:
        """How much the files that are leased now hold."""
        return self._holdings.leased_bytes

    # ---------------------------------------------------------------- holding

    def hold(self, snapshot: str, descriptor: int) -> Holding | None:
        """Hold a regular file, open for reading only, for a snapshot, and own its descriptor from then on.

        None when it is refused: somebody has it open for writing, it is of another user, its file system
        cannot be relied on, or enough are held. The descriptor then stays the caller's.
        """
        return self._hold(snapshot, descriptor, None)

    def share(self, snapshot: str, info: os.stat_result) -> Holding | None:
        """Hold the file that had this stat for one more snapshot, if it is leased and unchanged since."""
        with self._lock:
            held = self._holdings.find_leased(info)
            if held is None or not self._is_running or not leases.is_whole(held.descriptor):
                return None
            return Holding(self._holdings.add_owner(held, snapshot), held.info)

    def adopt(self, snapshot: str, number: int, descriptor: int | None) -> bool:
        """Hold again, under its number, what was held before a restart; False when that cannot be.

        With a descriptor as `hold` does: compare its stat with the recorded one after this, and release it
        if they differ. None: what the spool has is the copy.
        """
        if descriptor is not None:
            return self._hold(snapshot, descriptor, number) is not None
        path = self._copies.find((snapshot, number))
        if path is None:
            return False
        held = HeldFile(-1, path.stat(), None, is_copied=True)
        with self._lock:
            self._holdings.add_owner(held, snapshot, number)
        return True

    def _hold(self, snapshot: str, descriptor: int, number: int | None) -> Holding | None:
        waiter = self._waiter
        if waiter is None or not file_systems.honours_leases(descriptor):
            return None
        with self._lock:
            slot = self._slots.take() if self._is_running else None
        if slot is None:
            return None
        if leases.take(descriptor, waiter.thread):
            held = HeldFile(descriptor, os.fstat(descriptor), slot, time.monotonic())
            with self._lock:
                if self._is_running and held.info.st_size < self._too_large:
                    return Holding(self._add(held, waiter, snapshot, number), held.info)
            leases.give_up(descriptor)
        with self._lock:
            self._slots.give_back(slot)
        return None

    def _add(self, held: HeldFile, waiter: leases.BreakWaiter, snapshot: str, number: int | None) -> int:
        """Enter a file whose lease has been taken; with the lock."""
        if not self._holdings.leased:
            waiter.wake()  # it looks at the leases now and then only while there are some
        self._holdings.add_leased(held)
        number = self._holdings.add_owner(held, snapshot, number)
        if held.info.st_dev not in self._unshared:
            self._reflinks.put(held)
        # A break that came before this was in the tables was told to nobody.
        if not leases.is_whole(held.descriptor):
            self._note_break(held)
        return number

    # ---------------------------------------------------------------- reading

    def open(self, snapshot: str, number: int) -> OpenedHeld:
        """Open a held file for reading; waits while it is copied because of a writer.

        Raises `CaptureFailed` when the file is lost, and OSError when it cannot be opened now.
        """
        with self._lock:
            held = self._holdings.find(snapshot, number)
            if held is None:
                raise CaptureFailed(f"the file is not held for this snapshot: {number}")
            while not held.is_copied:
                if held.lost:
                    raise CaptureFailed(held.lost, hint=_LOST_HINT)
                if not held.is_leased:
                    raise OSError(errno.ESHUTDOWN, "the file is not held any more")
                if leases.is_whole(held.descriptor):
                    return OpenedHeld(fcntl.fcntl(held.descriptor, fcntl.F_DUPFD_CLOEXEC, 0), held.slot)
                self._note_break(held)
                self._not_busy.wait()
        path = self._copies.find((snapshot, number))
        if path is None:
            raise CaptureFailed(f"the copy of a file has vanished from the spool: {held_name(number)}")
        return OpenedHeld(os.open(path, os.O_RDONLY | os.O_CLOEXEC), None)

    def release(self, snapshot: str, number: int | None = None) -> None:
        """A file, or every file, of the snapshot is stored or not wanted; harmless when it is not held.

        When this returns, nothing more is written for it to the spool of the snapshot.
        """
        with self._lock:
            disowned = self._holdings.disown(snapshot, number)
            self._wait_until_not_busy(disowned)
            unwanted = [held for held in disowned if not held.owners]
            descriptors = [self._end_lease(held) for held in unwanted if held.is_leased]
            for held in unwanted:
                self._holdings.give_back_slot(held)
        for descriptor in descriptors:
            leases.close(descriptor)

    # --------------------------------------------------------------- breaking

    def _watch(self, ready: threading.Event) -> None:
        """Hear of writers that wait, until the end."""
        try:
            waiter = self._waiter = leases.BreakWaiter()
        finally:
            ready.set()
        next_scan = 0.0
        while self._is_running or self._holdings.leased:
            timeout_s = max(0.0, next_scan - time.monotonic()) if self._holdings.leased else None
            breaks = waiter.wait(timeout_s)
            with self._lock:
                for descriptor in breaks.descriptors:
                    held = self._holdings.leased.get(descriptor)
                    if held is not None and not leases.is_whole(descriptor):
                        self._note_break(held)
            if breaks.missed_some or time.monotonic() >= next_scan:
                self._scan()
                next_scan = time.monotonic() + _SCAN_INTERVAL_S

    def _scan(self) -> None:
        """Look at all leases, mostly without the lock: thousands of them take milliseconds."""
        began = time.monotonic()
        suspects = [
            pair for pair in list(self._holdings.leased.copy().items()) if not leases.is_whole(pair[0])
        ]
        with self._lock:
            for descriptor, held in suspects:
                # It may have been closed, and the number be in use for another file.
                if held.descriptor == descriptor and not leases.is_whole(descriptor):
                    self._note_break(held)
            self._scanned_at = began

    def _note_break(self, held: HeldFile) -> None:
        """A writer waits for this file: have it copied. With the lock."""
        if held.deadline is not None:
            return
        # At once, not only when the lease ends: should the copy take too long, the kernel ends it before us.
        self._holdings.flag(held)
        # Not from now: after a minute in which the process did not run, an old break looks like a new one.
        whole_at = max(held.held_at, self._scanned_at)
        held.deadline = whole_at + self._break_time_s() * (1 - _MARGIN)
        if not held.is_busy:
            self._rescues.put(held.info.st_size, held)

    def _rescue(self, max_bytes: int | None) -> None:
        """Copy files that writers wait for, until the end."""
        while (held := self._rescues.take(max_bytes)) is not None:
            if not self._claim(held, wait=False):
                continue  # who is busy with it puts it back, if it is still to be copied then
            began = time.monotonic()
            try:
                self._copy(held)
            except _Abandoned:
                self._leave(held)
            except Exception as error:
                if not isinstance(error, OSError):
                    _log.exception("a held file could not be copied")
                if isinstance(error, TimeoutError) and time.monotonic() - began > self._break_time_s() / 2:
                    self._too_large = min(self._too_large, held.info.st_size)
                self._lose(held, error)

    def _lose(self, held: HeldFile, error: Exception) -> None:
        """There will be no copy: say why, and let the writers go on."""
        try:
            path = os.readlink(f"/proc/self/fd/{held.descriptor}")
        except OSError:
            path = f"inode {held.info.st_ino}"
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
        why = f"a file was opened for writing before it was stored, and could not be copied: {path}: {reason}"
        with self._lock:
            held.lost = why
            descriptor = self._end_lease(held)
        leases.close(descriptor)

    # ---------------------------------------------------------------- copying

    def secure(self, snapshot: str) -> None:
        """Have all files of a snapshot in its spool, so that they survive the end of the daemon.

        Raises OSError when that cannot be; what was not copied is then held as before. Lost files are passed
        over: `open` says why.
        """
        with self._lock:
            files = self._holdings.of_snapshot(snapshot)
        for held in files.values():
            if not self._claim(held, wait=True):
                continue
            try:
                self._copy(held)
            except _Abandoned:
                self._leave(held)
            except BaseException:
                self._leave(held)
                raise

    def _claim(self, held: HeldFile, *, wait: bool) -> bool:
        """Be the one that is busy with a file, if it is leased and nobody is, or to be waited for."""
        with self._lock:
            if wait:
                self._wait_until_not_busy([held])
            if held.is_busy or not held.is_leased:
                return False
            held.is_busy = True
            return True

    def _reflink(self) -> None:
        """Replace leases by reflinks a while after the capture, where that can be, until the end."""
        while (held := self._reflinks.take()) is not None:
            if held.info.st_dev in self._unshared or not self._claim(held, wait=False):
                continue
            try:
                if self._copy(held, by_reflink_only=True):
                    continue
                with self._lock:
                    self._unshared.add(held.info.st_dev)
            except (OSError, _Abandoned):
                pass  # held as before
            except Exception:
                _log.exception("a held file could not be reflinked")
            self._leave(held)

    def _copy(self, held: HeldFile, *, by_reflink_only: bool = False) -> bool:
        """Give each owner a copy, then give up the lease; False when only a reflink will do and cannot be.

        The caller is busy with the file, and still is unless this returns True.
        """
        with self._lock:
            owner = min(held.owners, default=None)
        if owner is None:
            raise _Abandoned
        if by_reflink_only and not self._may_reflink(held, owner):
            return False
        temporary, destination = self._copies.begin(owner)
        is_published = False
        try:
            try:
                is_whole = self._duplicate(held, destination, by_reflink_only)
            finally:
                os.close(destination)
            if is_whole:
                self._publish(held, temporary)
                is_published = True
        finally:
            if not is_published:
                temporary.unlink(missing_ok=True)
        return is_published

    def _may_reflink(self, held: HeldFile, owner: Owner) -> bool:
        parent = self._copies.open_parent(owner)
        try:
            return file_systems.may_share_blocks(held.descriptor, parent)
        finally:
            os.close(parent)

    def _duplicate(self, held: HeldFile, destination: int, by_reflink_only: bool) -> bool:
        """Duplicate the file as it was when it was held; False when only a reflink will do and cannot be."""
        source = held.descriptor
        before = os.fstat(source)
        if not (
            file_systems.may_share_blocks(source, destination) and duplicate.reflink(source, destination)
        ):
            if by_reflink_only:
                return False
            duplicate.copy(source, destination, held.info.st_size, lambda: self._check(held))
        self._check(held)
        after = os.fstat(source)
        # The lease kept it from changing; this is a second lock on that door. Not the ctime: the file may
        # have been renamed, removed, or given other permissions.
        if after.st_size != held.info.st_size or after.st_mtime_ns != before.st_mtime_ns:
            raise OSError(errno.EBUSY, "it changed while it was copied")
        return True

    def _check(self, held: HeldFile) -> None:
        """Raise unless the copy is wanted still, and what was read up to now is the file as it was held."""
        with self._lock:
            if not held.owners:
                raise _Abandoned
            if not leases.is_whole(held.descriptor):
                self._note_break(held)
            if held.deadline is not None and time.monotonic() > held.deadline:
                raise TimeoutError(errno.ETIMEDOUT, "it took longer than the kernel lets a writer wait")

    def _publish(self, held: HeldFile, path: Path) -> None:
        """Give each owner the complete copy at this path, then let the writers go on."""
        served: set[Owner] = set()
        while True:
            with self._lock:
                if not held.owners:
                    raise _Abandoned
                waiting = held.owners - served
                if not waiting:
                    held.is_copied = True
                    descriptor = self._end_lease(held)
                    break
            for owner in waiting:
                path = self._copies.give(path, owner, is_temporary=not served)
                served.add(owner)
        leases.close(descriptor)

    def _end_lease(self, held: HeldFile) -> int:
        """What was to be done with a leased file is done; with the lock. The caller closes what this returns.

        Not under the lock: closing a removed file frees its blocks, which takes time.
        """
        held.is_busy = False
        self._not_busy.notify_all()
        return self._holdings.end_lease(held)

    def _leave(self, held: HeldFile) -> None:
        """Be busy with it no more."""
        with self._lock:
            held.is_busy = False
            self._not_busy.notify_all()
            if held.deadline is not None and held.is_leased and held.owners:
                self._rescues.put(held.info.st_size, held)

    def _wait_until_not_busy(self, held_files: Iterable[HeldFile]) -> None:
        """With the lock, which others can have meanwhile."""
        for held in held_files:
            while held.is_busy:
                self._not_busy.wait()


def _begin(name: str, target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    thread.start()
    return thread
