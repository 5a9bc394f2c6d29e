"""What the kernel has mounted, and who keeps it in use: /proc/self/mountinfo and /proc/PID read."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from replicated.mount.engine.libfuse import FILESYSTEM_TYPE, UNMOUNT_PROGRAM

_MOUNTINFO = "/proc/self/mountinfo"
#: The kernel reads ahead 128 KiB unless told otherwise, which makes eight requests of each one.
_READ_AHEAD_KB = 1024
_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line of mountinfo."""

    directory: bytes
    #: Such as `fuse.replicate`.
    type: bytes
    source: bytes
    #: `major:minor`, the name of the mount under /sys/class/bdi.
    device: str
    #: The user who mounted it, for FUSE.
    user_id: int | None

    @property
    def is_ours(self) -> bool:
        """Whether it is a mount of this program and this user."""
        return self.type == FILESYSTEM_TYPE and self.user_id == os.getuid()


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that keeps a mount in use."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.pid} ({self.command})"


def read_mountinfo() -> list[Mounted]:
    """Everything that is mounted where this process can see it, in the order of mounting."""
    with open(_MOUNTINFO, "rb") as file:
        return [parse_line(line) for line in file]


def parse_line(line: bytes) -> Mounted:
    """One line of mountinfo, with the kernel's escapes undone."""
    fields = line.rstrip(b"\n").split(b" ")
    # A variable number of optional fields ends with a hyphen.
    type_, source, options = fields[fields.index(b"-", 6) + 1 :][:3]
    user = re.search(rb"(?:^|,)user_id=(\d+)", options)
    return Mounted(
        directory=_unescape(fields[4]),
        type=_unescape(type_),
        source=_unescape(source),
        device=fields[2].decode("ascii"),
        user_id=int(user.group(1)) if user else None,
    )


def find_mounted(directory: bytes) -> Mounted | None:
    """What is mounted on exactly this directory (an absolute path without links); the topmost."""
    return next((m for m in reversed(read_mountinfo()) if m.directory == directory), None)


def raise_read_ahead(directory: bytes) -> None:
    """Let the kernel read ahead as much of a mount as fits into one request; only root may."""
    mounted = find_mounted(directory)
    if mounted is not None:
        with suppress(OSError), open(f"/sys/class/bdi/{mounted.device}/read_ahead_kb", "w") as file:
            file.write(f"{_READ_AHEAD_KB}\n")


def is_disconnected(directory: bytes, *, timeout_s: float = 1) -> bool:
    """Whether a mount has lost its process. One that does not answer in time has not."""
    answers: list[int] = []

    def probe() -> None:
        # Not `stat`: that can be answered from the kernel's cache.
        try:
            os.statvfs(directory)
        except OSError as error:
            answers.append(error.errno or 0)

    # A mount whose process hangs would hang us as well.
    thread = threading.Thread(target=probe, name="statvfs", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers in ([errno.ENOTCONN], [errno.ECONNABORTED])


def find_holders(directory: bytes) -> list[Holder]:
    """The processes that have a file of this mount open or mapped, or work in it, as far as we may see."""
    return [Holder(pid, _command(pid)) for pid in _pids() if _is_holder(pid, directory)]


def find_watchers(directory: bytes) -> list[int]:
    """The pids of the programs of libfuse that unmount a directory when the process that serves it ends."""
    return [pid for pid in _pids() if _is_watcher(pid, directory)]


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def _is_watcher(pid: int, directory: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = file.read().split(b"\0")
    except OSError:
        return False
    return os.path.basename(arguments[0]) == UNMOUNT_PROGRAM.encode() and directory in arguments


def _is_holder(pid: int, directory: bytes) -> bool:
    below = directory.rstrip(b"/") + b"/"
    return any(path == directory or path.startswith(below) for path in _used_paths(pid))


def _used_paths(pid: int) -> Iterator[bytes]:
    base = b"/proc/%d/" % pid
    yield from _read_links([base + b"cwd", base + b"root", base + b"exe"])
    try:
        yield from _read_links(base + b"fd/" + name for name in os.listdir(base + b"fd"))
        with open(base + b"maps", "rb") as maps:
            for line in maps:
                fields = line.rstrip(b"\n").split(None, 5)
                if len(fields) == 6:
                    # Here the kernel escapes nothing but newlines.
                    yield fields[5].replace(b"\\012", b"\n")
    except OSError:
        # Another user's process, or gone by now.
        return


def _read_links(links: Iterable[bytes]) -> Iterator[bytes]:
    for link in links:
        try:
            yield os.readlink(link)
        except OSError:
            continue


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"


def _unescape(text: bytes) -> bytes:
    return _OCTAL.sub(lambda match: bytes([int(match.group(1), 8)]), text)
