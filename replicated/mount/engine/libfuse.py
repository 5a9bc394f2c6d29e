"""What engines need of the machine: /dev/fuse, a program that mounts for users, a library; how to get them.

Nothing of FUSE is loaded here, but by the questions whether a library can be.
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
#: The same of libfuse 2; where libfuse 3 is there, often a link to the other.
OLD_UNMOUNT_PROGRAM = "fusermount"
#: Newest first; version 3.17 changed the number.
_LIBRARIES = ("libfuse3.so.4", "libfuse3.so.3")
OLD_LIBRARY = "libfuse.so.2"
#: To be filled in with the name of a package of Debian.
INSTALL_HINT = "install Debian's package {0} (apt install {0}), or use `replicate checkout` instead"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: whether it is right, what was found, how to mend it."""

    ok: bool
    detail: str
    hint: str = ""


def check_device() -> Finding:
    """Whether this user can open the device of FUSE."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Finding(
            False,
            f"{DEVICE} is missing",
            "load the kernel module (modprobe fuse); in a container, start it with "
            "--device /dev/fuse --cap-add SYS_ADMIN; or use `replicate checkout` instead",
        )
    except OSError as error:
        return Finding(
            False,
            f"{DEVICE} cannot be opened: {error.strerror}",
            f"let this user open it (chmod 666 {DEVICE}), or use `replicate checkout` instead",
        )
    return Finding(True, DEVICE)


def check_program(program: str = UNMOUNT_PROGRAM) -> Finding:
    """Whether the program is there that mounts for others than root, and unmounts what was killed."""
    found = shutil.which(program)
    if found is None:
        return Finding(False, f"{program} is not in the PATH", INSTALL_HINT.format("fuse3"))
    return Finding(True, found)


def find_library() -> str | None:
    """The name under which libfuse 3 can be loaded here."""
    return next(filter(_can_be_loaded, _LIBRARIES), None)


def find_old_library() -> str | None:
    """The name under which libfuse 2 can be loaded here."""
    return OLD_LIBRARY if _can_be_loaded(OLD_LIBRARY) else None


def choose_library() -> None:
    """Make a later `import mfusepy` load libfuse 3, which it does not where libfuse 2 is there too."""
    if "FUSE_LIBRARY_PATH" not in os.environ:
        found = find_library()
        # By path the library is loaded at once; by name, ldconfig or a compiler is run to find it.
        os.environ["FUSE_LIBRARY_PATH" if found else "FUSE_LIBRARY_NAME"] = found or "fuse3"


def _can_be_loaded(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
