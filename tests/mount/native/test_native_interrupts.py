"""Signals for who waits: which of them end a request, and which pass unseen."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from replicated.mount.engine.native.interrupts import Verdict, judge, judge_status
from replicated.mount.filesystem import Filesystem


def mask(numbers):
    return sum(1 << (number - 1) for number in numbers)


def status(own=(), shared=(), blocked=(), ignored=(), caught=()):
    fields = {"SigPnd": own, "ShdPnd": shared, "SigBlk": blocked, "SigIgn": ignored, "SigCgt": caught}
    lines = [f"{name}:\t{mask(numbers):016x}" for name, numbers in fields.items()]
    return "\n".join(["Name:\tcat", "SigQ:\t0/1", *lines]).encode()


@pytest.mark.parametrize(
    "signals, expected",
    [
        ({}, Verdict.GO_ON),
        ({"own": [signal.SIGKILL]}, Verdict.NOW),
        ({"shared": [signal.SIGINT]}, Verdict.NOW),
        ({"shared": [signal.SIGRTMAX]}, Verdict.NOW),
        ({"shared": [signal.SIGINT], "blocked": [signal.SIGINT]}, Verdict.GO_ON),
        ({"shared": [signal.SIGINT], "ignored": [signal.SIGINT]}, Verdict.GO_ON),
        ({"shared": [signal.SIGINT], "caught": [signal.SIGINT]}, Verdict.SOON),
        ({"own": [signal.SIGPROF], "caught": [signal.SIGPROF]}, Verdict.GO_ON),
        ({"shared": [signal.SIGCHLD]}, Verdict.GO_ON),
        ({"shared": [signal.SIGTSTP]}, Verdict.GO_ON),
        ({"own": [signal.SIGKILL], "shared": [signal.SIGURG], "caught": [signal.SIGURG]}, Verdict.NOW),
        ({"shared": [signal.SIGURG, signal.SIGTERM], "caught": [signal.SIGURG]}, Verdict.NOW),
    ],
)
def test_only_what_ends_a_program_or_asks_it_to_ends_its_request(signals, expected):
    assert judge_status(status(**signals)) is expected


def test_who_is_not_to_be_seen_is_given_a_while():
    assert judge(0) is Verdict.SOON
    with pytest.raises(ValueError):
        judge_status(b"Name:\tcat\n")


def test_the_signals_of_a_thread_are_found():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        # To this thread alone: others of this process have not blocked it.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        assert judge(threading.get_native_id()) is Verdict.GO_ON
    finally:
        signal.sigwait([signal.SIGUSR1])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


WAITING = """
import os, signal, sys
handled = []
for number in (signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: handled.append(number))
    signal.siginterrupt(number, False)
try:
    size = os.stat(sys.argv[1]).st_size
except OSError as error:
    size = error.strerror
print(size, *handled)
"""


@pytest.fixture
def slow_name(natively, memory_tree, gate):
    """A mount in which one name is answered only once the gate is open, and a program that waits for it."""
    started = []

    class Slow(Filesystem):
        def lookup(self, parent, name):
            if name == b"slow":
                gate.pass_through()
            return super().lookup(parent, name)

    served = natively(Slow(memory_tree({b"slow": b"12345", b"other": b"1"})))
    command = [sys.executable, "-c", WAITING, served.directory / "slow"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    started.append(process)
    gate.wait_for(1)
    yield served, process
    process.kill()
    process.communicate()


@pytest.mark.proves("S-54")
def test_a_program_that_handles_a_signal_gets_its_answer(slow_name, gate):
    served, process = slow_name
    process.send_signal(signal.SIGUSR1)
    # The kernel hands out interrupts before anything else.
    assert not os.path.exists(served.directory / "absent")
    assert os.stat(served.directory / "other").st_size == 1
    gate.open()
    assert process.communicate(timeout=20)[0].split() == [b"5", b"%d" % signal.SIGUSR1]


@pytest.mark.proves("S-54")
def test_a_program_that_handles_a_request_to_end_need_not_wait_for_ever(slow_name, gate):
    _, process = slow_name
    # The kernel tells of the first one only.
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGINT)
    found = process.communicate(timeout=20)[0]
    assert found.startswith(b"Interrupted system call")
    gate.open()


@pytest.mark.proves("S-54")
def test_killing_ends_a_program_that_got_another_signal_before(slow_name, gate):
    served, process = slow_name
    process.send_signal(signal.SIGUSR1)
    assert os.stat(served.directory / "other").st_size == 1
    process.kill()
    # The gate is still closed.
    assert process.wait(20) == -signal.SIGKILL
    gate.open()
