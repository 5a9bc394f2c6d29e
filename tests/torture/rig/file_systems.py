"""File systems to torture on: each in an image of its own, mounted as long as a `with` block lasts.

Needs root, loop devices and the mkfs of each; what is missing is an `Unavailable` that says so. The loop
device is made by mount(8) and goes with the mount: unmounting is all there is to clean up.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("ext4", "xfs", "btrfs", "tmpfs")
CAN_REFLINK = {"xfs", "btrfs"}
#: Sparse: an image takes what is written to it.
IMAGE_BYTES = 8 << 30


class Unavailable(Exception):
    """This file system cannot be had here, and why."""


@contextmanager
def mounted(name: str, size_bytes: int = IMAGE_BYTES) -> Iterator[Path]:
    """A new, empty file system of a kind, and where it is mounted; raises `Unavailable`."""
    if os.getuid() != 0:
        raise Unavailable(f"needs root to mount {name}")
    # Short: the path of a socket holds 107 bytes.
    with tempfile.TemporaryDirectory(prefix="rpl-") as place:
        directory = Path(place, "fs")
        directory.mkdir()
        if name == "tmpfs":
            _run("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", directory)
        else:
            image = Path(place, "image")
            with image.open("wb") as file:
                file.truncate(size_bytes)
            _run(f"mkfs.{name}", "-q", image)
            _run("mount", "-t", name, "-o", "loop", image, directory)
        try:
            yield directory
        finally:
            if subprocess.run(["umount", directory], check=False).returncode != 0:
                subprocess.run(["umount", "--lazy", directory], check=True)


def _run(*command: str | Path) -> None:
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    program = shutil.which(str(command[0]), path=path)
    if program is None:
        raise Unavailable(f"{command[0]} is missing (of e2fsprogs, xfsprogs or btrfs-progs)")
    done = subprocess.run([program, *command[1:]], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
