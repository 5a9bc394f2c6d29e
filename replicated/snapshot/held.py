"""Files that were captured without being read: read leases keep them from changing until they are stored.

Whoever opens such a file for writing waits in the kernel. The thread `leases` hears of it, a `rescue`
thread copies the whole file into the spool, and only then is the lease given up and the writer goes on.
The promise: what `open` gives is the file as it was when it was held, or an error says why it is lost;
a writer never waits longer than for one copy; and the byte of a slot is set before the first writer can
change what a reader of that slot reads. Called by `capture` (hold, share), by the side of the store
process (open, release) and at recovery (adopt). Stores nothing itself.

One lock guards all state. Nothing slow is done under it: whoever copies a file sets `is_busy` on it, and
who has to do something else with that file waits for the end of it.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import itertools
import logging
import mmap
import os
import resource
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from replicate.errors import CaptureFailed
from replicated.processes import current_boot_id
from replicated.snapshot import duplicate, file_systems, leases
from replicated.snapshot.entries import held_name

SLOT_COUNT: Final = 1 << 16

#: The kernel tells of a break at once; this finds what it could not tell.
_SCAN_INTERVAL_S: Final = 2.0
#: Of the time that the kernel gives, the part that is not used: the clock begins before we know.
_MARGIN: Final = 0.1
#: A file stored within this time is never reflinked: that would flush what was just written.
_REFLINK_AFTER_S: Final = 1.0
_RESCUE_THREADS: Final = 4
#: One rescue thread leaves files above this to the others, so that a small one never waits for big ones.
_SMALL_BYTES: Final = 64 << 20
_TEMPORARY_SUFFIX: Final = ".tmp"
_LOST_HINT: Final = "`capture: copy` in the configuration copies every file before the call returns"

_log = logging.getLogger(__name__)

_Owner: TypeAlias = "tuple[str, int]"
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
    """One leased file, of one or more snapshots. All but `info` is guarded by `HeldFiles._lock`."""

    #: -1 once the lease is given up.
    descriptor: int
    info: os.stat_result
    #: None: a copy from before a restart, or already free for the next.
    slot: int | None
    #: Clock of `time.monotonic`; the lease was whole then.
    held_at: float
    owners: set[_Owner]
    #: Somebody copies it or makes its copies durable; changes of `owners` other than additions wait.
    is_busy: bool = False
    #: Until when a copy can be relied on; None while no writer waits.
    deadline: float | None = None
    #: Each owner has a copy in its spool, under the name for the time being until that is durable.
    is_copied: bool = False
    is_durable: bool = False
    #: Why there will be no copy.
    lost: str = ""


@dataclass(slots=True)
class _Snapshot:
    holdings: dict[int, _Held] = field(default_factory=dict)
    next_number: int = 0


class _Abandoned(Exception):
    """Nobody wants the copy any more."""


class HeldFiles:
    """All files that are held for snapshots; every method may be called from any thread.

    `spool_path` says where the spool directory of a snapshot is; it is made when there is something to put
    into it. At most `descriptor_limit` files are held at a time, by default half of what the process may
    open. The last two parameters are for tests.
    """

    def __init__(
        self,
        spool_path: Callable[[str], Path],
        *,
        descriptor_limit: int | None = None,
        break_time_s: Callable[[], float] = leases.break_time_s,
        reflink_after_s: float = _REFLINK_AFTER_S,
    ) -> None:
        self._spool_path = spool_path
        #: Of a complete copy that may not be on the disk yet: it is believed in this boot only.
        self._fresh_suffix = f".{current_boot_id() or uuid.uuid4()}"
        self._break_time_s = break_time_s
        self._reflink_after_s = reflink_after_s
        if descriptor_limit is None:
            descriptor_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self.flags_descriptor = os.memfd_create("replicate-held", os.MFD_CLOEXEC)
        os.ftruncate(self.flags_descriptor, SLOT_COUNT)
        self._flags = mmap.mmap(self.flags_descriptor, SLOT_COUNT)
        self._lock = threading.Lock()
        #: A file is not busy any more.
        self._settled = threading.Condition(self._lock)
        #: Something to rescue, or the end.
        self._broke = threading.Condition(self._lock)
        #: Something to reflink, or the end.
        self._held_one = threading.Condition(self._lock)
        self._is_running = False
        # Used again as late as possible, so that a reader that is being ended cannot take one for another.
        self._free_slots = deque(range(min(descriptor_limit, SLOT_COUNT)))
        self._snapshots: dict[str, _Snapshot] = {}
        self._leased: dict[int, _Held] = {}
        self._leased_bytes = 0
        self._by_identity: dict[_Identity, _Held] = {}
        #: When the last scan that looked at all leases began.
        self._scanned_at = 0.0
        self._rescues: list[tuple[int, int, _Held]] = []
        self._order = itertools.count()
        self._reflinks: deque[_Held] = deque()
        #: Devices whose files share no blocks with the spool.
        self._unshared: set[int] = set()
        self._waiter: leases.BreakWaiter | None = None
        self._watcher: threading.Thread | None = None
        self._workers: list[threading.Thread] = []

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Begin to answer writers; before this `hold` refuses everything."""
        ready = threading.Event()
        self._is_running = True
        self._watcher = threading.Thread(target=self._watch, args=(ready,), name="leases", daemon=True)
        self._watcher.start()
        for number in range(_RESCUE_THREADS):
            self._begin_worker(f"rescue-{number}", self._rescue, _SMALL_BYTES if number == 0 else None)
        self._begin_worker("reflink", self._reflink)
        ready.wait()
        if self._waiter is None:
            raise RuntimeError("the thread that waits for broken leases could not begin")

    def stop(self) -> None:
        """Finish what writers wait for, then give up all leases. Copies in the spool stay."""
        with self._lock:
            self._is_running = False
            self._broke.notify_all()
            self._held_one.notify_all()
        for worker in self._workers:
            worker.join()
        with self._lock:
            held_files = list(self._leased.values())
            descriptors = [self._detach(held, "the daemon has stopped") for held in held_files]
        for descriptor in descriptors:
            _close_leased(descriptor)
        if self._waiter is not None and self._watcher is not None:
            self._waiter.wake()
            self._watcher.join()
        self._flags.close()
        os.close(self.flags_descriptor)

    def _begin_worker(self, name: str, target: Callable[..., None], *args: object) -> None:
        worker = threading.Thread(target=target, args=args, name=name, daemon=True)
        worker.start()
        self._workers.append(worker)

    @property
    def count(self) -> int:
        """How many files are leased now."""
        return len(self._leased)

    @property
    def size_bytes(self) -> int:
        """What the files that are leased now hold."""
        return self._leased_bytes

    # --------------------------------------------------------------- holding

    def hold(self, snapshot: str, descriptor: int) -> Holding | None:
        """Hold a regular file, open for reading alone, for a snapshot, and own its descriptor from then on.

        None when it is refused: somebody has it open for writing, it is of another user, the file system
        cannot be relied on, or enough are held. The descriptor then stays the caller's.
        """
        return self._hold(snapshot, descriptor, None)

    def share(self, snapshot: str, info: os.stat_result) -> Holding | None:
        """Hold for one more snapshot the file that had this stat, if it is held and has not changed since."""
        with self._lock:
            held = self._by_identity.get(_identity(info))
            if held is None or not self._is_running or not leases.is_whole(held.descriptor):
                return None
            return Holding(self._add_owner(held, snapshot, None), held.info)

    def adopt(self, snapshot: str, number: int, descriptor: int | None) -> bool:
        """Hold again, under its number, what was held before a restart; False when that cannot be.

        With a descriptor as `hold` does; the caller compares the stat with the recorded one *after* this.
        None: the spool should have the copy; it has if it was complete, and durable or of this boot.
        """
        if descriptor is not None:
            return self._hold(snapshot, descriptor, number) is not None
        path = self._existing_copy((snapshot, number))
        if path is None:
            return False
        held = _Held(-1, os.stat(path), None, 0.0, set(), is_copied=True)
        held.is_durable = path.name == held_name(number)
        with self._lock:
            self._add_owner(held, snapshot, number)
        return True

    def _hold(self, snapshot: str, descriptor: int, number: int | None) -> Holding | None:
        waiter = self._waiter
        if waiter is None or not file_systems.honours_leases(descriptor):
            return None
        with self._lock:
            if not self._is_running or not self._free_slots:
                return None
            slot = self._free_slots.popleft()
        if not leases.take(descriptor, waiter.thread):
            with self._lock:
                self._free_slots.append(slot)
            return None
        held = _Held(descriptor, os.fstat(descriptor), slot, time.monotonic(), set())
        with self._lock:
            self._flags[slot] = 0
            if not self._leased:
                waiter.wake()  # it scans only while something is held
            self._leased[descriptor] = held
            self._leased_bytes += held.info.st_size
            self._by_identity[_identity(held.info)] = held
            given = self._add_owner(held, snapshot, number)
            if held.info.st_dev not in self._unshared:
                self._reflinks.append(held)
                self._held_one.notify()
            # A break before it was in the tables was told to nobody.
            if not leases.is_whole(descriptor):
                self._note_break(held)
        return Holding(given, held.info)

    def _add_owner(self, held: _Held, snapshot: str, number: int | None) -> int:
        of_snapshot = self._snapshots.setdefault(snapshot, _Snapshot())
        if number is None:
            number = of_snapshot.next_number
        of_snapshot.next_number = max(of_snapshot.next_number, number + 1)
        of_snapshot.holdings[number] = held
        held.owners.add((snapshot, number))
        return number

    # --------------------------------------------------------------- reading

    def open(self, snapshot: str, number: int) -> OpenedHeld:
        """Open a held file for reading; waits for a copy that is being made because of a writer.

        Raises `CaptureFailed` when the file was lost, and OSError when it cannot be opened now.
        """
        with self._lock:
            of_snapshot = self._snapshots.get(snapshot)
            held = of_snapshot.holdings.get(number) if of_snapshot else None
            if held is None:
                raise CaptureFailed(f"the file is not held for this snapshot: {number}")
            while not held.is_copied and not held.lost:
                if leases.is_whole(held.descriptor):
                    return OpenedHeld(fcntl.fcntl(held.descriptor, fcntl.F_DUPFD_CLOEXEC, 0), held.slot)
                self._note_break(held)
                self._settled.wait()
            if held.lost:
                raise CaptureFailed(held.lost, hint=_LOST_HINT)
        path = self._existing_copy((snapshot, number))
        if path is None:
            raise CaptureFailed(f"the copy of a file is gone from the spool: {held_name(number)}")
        return OpenedHeld(os.open(path, os.O_RDONLY | os.O_CLOEXEC), None)

    def lost(self, snapshot: str) -> str:
        """Why a file of the snapshot was lost; empty while none was."""
        with self._lock:
            of_snapshot = self._snapshots.get(snapshot, _Snapshot())
            return next((held.lost for held in of_snapshot.holdings.values() if held.lost), "")

    def release(self, snapshot: str, number: int | None = None) -> None:
        """A file, or all files, of the snapshot are stored or not wanted; harmless when they are not held.

        When it returns, nothing is being written to the spool of the snapshot for them.
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
            for held in released:
                while held.is_busy:
                    self._settled.wait()
            descriptors = []
            for held in released:
                if not held.owners:
                    descriptors.append(self._detach(held))
                    if held.slot is not None:
                        self._free_slots.append(held.slot)
                        held.slot = None
        for descriptor in descriptors:
            _close_leased(descriptor)

    # -------------------------------------------------------------- breaking

    def _watch(self, ready: threading.Event) -> None:
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
        """Look at all leases, most of the time without the lock: it takes milliseconds for thousands."""
        began = time.monotonic()
        suspects = [pair for pair in list(self._leased.items()) if not leases.is_whole(pair[0])]
        with self._lock:
            for descriptor, held in suspects:
                if held.descriptor == descriptor:
                    self._note_break(held)
            self._scanned_at = began

    def _note_break(self, held: _Held) -> None:
        """A writer waits for this file: have it copied. Called with the lock."""
        if held.deadline is not None:
            return
        # Not from now: a process that did not run for a minute would take an old break for a new one.
        whole_at = max(held.held_at, self._scanned_at)
        held.deadline = whole_at + self._break_time_s() * (1 - _MARGIN)
        if not held.is_busy:
            self._queue_rescue(held)

    def _queue_rescue(self, held: _Held) -> None:
        heapq.heappush(self._rescues, (held.info.st_size, next(self._order), held))
        # All of them: the one that wakes may be the one that leaves it to the others.
        self._broke.notify_all()

    def _rescue(self, max_bytes: int | None) -> None:
        """Copy files that writers wait for until the end."""
        while (held := self._next_rescue(max_bytes)) is not None:
            try:
                self._copy(held)
            except _Abandoned:
                self._leave(held)
            except OSError as error:
                self._end(held, lost=_loss(held, error))
            except Exception as error:
                _log.exception("a held file could not be copied")
                self._end(held, lost=_loss(held, error))

    def _next_rescue(self, max_bytes: int | None) -> _Held | None:
        """The smallest file that a writer waits for, claimed; None at the end."""
        with self._lock:
            while True:
                if self._rescues and (max_bytes is None or self._rescues[0][0] <= max_bytes):
                    held = heapq.heappop(self._rescues)[2]
                    # Whoever is busy with it queues it again, if it is still to be copied then.
                    if not held.is_busy and held.descriptor >= 0:
                        held.is_busy = True
                        return held
                elif self._is_running:
                    self._broke.wait()
                else:
                    return None

    # --------------------------------------------------------------- copying

    def secure(self, snapshot: str) -> None:
        """Have all files of a snapshot in its spool, so that they survive the end of daemon and machine.

        Raises OSError when that cannot be; what was not copied then is held as before. Lost files are
        passed over: see `lost`.
        """
        with self._lock:
            of_snapshot = self._snapshots.get(snapshot, _Snapshot())
            held_files = list(of_snapshot.holdings.values())
        for held in held_files:
            with self._lock:
                while held.is_busy:
                    self._settled.wait()
                is_leased = held.descriptor >= 0
                held.is_busy = is_leased
            if is_leased:
                try:
                    self._copy(held)
                except _Abandoned:
                    self._leave(held)
                    continue
                except BaseException:
                    self._leave(held)
                    raise
            self._make_durable(held)

    def _reflink(self) -> None:
        """Replace leases by reflinks a while after the capture, where the spool can have them."""
        while (held := self._next_reflink()) is not None:
            try:
                if not self._copy(held, by_reflink_only=True):
                    self._unshared.add(held.info.st_dev)
                    self._leave(held)
            except (OSError, _Abandoned):
                self._leave(held)  # held as before

    def _next_reflink(self) -> _Held | None:
        """The next file that has been leased for long enough, claimed; None at the end."""
        with self._lock:
            while self._is_running:
                if not self._reflinks:
                    self._held_one.wait()
                    continue
                held = self._reflinks[0]
                wait_s = held.held_at + self._reflink_after_s - time.monotonic()
                if wait_s > 0:
                    self._held_one.wait(wait_s)
                    continue
                self._reflinks.popleft()
                if held.is_busy or held.descriptor < 0 or held.info.st_dev in self._unshared:
                    continue
                held.is_busy = True
                return held
            return None

    def _copy(self, held: _Held, *, by_reflink_only: bool = False) -> bool:
        """Give each owner a copy, then give up the lease; False when it has to be a reflink and cannot.

        The file is the caller's (`is_busy`); unless this returns True, it stays so, and leased.
        """
        with self._lock:
            owner = min(held.owners, default=None)
        if owner is None:
            raise _Abandoned
        temporary = self._copy_path(owner, _TEMPORARY_SUFFIX)
        temporary.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            try:
                if not self._duplicate(held, descriptor, by_reflink_only):
                    os.unlink(temporary)
                    return False
            finally:
                os.close(descriptor)
            self._publish(held, temporary)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return True

    def _duplicate(self, held: _Held, destination: int, by_reflink_only: bool) -> bool:
        source = held.descriptor
        before = os.fstat(source)
        is_reflink = file_systems.may_share_blocks(source, destination) and duplicate.reflink(
            source, destination
        )
        if not is_reflink:
            if by_reflink_only:
                return False
            duplicate.copy(source, destination, held.info.st_size, lambda: self._check(held))
        self._check(held)
        after = os.fstat(source)
        # The lease has kept it from changing; this is the second lock on that door. The ctime may differ:
        # the file may have been renamed or removed, or have got other permissions.
        if after.st_size != held.info.st_size or after.st_mtime_ns != before.st_mtime_ns:
            raise OSError(errno.EBUSY, "it changed while it was copied")
        return True

    def _check(self, held: _Held) -> None:
        """Raise unless the copy is still wanted, and what was read so far is what was held."""
        if not held.owners:
            raise _Abandoned
        with self._lock:
            if not leases.is_whole(held.descriptor):
                self._note_break(held)
        if held.deadline is not None and time.monotonic() > held.deadline:
            raise OSError(errno.ETIMEDOUT, "the time that the kernel gives was over")

    def _publish(self, held: _Held, temporary: Path) -> None:
        """Give each owner its link to a complete copy, then let the writers go on."""
        complete: Path | None = None
        linked: set[_Owner] = set()
        while True:
            with self._lock:
                if not held.owners:
                    raise _Abandoned
                missing = held.owners - linked
                if not missing:
                    held.is_copied = True
                    descriptor = self._detach(held)
                    break
            for owner in missing:
                path = self._copy_path(owner, self._fresh_suffix)
                if complete is None:
                    temporary.rename(path)
                    complete = path
                else:
                    path.parent.mkdir(mode=0o700, exist_ok=True)
                    path.unlink(missing_ok=True)
                    path.hardlink_to(complete)
                linked.add(owner)
        _close_leased(descriptor)

    def _make_durable(self, held: _Held) -> None:
        """Flush a complete copy and give it the name that is believed after a restart of the machine."""
        with self._lock:
            while held.is_busy:
                self._settled.wait()
            if not held.is_copied or held.is_durable:
                return
            held.is_busy = True
            owners = list(held.owners)
        try:
            for owner in owners:
                fresh = self._copy_path(owner, self._fresh_suffix)
                _fsync(fresh)
                fresh.rename(self._copy_path(owner))
                _fsync(fresh.parent)
            held.is_durable = True
        finally:
            self._leave(held)

    def _copy_path(self, owner: _Owner, suffix: str = "") -> Path:
        snapshot, number = owner
        return self._spool_path(snapshot) / (held_name(number) + suffix)

    def _existing_copy(self, owner: _Owner) -> Path | None:
        """The complete copy of a file; in this order, because the one is renamed to the other."""
        for suffix in (self._fresh_suffix, ""):
            path = self._copy_path(owner, suffix)
            if path.exists():
                return path
        return None

    # ---------------------------------------------------------------- ending

    def _end(self, held: _Held, lost: str = "") -> None:
        """Give up a lease; all that `held` says about the file has to be true already."""
        with self._lock:
            descriptor = self._detach(held, lost)
        _close_leased(descriptor)

    def _detach(self, held: _Held, lost: str = "") -> int:
        """Take a file out of the tables of the leased; the caller closes what this returns. With the lock.

        The flag is set here, and the writers go on when that descriptor is closed: in this order, a reader
        of the slot cannot take what they write for the content.
        """
        descriptor, held.descriptor = held.descriptor, -1
        if descriptor >= 0:
            assert held.slot is not None
            self._flags[held.slot] = 1
            held.lost = lost
            del self._leased[descriptor]
            self._leased_bytes -= held.info.st_size
            if self._by_identity.get(_identity(held.info)) is held:
                del self._by_identity[_identity(held.info)]
        held.is_busy = False
        self._settled.notify_all()
        return descriptor

    def _leave(self, held: _Held) -> None:
        """Be busy with it no more."""
        with self._lock:
            held.is_busy = False
            self._settled.notify_all()
            if held.deadline is not None and held.descriptor >= 0 and held.owners:
                self._queue_rescue(held)


def _identity(info: os.stat_result) -> _Identity:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _loss(held: _Held, error: Exception) -> str:
    """What to tell the user about a file that could not be copied; before its descriptor is closed."""
    try:
        path = os.readlink(f"/proc/self/fd/{held.descriptor}")
    except OSError:
        path = f"inode {held.info.st_ino}"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"a file was opened for writing before it was stored, and could not be copied: {path}: {reason}"


def _close_leased(descriptor: int) -> None:
    """Let the writers go on; not under a lock, as closing a removed file frees its blocks."""
    if descriptor >= 0:
        # By name: a duplicate that the store process has not closed yet would keep the lease.
        leases.give_up(descriptor)
        os.close(descriptor)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
