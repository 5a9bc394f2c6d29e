"""What users give as `path`: checked, and made relative to the project directory.

Used by the write side before anything is sent. Looks at the file system, reads no file and follows no link
that is itself to be saved.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def check_paths(path: object, directory: Path) -> tuple[str, ...]:
    """What users give as `path`, as paths relative to the project directory, without repetition.

    Raises `TypeError`, `FileNotFoundError`, or `ValueError` for a path outside the project and for a
    socket, pipe or device. Links are not followed: one that points nowhere exists.
    """
    if path is None:
        return ()
    given = list(path) if isinstance(path, (list, tuple)) else [path]
    return tuple(dict.fromkeys(_check_path(one, directory) for one in given))


def _check_path(path: object, directory: Path) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str, a pathlib.Path or a list of them, not {path!r}")
    text = os.fsdecode(path)
    if not text:
        raise ValueError('path must not be empty; "." is the whole project directory')
    if "\0" in text:
        raise ValueError(f"path holds a NUL character: {text!r}")
    relative = _relative(text, directory)
    if relative is None:
        raise ValueError(f"path is outside the project directory {directory}: {text!r}")
    try:
        mode = os.lstat(directory / relative).st_mode
    except (FileNotFoundError, NotADirectoryError):
        where = f"no such file or directory in the project directory {directory}"
        raise FileNotFoundError(errno.ENOENT, where, text) from None
    except OSError:
        return relative  # the daemon says what is wrong with it
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        raise ValueError(f"path is not a regular file or directory: {text!r}")
    return relative


def _relative(path: str, directory: Path) -> str | None:
    """The path relative to the project directory, also when one of them leads through links."""
    base = os.path.normpath(directory)
    absolute = os.path.normpath(os.path.join(base, path))
    real = os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))
    for inner, outer in ((absolute, base), (real, os.path.realpath(base))):
        if inner == outer:
            return "."
        if inner.startswith(outer.rstrip(os.sep) + os.sep):
            return os.path.relpath(inner, outer)
    return None
