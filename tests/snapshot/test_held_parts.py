"""What held files are made of: queues, slots, duplicating, and the kernel's leases."""

import errno
import math
import os
import queue
import subprocess
import sys
import threading
import time

import pytest

from replicated.snapshot import duplicate, leases
from replicated.snapshot.held_queues import Delayed, SmallestFirst
from replicated.snapshot.slots import SLOT_COUNT, Slots

DEADLINE_S = 60


def in_thread(function):
    """Run a function in a thread; calling the result waits for what it returns."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()

    def result():
        thread.join(DEADLINE_S)
        return results[0]

    return result


def test_the_smallest_is_taken_first_and_equals_in_their_order():
    items = SmallestFirst()
    for size, item in ((3, "c"), (1, "a"), (2, "b"), (1, "a2")):
        items.put(size, item)
    assert [items.take() for _ in range(4)] == ["a", "a2", "b", "c"]


def test_what_is_too_large_for_one_thread_is_taken_by_another():
    items = SmallestFirst()
    small = in_thread(lambda: items.take(10))
    # Each round, the thread with the limit is among those that could be woken.
    for _ in range(50):
        large = in_thread(items.take)
        items.put(11, "large")
        assert large() == "large"
    items.put(10, "small")
    assert small() == "small"


def test_a_closed_queue_gives_what_is_in_it_and_then_nothing():
    items = SmallestFirst()
    waiting = in_thread(lambda: items.take(0))
    items.put(1, "item")
    items.close()
    assert waiting() is None
    assert items.take() == "item"
    assert items.take() is None


def test_nothing_is_taken_before_its_time():
    items = Delayed(0.05)
    began = time.monotonic()
    items.put("first")
    items.put("second")
    assert [items.take(), items.take()] == ["first", "second"]
    assert time.monotonic() - began >= 0.05


def test_closing_ends_a_wait_for_the_time():
    items = Delayed(3600)
    items.put("never")
    waiting = in_thread(items.take)
    items.close()
    assert waiting() is None


def test_a_slot_is_used_again_as_late_as_possible_and_then_with_its_byte_0():
    slots = Slots(3)
    first = slots.take()
    slots.flag(first)
    assert os.pread(slots.descriptor, 1, first) == b"\1"
    slots.give_back(first)
    others = [slots.take(), slots.take()]
    assert first not in others
    assert os.pread(slots.descriptor, 1, first) == b"\1"
    assert slots.take() == first
    assert os.pread(slots.descriptor, 1, first) == b"\0"
    assert slots.take() is None
    slots.close()


def test_there_is_a_byte_for_every_slot():
    slots = Slots(SLOT_COUNT + 10)
    assert os.fstat(slots.descriptor).st_size == SLOT_COUNT
    assert [slots.take() for _ in range(SLOT_COUNT)] == list(range(SLOT_COUNT))
    assert slots.take() is None
    slots.close()


@pytest.fixture
def source_and_destination(tmp_path):
    (tmp_path / "source").write_bytes(os.urandom(300_000))
    source = os.open(tmp_path / "source", os.O_RDWR)
    destination = os.open(tmp_path / "destination", os.O_RDWR | os.O_CREAT)
    yield source, destination
    os.close(source)
    os.close(destination)


def nothing():
    pass


def test_a_duplicate_is_equal_and_of_the_size_that_was_asked_for(source_and_destination):
    source, destination = source_and_destination
    duplicate.copy(source, destination, 200_001, nothing)
    assert os.fstat(destination).st_size == 200_001
    assert os.pread(destination, 300_000, 0) == os.pread(source, 200_001, 0)


def test_holes_and_data_in_turn_are_duplicated(source_and_destination):
    source, destination = source_and_destination
    for block in range(0, 64, 2):
        os.pwrite(source, b"data", block << 20)
    os.ftruncate(source, 64 << 20)
    duplicate.copy(source, destination, 64 << 20, nothing)
    assert os.pread(destination, 64 << 20, 0) == os.pread(source, 64 << 20, 0)
    assert os.fstat(destination).st_blocks * 512 < 4 << 20


def test_duplicating_asks_between_steps_whether_to_go_on(source_and_destination, monkeypatch):
    monkeypatch.setattr(duplicate, "_STEP_BYTES", 4096)
    source, destination = source_and_destination
    asked = []

    def go_on():
        asked.append(True)
        if len(asked) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        duplicate.copy(source, destination, 300_000, go_on)
    assert os.pread(destination, 8192, 0) == os.pread(source, 8192, 0)
    assert not os.pread(destination, 300_000, 8192).strip(b"\0")


def test_a_source_that_became_shorter_is_an_error(source_and_destination, monkeypatch):
    monkeypatch.setattr(duplicate, "_STEP_BYTES", 4096)
    source, destination = source_and_destination
    with pytest.raises(OSError, match="shorter"):
        duplicate.copy(source, destination, 300_000, lambda: os.ftruncate(source, 4096))


def test_what_the_kernel_will_not_copy_within_itself_is_copied_all_the_same(source_and_destination):
    _, destination = source_and_destination
    source = os.memfd_create("source")
    content = os.urandom(100_000)
    os.write(source, content)
    duplicate.copy(source, destination, len(content), nothing)
    os.close(source)
    assert os.pread(destination, 200_000, 0) == content


def test_a_destination_without_room_is_told_at_once(source_and_destination, monkeypatch):
    source, destination = source_and_destination
    info = os.fstatvfs(destination)
    full = os.statvfs_result((*info[:3], 0, 0, *info[5:]))
    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: full)
    with pytest.raises(OSError, match="No space") as failure:
        duplicate.copy(source, destination, 300_000, nothing)
    assert failure.value.errno == errno.ENOSPC
    assert os.fstat(destination).st_size == 0


def start_writer(path):
    return subprocess.Popen([sys.executable, "-S", "-c", "import sys; open(sys.argv[1], 'r+b')", path])


@pytest.fixture
def hearing():
    """A waiter in a thread of its own, and the queue of what it hears."""
    heard = queue.Queue()
    done = threading.Event()

    def hear():
        waiter = leases.BreakWaiter()
        heard.put(waiter)
        while not done.is_set():
            heard.put(waiter.wait(None))

    thread = threading.Thread(target=hear)
    thread.start()
    waiter = heard.get(timeout=DEADLINE_S)
    yield waiter, heard
    done.set()
    waiter.wake()
    thread.join()
    waiter.close()


def test_a_break_names_the_descriptor_and_ends_when_the_lease_does(hearing, tmp_path):
    waiter, heard = hearing
    path = tmp_path / "file"
    path.write_bytes(b"content")
    descriptor = os.open(path, os.O_RDONLY)
    assert not leases.is_whole(descriptor)
    assert leases.take(descriptor, waiter.thread)
    assert leases.is_whole(descriptor)
    writer = start_writer(path)
    assert heard.get(timeout=DEADLINE_S) == leases.Breaks(frozenset({descriptor}), missed_some=False)
    assert not leases.is_whole(descriptor)
    assert writer.poll() is None
    leases.close(descriptor)
    assert writer.wait(DEADLINE_S) == 0


def test_giving_up_what_was_never_held_does_no_harm(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    leases.give_up(descriptor)
    leases.close(descriptor)
    assert not leases.is_whole(descriptor)


@pytest.mark.parametrize(
    ("text", "expected"), [("45\n", 45.0), ("0\n", math.inf), ("", 45.0), ("forty", 45.0), (None, 45.0)]
)
def test_the_time_to_a_forced_break_is_read_from_the_kernel(tmp_path, monkeypatch, text, expected):
    path = tmp_path / "lease-break-time"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(leases, "_BREAK_TIME_FILE", path)
    assert leases.break_time_s() == expected
