"""Facts about processes of this machine, read from /proc: identity, liveness, and the boot.

A pid alone is reused, so a process is a pid, its start time and the boot it belongs to.
"""

from __future__ import annotations

import fcntl
import functools
import os
import struct
import time

from replicate.records import ProcessIdentity

#: ioctl PIDFD_GET_INFO of Linux 6.13 and its struct: mask, cgroup, eleven ids, exit status.
_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO = struct.Struct("=QQ11Ii")
#: Exit statuses are told since Linux 6.15.
_PIDFD_INFO_EXIT = 1 << 3


@functools.cache
def current_boot_id() -> str:
    """The kernel's random id of this boot; empty where there is none."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when it is gone (a zombie is gone)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name of the program, in parentheses, may hold spaces and parentheses itself.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def is_alive(process: ProcessIdentity) -> bool:
    """Whether the very process still runs on this machine, in this boot."""
    if process.boot_id != current_boot_id():
        return False
    return start_ticks(process.pid) == process.start_ticks


def age_s(process: ProcessIdentity) -> float | None:
    """How long ago a process of this boot of this machine started; None for others."""
    if process.boot_id != current_boot_id() or not process.start_ticks:
        return None
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return max(0.0, now - process.start_ticks / os.sysconf("SC_CLK_TCK"))


def identify(pid: int) -> ProcessIdentity | None:
    """The identity of a running process of this machine, or None when it is gone."""
    ticks = start_ticks(pid)
    return None if ticks is None else ProcessIdentity(pid, ticks, current_boot_id())


def open_pidfd(process: ProcessIdentity) -> int | None:
    """A descriptor that becomes readable when the process ends; None when it has ended already."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return None
    # Checked after opening: from here on the descriptor cannot mean a later process of that pid.
    if not is_alive(process):
        os.close(descriptor)
        return None
    return descriptor


def exit_status(pidfd: int) -> int | None:
    """How a process ended: its exit code, or minus the signal that killed it.

    None while its parent has not taken note of its end, and always on kernels that do not tell.
    """
    answer = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, 0, *([0] * 11), 0))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, answer)
    except OSError:
        return None
    mask, *_, status = _PIDFD_INFO.unpack(answer)
    return os.waitstatus_to_exitcode(status) if mask & _PIDFD_INFO_EXIT else None
