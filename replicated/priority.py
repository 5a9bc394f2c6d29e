"""Letting a process take only what nobody else wants: the training comes first.

Linux only; harmless where something of it is not known or not allowed.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from contextlib import suppress
from typing import Final

LOWEST_NICENESS: Final = 19
#: While somebody waits: a tenth of a busy processor, where the lowest priority is a seventieth. More would be
#: felt by the training, which goes on while one of its threads waits.
URGENT_NICENESS: Final = 10

#: Numbers of ioprio_set(2), which the C library has no function for; elsewhere it is 30.
_IOPRIO_SET: Final = {"x86_64": 251, "ppc64le": 273, "ppc64": 273, "s390x": 282}
_NEWER_MACHINES: Final = ("aarch64", "riscv64", "loongarch64")
_OTHERS_IOPRIO_SET: Final = 30
_WHO_PROCESS: Final = 1
_CLASS_NONE: Final = 0
_CLASS_IDLE: Final = 3 << 13

#: The kernel takes ten changes of autogroups a second, of all processes together.
_AUTOGROUP_TRIES: Final = 5
_AUTOGROUP_PAUSE_S: Final = 0.1


def take_low_priority(*, is_urgent: bool) -> None:
    """Lower this process for good, on the processors and, unless it is urgent, on the disks.

    To be called before it has other threads: they inherit it. In a session of its own the process is
    lowered as a whole too: where the kernel groups processes by session, niceness counts within one only.
    """
    niceness = URGENT_NICENESS if is_urgent else LOWEST_NICENESS
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    if os.getsid(0) == os.getpid():
        _set_session("self", niceness)
    if not is_urgent:
        _set_io_class(0, _CLASS_IDLE)


def set_priority(pid: int, *, is_urgent: bool) -> bool:
    """Raise a process that leads its session, or lower it again; False when that is not allowed.

    Lowering always is; raising takes privileges or a limit (RLIMIT_NICE) that few users have.
    """
    niceness = URGENT_NICENESS if is_urgent else LOWEST_NICENESS
    try:
        threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        for thread in threads:
            os.setpriority(os.PRIO_PROCESS, thread, niceness)
    except PermissionError:
        return False
    except OSError:
        return True  # one that has just ended
    for thread in threads:
        _set_io_class(thread, _CLASS_NONE if is_urgent else _CLASS_IDLE)
    _set_session(str(pid), niceness)
    return True


def _set_io_class(thread: int, io_class: int) -> None:
    number = _ioprio_set_number()
    if number is not None:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).syscall(
                ctypes.c_long(number),
                ctypes.c_long(_WHO_PROCESS),
                ctypes.c_long(thread),
                ctypes.c_long(io_class),
            )


def _set_session(pid: str, niceness: int) -> None:
    for _ in range(_AUTOGROUP_TRIES):
        try:
            with open(f"/proc/{pid}/autogroup", "w", encoding="ascii") as file:
                file.write(str(niceness))
        except BlockingIOError:
            time.sleep(_AUTOGROUP_PAUSE_S)
        except OSError:
            return
        else:
            return


def _ioprio_set_number() -> int | None:
    if struct.calcsize("P") != 8:
        return None  # a 32-bit program, which the name of the machine does not tell
    machine = os.uname().machine
    return _OTHERS_IOPRIO_SET if machine in _NEWER_MACHINES else _IOPRIO_SET.get(machine)
