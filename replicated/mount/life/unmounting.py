"""Taking mounts away: politely, with the names of those who hold one up, or what is left of dead ones.

Asks `fusermount3`, which may do it for every user; root needs no help. Knows nothing of the register; called
by `table` and `launching`.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess

from replicate.errors import MountFailed
from replicate.records import ProcessIdentity
from replicated.mount.engine.libfuse import UNMOUNT_PROGRAM
from replicated.mount.life.mountinfo import find_holders, find_mounted, find_watchers, is_disconnected
from replicated.processes import open_pidfd

#: How long a process that serves nothing any more may take to end by itself.
_END_TIMEOUT_S = 15.0
#: How long the kernel's last answers, and programs that watch over a mount, may take after its end.
_SETTLE_TIMEOUT_S = 5.0

#: From <sys/mount.h>.
_MNT_DETACH = 2


def unmount(target: bytes, process: ProcessIdentity) -> None:
    """Unmount what a process serves; returns when the process is gone.

    Raises `MountFailed` naming those who keep the mount in use.
    """
    descriptor = open_pidfd(process)
    try:
        refusal = _run_unmount(target)
        if refusal and find_mounted(target) is not None:
            raise _in_use(target, refusal)
        if descriptor is not None and not _has_ended(descriptor, _END_TIMEOUT_S):
            # It serves nothing any more.
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            _has_ended(descriptor, _END_TIMEOUT_S)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def detach_dead(target: bytes) -> bool:
    """Detach a mount of ours if nobody serves it any more; whether that was so."""
    mounted = find_mounted(target)
    if mounted is None or not mounted.is_ours or not is_disconnected(target):
        return False
    # Lazily: whoever still has a file of it open only gets errors, and keeps nothing alive.
    _run_unmount(target, is_lazy=True)
    return True


def clear_remains(target: bytes) -> bool:
    """Detach what a process that has ended had mounted; whether nothing of ours is mounted there now.

    Returns when no `fusermount3` watches over that mount any more: a late one would take away the next.
    """
    for watcher in find_watchers(target):
        try:
            descriptor = os.pidfd_open(watcher)
        except ProcessLookupError:
            continue
        _has_ended(descriptor, _SETTLE_TIMEOUT_S)
        os.close(descriptor)
    mounted = find_mounted(target)
    return mounted is None or not mounted.is_ours or detach_dead(target)


def _run_unmount(target: bytes, *, is_lazy: bool = False) -> str:
    """Ask for an unmount; what was complained about, empty when it was done."""
    if shutil.which(UNMOUNT_PROGRAM) is None:
        return _unmount_as_root(target, _MNT_DETACH if is_lazy else 0)
    finished = subprocess.run(
        [UNMOUNT_PROGRAM, "-u", *(["-z"] if is_lazy else []), "--", target],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if finished.returncode == 0:
        return ""
    return finished.stderr.decode(errors="replace").strip() or f"status {finished.returncode}"


def _unmount_as_root(target: bytes, flags: int) -> str:
    if ctypes.CDLL(None, use_errno=True).umount2(target, flags) == 0:
        return ""
    return f"{UNMOUNT_PROGRAM} is not in the PATH, and by itself: {os.strerror(ctypes.get_errno())}"


def _in_use(target: bytes, refusal: str) -> MountFailed:
    holders = find_holders(target)
    if not holders:
        return MountFailed(
            f"cannot unmount {os.fsdecode(target)}: {refusal}",
            hint="end what uses it (`fuser -vm` shows it), then try again",
        )
    return MountFailed(
        f"cannot unmount {os.fsdecode(target)}, it is in use by "
        + ", ".join(f"process {holder}" for holder in holders),
        hint="end these processes or let them leave the directory, then try again",
        fields={"pids": " ".join(str(holder.pid) for holder in holders)},
    )


def _has_ended(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
