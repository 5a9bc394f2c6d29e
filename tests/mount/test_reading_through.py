"""A program of its own reads files through a mount."""

import errno
import os

import pytest

from replicated.mount.reading.through import read_through


class Ended(Exception):
    pass


def test_ranges_are_read_to_their_ends(tmp_path):
    (tmp_path / "f").write_bytes(bytes(3_000_000))
    (tmp_path / "g\n").write_bytes(b"")
    read_through(os.fsencode(tmp_path), [(b"f", 0, 3_000_000), (b"f", 5, 10), (b"g\n", 0, 0)], lambda: None)


def test_what_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "short").write_bytes(b"123")
    os.symlink("short", tmp_path / "link")
    for path, number in ((b"absent", errno.ENOENT), (b"link", errno.ELOOP), (b"short", errno.EIO)):
        with pytest.raises(OSError) as raised:
            read_through(os.fsencode(tmp_path), [(path, 0, 4)], lambda: None)
        assert raised.value.errno == number


def test_it_ends_when_it_is_not_wanted_any_more(tmp_path):
    os.mkfifo(tmp_path / "waits")
    asked = []

    def check():
        asked.append(None)
        if len(asked) == 2:
            raise Ended

    with pytest.raises(Ended):
        read_through(os.fsencode(tmp_path), [(b"waits", 0, 1)], check)
