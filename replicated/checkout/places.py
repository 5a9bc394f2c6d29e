"""What both halves of a checkout need: looking at names in open directories, and errors with their path.

A `parent` is the descriptor of an open directory and `name` one name in it; `full` and `path` are for
messages only, except where the output directory itself is opened.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from replicate.errors import CheckoutFailed, RepositoryDamaged, RepositoryError
from replicated.tree import Node

PERMISSION_BITS = 0o777
#: Pieces in which files are read: big enough for the store, small enough for memory.
PIECE_BYTES = 4 << 20
#: For a directory that must not be reached through a link.
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: For a file that must not be reached through a link, and may turn out to be a pipe.
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_HINTS = {
    errno.ENOSPC: "free some space, then check out again",
    errno.EDQUOT: "free some of your quota, then check out again",
    errno.EACCES: "choose a directory that you can write to",
    errno.EPERM: "choose a directory that belongs to you",
    errno.EROFS: "choose a directory that you can write to",
}


def has_attributes(node: Node, found: os.stat_result) -> bool:
    """Whether what was found has the mode and time of `node`."""
    if found.st_mtime_ns != node.mtime_ns:
        return False
    # The mode of a link means nothing, and cannot be set.
    return node.type == "symlink" or stat.S_IMODE(found.st_mode) == node.mode & PERMISSION_BITS


def lstat(parent: int | None, name: bytes, full: bytes) -> os.stat_result | None:
    """What lies under a name, not following a link; None when nothing does."""
    if parent is None:
        return None
    with naming(full, "look at"):
        try:
            return os.lstat(name, dir_fd=parent)
        except FileNotFoundError:
            return None


def open_directory(parent: int, name: bytes, full: bytes) -> int:
    """A descriptor of the directory of that name, for the caller to close; a link is an error."""
    with naming(full, "open"):
        return os.open(name, OPEN_DIRECTORY, dir_fd=parent)


def check_name(name: bytes, parent: bytes) -> None:
    """Refuse a name that would lead elsewhere; whoever wrote the repository may mean harm."""
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise RepositoryDamaged(f"impossible file name in the snapshot below {show(parent)!r}: {name!r}")


@contextmanager
def naming(path: bytes, doing: str = "write") -> Iterator[None]:
    """What goes wrong inside is told with the path that it happened to."""
    try:
        yield
    except OSError as error:
        raise CheckoutFailed(
            f"cannot {doing} {show(path)}: {error.strerror or error}",
            hint=_HINTS.get(error.errno or 0, ""),
        ) from error
    except RepositoryError as error:
        raise type(error)(
            f"cannot check out {show(path)}: {error.message}", hint=error.hint, fields=error.fields
        ) from error


def join(base: bytes, name: bytes) -> bytes:
    """A path below another; an empty one is the directory itself."""
    return base + b"/" + name if base and name else base or name


def show(path: bytes) -> str:
    """A path for a message."""
    return os.fsdecode(path)
