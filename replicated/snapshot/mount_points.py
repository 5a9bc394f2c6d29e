"""What is mounted where, as this process sees it, and whether that has changed since it was looked at.

Used by `watch`: no watch in a directory tells that something was mounted over it.
"""

from __future__ import annotations

import re
import select
from typing import Final

_TABLE: Final = "/proc/self/mountinfo"
_OCTAL = re.compile(rb"\\([0-7]{3})")


class MountPoints:
    """The mounts of this mount namespace. Not for several threads at once; raises `OSError` without /proc."""

    def __init__(self) -> None:
        self._file = open(_TABLE, "rb", buffering=0)  # noqa: SIM115 - until `close`
        self._changes = select.poll()
        self._changes.register(self._file.fileno(), select.POLLPRI)
        #: What is mounted, by path.
        self._mounts: dict[bytes, bytes] = {}
        self._version = 0
        self._read()

    def close(self) -> None:
        """Close the table."""
        self._file.close()

    def refresh(self) -> int:
        """Look whether anything was mounted or unmounted; a number that changes when it was."""
        if self._changes.poll(0):
            self._read()
        return self._version

    def below(self, path: bytes) -> dict[bytes, bytes]:
        """What was mounted below this directory at the last refresh."""
        prefix = path.rstrip(b"/") + b"/"
        return {point: what for point, what in self._mounts.items() if point.startswith(prefix)}

    def _read(self) -> None:
        self._version += 1
        self._mounts = {}
        self._file.seek(0)
        for line in self._file.readall().splitlines():
            # Id, parent, device, root, mount point: proc_pid_mountinfo(5).
            identity, _, device, root, point, _ = line.split(b" ", 5)
            point = _OCTAL.sub(lambda match: bytes([int(match.group(1), 8)]), point)
            what = b" ".join((identity, device, root))
            self._mounts[point] = self._mounts.get(point, b"") + what + b"\n"
