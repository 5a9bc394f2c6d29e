"""A cache, contents to keep in it, and what it takes of the disk."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from replicated.cache import ContentCache

#: Enough for the database and some files.
LIMIT_BYTES = 8 << 20

Contents = Callable[..., dict[bytes, bytes]]


def make_contents(count: int, size: int = 64 << 10, seed: int = 0) -> dict[bytes, bytes]:
    source = random.Random(f"{seed} {size}")
    made = [source.randbytes(size) for _ in range(count)]
    return {blake3(content).digest(): content for content in made}


def disk_bytes(directory: Path) -> int:
    """What all files below a directory take of the disk, or would if they were written back."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                info = os.lstat(os.path.join(parent, name))
            except FileNotFoundError:
                continue
            # What is written but has no blocks yet counts as well; holes do not.
            total += info.st_blocks * 512 if info.st_blocks else info.st_size
        total += 4096
    return total


@pytest.fixture
def contents() -> Contents:
    return make_contents


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "content"


@pytest.fixture
def cache(directory: Path) -> Iterator[ContentCache]:
    opened = ContentCache(directory, LIMIT_BYTES)
    yield opened
    opened.close()


@pytest.fixture
def reopen(directory: Path) -> Iterator[Callable[..., ContentCache]]:
    opened: list[ContentCache] = []

    def open_again(limit_bytes: int = LIMIT_BYTES) -> ContentCache:
        opened.append(ContentCache(directory, limit_bytes))
        return opened[-1]

    yield open_again
    for cache in opened:
        cache.close()


@pytest.fixture
def taken() -> Callable[[Path], int]:
    return disk_bytes
