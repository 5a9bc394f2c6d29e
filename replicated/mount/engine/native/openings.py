"""The files that are open, of a mount whose kernel tells us of each open: how the kernel reads each of them.

An inode whose bytes lie in the cache as one plain file is passed through: the kernel reads that file by
itself, and none of us sees the bytes. Every other one is read through its page cache and us. The kernel
allows an inode only one of the two at a time, so what its first open got, all get until its last close.

Invariant: while a file is passed through we hold a lease on it. Whoever wants to write to it has to wait
until the kernel lets nobody read it any more: readers get EIO, and never bytes that were not saved. (What
was mapped into memory before stays mapped.)
"""

from __future__ import annotations

import errno
import itertools
import logging
import threading
from dataclasses import dataclass
from typing import Final

from replicated.file_systems import honours_leases
from replicated.mount.engine.native.passthrough import Passthrough
from replicated.mount.errors import Refused
from replicated.mount.filesystem import Filesystem
from replicated.mount.reading.open_files import PlainFile

_LOG = logging.getLogger(__name__)

#: Opening and closing a file that is passed through costs more than reading a smaller one through us.
MIN_PASSED_BYTES: Final = 1 << 20
#: After so many opens in a row of files that are smaller, files are not opened any more where that may be.
SMALL_OPENS: Final = 512
#: Marks our own handles among those of the file system.
_OURS: Final = 1 << 63


@dataclass(slots=True, eq=False)
class _Passed:
    """A file that is registered with the kernel."""

    backing_id: int
    plain: PlainFile


@dataclass(slots=True, eq=False)
class _Use:
    """An inode from its first open to its last close."""

    inode: int
    passed: _Passed | None
    handles: int = 0
    is_condemned: bool = False


