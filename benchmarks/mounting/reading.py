"""How files are read: in order, mapped, at random, and all of them by programs that everybody knows.

Everything is read into memory that begins at a page and is there already, so that only the mount differs.
"""

import mmap
import os
import random
import subprocess
import sys
import time
from pathlib import Path

_BLOCK = 1 << 20
_PAGE = 4096
#: Between two looks at the clock.
_READS_A_LOOK = 64

_buffer = mmap.mmap(-1, _BLOCK)
_buffer.write(bytes(_BLOCK))


def read_in_order(path: Path, limit_bytes: int | None = None) -> float:
    """Bytes a second of `read`, 1 MiB at a time; at most so many bytes."""
    wanted = path.stat().st_size if limit_bytes is None else limit_bytes
    left = wanted
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while left > 0 and (got := file.readinto(_buffer)):
            left -= got
    elapsed = time.perf_counter() - begin
    if left > 0:
        sys.exit(f"error: {path} has ended {left} bytes too early")
    return wanted / elapsed


def read_mapped(path: Path, limit_s: float) -> float:
    """Bytes a second of copying the file out of a mapping, in order; for at most `limit_s`."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        done = 0
        begin = time.perf_counter()
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            target = memoryview(_buffer)
            while done < size and time.perf_counter() - begin < limit_s:
                with view[done : done + _BLOCK] as piece:
                    target[: len(piece)] = piece
                    done += len(piece)
            return done / (time.perf_counter() - begin)


def read_at_random(path: Path, limit_s: float) -> float:
    """Reads a second of 4 KiB at offsets that nobody can guess, each only once; for at most `limit_s`.

    The same offsets in the same order for everybody.
    """
    pages = path.stat().st_size // _PAGE
    offsets = [page * _PAGE for page in random.Random(pages).sample(range(pages), pages)]
    target = [memoryview(_buffer)[:_PAGE]]
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    done = 0
    begin = time.perf_counter()
    try:
        while done < pages and time.perf_counter() - begin < limit_s:
            for offset in offsets[done : done + _READS_A_LOOK]:
                os.preadv(descriptor, target, offset)
            done = min(pages, done + _READS_A_LOOK)
        return done / (time.perf_counter() - begin)
    finally:
        os.close(descriptor)


def find(directory: Path, files: int) -> float:
    """Seconds of `find -printf %s`, which must see so many files."""
    begin = time.perf_counter()
    ran = subprocess.run(["find", directory, "-printf", "%y%s\n"], capture_output=True, check=True)
    elapsed = time.perf_counter() - begin
    if (found := ran.stdout.count(b"f")) != files:
        sys.exit(f"error: {found} files in {directory}, {files} were saved")
    return elapsed


def tar(directory: Path) -> float:
    """Seconds until `tar` has read everything; it would not read for /dev/null itself."""
    begin = time.perf_counter()
    with subprocess.Popen(["tar", "-C", directory, "-cf", "-", "."], stdout=subprocess.PIPE) as packing:
        output = packing.stdout
        assert output is not None, "a pipe was asked for"
        while output.readinto(_buffer):  # type: ignore[attr-defined]
            pass
    if packing.returncode:
        sys.exit(f"error: tar of {directory} has exited with status {packing.returncode}")
    return time.perf_counter() - begin
