"""A store with a limit: never faster than allowed, and never waiting for what nobody wants any more."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicated.store.limited import BURST_S, LimitedStore, UploadInterrupted, UploadLimit
from replicated.store.memory import MemoryStore


class Clock:
    """Time that passes only while somebody waits for the limit."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def limit_on(clock, bytes_per_s):
    limit = UploadLimit(bytes_per_s, clock=clock)

    def wait(timeout):
        assert 0 < timeout <= threading.TIMEOUT_MAX
        clock.now += max(timeout, 1e-6)  # smaller steps would be lost in rounding

    limit._changed.wait = wait
    return limit


@given(
    st.integers(1, 10**9),
    st.lists(st.tuples(st.integers(0, 10**9), st.sampled_from([0, 0.1, 10])), max_size=20),
)
def test_no_more_goes_out_than_allowed_at_any_time(bytes_per_s, takes):
    clock = Clock()
    limit = limit_on(clock, bytes_per_s)
    gone = 0
    for size, pause in takes:
        clock.now += pause
        limit.take(size)
        gone += size
        allowed = (clock.now - 1000.0 + BURST_S) * bytes_per_s
        assert gone <= allowed * (1 + 1e-6) + 1


def test_waiting_is_no_longer_than_needed(clock):
    limit = limit_on(clock, 1000)
    for _ in range(10):
        limit.take(5000)
    assert clock.now == pytest.approx(1000 + 50 - BURST_S)


def test_a_pause_saves_no_more_than_a_burst(clock):
    limit = limit_on(clock, 1000)
    clock.now += 3600
    limit.take(10_000)
    assert clock.now == pytest.approx(1000 + 3600 + 10 - BURST_S)


def test_without_a_limit_nobody_waits(clock):
    limit = limit_on(clock, 0)
    limit.take(1 << 60)
    assert clock.now == 1000


def test_a_new_limit_owes_nothing_from_before(clock):
    limit = limit_on(clock, 1000)
    limit.take(1000)
    limit.set(10)
    limit.take(20)
    assert clock.now == pytest.approx(1002)
    limit.set(0)
    limit.take(1 << 60)
    assert clock.now == pytest.approx(1002)


def begin_waiting(limit):
    """A thread that waits for more than it will ever get, and how it ended."""
    ended = []

    def take():
        try:
            limit.take(1 << 60)
            ended.append("taken")
        except UploadInterrupted:
            ended.append("interrupted")

    thread = threading.Thread(target=take)
    thread.start()
    deadline = time.monotonic() + 30
    while limit._level > -(1 << 59):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return thread, ended


def test_waiting_ends_when_it_is_interrupted():
    limit = UploadLimit(1)
    thread, ended = begin_waiting(limit)
    limit.interrupt()
    thread.join()
    assert ended == ["interrupted"]
    with pytest.raises(UploadInterrupted):
        limit.take(0)
    limit.set(1 << 30)
    limit.take(1)


def test_waiting_ends_when_the_limit_is_lifted():
    limit = UploadLimit(1)
    thread, ended = begin_waiting(limit)
    limit.set(0)
    thread.join()
    assert ended == ["taken"]


def test_only_new_objects_count(clock):
    limit = limit_on(clock, 10)
    store = LimitedStore(MemoryStore(), limit)
    store.put("a", [b"x" * 5, bytearray(5), memoryview(bytes(8)).cast("H")])
    assert clock.now == pytest.approx(1000 + 1.8 - BURST_S)
    store.replace("b", bytes(1000))
    assert store.get("a", 0, 5) == b"x" * 5
    assert {info.key for info in store.list("")} == {"a", "b"}
    store.delete("a")
    assert not store.exists("a")
    assert clock.now == pytest.approx(1000 + 1.8 - BURST_S)


def test_what_is_interrupted_is_not_stored():
    limit = UploadLimit(1)
    store = LimitedStore(MemoryStore(), limit)
    limit.interrupt()
    with pytest.raises(UploadInterrupted):
        store.put("a", [b"x"])
    assert not store.exists("a")