class Openings:
    """The open files of one mount. May be used from any thread.

    `passthrough` is None when everything is read through us. `generations` holds how often an inode was
    taken away from those who used it; with another generation it is another inode to the kernel. With
    `may_end`, the kernel is told to open no more files once many small ones were opened in a row: opening
    and closing a file then costs a tenth, but nothing is passed through from then on. Not while a file is:
    the kernel would let nobody else use it.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        passthrough: Passthrough | None,
        generations: dict[int, int],
        *,
        may_end: bool = False,
    ) -> None:
        self._filesystem = filesystem
        self._passthrough = passthrough
        self._generations = generations
        self._may_end = may_end
        # Guards what follows; never held while a file is opened or closed.
        self._lock = threading.Lock()
        self._small_opens = 0
        #: Opens under way of files that may be passed through.
        self._large_opens = 0
        self._has_ended = False
        self._uses: dict[int, _Use] = {}
        self._handles: dict[int, _Use] = {}
        self._numbers = itertools.count(_OURS)

    def open(self, inode: int) -> tuple[int, int]:
        """A handle, and the id of the file that the kernel is to read; 0 when it is to ask us.

        Refused with ENOSYS when files are not opened any more; those that are open stay so.
        """
        is_large = self._filesystem.getattr(inode).size >= MIN_PASSED_BYTES
        with self._lock:
            self._note(is_large)
            self._large_opens += is_large
        try:
            use = self._begin(inode, may_pass=is_large)
        finally:
            with self._lock:
                self._large_opens -= is_large
        try:
            if use.passed is not None:
                handle, backing_id = next(self._numbers), use.passed.backing_id
            else:
                handle, backing_id = self._filesystem.open(inode), 0
        except BaseException:
            self._end(use)
            raise
        self._handles[handle] = use
        return handle, backing_id

    def release(self, handle: int) -> None:
        """End the use of a handle."""
        use = self._handles.pop(handle, None)
        if use is None:
            return
        if handle < _OURS:
            self._filesystem.release(handle)
        self._end(use)

    def is_condemned(self, inode: int) -> bool:
        """Whether an inode is being taken away from those who use it."""
        use = self._uses.get(inode)
        return use is not None and use.is_condemned

    def watch(self) -> None:
        """Take away the files that somebody wants to change; to be called every second or so."""
        with self._lock:
            watched = [use for use in self._uses.values() if use.passed is not None and not use.is_condemned]
            for use in watched:
                # As long as it is looked at, its file is not closed: a closed one has no lease either.
                use.handles += 1
        for use in watched:
            if use.passed is None or not use.passed.plain.is_broken():
                self._end(use)
                continue
            try:
                # In a thread of its own, because the kernel asks us while it is being told.
                threading.Thread(target=self._condemn, args=(use,), name="condemn", daemon=True).start()
            except (RuntimeError, MemoryError) as error:
                # The kernel lets whoever wants to change the file wait until we look again.
                _LOG.warning("a file that somebody changes cannot be taken away yet: %s", error)
                self._end(use)

    def _note(self, is_large: bool) -> None:
        """Count how many small files were opened in a row, and end at the right moment; the lock is held."""
        self._small_opens = 0 if is_large else self._small_opens + 1
        if self._may_end and self._small_opens >= SMALL_OPENS and not self._large_opens:
            self._has_ended = self._has_ended or all(use.passed is None for use in self._uses.values())
        if self._has_ended:
            raise Refused(errno.ENOSYS)

    # -- beginning and ending ------------------------------------------------------------------------

    def _begin(self, inode: int, *, may_pass: bool) -> _Use:
        """What an inode is in use as, with one more handle."""
        with self._lock:
            use = self._uses.get(inode)
            if use is not None:
                return _join(use)
        passed = self._pass(inode) if may_pass else None
        try:
            with self._lock:
                use = self._uses.get(inode)
                if use is None:
                    use = self._uses[inode] = _Use(inode, passed)
                    passed = None
                return _join(use)
        finally:
            if passed is not None:
                # Another thread was faster, and the kernel allows no two files of one inode.
                self._give_back(passed)

    def _end(self, use: _Use) -> None:
        with self._lock:
            use.handles -= 1
            if use.handles:
                return
            if self._uses.get(use.inode) is use:
                del self._uses[use.inode]
        if use.passed is not None:
            self._give_back(use.passed)

    def _pass(self, inode: int) -> _Passed | None:
        """The file of an inode, registered with the kernel; None when it is to be read through us."""
        if self._passthrough is None:
            return None
        plain = self._filesystem.backing(inode)
        if plain is None:
            return None
        try:
            # In this order: what was changed before the lease is seen after it.
            if honours_leases(plain.descriptor) and plain.hold_lease() and plain.is_intact():
                return _Passed(self._passthrough.register(plain.descriptor), plain)
        except OSError as error:
            _LOG.warning("a file of the cache cannot be passed through: %s", error)
        plain.close()
        return None

    def _give_back(self, passed: _Passed) -> None:
        assert self._passthrough is not None, "a file is passed through"
        self._passthrough.unregister(passed.backing_id)
        passed.plain.close()

    # -- taking away ---------------------------------------------------------------------------------

    def _condemn(self, use: _Use) -> None:
        """Take an inode away from everybody, then let go on whoever wants to change its file.

        The caller has counted one more handle, which this gives back.
        """
        try:
            if self._begin_condemning(use):
                self._take_away(use)
        finally:
            self._end(use)

    def _begin_condemning(self, use: _Use) -> bool:
        """Whether an inode is to be taken away: it is in use, and nobody does so already."""
        with self._lock:
            # The one handle is the caller's: what everybody else has closed, nobody reads.
            is_wanted = use.handles > 1 and not use.is_condemned
            use.is_condemned = use.is_condemned or is_wanted
            return is_wanted

    def _take_away(self, use: _Use) -> None:
        assert self._passthrough is not None and use.passed is not None, "a file is passed through"
        _LOG.error("somebody changes a file of the cache: who has inode %d open gets EIO", use.inode)
        generation = self._generations.get(use.inode, 0)
        # Who looks the name up from now on gets another inode, and that too spoils this one.
        self._generations[use.inode] = generation + 1
        if not self._passthrough.spoil(use.inode, generation):
            _LOG.critical("inode %d is still read from a file that is being changed", use.inode)
        with self._lock:
            if self._uses.get(use.inode) is use:
                del self._uses[use.inode]
        use.passed.plain.release_lease()


def _join(use: _Use) -> _Use:
    if use.is_condemned:
        raise Refused(errno.EIO)
    use.handles += 1
    return use
