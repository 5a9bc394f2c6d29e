"""A mount as the kernel sees it: made, and taken away again.

`fusermount3` mounts for everybody, root as well where it is installed: it stays beside the process and
unmounts when that dies without having done so. Without it root mounts by system call. Who may mount here
is said by `check`. Knows nothing of what is served.
"""

from __future__ import annotations

import array
import os
import shutil
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from replicate.errors import MountFailed
from replicated.mount.engine.libfuse import DEVICE, SUBTYPE, UNMOUNT_PROGRAM
from replicated.mount.life.mountinfo import find_mounted

#: The kernel reads ahead 128 KiB unless told otherwise, which makes eight requests of each one.
_READ_AHEAD_KB: Final = 1024
#: The descriptor at which fusermount3 is given its end of the socket.
_SOCKET_NUMBER = 3
#: Of what fusermount3 says when it fails.
_MAX_MESSAGE_BYTES = 4096

# From <sys/mount.h>.
_MS_RDONLY = 1
_MS_NOSUID = 2
_MS_NODEV = 4
_MNT_DETACH = 2


@dataclass(frozen=True, slots=True)
class Device:
    """A mount that was made. `descriptor` is where the kernel sends requests and takes answers."""

    descriptor: int
    directory: bytes
    #: `major:minor` of the mounted file system.
    number: str
    #: The socket that fusermount3 watches, and its pid; None when there is none.
    watch: tuple[socket.socket, int] | None = None

    def raise_read_ahead(self) -> None:
        """Let the kernel read ahead as much as fits into one request; only root may.

        To be called after INIT was answered, which sets it to the kernel's own measure.
        """
        with suppress(OSError), open(f"/sys/class/bdi/{self.number}/read_ahead_kb", "w") as file:
            file.write(f"{_READ_AHEAD_KB}\n")

    def unmount(self) -> None:
        """Take the mount out of the directory, also while it is in use; nothing when it is gone already."""
        mounted = find_mounted(self.directory)
        # What somebody else has mounted on top of it is not ours to remove.
        if mounted is not None and mounted.device == self.number:
            if os.geteuid() == 0:
                _unmount_as_root(self.directory)
            else:
                _run([UNMOUNT_PROGRAM, b"-u", b"-q", b"-z", b"--", self.directory])

    def close(self) -> None:
        """Let go of the device, which ends the mount for whoever still uses it."""
        os.close(self.descriptor)
        if self.watch is not None:
            end, pid = self.watch
            end.close()
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def mount(directory: bytes, source_name: str, *, allow_other: bool) -> Device:
    """Mount on `directory`, an absolute path without links. Raises `MountFailed` saying why not."""
    options = ["ro", "nosuid", "nodev", "default_permissions"]
    if allow_other:
        options.append("allow_other")
    if shutil.which(UNMOUNT_PROGRAM) is not None:
        descriptor, watch = _mount_by_program(directory, source_name, options)
    else:
        descriptor, watch = _mount_as_root(directory, source_name, options), None
    mounted = find_mounted(directory)
    return Device(descriptor, directory, mounted.device if mounted else "", watch)


def _mount_by_program(
    directory: bytes, source_name: str, options: list[str]
) -> tuple[int, tuple[socket.socket, int]]:
    """The device as fusermount3 hands it over, and what keeps that one waiting for our end."""
    options = [*options, "auto_unmount", f"subtype={SUBTYPE}", f"fsname={_escape(source_name)}"]
    ours, theirs = socket.socketpair()
    message = os.memfd_create("message")
    try:
        command: list[str | bytes] = [UNMOUNT_PROGRAM, "-o", ",".join(options), "--", directory]
        pid = os.posix_spawnp(
            UNMOUNT_PROGRAM,
            command,
            os.environ | {"_FUSE_COMMFD": str(_SOCKET_NUMBER)},
            # In this order: the first must not be overwritten by the second.
            file_actions=[
                (os.POSIX_SPAWN_DUP2, message, 2),
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), _SOCKET_NUMBER),
            ],
        )
        theirs.close()
        descriptor = _receive_descriptor(ours)
        if descriptor is None:
            os.waitpid(pid, 0)
            said = os.pread(message, _MAX_MESSAGE_BYTES, 0).decode("utf-8", "replace").strip()
            raise MountFailed(said or f"{UNMOUNT_PROGRAM} could not mount {os.fsdecode(directory)}")
    except BaseException:
        ours.close()
        theirs.close()
        raise
    finally:
        os.close(message)
    os.set_inheritable(descriptor, False)
    return descriptor, (ours, pid)


def _receive_descriptor(end: socket.socket) -> int | None:
    """The descriptor that comes through a socket; None when the other side closes it."""
    size = array.array("i").itemsize
    data, ancillary, _, _ = end.recvmsg(1, socket.CMSG_LEN(size))
    for level, kind, content in ancillary:
        if data and level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return array.array("i", content[:size])[0]
    return None


def _mount_as_root(directory: bytes, source_name: str, options: list[str]) -> int:
    import ctypes  # here, because only this way of mounting needs it

    try:
        descriptor = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountFailed(f"{DEVICE} cannot be opened: {error.strerror}") from error
    rootmode = stat.S_IFMT(os.stat(directory).st_mode)
    data = f"fd={descriptor},rootmode={rootmode:o},user_id={os.getuid()},group_id={os.getgid()}"
    for option in options:
        if option in ("default_permissions", "allow_other"):
            data += f",{option}"
    library = ctypes.CDLL(None, use_errno=True)
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    if library.mount(
        source_name.encode(), directory, f"fuse.{SUBTYPE}".encode(), ctypes.c_ulong(flags), data.encode()
    ):
        number = ctypes.get_errno()
        os.close(descriptor)
        raise MountFailed(f"cannot mount on {os.fsdecode(directory)}: {os.strerror(number)}")
    return descriptor


def _unmount_as_root(directory: bytes) -> None:
    import ctypes

    ctypes.CDLL(None).umount2(directory, _MNT_DETACH)


def _run(command: list[str | bytes]) -> None:
    os.waitpid(os.posix_spawnp(os.fsdecode(command[0]), command, os.environ), 0)


def _escape(name: str) -> str:
    """A value in a list of mount options."""
    return name.replace("\\", "\\\\").replace(",", "\\,")
