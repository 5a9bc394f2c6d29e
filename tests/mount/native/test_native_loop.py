"""The threads of a mount, with this test as the kernel: what becomes of requests when something fails."""

import errno
import mmap
import select
import socket
import threading

import pytest

from replicated.mount.engine.native import loop as loops
from replicated.mount.engine.native import protocol
from replicated.mount.engine.native.answers import Answers
from replicated.mount.engine.native.interrupts import Verdict
from replicated.mount.engine.native.loop import Loop
from replicated.mount.engine.native.operations import Operations
from replicated.mount.engine.native.requests import MAX_THREADS
from replicated.mount.filesystem import Filesystem

PATIENCE_S = 20
#: IOCTL, to which there is no answer.
UNKNOWN = 39


class Kernel:
    """The other end of a device; keeps the bounds of messages, as a device does."""

    def __init__(self):
        self._end, self.device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._end.settimeout(PATIENCE_S)

    def send(self, unique, operation, body=b"", inode=1):
        length = protocol.REQUEST_HEADER.size + len(body)
        self._end.send(protocol.REQUEST_HEADER.pack(length, operation, unique, inode, 0, 0, 77, 0, 0) + body)

    def receive(self):
        """The next answer: of which request, and its errno."""
        _, number, unique = protocol.ANSWER_HEADER.unpack_from(self._end.recv(1 << 17))
        return unique, -number

    def has_answered(self):
        return bool(select.select([self._end], [], [], 0)[0])

    def close(self):
        self._end.close()
        self.device.close()


@pytest.fixture
def kernel():
    kernel = Kernel()
    yield kernel
    kernel.close()


class Gated(Filesystem):
    """Attributes are told only once the gate is open."""

    def __init__(self, source):
        super().__init__(source)
        self.arrived = threading.Semaphore(0)
        self.gate = threading.Event()

    def getattr(self, inode):
        self.arrived.release()
        assert self.gate.wait(PATIENCE_S)
        return super().getattr(inode)


@pytest.fixture
def filesystem(memory_tree):
    return Gated(memory_tree({b"f": b"1"}))


@pytest.fixture
def begin(kernel, filesystem):
    """Start a loop; it ends with the test."""
    begun = []

    def begin(judge=lambda pid: Verdict.GO_ON, timeout_s=1000):
        operations = Operations(filesystem, Answers(0, 0), None)
        ended = threading.Event()
        loop = Loop(kernel.device.fileno(), operations, timeout_s, on_end=ended.set, judge=judge)
        loop.ended = ended
        loop.start()
        begun.append(loop)
        return loop

    yield begin
    filesystem.gate.set()
    # What is no request ends whoever takes it.
    for loop in begun:
        while loop._threads:
            kernel._end.send(b"end")
            loop.join(0.05)


def get(kernel, unique):
    """One request that is answered at once."""
    kernel.send(unique, protocol.READLINK)


@pytest.mark.parametrize("what", ["memory", "threads"])
def test_a_moment_without_room_for_another_thread_is_survived(begin, kernel, filesystem, monkeypatch, what):
    loop = begin()
    with monkeypatch.context() as patch:
        if what == "memory":
            patch.setattr(mmap, "mmap", no_memory)
        else:
            patch.setattr(threading.Thread, "start", no_thread)
        for unique in range(2, 6):
            get(kernel, unique)
            assert kernel.receive() == (unique, errno.EINVAL)
        # Now nobody waits for requests, until somebody looks after it.
        kernel.send(6, protocol.GETATTR)
        assert filesystem.arrived.acquire(timeout=PATIENCE_S)
    get(kernel, 7)
    loop.look_after()
    assert kernel.receive() == (7, errno.EINVAL)
    filesystem.gate.set()
    assert kernel.receive() == (6, 0)
    assert not loop.ended.is_set() and loop.failure is None


def no_memory(*_):
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def no_thread(self):
    raise RuntimeError("can't start new thread")


def test_a_request_for_which_there_is_no_thread_stays_queued(begin, kernel, filesystem, monkeypatch):
    loop = begin()
    # One of the threads waits, and the others work.
    for unique in range(2, MAX_THREADS + 1):
        kernel.send(unique, protocol.GETATTR)
        assert filesystem.arrived.acquire(timeout=PATIENCE_S)
    get(kernel, 100)
    # Taken after that one, and answered by who takes it.
    kernel.send(102, UNKNOWN)
    assert kernel.receive() == (102, errno.ENOSYS)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        loop._give_up(2, errno.EIO)
        assert kernel.receive() == (2, errno.EIO)
        assert not kernel.has_answered()
    loop._give_up(3, errno.EIO)
    assert {kernel.receive(), kernel.receive()} == {(3, errno.EIO), (100, errno.EINVAL)}


def test_a_thread_that_fails_for_good_is_told(begin, kernel):
    loop = begin()
    kernel._end.send(b"no request")
    assert loop.ended.wait(PATIENCE_S)
    assert isinstance(loop.failure, protocol.ProtocolError)


@pytest.mark.parametrize(
    "verdict, grace_s, is_given_up",
    [
        (Verdict.NOW, 1000, True),
        (Verdict.SOON, 1000, False),
        (Verdict.SOON, 0, True),
        (Verdict.GO_ON, 0, False),
    ],
)
def test_an_interrupted_request_is_given_up_when_its_sender_is_to_end(
    begin, kernel, filesystem, monkeypatch, verdict, grace_s, is_given_up
):
    monkeypatch.setattr(loops, "GRACE_S", grace_s)
    asked = []
    loop = begin(judge=lambda pid: asked.append(pid) or verdict)
    kernel.send(2, protocol.GETATTR)
    assert filesystem.arrived.acquire(timeout=PATIENCE_S)
    kernel.send(3, protocol.INTERRUPT, protocol.INTERRUPT_IN.pack(2))
    # Taken by the same thread, after that.
    get(kernel, 4)
    answers = [kernel.receive() for _ in range(1 + is_given_up)]
    assert answers == [(2, errno.EINTR)] * is_given_up + [(4, errno.EINVAL)]
    assert asked == [77]
    filesystem.gate.set()
    if not is_given_up:
        loop.look_after()
        assert kernel.receive() == (2, 0)


def test_a_second_signal_is_found_though_the_kernel_does_not_tell_of_it(begin, kernel, filesystem):
    verdict = Verdict.GO_ON
    loop = begin(judge=lambda pid: verdict)
    kernel.send(2, protocol.GETATTR)
    assert filesystem.arrived.acquire(timeout=PATIENCE_S)
    kernel.send(3, protocol.INTERRUPT, protocol.INTERRUPT_IN.pack(2))
    get(kernel, 4)
    assert kernel.receive() == (4, errno.EINVAL)
    loop.look_after()
    assert not kernel.has_answered()
    verdict = Verdict.NOW
    loop.look_after()
    assert kernel.receive() == (2, errno.EINTR)


def test_an_interrupt_of_what_nobody_knows_is_asked_for_again(begin, kernel):
    begin()
    kernel.send(3, protocol.INTERRUPT, protocol.INTERRUPT_IN.pack(2))
    assert kernel.receive() == (3, errno.EAGAIN)
