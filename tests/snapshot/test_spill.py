"""The pool of memory and its writer: everything queued is written once, or said not to be."""

import errno
import os
import threading
import time

import pytest

from replicate.errors import CaptureFailed
from replicated.snapshot import spill as spill_module
from replicated.snapshot.spill import SLAB_BYTES, Spill

DEADLINE_S = 30


@pytest.fixture
def spill():
    made = Spill(budget_bytes=3 * SLAB_BYTES)
    yield made
    made.stop()


@pytest.fixture
def gate(monkeypatch):
    """Writes wait until the gate is open."""
    opened = threading.Event()
    real_pwrite = os.pwrite

    def pwrite(*arguments):
        assert opened.wait(DEADLINE_S)
        return real_pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    yield opened
    opened.set()


def directory(tmp_path, name):
    path = tmp_path / name
    path.mkdir()
    return path


def put(spill, file, data, offset=0):
    slab = spill.take()
    slab.view[: len(data)] = data
    spill.reserve(file, offset, offset + len(data))
    spill.write(file, slab, offset, len(data))


def is_complete(path):
    return (path / "complete").exists()


def test_what_is_queued_is_written_and_then_the_spool_is_complete(spill, tmp_path, gate):
    spool = directory(tmp_path, "one")
    file = spill.create("one", spool / "packed")
    pieces = [os.urandom(SLAB_BYTES), os.urandom(1000)]
    put(spill, file, pieces[0])
    put(spill, file, pieces[1], SLAB_BYTES)
    spill.end(file, SLAB_BYTES + 900)
    spill.seal("one", spool)
    assert not is_complete(spool)
    gate.set()
    spill.finish("one")
    assert is_complete(spool)
    assert (spool / "packed").read_bytes() == pieces[0] + pieces[1][:900]


def test_a_spool_without_queued_bytes_is_complete_at_once(spill, tmp_path):
    spool = directory(tmp_path, "one")
    spill.seal("one", spool)
    assert is_complete(spool)
    spill.finish("one")
    spill.finish("unknown")


def test_who_takes_more_than_the_budget_waits_for_the_writer(spill, tmp_path, gate):
    spool = directory(tmp_path, "one")
    file = spill.create("one", spool / "packed")
    for number in range(3):
        put(spill, file, b"x", number)
    assert not spill.has_room(1)
    taken = threading.Event()
    threading.Thread(target=lambda: (spill.take(), taken.set())).start()
    assert not taken.is_set()
    gate.set()
    assert taken.wait(DEADLINE_S)
    spill.end(file, 3)


def test_captures_that_hold_all_memory_do_not_wait_for_each_other(spill):
    slabs = [spill.take() for _ in range(5)]
    assert len(set(map(id, slabs))) == 5
    for slab in slabs:
        spill.give_back(slab)
    assert spill.has_room(3 * SLAB_BYTES)
    assert not spill.has_room(3 * SLAB_BYTES + 1)


def test_a_shared_file_completes_both_spools_and_outlives_the_first(spill, tmp_path, gate):
    one, two = directory(tmp_path, "one"), directory(tmp_path, "two")
    file = spill.create("one", one / "packed")
    put(spill, file, b"content")
    spill.end(file, 7)
    spill.seal("one", one)
    assert spill.share("one", "packed", "two", two / "packed-0")
    spill.seal("two", two)
    assert not is_complete(two)
    spill.forget("one")
    gate.set()
    spill.finish("two")
    assert is_complete(two)
    assert not is_complete(one)
    assert (two / "packed-0").read_bytes() == b"content"


def test_nothing_is_shared_with_a_snapshot_that_is_gone(spill, tmp_path):
    one, two = directory(tmp_path, "one"), directory(tmp_path, "two")
    (one / "packed").touch()
    assert not spill.share("one", "packed", "two", two / "packed-0")
    spill.seal("one", one)
    assert spill.share("one", "packed", "two", two / "packed-0")
    (one / "packed").unlink()
    assert not spill.share("one", "packed", "two", two / "packed-1")
    spill.forget("one")
    assert not spill.share("one", "packed", "two", two / "packed-2")


def test_what_is_forgotten_is_not_written(spill, tmp_path, gate):
    one, two = directory(tmp_path, "one"), directory(tmp_path, "two")
    files = {}
    for name, spool in (("one", one), ("two", two)):
        files[name] = spill.create(name, spool / "packed")
        put(spill, files[name], b"content")
        spill.end(files[name], 7)
        spill.seal(name, spool)
    spill.forget("two")
    gate.set()
    spill.finish("one")
    spill.finish("two")
    spill.stop()
    assert (one / "packed").read_bytes() == b"content"
    assert not is_complete(two)
    assert files["two"].descriptor == -1


def test_a_cancelled_file_leaves_nothing(spill, tmp_path):
    spool = directory(tmp_path, "one")
    file = spill.create("one", spool / "large-0")
    put(spill, file, b"content")
    spill.cancel(file)
    spill.seal("one", spool)
    spill.finish("one")
    assert [path.name for path in spool.iterdir()] == ["complete"]


def test_a_failed_write_fails_every_snapshot_that_needs_it(spill, tmp_path, monkeypatch):
    one, two = directory(tmp_path, "one"), directory(tmp_path, "two")

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", fail)
    file = spill.create("one", one / "packed")
    assert spill.share("one", "packed", "two", two / "packed-0")
    put(spill, file, b"content")
    spill.end(file, 7)
    for name, spool in (("one", one), ("two", two)):
        spill.seal(name, spool)
        with pytest.raises(CaptureFailed, match="Input/output error"):
            spill.finish(name)
        assert not is_complete(spool)


def test_a_stop_writes_what_is_queued(tmp_path):
    spill = Spill()
    spool = directory(tmp_path, "one")
    file = spill.create("one", spool / "packed")
    put(spill, file, b"content")
    spill.end(file, 7)
    spill.seal("one", spool)
    spill.stop()
    assert is_complete(spool)
    assert (spool / "packed").read_bytes() == b"content"


def test_memory_goes_back_after_a_while_of_idleness(tmp_path, monkeypatch):
    monkeypatch.setattr(spill_module, "_IDLE_S", 0.01)
    spill = Spill()
    spool = directory(tmp_path, "one")
    file = spill.create("one", spool / "packed")
    for slab in [spill.take() for _ in range(6)]:
        spill.give_back(slab)
    put(spill, file, b"x")
    spill.end(file, 1)
    deadline = time.monotonic() + DEADLINE_S
    while spill._slab_count > 2:
        assert time.monotonic() < deadline
        os.sched_yield()
    assert len(spill._free) == 2
    spill.stop()
