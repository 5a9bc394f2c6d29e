"""Starting mount processes: a place to mount on, and a process that says when it is ready.

Called by `table`, with the mount point claimed.
"""

from __future__ import annotations

import os
import select
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

from replicate.errors import MountFailed
from replicate.home import Home
from replicated.mount.life.mountinfo import find_mounted
from replicated.mount.life.registry import Registration
from replicated.mount.life.unmounting import clear_remains, detach_dead
from replicated.mount.process import READY, Start
from replicated.reaching import process_environment

_COMMAND = (sys.executable, "-m", "replicated", "mount-process")
#: Opening a repository far away may take a while; longer than this nobody waits.
_START_TIMEOUT_S = 60.0
#: A process that has closed its output may take so long to end.
_LAST_WORDS_S = 2.0
_LOG_NAME = "mounts.log"
_ELSEWHERE = "choose an empty directory, or one that does not exist yet"


def make_place(home: Home, repository: str, target: bytes) -> bool:
    """Make sure that `target` is a directory to mount on; whether it had to be made.

    Raises `MountFailed` naming what is in the way.
    """
    _refuse_own_directories(home, repository, target)
    mounted = find_mounted(target)
    if mounted is not None and mounted.is_ours and detach_dead(target):
        mounted = find_mounted(target)
    shown = os.fsdecode(target)
    if mounted is not None:
        raise MountFailed(
            f"{os.fsdecode(mounted.source)} is mounted there already: {shown}",
            hint="unmount it first (`replicate umount`), or choose another directory",
        )
    try:
        try:
            mode = os.stat(target).st_mode
        except FileNotFoundError:
            os.mkdir(target)
            return True
        if not stat.S_ISDIR(mode):
            raise MountFailed(f"the mount point is not a directory: {shown}", hint=_ELSEWHERE)
        if os.listdir(target):
            raise MountFailed(
                f"the mount point is not empty: {shown}",
                hint=_ELSEWHERE,
            )
    except FileNotFoundError as error:
        raise MountFailed(
            "the directory that should hold the mount point does not exist: "
            f"{os.fsdecode(os.path.dirname(target))}",
            hint="make it first (mkdir -p), or choose another place",
        ) from error
    except OSError as error:
        raise MountFailed(f"cannot mount there: {error.strerror}: {shown}", hint=_ELSEWHERE) from error
    return False


def launch(home: Home, registration: Registration, variables: Mapping[str, str] | None = None) -> int:
    """Run a mount process until its mount can be used; its pid, to be waited for by the caller.

    It reaches a bucket with `variables`; None: with those of this process.

    Raises `MountFailed` with the reason that it gave, and leaves nothing mounted.
    """
    home.logs.mkdir(parents=True, exist_ok=True)
    start = Start(
        register=str(home.mounts),
        cache=str(home.cache),
        log=str(home.logs / _LOG_NAME),
        registration=registration,
    )
    began = time.monotonic()
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [*_COMMAND, start.encode()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            cwd="/",
            # Not with its order, which is written down.
            env=process_environment(variables),
            # The signals of a terminal and the end of the daemon are not for it.
            start_new_session=True,
        )
        assert process.stdout is not None, "a pipe was asked for"
        with process.stdout as output:
            if _is_ready(output):
                # It outlives this object on purpose, which would warn of that when it is deleted.
                process.returncode = 0
                return process.pid
        # One that says no more is about to end, and is let say why.
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LAST_WORDS_S if time.monotonic() - began < _START_TIMEOUT_S else 0)
        process.kill()
        process.wait()
        clear_remains(registration.target)
        complaints.seek(0)
        reason, hint = _last_words(complaints.read().decode(errors="replace"))
    if time.monotonic() - began >= _START_TIMEOUT_S:
        reason = f"not usable after {_START_TIMEOUT_S:.0f} s: {reason}"
    raise MountFailed(f"cannot mount on {registration.order.directory}: {reason}", hint=hint)


def _refuse_own_directories(home: Home, repository: str, target: bytes) -> None:
    """What we write to must not lie below a mount; mount points that we chose ourselves are apart."""
    if _is_below(target, os.fsencode(home.mounts)):
        return
    for own in (home.state, home.cache, home.run, home.logs):
        if _is_below(target, os.fsencode(own)):
            raise MountFailed(
                f"the mount point lies in a directory of replicate's own: {os.fsdecode(target)}",
                hint="choose a directory elsewhere",
            )
    if repository.startswith("file://") and _is_below(target, os.fsencode(repository[len("file://") :])):
        # What is stored there could not be written any more.
        raise MountFailed(
            f"the mount point lies in the repository itself: {os.fsdecode(target)}",
            hint="choose a directory elsewhere",
        )


def _is_below(target: bytes, directory: bytes) -> bool:
    base = os.path.realpath(directory)
    return target == base or target.startswith(base + b"/")


def _is_ready(output: IO[bytes]) -> bool:
    """Whether the process at the other end says in time that it is ready."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    received = b""
    while not received.endswith(READY):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([output], [], [], left)[0]:
            return False
        piece = os.read(output.fileno(), len(READY))
        if not piece:
            return False
        received += piece
    return True


def _last_words(said: str) -> tuple[str, str]:
    """Why a process failed, and its advice: what it said last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    hint = ""
    if lines and lines[-1].startswith("hint: "):
        hint = lines.pop().removeprefix("hint: ")
    return lines[-1] if lines else "it did not say why", hint
