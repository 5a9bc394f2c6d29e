"""The processes of a home, found from outside: the daemon, and the child that does its storing."""

import os
import resource
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rig.oracle import using

from replicate import connection


def processes_of(home: Path, *words: bytes) -> Iterator[int]:
    """Pids of the running processes that serve a home and have some words in their command line."""
    setting = b"REPLICATE_HOME=" + os.fsencode(home)
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            command = (directory / "cmdline").read_bytes().split(b"\0")
            is_ours = setting in (directory / "environ").read_bytes().split(b"\0")
            if is_ours and all(word in command for word in (b"replicated", *words)):
                yield int(directory.name)


def signal_daemon(home: Path, number: signal.Signals) -> bool:
    """Send a signal to the daemon of a home; whether there was one."""
    return _signal(processes_of(home, b"serve"), number)


def signal_store(home: Path, number: signal.Signals) -> bool:
    """Send a signal to the process that stores for a home; whether there was one."""
    return _signal(processes_of(home, b"store-process"), number)


def stop_daemon(home: Path) -> None:
    """Leave no daemon of a home behind, whatever state it is in."""
    signal_store(home, signal.SIGCONT)
    with using(home), suppress(Exception):
        connection.stop_daemon()
    while pids := list(processes_of(home)):
        _signal(pids, signal.SIGKILL)
        time.sleep(0.01)


@contextmanager
def no_new_descriptors(pid: int) -> Iterator[None]:
    """Let a process open nothing meanwhile."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def _signal(pids: Iterable[int], number: signal.Signals) -> bool:
    sent = False
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            sent = True
    return sent
