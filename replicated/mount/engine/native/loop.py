"""The threads that take requests from the kernel and give it the answers.

Who does what is decided by `requests`, what is answered by `operations`; here are the threads, the reads
and the writes. Used by `session`, one loop a mount.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import Final

from replicated.mount.engine.native import protocol
from replicated.mount.engine.native.interrupts import Verdict, judge
from replicated.mount.engine.native.operations import Operations
from replicated.mount.engine.native.protocol import ProtocolError, Request
from replicated.mount.engine.native.requests import Requests, Step
from replicated.mount.errors import errno_for
from replicated.mount.reading.open_files import Part

_LOG = logging.getLogger(__name__)

#: What the kernel may write at once; it never does, but wants room for that and the headers.
MAX_WRITE: Final = 64 << 10
_BUFFER_BYTES = MAX_WRITE + mmap.PAGESIZE
#: The system takes 1024 parts at once, one of which is the header.
_MAX_PARTS = 1023

#: So long after a signal whoever waits for a request may have to wait for its answer, if the signal allows.
GRACE_S: Final = 1.0

_UNANSWERED = frozenset((protocol.FORGET, protocol.BATCH_FORGET))
#: What it means that a thread cannot be started: there is no memory or no room for one at the moment.
_SHORTAGE = (RuntimeError, MemoryError, OSError)


class Loop:
    """Serves the requests that come from a device, from `start` until the mount is gone.

    `on_end` is called by a thread that finds the mount gone, or fails; more than once, perhaps. `failure` is
    then what it failed with, if it did: requests are lost, and the mount must be made anew.
    """

    failure: BaseException | None = None

    def __init__(
        self,
        descriptor: int,
        operations: Operations,
        timeout_s: float,
        on_end: Callable[[], None],
        judge: Callable[[int], Verdict] = judge,
    ) -> None:
        self._descriptor = descriptor
        self._operations = operations
        self._timeout_s = timeout_s
        self._on_end = on_end
        self._judge = judge
        self._requests = Requests()
        self._threads: set[threading.Thread] = set()

    def start(self) -> None:
        """Begin to take requests. Raises `RuntimeError`, `MemoryError` or `OSError` when there is no room."""
        self._start_thread(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads to end, which they do when the mount is gone; whether all have."""
        threads = tuple(self._threads)
        for thread in threads:
            thread.join(timeout_s / len(threads))
        return not any(thread.is_alive() for thread in threads)

    def look_after(self) -> None:
        """Answer what has waited for too long, and see that requests are taken; to be called now and then."""
        if self._requests.needs_waiting():
            self._start_waiting()
        for request, since_s in self._requests.interrupted():
            self._weigh(request, since_s)
        for request in self._requests.overdue(self._timeout_s):
            if self._give_up(request.unique, errno.EIO):
                name = protocol.NAMES.get(request.operation, request.operation)
                _LOG.error("%s failed: no answer within %g s", name, self._timeout_s)

    # -- threads -------------------------------------------------------------------------------------

    def _start_thread(self, request: Request | None) -> None:
        """A thread that works on `request` first, if there is one, and then waits for others."""
        # Here, where it is known what to do when there is no memory.
        buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))
        thread = threading.Thread(target=self._run, args=(buffer, request), name="requests", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except BaseException:
            self._threads.discard(thread)
            raise

    def _start_waiting(self) -> None:
        """A thread that waits, and is counted already."""
        try:
            self._start_thread(None)
        except _SHORTAGE as error:
            _LOG.warning("nobody waits for requests meanwhile: %s", error)
            self._requests.leave()

    def _run(self, buffer: memoryview, request: Request | None) -> None:
        try:
            self._work(buffer, request)
        except BaseException as error:
            self.failure = error
            self._on_end()
        finally:
            self._threads.discard(threading.current_thread())

    def _work(self, buffer: memoryview, request: Request | None) -> None:
        """Take requests and answer them, until this thread is not needed any more."""
        while True:
            request = request or self._take(buffer)
            if request is None:
                return
            self._perform(request)
            following = self._requests.next()
            if following is Step.LEAVE:
                return
            request = following if isinstance(following, Request) else None

    def _take(self, buffer: memoryview) -> Request | None:
        """Wait for a request that this thread is to work on; None when the mount is gone."""
        while True:
            try:
                length = os.readv(self._descriptor, [buffer])
            except OSError as error:
                # Withdrawn before it was read, or a signal.
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue
                if error.errno != errno.ENODEV:
                    raise
                self._requests.leave()
                self._on_end()
                return None
            request = protocol.parse_request(buffer[:length])
            if request.operation in _UNANSWERED:
                # Inodes are never given up, so it does not matter who has forgotten them.
                continue
            if request.operation == protocol.INTERRUPT:
                self._interrupt(request)
                continue
            if not self._operations.knows(request.operation):
                # At once: Python asks of each file that it opens whether it is a terminal (IOCTL), and the
                # kernel passes that on every time.
                self._write(request.unique, errno.ENOSYS, ())
                continue
            step = self._requests.take(request)
            if step is Step.START_AND_WORK:
                self._start_waiting()
            if step is not Step.WAIT:
                return request

    # -- answers -------------------------------------------------------------------------------------

    def _perform(self, request: Request) -> None:
        parts: Sequence[Part] = ()
        number = 0
        try:
            parts = self._operations.perform(request)
            if len(parts) > _MAX_PARTS:
                parts = (b"".join(parts),)
        except ProtocolError as error:
            _LOG.error("the kernel sent %s", error)
            number = errno.EIO
        except BaseException as error:
            number = errno_for(error, protocol.NAMES.get(request.operation, str(request.operation)))
        delivered = self._requests.claim(request) and self._write(request.unique, number, parts)
        if not delivered and not number:
            self._operations.undo(request, parts)

    def _interrupt(self, request: Request) -> None:
        """Do what is to be done for a process that got a signal, now and as long as its request takes."""
        (unique,) = protocol.unpack(protocol.INTERRUPT_IN, request.body)
        interrupted = self._requests.interrupt(unique)
        if interrupted is None:
            # It is answered by now, and then nobody cares; or the thread that has taken it has not got
            # as far as to say so, and then we are asked again.
            self._write(request.unique, errno.EAGAIN, ())
        else:
            self._weigh(interrupted, 0)

    def _weigh(self, request: Request, since_s: float) -> None:
        """Give a request up if a signal that came for its sender is a reason to."""
        verdict = self._judge(request.pid)
        if verdict is Verdict.NOW or (verdict is Verdict.SOON and since_s >= GRACE_S):
            self._give_up(request.unique, errno.EINTR)

    def _give_up(self, unique: int, number: int) -> bool:
        """Answer a request with an error whatever others do about it; False when it has been answered."""
        if not self._requests.give_up(unique):
            return False
        self._write(unique, number, ())
        queued = self._requests.next_for_another()
        if queued is not None:
            try:
                self._start_thread(queued)
            except _SHORTAGE as error:
                _LOG.warning("a request stays queued: %s", error)
                self._requests.put_back(queued)
        return True

    def _write(self, unique: int, number: int, parts: Sequence[Part]) -> bool:
        """Give an answer to the kernel; whether it took it."""
        size = protocol.ANSWER_HEADER.size + sum(map(len, parts))
        header = protocol.ANSWER_HEADER.pack(size, -number, unique)
        try:
            os.writev(self._descriptor, [header, *parts])
        except OSError as error:
            # Nobody waits any more, or the mount is gone, as the next read will find. For whatever else
            # is wrong with an answer, the kernel has told who waits for it that it is an error.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                _LOG.error("the kernel did not take an answer of %d bytes: %s", size, error)
            return False
        return True
