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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from replicate.errors import CaptureFailed
from replicated.snapshot import duplicate, file_systems, leases
from replicated.snapshot.entries import held_name
from replicated.snapshot.held_copies import HeldCopies, Owner
from replicated.snapshot.held_queues import Delayed, SmallestFirst
from replicated.snapshot.leases import block_signals as block_signals
from replicated.snapshot.slots import Slots

#: The kernel tells of a break at once; this finds what it could not tell.
_SCAN_INTERVAL_S: Final = 2.0
#: The part of the kernel's time that is not used: it began before we knew.
_MARGIN: Final = 0.1
#: A file that is stored within this time is not reflinked: that would flush what was just written.
_REFLINK_AFTER_S: Final = 1.0
#: One rescue thread leaves files above this to the others, so that a small one never waits for big ones.
_SMALL_BYTES: Final = 64 << 20
_LOST_HINT: Final = "`capture: copy` in the configuration copies every file before the call returns"

_log = logging.getLogger(__name__)

_Identity: TypeAlias = "tuple[int, int, int, int, int]"


class Holding(NamedTuple):
    """One held file of a snapshot."""

    #: Unique within the snapshot, from 0.
    number: int
    #: Taken under the lease: this is the file that will be stored.
    info: os.stat_result


class OpenedHeld(NamedTuple):
    """A held file to be read; the descriptor is the caller's to close."""

    descriptor: int
    #: Bytes that were read while the byte of this slot is 0 are good. None: a copy that nobody changes.
    slot: int | None


@dataclass(slots=True, eq=False)
class _Held:
    """One file that is held for snapshots; guarded by `HeldFiles._lock`, except what never changes."""

    #: -1 once the lease is given up. Who is busy with the file may use it without the lock.
    descriptor: int
    info: os.stat_result
    #: None for a copy from before a restart, and once it is free again.
    slot: int | None
    #: When the lease was taken, by `time.monotonic`.
    held_at: float
    owners: set[Owner] = field(default_factory=set)
    #: One thread copies the file, or makes its copies durable.
    is_busy: bool = False
    #: Until when what is read is believed; None while no writer waits.
    deadline: float | None = None
    #: Each owner has a complete copy.
    is_copied: bool = False
    #: Why nobody will have one.
    lost: str = ""


@dataclass(slots=True)
class _Snapshot:
    holdings: dict[int, _Held] = field(default_factory=dict)
    next_number: int = 0


class _Abandoned(Exception):
    """Nobody wants the copy any more."""


