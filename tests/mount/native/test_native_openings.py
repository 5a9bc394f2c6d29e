"""Open files that are passed through, with this test as the kernel: others do things at the worst moments."""

import errno
import os
import random
import threading

import blake3
import pytest

from replicated.cache import ContentCache
from replicated.cache.plain import PlainFile
from replicated.mount.engine.native.openings import MIN_PASSED_BYTES, Openings
from replicated.mount.errors import Refused
from replicated.mount.filesystem import Filesystem
from replicated.mount.reading.open_files import OpenFiles

CONTENT = random.Random(7).randbytes(MIN_PASSED_BYTES)
PATIENCE_S = 20


class Kernel:
    """What is registered with it, and what it was told to take away; calls back before it does so."""

    def __init__(self):
        self.registered = {}
        self.spoiled = []
        self.on_register = self.on_spoil = lambda: None
        self._last = 0

    def register(self, descriptor):
        self._last += 1
        backing_id = self._last
        self.registered[backing_id] = descriptor
        self.on_register()
        return backing_id

    def unregister(self, backing_id):
        del self.registered[backing_id]

    def spoil(self, inode, generation):
        self.spoiled.append((inode, generation))
        self.on_spoil()
        return True


class Mounted:
    """One file of a cache, and its openings."""

    def __init__(self, tree, cache):
        self.filesystem = Filesystem(tree, files=OpenFiles(tree, cache=cache))
        self.inode = self.filesystem.lookup(1, b"f").inode
        self.kernel = Kernel()
        self.generations = {}
        self.openings = Openings(self.filesystem, self.kernel, self.generations)

    def open(self):
        return self.openings.open(self.inode)

    def watch(self):
        """Look once, and wait for what comes of it."""
        self.openings.watch()
        join_condemning()


def join_condemning():
    for thread in threading.enumerate():
        if thread.name == "condemn":
            thread.join(PATIENCE_S)


def descriptors():
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def mounted(tmp_path, memory_tree):
    cache = ContentCache(tmp_path / "content", 1 << 30)
    assert cache.build_plain(blake3.blake3(CONTENT).digest(), len(CONTENT), [CONTENT])
    mounted = Mounted(memory_tree({b"f": CONTENT}), cache)
    # Whatever is opened on first use is open now, and what leases tell nobody is the end of nobody.
    handle, backing_id = mounted.open()
    assert backing_id, "leases are not to be had here"
    mounted.openings.release(handle)
    yield mounted
    join_condemning()
    cache.close()


def test_what_is_closed_while_it_is_looked_at_is_not_taken_away(mounted, monkeypatch):
    before = descriptors()
    handle, _ = mounted.open()
    is_broken = PlainFile.is_broken

    def close_first(plain):
        mounted.openings.release(handle)
        return is_broken(plain)

    monkeypatch.setattr(PlainFile, "is_broken", close_first)
    mounted.watch()
    assert (mounted.kernel.spoiled, mounted.generations) == ([], {})
    assert (mounted.kernel.registered, descriptors()) == ({}, before)


def test_what_nobody_uses_any_more_is_closed_and_not_taken_away(mounted, monkeypatch):
    handle, _ = mounted.open()
    monkeypatch.setattr(PlainFile, "is_broken", lambda plain: mounted.openings.release(handle) or True)
    mounted.watch()
    assert (mounted.kernel.spoiled, mounted.generations, mounted.kernel.registered) == ([], {}, {})


def test_a_file_stays_open_until_it_is_taken_away(mounted, monkeypatch):
    before = descriptors()
    handle, backing_id = mounted.open()
    descriptor = mounted.kernel.registered[backing_id]
    file = os.fstat(descriptor)
    released = []
    monkeypatch.setattr(PlainFile, "is_broken", lambda plain: True)
    monkeypatch.setattr(PlainFile, "release_lease", lambda plain: released.append(os.fstat(plain.descriptor)))
    mounted.kernel.on_spoil = lambda: mounted.openings.release(handle)
    mounted.watch()
    assert mounted.kernel.spoiled == [(mounted.inode, 0)]
    # Never that of another file, which may have got the same number.
    assert released and {(other.st_dev, other.st_ino) for other in released} == {(file.st_dev, file.st_ino)}
    assert (mounted.kernel.registered, descriptors()) == ({}, before)


def test_who_comes_while_a_file_is_taken_away_leaves_nothing_behind(mounted, monkeypatch):
    before = descriptors()
    entered, go_on = threading.Event(), threading.Event()
    handles = []

    def wait():
        entered.set()
        assert go_on.wait(PATIENCE_S)

    def others_are_faster():
        mounted.kernel.on_register = lambda: None
        handles.append(mounted.open()[0])
        mounted.openings.watch()
        assert entered.wait(PATIENCE_S)

    monkeypatch.setattr(PlainFile, "is_broken", lambda plain: True)
    mounted.kernel.on_register, mounted.kernel.on_spoil = others_are_faster, wait
    try:
        with pytest.raises(Refused) as raised:
            mounted.open()
    finally:
        go_on.set()
    assert raised.value.errno == errno.EIO
    join_condemning()
    assert len(mounted.kernel.registered) == 1
    mounted.openings.release(*handles)
    assert (mounted.kernel.registered, descriptors()) == ({}, before)


def test_a_file_is_taken_away_later_when_there_is_no_thread_for_it(mounted, monkeypatch, caplog):
    handle, _ = mounted.open()
    monkeypatch.setattr(PlainFile, "is_broken", lambda plain: True)
    with monkeypatch.context() as patch:

        def fail(thread):
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", fail)
        mounted.watch()
    assert not mounted.openings.is_condemned(mounted.inode)
    assert "cannot be taken away yet" in caplog.text
    mounted.watch()
    assert mounted.kernel.spoiled == [(mounted.inode, 0)]
    mounted.openings.release(handle)
    assert mounted.kernel.registered == {}
