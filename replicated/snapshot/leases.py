"""Read leases as the kernel has them: take one, look at it, give it up, and hear that somebody waits for it.

A thin layer over fcntl(2) and signalfd(2) with no state but that of a `BreakWaiter`; `held` decides what
to do. Two facts are behind its form. The signal of a broken lease goes to the thread that waits for it and
to no other, so that no thread of a library can get it and die of it. And a lease belongs to the open file,
not to the descriptor: a duplicate in another process keeps it, so it is given up by name, not by closing.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

_F_SETOWN_EX: Final = 15
_OWNER: Final = struct.Struct("ii")
_F_OWNER_TID: Final = 0
#: Of a `struct signalfd_siginfo`: the signal, and five numbers later the descriptor.
_SIGNAL_INFO: Final = struct.Struct("=IiiIIi")
_SIGNAL_INFO_BYTES: Final = 128
_SIGNALS_A_READ: Final = 64
_BREAK_TIME_FILE: Final = Path("/proc/sys/fs/lease-break-time")
_DEFAULT_BREAK_TIME_S: Final = 45.0

_libc = ctypes.CDLL(None, use_errno=True)


class Breaks(NamedTuple):
    """What a `BreakWaiter` heard."""

    #: Whose leases somebody waits for. One may have been closed, and its number used again, since.
    descriptors: frozenset[int]
    #: Signals were lost: only a look at every lease tells.
    missed_some: bool


class BreakWaiter:
    """Where the thread that makes it hears of broken leases; no other may wait."""

    def __init__(self) -> None:
        self.thread = threading.get_native_id()
        signals = (_break_signal(), signal.SIGIO)
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        self._signals = _signal_descriptor(signals)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._signals, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)

    def wait(self, timeout_s: float | None) -> Breaks:
        """Wait for broken leases, for `wake` from any thread, or for the time to pass."""
        self._poll.poll(None if timeout_s is None else timeout_s * 1000)
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        try:
            data = os.read(self._signals, _SIGNALS_A_READ * _SIGNAL_INFO_BYTES)
        except BlockingIOError:
            return Breaks(frozenset(), missed_some=False)
        descriptors = set()
        missed_some = False
        for offset in range(0, len(data), _SIGNAL_INFO_BYTES):
            number, _, _, _, _, descriptor = _SIGNAL_INFO.unpack_from(data, offset)
            if number == signal.SIGIO:
                # The queue of real-time signals was full: the kernel falls back to one without details.
                missed_some = True
            else:
                descriptors.add(descriptor)
        return Breaks(frozenset(descriptors), missed_some)

    def wake(self) -> None:
        """Make `wait` return; from any thread."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Stop hearing: all leases have been given up, and the thread has ended."""
        os.close(self._signals)
        os.close(self._wake)


def take(descriptor: int, thread: int) -> bool:
    """Take a read lease on a file that is open for reading; its break will be told to `thread`.

    False when it is refused: somebody has the file open for writing or mapped shared and writable, it is
    of another user, or its file system has no leases.
    """
    try:
        # Both before the lease: with it, signals begin, by default a deadly one to the whole process.
        fcntl.fcntl(descriptor, _F_SETOWN_EX, _OWNER.pack(_F_OWNER_TID, thread))
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, _break_signal())
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    return True


def is_whole(descriptor: int) -> bool:
    """Whether the lease is there and nobody waits for it: all that was read so far is the file as it was."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_RDLCK
    except OSError:
        return False


def give_up(descriptor: int) -> None:
    """Let the writers go on; harmless when there is no lease."""
    with suppress(OSError):  # it was broken by force
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def close(descriptor: int) -> None:
    """Give up the lease of a descriptor and close it."""
    # By name: a duplicate that the store process has not closed yet would keep it.
    give_up(descriptor)
    with suppress(OSError):  # nothing was written through it that could be lost
        os.close(descriptor)


def break_time_s() -> float:
    """How long the kernel makes a writer wait before it breaks a lease by force; it may be for ever."""
    try:
        seconds = float(_BREAK_TIME_FILE.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return _DEFAULT_BREAK_TIME_S
    return seconds if seconds > 0 else float("inf")


def _break_signal() -> int:
    return signal.SIGRTMIN + 5


def _signal_descriptor(signals: tuple[int, ...]) -> int:
    mask = (ctypes.c_ulong * (_SIGNAL_INFO_BYTES // ctypes.sizeof(ctypes.c_ulong)))()
    for number in signals:
        word, bit = divmod(number - 1, ctypes.sizeof(ctypes.c_ulong) * 8)
        mask[word] |= 1 << bit
    descriptor: int = _libc.signalfd(ctypes.c_int(-1), mask, ctypes.c_int(os.O_CLOEXEC | os.O_NONBLOCK))
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return descriptor