class HeldFiles:
    """All files that are held for snapshots; every method may be called from any thread.

    `spool_path` says where the spool directory of a snapshot is; it is made when a copy goes there. At most
    `descriptor_limit` files are held, by default half as many as the process may open. The kernel breaks a
    lease after `break_time_s()`.
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
            descriptor_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._slots = Slots(descriptor_limit)
        self._lock = threading.Lock()
        #: A file is not busy any more.
        self._not_busy = threading.Condition(self._lock)
        self._is_running = False
        self._snapshots: dict[str, _Snapshot] = {}
        self._leased: dict[int, _Held] = {}
        self._leased_bytes = 0
        self._by_identity: dict[_Identity, _Held] = {}
        #: When the last look at all leases began.
        self._scanned_at = 0.0
        #: Files that writers wait for.
        self._rescues: SmallestFirst[_Held] = SmallestFirst()
        self._reflinks: Delayed[_Held] = Delayed(_REFLINK_AFTER_S)
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
        """Finish the copies that writers wait for, then give up all leases; the copies stay."""
        with self._lock:
            self._is_running = False
        self._rescues.close()
        self._reflinks.close()
        for worker in self._workers:
            worker.join()
        with self._lock:
            held_files = list(self._leased.values())
            self._wait_until_not_busy(held_files)
            descriptors = [self._detach(held) for held in held_files if held.descriptor >= 0]
        for descriptor in descriptors:
            leases.close(descriptor)
        if self._waiter is not None and self._watcher is not None:
            self._waiter.wake()
            self._watcher.join()
        self._slots.close()

    @property
    def flags_descriptor(self) -> int:
        """The shared memory with the byte of each slot, to be handed to the store process; see `slots`."""
        return self._slots.descriptor

    @property
    def count(self) -> int:
        """How many files are leased now."""
        return len(self._leased)

    @property
    def size_bytes(self) -> int:
        """How much the files that are leased now hold."""
        return self._leased_bytes

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
            held = self._by_identity.get(_identity(info))
            if held is None or not self._is_running or not leases.is_whole(held.descriptor):
                return None
            return Holding(self._add_owner(held, snapshot, None), held.info)

    def adopt(self, snapshot: str, number: int, descriptor: int | None) -> bool:
        """Hold again, under its number, what was held before a restart; False when that cannot be.

        With a descriptor as `hold` does: compare its stat with the recorded one after this, and release it
        if they differ. None: find the copy in the spool.
        """
        if descriptor is not None:
            return self._hold(snapshot, descriptor, number) is not None
        path = self._copies.find((snapshot, number))
        if path is None:
            return False
        held = _Held(-1, path.stat(), None, 0.0, is_copied=True)
        with self._lock:
            self._add_owner(held, snapshot, number)
        return True

    def _hold(self, snapshot: str, descriptor: int, number: int | None) -> Holding | None:
        waiter = self._waiter
        if waiter is None or not file_systems.honours_leases(descriptor):
            return None
        with self._lock:
            slot = self._slots.take() if self._is_running else None
        if slot is None:
            return None
        info = None
        if leases.take(descriptor, waiter.thread):
            info = os.fstat(descriptor)
            if info.st_size >= self._too_large:
                leases.give_up(descriptor)
                info = None
        if info is None:
            with self._lock:
                self._slots.give_back(slot)
            return None
        held = _Held(descriptor, info, slot, time.monotonic())
        with self._lock:
            if not self._leased:
                waiter.wake()  # it looks at the leases now and then only while there are some
            self._leased[descriptor] = held
            self._leased_bytes += info.st_size
            self._by_identity[_identity(info)] = held
            number = self._add_owner(held, snapshot, number)
            if info.st_dev not in self._unshared:
                self._reflinks.put(held)
            # A break that came before this was in the tables was told to nobody.
            if not leases.is_whole(descriptor):
                self._note_break(held)
        return Holding(number, info)

    def _add_owner(self, held: _Held, snapshot: str, number: int | None) -> int:
        of_snapshot = self._snapshots.setdefault(snapshot, _Snapshot())
        if number is None:
            number = of_snapshot.next_number
        of_snapshot.next_number = max(of_snapshot.next_number, number + 1)
        of_snapshot.holdings[number] = held
        held.owners.add((snapshot, number))
        return number

    # ---------------------------------------------------------------- reading

    def open(self, snapshot: str, number: int) -> OpenedHeld:
        """Open a held file for reading; waits while it is copied because of a writer.

        Raises `CaptureFailed` when the file is lost, and OSError when it cannot be opened now.
        """
        with self._lock:
            held = self._snapshots.get(snapshot, _Snapshot()).holdings.get(number)
            if held is None:
                raise CaptureFailed(f"the file is not held for this snapshot: {number}")
            while not held.is_copied:
                if held.lost:
                    raise CaptureFailed(held.lost, hint=_LOST_HINT)
                if held.descriptor < 0:
                    raise OSError(errno.ESHUTDOWN, "the daemon is stopping")
                if leases.is_whole(held.descriptor):
                    return OpenedHeld(fcntl.fcntl(held.descriptor, fcntl.F_DUPFD_CLOEXEC, 0), held.slot)
                self._note_break(held)
                self._not_busy.wait()
        path = self._copies.find((snapshot, number))
        if path is None:
            raise CaptureFailed(f"the copy of a file has vanished from the spool: {held_name(number)}")
        return OpenedHeld(os.open(path, os.O_RDONLY | os.O_CLOEXEC), None)

    def lost(self, snapshot: str) -> str:
        """Why a file of the snapshot is lost; empty when none is."""
        with self._lock:
            holdings = self._snapshots.get(snapshot, _Snapshot()).holdings
            return next((held.lost for held in holdings.values() if held.lost), "")

    def release(self, snapshot: str, number: int | None = None) -> None:
        """A file, or every file, of the snapshot is stored or not wanted; harmless when it is not held.

        When this returns, nothing more is written for it to the spool of the snapshot.
        """
        with self._lock:
            of_snapshot = self._snapshots.get(snapshot)
            if of_snapshot is None:
                return
            released = []
            for which in list(of_snapshot.holdings) if number is None else [number]:
                held = of_snapshot.holdings.pop(which, None)
                if held is not None:
                    held.owners.discard((snapshot, which))
                    released.append(held)
            if number is None:
                del self._snapshots[snapshot]
            self._wait_until_not_busy(released)
            descriptors = []
            for held in released:
                if not held.owners and held.slot is not None:
                    if held.descriptor >= 0:
                        descriptors.append(self._detach(held))
                    self._slots.give_back(held.slot)
                    held.slot = None
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
        while self._is_running or self._leased:
            timeout_s = max(0.0, next_scan - time.monotonic()) if self._leased else None
            breaks = waiter.wait(timeout_s)
            with self._lock:
                for descriptor in breaks.descriptors:
                    held = self._leased.get(descriptor)
                    if held is not None and not leases.is_whole(descriptor):
                        self._note_break(held)
            if breaks.missed_some or time.monotonic() >= next_scan:
                self._scan()
                next_scan = time.monotonic() + _SCAN_INTERVAL_S
        waiter.close()

    def _scan(self) -> None:
        """Look at all leases, mostly without the lock: thousands of them take milliseconds."""
        began = time.monotonic()
        suspects = [pair for pair in list(self._leased.items()) if not leases.is_whole(pair[0])]
        with self._lock:
            for descriptor, held in suspects:
                # It may have been closed, and the number be in use for another file.
                if held.descriptor == descriptor and not leases.is_whole(descriptor):
                    self._note_break(held)
            self._scanned_at = began

    def _note_break(self, held: _Held) -> None:
        """A writer waits for this file: have it copied. With the lock."""
        if held.deadline is not None:
            return
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

    def _lose(self, held: _Held, error: Exception) -> None:
        """There will be no copy: say why, and let the writers go on."""
        try:
            path = os.readlink(f"/proc/self/fd/{held.descriptor}")
        except OSError:
            path = f"inode {held.info.st_ino}"
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
        why = f"a file was opened for writing before it was stored, and could not be copied: {path}: {reason}"
        with self._lock:
            held.lost = why
            descriptor = self._detach(held)
        leases.close(descriptor)

    # ---------------------------------------------------------------- copying

    def secure(self, snapshot: str) -> None:
        """Have all files of a snapshot in its spool, so that they survive the end of daemon and machine.

        Raises OSError when that cannot be; what was not copied is then held as before. Lost files are passed
        over: see `lost`.
        """
        with self._lock:
            holdings = dict(self._snapshots.get(snapshot, _Snapshot()).holdings)
        for number, held in holdings.items():
            if self._claim(held, wait=True):
                try:
                    self._copy(held)
                except _Abandoned:
                    self._leave(held)
                except BaseException:
                    self._leave(held)
                    raise
            self._make_durable(held, (snapshot, number))

    def _claim(self, held: _Held, *, wait: bool) -> bool:
        """Be the one that is busy with a file, if it is leased and nobody is, or to be waited for."""
        with self._lock:
            if wait:
                self._wait_until_not_busy([held])
            if held.is_busy or held.descriptor < 0:
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
            self._leave(held)

    def _copy(self, held: _Held, *, by_reflink_only: bool = False) -> bool:
        """Give each owner a copy, then give up the lease; False when only a reflink will do and cannot be.

        The caller is busy with the file, and still is unless this returns True.
        """
        with self._lock:
            owner = min(held.owners, default=None)
        if owner is None:
            raise _Abandoned
        if by_reflink_only and not self._may_reflink(held, owner):
            return False
        temporary, descriptor = self._copies.begin(owner)
        try:
            try:
                is_whole = self._duplicate(held, descriptor, by_reflink_only)
            finally:
                os.close(descriptor)
            if is_whole:
                self._publish(held, temporary)
        finally:
            temporary.unlink(missing_ok=True)
        return is_whole

    def _may_reflink(self, held: _Held, owner: Owner) -> bool:
        parent = self._copies.open_parent(owner)
        try:
            return file_systems.may_share_blocks(held.descriptor, parent)
        finally:
            os.close(parent)

    def _duplicate(self, held: _Held, destination: int, by_reflink_only: bool) -> bool:
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

    def _check(self, held: _Held) -> None:
        """Raise unless the copy is wanted still, and what was read up to now is the file as it was held."""
        with self._lock:
            if not held.owners:
                raise _Abandoned
            if not leases.is_whole(held.descriptor):
                self._note_break(held)
            if held.deadline is not None and time.monotonic() > held.deadline:
                raise TimeoutError(errno.ETIMEDOUT, "it took longer than the kernel lets a writer wait")

    def _publish(self, held: _Held, path: Path) -> None:
        """Give each owner the complete copy at this path, then let the writers go on."""
        served: set[Owner] = set()
        while True:
            with self._lock:
                if not held.owners:
                    raise _Abandoned
                waiting = held.owners - served
                if not waiting:
                    held.is_copied = True
                    descriptor = self._detach(held)
                    break
            for owner in waiting:
                path = self._copies.give(path, owner, is_temporary=not served)
                served.add(owner)
        leases.close(descriptor)

    def _make_durable(self, held: _Held, owner: Owner) -> None:
        with self._lock:
            self._wait_until_not_busy([held])
            if not held.is_copied or owner not in held.owners:
                return
            held.is_busy = True
        try:
            if not self._copies.is_durable(owner):
                self._copies.make_durable(owner)
        finally:
            self._leave(held)

    def _leave(self, held: _Held) -> None:
        """Be busy with it no more."""
        with self._lock:
            held.is_busy = False
            self._not_busy.notify_all()
            if held.deadline is not None and held.descriptor >= 0 and held.owners:
                self._rescues.put(held.info.st_size, held)

    def _wait_until_not_busy(self, held_files: Iterable[_Held]) -> None:
        """With the lock, which others can have meanwhile."""
        for held in held_files:
            while held.is_busy:
                self._not_busy.wait()

    def _detach(self, held: _Held) -> int:
        """Take a leased file out of the tables; with the lock. The caller closes what this returns.

        That lets the writers go on, so the flag is set here, before. Not closed here: of a removed file, it
        frees the blocks, which takes time.
        """
        assert held.slot is not None
        self._slots.flag(held.slot)
        descriptor, held.descriptor = held.descriptor, -1
        del self._leased[descriptor]
        self._leased_bytes -= held.info.st_size
        if self._by_identity.get(_identity(held.info)) is held:
            del self._by_identity[_identity(held.info)]
        held.is_busy = False
        self._not_busy.notify_all()
        return descriptor


def _identity(info: os.stat_result) -> _Identity:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _begin(name: str, target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    thread.start()
    return thread
