"""Brings the files that a mount is served from into the same state for everybody: in the page cache, or not.

Only files below the given directories are touched: other work on the machine keeps its page cache, and this
need not be root. Names and attributes stay known to the kernel either way.
"""

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

_BLOCK = 1 << 20


def warm(directories: Iterable[Path]) -> None:
    """Read every file once, so that its bytes are in the page cache.

    Packs are written around it, and what is served from them would come from the disk otherwise, while what
    the others serve from was just written through it.
    """
    buffer = mmap.mmap(-1, _BLOCK)
    for descriptor in _open_all(directories):
        while os.readv(descriptor, [buffer]):
            pass


def drop(directories: Iterable[Path]) -> None:
    """Let the page cache forget every file: its bytes come from the disk again."""
    os.sync()  # what is dirty is not forgotten
    for descriptor in _open_all(directories):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _open_all(directories: Iterable[Path]) -> Iterator[int]:
    for directory in directories:
        for folder, _, names in os.walk(directory):
            for name in names:
                with suppress(FileNotFoundError):  # a temporary file of somebody who works there
                    path = os.path.join(folder, name)
                    if os.path.isfile(path) and not os.path.islink(path):
                        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                        try:
                            yield descriptor
                        finally:
                            os.close(descriptor)
