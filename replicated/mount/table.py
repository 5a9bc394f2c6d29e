"""The daemon's view of mounts: starts mount processes, finds them again, ends them, cleans up after them.

The truth is the register together with the kernel's list, so that nothing is lost when the daemon is
restarted. All methods may be called from any thread.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from replicate.errors import MountFailed, NotFound
from replicate.home import Home, make_private
from replicate.ids import new_id, short
from replicated.mount.libfuse import UNMOUNT_PROGRAM, check_fuse
from replicated.mount.mountinfo import (
    find_holders,
    find_mounted,
    is_disconnected,
    read_mountinfo,
)
from replicated.mount.process import READY
from replicated.mount.registry import (
    MountInfo,
    Registration,
    read_registrations,
    remove_registration,
)
from replicated.processes import is_alive, open_pidfd

_COMMAND = (sys.executable, "-m", "replicated", "mount-process")
#: Opening a repository far away may take a while; longer than this nobody waits.
_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 15.0
_LOG_NAME = "mounts.log"


class MountTable:
    """The mounts of one home."""

    def __init__(self, home: Home) -> None:
        self._home = home
        # Guards the two below; never held while a process is waited for.
        self._lock = threading.Lock()
        self._starting: set[bytes] = set()
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def mount(
        self,
        repository: str,
        experiment_id: str,
        checkpoint_id: str,
        snapshot_ids: Sequence[str],
        directory: Path,
    ) -> MountInfo:
        """Mount snapshots, later ones laid over earlier ones, on a directory; returns when it is usable.

        Without snapshots (and with empty ids) it is the whole repository, as `RepositoryView` shows it.
        The directory must be empty, or absent with its parent there: then it is made, and removed at the
        end. `repository` is an absolute URL, `checkpoint_id` is empty for the files of an experiment
        alone. Raises `MountFailed` saying what is in the way.
        """
        for finding in check_fuse():
            if not finding.ok:
                raise MountFailed(f"cannot mount here: {finding.detail}", hint=finding.hint)
        self._refresh()
        target = os.path.realpath(os.fsencode(directory))
        make_private(self._home.mounts.parent)
        make_private(self._home.mounts)
        self._home.logs.mkdir(parents=True, exist_ok=True)
        with self._sole_starter(target):
            made = self._prepare(target)
            command = [
                *_COMMAND,
                f"--repository={repository}",
                f"--cache={self._home.cache}",
                f"--register={self._home.mounts}",
                f"--log={self._home.logs / _LOG_NAME}",
                f"--name={short(checkpoint_id or experiment_id) or 'all'}-{new_id()[:8]}",
                f"--experiment={experiment_id}",
                f"--checkpoint={checkpoint_id}",
                *(f"--snapshot={snapshot_id}" for snapshot_id in snapshot_ids),
                f"--directory={os.fsdecode(target)}",
                *(["--made-directory"] if made else []),
            ]
            try:
                pid = self._start(command, target)
            except BaseException:
                if made:
                    with suppress(OSError):
                        os.rmdir(target)
                raise
        return MountInfo(
            id=checkpoint_id or experiment_id,
            experiment_id=experiment_id,
            repository=repository,
            directory=os.fsdecode(target),
            pid=pid,
        )

    def list(self) -> Sequence[MountInfo]:
        """The mounts that can be used now, by directory."""
        return [registration.info for registration in self._refresh()]

    def unmount(
        self, *, directory: Path | None = None, identifier: str = "", everything: bool = False
    ) -> Sequence[MountInfo]:
        """Unmount what is mounted on a directory, or all mounts of an id (or prefix), or all; what it was.

        Returns when the processes are gone. Raises `NotFound` when nothing fits (unless `everything`),
        and `MountFailed` naming who keeps a mount in use, after the others have been unmounted.
        """
        chosen = self._choose(directory, identifier, everything)
        failures: list[MountFailed] = []
        for registration in chosen:
            try:
                self._end(registration)
            except MountFailed as error:
                failures.append(error)
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise MountFailed("; ".join(failure.message for failure in failures), hint=failures[0].hint)
        return [registration.info for registration in chosen]

    def clean_dead(self) -> None:
        """Unmount what has lost its process, also what no register knows; for the daemon's start."""
        known = {registration.directory for registration in self._refresh()}
        for mounted in read_mountinfo():
            if mounted.is_ours and mounted.directory not in known:
                _unmount_dead(mounted.directory)

    # -- starting ------------------------------------------------------------------------------------

    @contextmanager
    def _sole_starter(self, target: bytes) -> Iterator[None]:
        with self._lock:
            if target in self._starting:
                raise MountFailed(f"something is just being mounted there: {_show(target)}")
            self._starting.add(target)
        try:
            yield
        finally:
            with self._lock:
                self._starting.discard(target)

    def _prepare(self, target: bytes) -> bool:
        """Make sure that `target` is a directory to mount on; whether it had to be made."""
        self._refuse_own_directories(target)
        mounted = find_mounted(target)
        if mounted is not None and mounted.is_ours and _unmount_dead(target):
            mounted = find_mounted(target)
        if mounted is not None:
            raise MountFailed(
                f"{_show(mounted.source)} is mounted there already: {_show(target)}",
                hint="unmount it first (`replicate umount`), or choose another directory",
            )
        try:
            try:
                mode = os.stat(target).st_mode
            except FileNotFoundError:
                os.mkdir(target)
                return True
            if not stat.S_ISDIR(mode):
                raise MountFailed(f"the mount point is not a directory: {_show(target)}")
            if os.listdir(target):
                raise MountFailed(
                    f"the mount point is not empty: {_show(target)}",
                    hint="choose an empty directory, or one that does not exist yet",
                )
        except FileNotFoundError as error:
            raise MountFailed(
                f"the directory that should hold the mount point does not exist: "
                f"{_show(os.path.dirname(target))}"
            ) from error
        except OSError as error:
            raise MountFailed(f"cannot mount there: {error.strerror}: {_show(target)}") from error
        return False

    def _refuse_own_directories(self, target: bytes) -> None:
        """Our own state must not lie below a mount; mount points that we chose ourselves are apart."""
        if _is_below(target, self._home.mounts):
            return
        for own in (self._home.state, self._home.cache, self._home.run, self._home.logs):
            if _is_below(target, own):
                raise MountFailed(
                    f"the mount point lies in a directory of replicate's own: {_show(target)}",
                    hint="choose a directory elsewhere",
                )

    def _start(self, command: Sequence[str], target: bytes) -> int:
        """Run a mount process until it is ready; its pid."""
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                cwd="/",
                # The signals of a terminal and the end of the daemon are not for it.
                start_new_session=True,
            )
            assert process.stdout is not None, "a pipe was asked for"
            with process.stdout as output:
                if _is_ready(output):
                    with self._lock:
                        self._children[process.pid] = process
                    return process.pid
            ended = process.poll() is not None
            process.kill()
            process.wait()
            _unmount_dead(target)
            self._refresh()
            complaints.seek(0)
            lines = complaints.read().decode(errors="replace").split("\n")
        reason = next((line for line in reversed(lines) if line.strip()), "it did not say why")
        if not ended:
            reason = f"not usable after {_START_TIMEOUT_S:.0f} s: {reason}"
        raise MountFailed(f"cannot mount on {_show(target)}: {reason}")

    # -- finding -------------------------------------------------------------------------------------

    def _refresh(self) -> Sequence[Registration]:
        """The usable mounts by directory, after cleaning up behind those whose process is gone."""
        self._reap()
        mounted = {m.directory for m in read_mountinfo() if m.is_ours}
        usable = []
        for registration in read_registrations(self._home.mounts):
            if not is_alive(registration.process):
                self._clean(registration)
            elif registration.directory in mounted:
                usable.append(registration)
            # Else it is just starting or ending.
        return sorted(usable, key=lambda registration: registration.directory)

    def _reap(self) -> None:
        with self._lock:
            for pid, process in list(self._children.items()):
                if process.poll() is not None:
                    del self._children[pid]

    def _clean(self, registration: Registration) -> None:
        mounted = find_mounted(registration.directory)
        if mounted is not None and mounted.is_ours and not _unmount_dead(registration.directory):
            # Its last threads are not gone yet; the next one who looks finds it disconnected.
            return
        if registration.made_directory:
            with suppress(OSError):
                os.rmdir(registration.directory)
        remove_registration(self._home.mounts, registration.name)

    def _choose(self, directory: Path | None, identifier: str, everything: bool) -> Sequence[Registration]:
        registrations = self._refresh()
        if everything:
            return registrations
        hint = "`replicate mounts` lists what is mounted"
        if directory is not None:
            target = os.path.realpath(os.fsencode(directory))
            chosen = [r for r in registrations if r.directory == target]
            if not chosen:
                raise NotFound(f"nothing of ours is mounted there: {_show(target)}", hint=hint)
            return chosen
        chosen = [
            registration
            for registration in registrations
            if identifier
            and registration.info.id
            and (
                registration.info.id.startswith(identifier)
                or registration.info.experiment_id.startswith(identifier)
            )
        ]
        if not chosen:
            raise NotFound(f"not mounted: {identifier}", hint=hint)
        return chosen

    # -- ending --------------------------------------------------------------------------------------

    def _end(self, registration: Registration) -> None:
        directory = registration.directory
        process = open_pidfd(registration.process)
        try:
            refusal = _run_unmount(directory)
            if refusal and find_mounted(directory) is not None:
                raise _still_mounted(directory, refusal)
            if process is not None and not _has_ended(process, _END_TIMEOUT_S):
                # It serves nothing any more.
                signal.pidfd_send_signal(process, signal.SIGKILL)
                _has_ended(process, _END_TIMEOUT_S)
        finally:
            if process is not None:
                os.close(process)
        self._refresh()


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


