"""Threads of a mount do what they are given, in order and within bounds, and end when they are told to."""

import os
import threading

import pytest

from replicated.mount.reading.background import Stopped, Workers


@pytest.fixture
def make_workers():
    made = []

    def make(count=1, capacity=4, **options):
        made.append(Workers("work", count, capacity=capacity, **options))
        return made[-1]

    yield make
    for workers in made:
        workers.close()


def test_work_is_done_in_order(make_workers):
    workers, done = make_workers(capacity=100), []
    for number in range(50):
        workers.put(lambda number=number: done.append(number))
    workers.wait_idle()
    assert done == list(range(50))


def test_more_than_may_wait_is_refused(make_workers, wait_until):
    workers, gate, begun = make_workers(capacity=2), threading.Event(), threading.Event()

    def block():
        begun.set()
        gate.wait(20)

    assert workers.submit(block)
    assert begun.wait(20)
    assert [workers.submit(lambda: None) for _ in range(4)] == [True, True, False, False]
    gate.set()


def test_no_more_threads_run_than_allowed(make_workers):
    workers, gate, lock = make_workers(count=3, capacity=50), threading.Event(), threading.Lock()
    running, most = 0, 0

    def work():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == 3:
                gate.set()
        gate.wait(20)
        with lock:
            running -= 1

    for _ in range(20):
        workers.submit(work)
    workers.wait_idle()
    assert most == 3


def test_failed_work_is_a_line_in_the_log_and_the_thread_goes_on(make_workers, caplog):
    workers, done = make_workers(), []

    def fail():
        raise OSError(5, "a failure")

    def stop():
        raise Stopped

    for work in (fail, stop, lambda: done.append(1)):
        workers.put(work)
    workers.wait_idle()
    assert done == [1]
    assert [record.getMessage() for record in caplog.records] == ["work: [Errno 5] a failure"]
    caplog.clear()


def test_after_the_end_nothing_is_begun(make_workers, wait_until):
    workers, gate, begun, done = make_workers(), threading.Event(), threading.Event(), []

    def block():
        begun.set()
        gate.wait(20)

    workers.submit(block)
    assert begun.wait(20)
    workers.submit(lambda: done.append(1))
    closer = threading.Thread(target=workers.close)
    closer.start()
    wait_until(lambda: workers.is_closed)
    gate.set()
    closer.join()
    assert not workers.submit(lambda: done.append(2))
    with pytest.raises(Stopped):
        workers.put(lambda: done.append(3))
    with pytest.raises(Stopped):
        workers.wait_idle()
    assert done == []


def test_a_low_priority_is_that_of_the_thread_alone(make_workers):
    workers, found = make_workers(niceness=7), []
    own = os.getpriority(os.PRIO_PROCESS, 0)
    workers.put(lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    workers.wait_idle()
    assert found == [7]
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


@pytest.fixture
def short(monkeypatch):
    """A system that can start none of their threads; `clear` ends that."""
    is_short = threading.Event()
    start = threading.Thread.start

    def refuse(thread):
        if is_short.is_set() and thread.name == "work":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    is_short.set()
    return is_short


def test_work_that_no_thread_can_be_started_for_is_refused_and_later_work_done(make_workers, short, caplog):
    workers, done = make_workers(), []
    for _ in range(3):
        assert not workers.submit(lambda: done.append(1))
    assert [record.getMessage() for record in caplog.records] == ["work: can't start new thread"]
    caplog.clear()
    workers.wait_idle()
    short.clear()
    assert workers.submit(lambda: done.append(2))
    workers.wait_idle()
    assert done == [2]


def test_work_that_no_second_thread_can_be_started_for_is_done_by_the_first(make_workers, short, caplog):
    workers, gate, begun, done = make_workers(count=2), threading.Event(), threading.Event(), []

    def block():
        begun.set()
        assert gate.wait(20)

    short.clear()
    assert workers.submit(block)
    assert begun.wait(20)
    short.set()
    assert workers.submit(lambda: done.append(1))
    gate.set()
    workers.wait_idle()
    assert done == [1]
    caplog.clear()


def test_putting_waits_until_a_thread_can_be_started(make_workers, short, caplog, wait_until):
    workers, done = make_workers(), []
    putter = threading.Thread(target=lambda: workers.put(lambda: done.append(1)))
    putter.start()
    wait_until(lambda: caplog.records)
    short.clear()
    putter.join(20)
    wait_until(lambda: done == [1])
    caplog.clear()
