"""How long calls hold up the training: what is counted, and what the daemon is told."""

import os
import threading
import time

import pytest

import replicate
from replicate.stall import StallClock

SECOND = 10**9


@pytest.fixture
def clock(monkeypatch):
    """A clock whose time passes when it is told to."""
    now = [5 * SECOND]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    clock = StallClock()
    clock.let_pass = lambda seconds: now.__setitem__(0, now[0] + round(seconds * SECOND))
    return clock


def test_only_the_time_of_calls_is_counted(clock):
    clock.let_pass(10)
    with clock.running():
        clock.let_pass(2)
        assert clock.seconds == 2
    clock.let_pass(10)
    with clock.running():
        clock.let_pass(0.5)
    assert clock.seconds == 2.5


def test_calls_at_the_same_time_are_counted_once(clock):
    with clock.running():
        clock.let_pass(1)
        with clock.running():
            clock.let_pass(1)
        clock.let_pass(1)
    assert clock.seconds == 3


def test_a_call_that_raises_is_counted(clock):
    with pytest.raises(ValueError), clock.running():
        clock.let_pass(1)
        raise ValueError
    clock.let_pass(1)
    assert clock.seconds == 1


def test_every_second_is_told_once(clock):
    with clock.running():
        clock.let_pass(2)
        assert clock.take_untold() == 2 * SECOND
        clock.let_pass(1)
    assert clock.take_untold() == SECOND
    assert clock.take_untold() == 0
    assert (clock.seconds, clock.told_seconds) == (3, 3)


def test_what_was_not_told_after_all_is_told_again(clock):
    with clock.running():
        clock.let_pass(2)
    taken = clock.take_untold()
    clock.give_back(taken)
    assert (clock.seconds, clock.told_seconds) == (2, 0)
    assert clock.take_untold() == taken


def test_a_forked_child_begins_at_zero(clock):
    with clock.running():
        clock.let_pass(2)
        pid = os.fork()
        if pid == 0:
            clock.let_pass(1)
            os._exit(0 if clock.seconds == 0 and clock.take_untold() == 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert clock.seconds == 2


def test_threads_can_use_one_clock():
    clock = StallClock()

    def work():
        for _ in range(1000):
            with clock.running():
                clock.give_back(clock.take_untold())

    begun = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < clock.seconds <= time.monotonic() - begun


def test_the_daemon_is_told_with_what_is_sent_anyway(project, server, written):
    server()
    experiment = replicate.init(quiet=True)
    first = experiment.stall_seconds
    assert first > 0
    for _ in range(3):
        experiment.checkpoint()
    experiment.stop()
    begun, *checkpoints, ended = written()
    assert checkpoints[0].stall_ns >= first * SECOND
    told_s = (sum(request.stall_ns for request in checkpoints) + ended.stall_ns) / SECOND
    assert all(request.stall_ns > 0 for request in checkpoints)
    assert first < told_s <= experiment.stall_seconds
    assert begun.experiment.id == experiment.id


def test_what_the_daemon_was_told_is_not_counted_twice(project):
    with replicate.init(quiet=True) as experiment:
        for _ in range(3):
            experiment.checkpoint()
        before = experiment.stall_seconds
        experiment.refresh()
        assert before <= experiment.stall_seconds < before + 0.5 * before + 0.001


def test_an_experiment_of_an_earlier_process_knows_what_it_waited(project, run_script):
    done = run_script(
        "import replicate\n"
        "with replicate.init(quiet=True) as experiment:\n"
        "    experiment.checkpoint()\n"
        "    print(experiment.stall_seconds)\n"
    )
    assert replicate.experiments.get("latest").stall_seconds >= float(done.output)


def test_nothing_is_held_up_when_it_is_disabled(monkeypatch):
    monkeypatch.setenv("REPLICATE_DISABLED", "1")
    with replicate.init() as experiment:
        experiment.checkpoint()
    assert experiment.stall_seconds == 0
