"""Large objects are written around the page cache, where that is possible, and are the same everywhere."""

import errno
import fcntl
import itertools
import mmap
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from replicate.errors import RepositoryFull
from replicated.store.local import DIRECT_ALIGNMENT, MIN_DIRECT_BYTES, LocalStore


@pytest.fixture
def directory(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def aligned(data: bytes) -> memoryview:
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memoryview(memory)


LARGE = random.Random(1).randbytes(MIN_DIRECT_BYTES + 3 * DIRECT_ALIGNMENT + 17)


@pytest.mark.parametrize("rest", [[], [b"records", b"footer"]])
@pytest.mark.parametrize("shift", [0, 1])
def test_large_objects_are_whole_wherever_they_were_in_memory(
    directory: LocalStore, rest: list[bytes], shift: int
) -> None:
    large = aligned(b"x" * shift + LARGE)[shift:]
    directory.put("packs/large", [large, *rest])
    assert directory.get("packs/large") == LARGE + b"".join(rest)


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    output = subprocess.run(["fincore", "-b", "-n", "-o", "RES", path], capture_output=True, check=True)
    return int(output.stdout)


@pytest.mark.skipif(shutil.which("fincore") is None, reason="fincore is not installed")
def test_large_objects_leave_the_page_cache_to_others(directory: LocalStore, tmp_path: Path) -> None:
    if not writes_directly(tmp_path):
        pytest.skip("this file system writes nothing directly")
    directory.put("packs/large", [aligned(LARGE), b"records"])
    path = Path(directory.url.removeprefix("file://"), "packs/large")
    assert cached_bytes(path) < len(LARGE) / 10


def writes_directly(directory: Path) -> bool:
    try:
        descriptor = os.open(directory / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    except OSError:
        return False
    try:
        os.write(descriptor, aligned(bytes(4096)))
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return cached_bytes(directory / "probe") == 0


@pytest.mark.parametrize("at", [0, 1])
def test_file_system_that_writes_nothing_directly_gets_everything_the_usual_way(
    directory: LocalStore, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    write, calls = os.write, itertools.count()

    def refuse(descriptor: int, data: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            if next(calls) >= at:
                raise OSError(errno.EINVAL, "Invalid argument")
            data = data[: 2 * DIRECT_ALIGNMENT]
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", refuse)
    directory.put("packs/large", [aligned(LARGE), b"records"])
    assert next(calls) > at, "it was tried"
    assert directory.get("packs/large") == LARGE + b"records"


def test_disk_that_is_full_of_a_large_object_is_told(
    directory: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(RepositoryFull):
        directory.put("packs/large", [aligned(LARGE)])
    assert not directory.exists("packs/large")
