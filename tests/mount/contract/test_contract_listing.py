"""Directories, and links."""

import ctypes
import errno
import os
import stat
import threading

import pytest

proves = pytest.mark.proves

_libc = ctypes.CDLL(None, use_errno=True)


class _Entry(ctypes.Structure):
    """`struct dirent64`."""

    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


_libc.opendir.argtypes = (ctypes.c_char_p,)
_libc.opendir.restype = ctypes.c_void_p
_libc.readdir64.argtypes = (ctypes.c_void_p,)
_libc.readdir64.restype = ctypes.POINTER(_Entry)
_libc.telldir.argtypes = (ctypes.c_void_p,)
_libc.telldir.restype = ctypes.c_long
_libc.seekdir.argtypes = (ctypes.c_void_p, ctypes.c_long)
_libc.rewinddir.argtypes = (ctypes.c_void_p,)
_libc.closedir.argtypes = (ctypes.c_void_p,)


class Directory:
    """A directory as C programs read it: with its dots and its positions."""

    def __init__(self, path):
        self._stream = _libc.opendir(os.fsencode(path))
        assert self._stream

    def __iter__(self):
        """Name, type and position after it."""
        ctypes.set_errno(0)
        while entry := _libc.readdir64(self._stream):
            yield entry.contents.d_name, entry.contents.d_type, _libc.telldir(self._stream)
        assert ctypes.get_errno() == 0

    def seek(self, position):
        _libc.seekdir(self._stream, position)

    def rewind(self):
        _libc.rewinddir(self._stream)

    def close(self):
        _libc.closedir(self._stream)


def names(directory):
    return [name for name, _, _ in directory]


@proves("S-20")
def test_dots_come_first_and_names_in_the_order_of_their_bytes(shown_by, stored):
    directory = Directory(shown_by.directory)
    found = names(directory)
    directory.close()
    tree = stored[-1]
    assert found == [b".", b"..", *sorted(tree.children(tree.root))]


@proves("S-20")
def test_entries_tell_their_type(shown_by):
    for name, kind in (("sub", stat.S_IFDIR), ("links", stat.S_IFDIR), ("void", stat.S_IFDIR)):
        directory = Directory(shown_by.directory / name)
        types = {name: kind << 12 for name, kind, _ in directory}
        directory.close()
        assert types.pop(b".") == types.pop(b"..") == kind
        for entry, found in types.items():
            path = os.path.join(os.fsencode(shown_by.directory / name), entry)
            assert found == stat.S_IFMT(os.lstat(path).st_mode)


@proves("S-21")
@pytest.mark.parametrize("name", ["many", "wide"])
def test_a_listing_can_be_continued_from_every_position(shown_by, name):
    directory = Directory(shown_by.directory / name)
    whole = list(directory)
    for index in range(0, len(whole), len(whole) // 25):
        directory.seek(whole[index][2])
        assert names(directory) == [name for name, _, _ in whole[index + 1 :]]
    directory.rewind()
    assert list(directory) == whole
    directory.close()


@proves("S-22")
@pytest.mark.parametrize(("name", "count"), [("many", 3000), ("wide", 300)])
def test_a_big_directory_is_listed_whole_by_many_at_once(shown_by, name, count):
    expected = sorted(os.fsencode(entry) for entry in os.listdir(shown_by.directory / name))
    assert len(expected) == count
    found = []

    def look():
        directory = Directory(shown_by.directory / name)
        found.append(names(directory))
        directory.close()

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[b".", b"..", *expected]] * 8


@proves("S-3")
def test_an_empty_directory_is_empty(shown_by):
    assert os.listdir(shown_by.directory / "void") == []


@proves("S-23")
def test_links_lead_where_they_led(shown_by):
    links = shown_by.directory / "links"
    assert os.readlink(links / "absolute") == "/etc/hostname"
    assert os.readlink(links / "long") == "x" * 4095
    assert (links / "inside").read_bytes() == b"1"
    assert (links / "directory/needle.txt").read_bytes() == b"a needle in a haystack\n"
    assert os.path.realpath(links / "directory") == os.path.realpath(shown_by.directory / "sub")
    with pytest.raises(FileNotFoundError):
        (links / "dangling").read_bytes()
    with pytest.raises(OSError) as raised:
        (links / "loop").read_bytes()
    assert raised.value.errno == errno.ELOOP


@proves("S-24")
def test_what_is_absent_stays_absent(shown_by):
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            os.stat(shown_by.directory / "absent")
        with pytest.raises(FileNotFoundError):
            os.stat(shown_by.directory / "void/absent")
        with pytest.raises(NotADirectoryError):
            os.stat(shown_by.directory / "big/below")