def _has_ended(process: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _unmount_dead(directory: bytes) -> bool:
    """Detach a mount of ours if nobody serves it any more; whether that was so."""
    mounted = find_mounted(directory)
    if mounted is None or not mounted.is_ours or not is_disconnected(directory):
        return False
    # Lazily: whoever still has a file of it open only gets errors, and keeps nothing alive.
    _run_unmount(directory, "-z")
    return True


def _run_unmount(directory: bytes, *options: str) -> str:
    """Ask for an unmount; what the program complained about, empty when it was done."""
    finished = subprocess.run(
        [UNMOUNT_PROGRAM, "-u", *options, "--", directory],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if finished.returncode == 0:
        return ""
    return finished.stderr.decode(errors="replace").strip() or f"status {finished.returncode}"


def _still_mounted(directory: bytes, refusal: str) -> MountFailed:
    holders = find_holders(directory)
    if not holders:
        return MountFailed(
            f"cannot unmount {_show(directory)}: {refusal}",
            hint="end what uses it (`fuser -vm` shows it), then try again",
        )
    return MountFailed(
        f"cannot unmount {_show(directory)}, it is in use by "
        + ", ".join(f"process {holder}" for holder in holders),
        hint="end these processes or let them leave the directory, then try again",
        fields={"pids": " ".join(str(holder.pid) for holder in holders)},
    )


def _is_below(target: bytes, directory: Path) -> bool:
    base = os.path.realpath(os.fsencode(directory))
    return target == base or target.startswith(base + b"/")


def _show(path: bytes) -> str:
    return os.fsdecode(path)
