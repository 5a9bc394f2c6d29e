"""What mounting needs of the machine: /dev/fuse, fusermount3 and libfuse 3, and how to get them.

Imported before anything of FUSE is loaded, by the daemon as well as by mount processes.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from dataclasses import dataclass

#: What mountinfo shows as the type of our mounts: `fuse.` and the subtype that an engine asks for.
SUBTYPE = "replicate"
FILESYSTEM_TYPE = b"fuse." + SUBTYPE.encode()

DEVICE = "/dev/fuse"
UNMOUNT_PROGRAM = "fusermount3"
#: Newest first; version 3.17 changed the number.
_LIBRARIES = ("libfuse3.so.4", "libfuse3.so.3")
_INSTALL = "install Debian's package fuse3 (apt install fuse3), or use `replicate checkout` instead"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: what was looked at, whether it is right, what was found, how to mend it."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


def check_fuse() -> list[Finding]:
    """Whether this user can mount here, one finding for each thing that is needed."""
    return [_check_device(), _check_program(), _check_library()]


def find_library() -> str | None:
    """The name under which libfuse 3 can be loaded here."""
    for name in _LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None


def choose_library() -> None:
    """Make a later `import mfusepy` load libfuse 3, which it does not where libfuse 2 is there too."""
    if "FUSE_LIBRARY_PATH" not in os.environ:
        found = find_library()
        # By path the library is loaded at once; by name, ldconfig or a compiler is run to find it.
        os.environ["FUSE_LIBRARY_PATH" if found else "FUSE_LIBRARY_NAME"] = found or "fuse3"


def _check_device() -> Finding:
    name = "FUSE device"
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Finding(
            name,
            False,
            f"{DEVICE} is missing",
            "load the kernel module (modprobe fuse); in a container, start it with "
            "--device /dev/fuse --cap-add SYS_ADMIN; or use `replicate checkout` instead",
        )
    except OSError as error:
        return Finding(
            name,
            False,
            f"{DEVICE} cannot be opened: {error.strerror}",
            f"let this user open it (chmod 666 {DEVICE}), or use `replicate checkout` instead",
        )
    return Finding(name, True, DEVICE)


def _check_program() -> Finding:
    found = shutil.which(UNMOUNT_PROGRAM)
    if found is None:
        return Finding(UNMOUNT_PROGRAM, False, f"{UNMOUNT_PROGRAM} is not in the PATH", _INSTALL)
    return Finding(UNMOUNT_PROGRAM, True, found)


def _check_library() -> Finding:
    found = find_library()
    if found is None:
        return Finding("libfuse 3", False, "libfuse 3 cannot be loaded", _INSTALL)
    return Finding("libfuse 3", True, found)
