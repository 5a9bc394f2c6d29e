"""Whole files that the cache has are taken from there, and are as right as all others."""

import os
import random

import pytest
from blake3 import blake3

from replicate.errors import RepositoryDamaged
from replicated.cache import ContentCache, PlainFile
from replicated.checkout.reading import ReadAhead

BIG = random.Random(1).randbytes(5_000_000)
SMALL = b"small"


@pytest.fixture
def cache(tmp_path):
    opened = ContentCache(tmp_path / "content", 100 << 20)
    assert opened.build_plain(blake3(BIG).digest(), len(BIG), [BIG])
    yield opened
    opened.close()


class Refusing:
    """The reader of a file that may be asked for its end only, or not at all."""

    def __init__(self, start=None):
        self.start = start

    def pread(self, offset, length):
        assert self.start is not None and offset >= self.start, "the repository is asked in vain"
        return BIG[offset : offset + length]


@pytest.fixture
def tree(memory_tree):
    return memory_tree({b"a": SMALL, b"big": BIG})


def read(tree, cache):
    files = [node for _, node in tree.walk()]
    with ReadAhead(tree, files, cache) as ahead:
        return {file.name: b"".join(ahead.parts(file)) for file in files}


def test_whole_file_in_the_cache_is_not_fetched(tree, cache):
    tree.readers[b"big"] = Refusing()
    assert read(tree, cache) == {b"a": SMALL, b"big": BIG}


def test_file_that_the_cache_has_not_is_fetched(tree, tmp_path):
    empty = ContentCache(tmp_path / "empty", 100 << 20)
    assert read(tree, empty) == {b"a": SMALL, b"big": BIG}
    empty.close()


def test_file_of_the_cache_with_other_bytes_is_fetched(tree, cache, monkeypatch):
    """As a disk may hand them over, without anybody having changed the file."""
    whole = PlainFile.read_into

    def flip(self, buffer, offset):
        length = whole(self, buffer, offset)
        buffer[0] ^= 1
        return length

    monkeypatch.setattr(PlainFile, "read_into", flip)
    assert read(tree, cache) == {b"a": SMALL, b"big": BIG}


def test_rest_of_a_file_that_is_changed_meanwhile_is_fetched(tree, cache, tmp_path, monkeypatch):
    (path,) = [path for path in (tmp_path / "content").glob("*/*") if path.stat().st_size == len(BIG)]
    whole, calls = PlainFile.read_into, []

    def change(self, buffer, offset):
        calls.append(offset)
        # It was hashed before.
        if calls.count(2 << 20) == 2:
            path.chmod(0o644)
            os.truncate(path, 1000)
        return whole(self, buffer, offset)

    monkeypatch.setattr(PlainFile, "read_into", change)
    tree.readers[b"big"] = Refusing(2 << 20)
    assert read(tree, cache) == {b"a": SMALL, b"big": BIG}


def test_file_of_the_cache_that_goes_wrong_in_the_end_is_no_file(tree, cache, monkeypatch):
    whole, calls = PlainFile.read_into, []

    def flip(self, buffer, offset):
        length = whole(self, buffer, offset)
        calls.append(offset)
        if calls.count(offset) == 2:
            buffer[0] ^= 1
        return length

    monkeypatch.setattr(PlainFile, "read_into", flip)
    with pytest.raises(RepositoryDamaged):
        read(tree, cache)
