"""The connection to the daemon of this user: found or started, kept for the process, made anew after `fork`.

Callers hand in a protobuf request and the type of the reply; they get the reply, or the `ReplicateError`
that the daemon raised. Everything may be called from any thread and after a fork. Repeating a request is
harmless by protocol (writes carry ids chosen by the client), so a call that finds the daemon gone starts it
again and repeats itself. What gRPC is used for is in `channel`; what is not urgent, in `delivery`.

Invariant for forks: while a process forks, no thread is inside grpc and no channel of ours is open. grpc
hangs in a child that is forked while another thread makes a call, or that inherits an unfinished one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from replicate.channel import (
    HELLO_TIMEOUT_S,
    Channel,
    DaemonInfo,
    Lost,
    decode_daemon,
    incompatible,
    load_grpc,
)
from replicate.errors import DaemonUnavailable, ReplicateError
from replicate.home import Home, find_home
from replicate.launch import Launch, is_alive, is_listening, lock_owner
from replicate.lazy import LazyModule

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from replicate import wire
    from replicate._pb import daemon_pb2 as pb

    _Reply = TypeVar("_Reply", bound=Message)
else:
    wire = LazyModule("replicate.wire")
    pb = LazyModule("replicate._pb.daemon_pb2")
    _Reply = TypeVar("_Reply")

#: Waits before the repetitions of a call that lost its daemon; with the starts between them some 20 s.
_RETRY_DELAYS_S = (0.0, 0.1, 0.5, 2.0, 5.0)
#: A daemon that fell silent during a call is given so long to answer the next one.
_SILENCE_PATIENCE_S = 10.0
#: How long a fork waits for the calls of other threads before it interrupts them (they are repeated
#: afterwards), and then for the interrupted ones to return.
_FORK_PATIENCE_S = 1.0
_INTERRUPTION_PATIENCE_S = 2.0


def call(
    method: str,
    request: Message,
    reply_type: type[_Reply],
    *,
    timeout_s: float | None = None,
    reach_s: float | None = None,
    serve_options: Sequence[str] = (),
) -> _Reply:
    """The daemon's reply to one request; starts the daemon when none runs.

    Without `timeout_s`, which bounds all of it, it waits as long as the daemon works on it, and as long as
    the daemon's process answers pings. Raises the error that the daemon raised, `DaemonUnavailable` when
    none can be reached within about 20 s (or `reach_s`) or the time is up, `InternalError` when the daemon
    failed by a bug. `serve_options` are for a daemon that is started by this call.
    """
    attempts = _Attempts(timeout_s, reach_s)
    while True:
        try:
            with _link.entered():
                channel = _link.channel(attempts.reach_by(), serve_options)
                return channel.unary(method, request, reply_type, attempts.left_s())
        except Lost as lost:
            attempts.wait(lost)


def stream(method: str, request: Message, reply_type: type[_Reply]) -> Iterator[_Reply]:
    """The daemon's replies to one request, as they come; errors as for `call`.

    Closing the generator cancels the request. It is repeated only as long as no reply has come; later, a
    fork of this process or the end of the daemon ends it with `DaemonUnavailable`.
    """
    attempts = _Attempts()
    has_begun = False
    while True:
        try:
            with _link.entered():
                for reply in _link.channel().stream(method, request, reply_type):
                    has_begun = True
                    yield reply
                return
        except Lost as lost:
            if has_begun:
                raise lost.error() from None
            attempts.wait(lost)


def probe() -> DaemonInfo | None:
    """Who answers on the socket of this home; None when nobody does. Starts nothing.

    Raises `DaemonUnavailable` when the directory of the socket is not private to this user, or when
    somebody listens and does not answer. A daemon of another protocol version is reported, not refused.
    """
    home = find_home()
    with _link.entered():
        if not is_listening(home):
            return None
        try:
            with _link.opened(home) as channel:
                return channel.hello()
        except Lost:
            return None


def start_daemon(upload_limit: int = 0) -> DaemonInfo:
    """The daemon of this home, started if none runs; returns when it answers.

    One that is started now sends at most `upload_limit` bytes a second to repositories (0: no limit).
    """
    request = pb.HelloRequest(protocol=wire.PROTOCOL_VERSION)
    options = ("--limit", str(upload_limit)) if upload_limit else ()
    reply = call("Hello", request, pb.HelloReply, timeout_s=HELLO_TIMEOUT_S, serve_options=options)
    return decode_daemon(reply)


def stop_daemon(timeout_s: float = 30.0) -> bool:
    """Stop the daemon and wait until it is gone; False when none was running.

    What is captured stays in its journal and is stored by the next one. Raises `DaemonUnavailable` when
    it is still there after `timeout_s`. Stops a daemon of another protocol version too.
    """
    home = find_home()
    daemon = probe()
    # One whose socket was removed cannot be asked, and is stopped all the same.
    pid = daemon.pid if daemon else lock_owner(home)
    if pid is None:
        return False
    if daemon is None or not _ask_to_stop(home):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while is_alive(pid):
        if time.monotonic() > deadline:
            raise DaemonUnavailable(
                f"the daemon does not stop: pid {pid} is still there after {timeout_s:g} s",
                hint=f"its log is {home.log_file}",
            )
        time.sleep(0.01)
    return True


def _ask_to_stop(home: Home) -> bool:
    """Whether the daemon was told to stop; it may be of another version, or just have left."""
    try:
        with _link.entered(), _link.opened(home) as channel:
            channel.unary("Shutdown", pb.ShutdownRequest(), pb.ShutdownReply, HELLO_TIMEOUT_S)
    except (Lost, ReplicateError):
        return False
    return True


class _Attempts:
    """Paces the repetitions of one call."""

    def __init__(self, timeout_s: float | None = None, reach_s: float | None = None) -> None:
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._reach_s = reach_s
        #: Who has little time to reach the daemon tries once more, and at once.
        self._delays = iter(_RETRY_DELAYS_S if reach_s is None else _RETRY_DELAYS_S[:1])

    def reach_by(self) -> float | None:
        """Until when the daemon must have been reached, of `time.monotonic`; None: as long as it takes."""
        limits = [] if self._deadline is None else [self._deadline]
        if self._reach_s is not None:
            limits.append(time.monotonic() + self._reach_s)
        return min(limits, default=None)

    def left_s(self) -> float | None:
        """How long the call may take now."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def wait(self, lost: Lost) -> None:
        """Wait until the call may be repeated; raises `DaemonUnavailable` when that is enough."""
        if lost.by_fork:
            return
        if lost.by_silence:
            self._reach_s = min(self._reach_s or _SILENCE_PATIENCE_S, _SILENCE_PATIENCE_S)
        delay = next(self._delays, None)
        if delay is None or (self._deadline is not None and time.monotonic() + delay > self._deadline):
            raise lost.error() from None
        time.sleep(delay)


class _Link:
    """What this process has open towards the daemon; a forked child begins with a new one.

    Any thread may use it. `_changed` guards everything but `_connecting`, which is held while a daemon is
    started and is taken first.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._connecting = threading.RLock()
        #: A token for each call that is under way → the thread that makes it.
        self._calls: dict[object, int] = {}
        #: The thread that is about to fork, or None.
        self._forking: int | None = None
        self._channels: set[Channel] = set()
        self._current: Channel | None = None
        #: How often the daemon could not be reached, and why the last time.
        self._failures = 0
        self._failure: DaemonUnavailable | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Hold off forks of other threads for a while; waits for one that is under way."""
        token = object()
        thread = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._forking in (None, thread))
            self._calls[token] = thread
        try:
            yield
        finally:
            with self._changed:
                del self._calls[token]
                self._changed.notify_all()

    def channel(self, deadline: float | None = None, serve_options: Sequence[str] = ()) -> Channel:
        """The channel to the daemon of this home, which is started when none runs.

        Raises `DaemonUnavailable` or `DaemonIncompatible`, at the latest at `deadline` (of
        `time.monotonic`), and `Lost` when it leaves at once.
        """
        home = find_home()
        failures = self._failures
        with self._connecting:
            current = self._current
            if current is not None and current.is_open and current.home == home:
                return current
            if self._failures != failures and self._failure is not None:
                # Another thread has tried meanwhile: threads do not wait one after the other.
                raise type(self._failure)(self._failure.message, hint=self._failure.hint)
            try:
                channel = self._connect(home, deadline, serve_options)
            except DaemonUnavailable as error:
                self._failures, self._failure = self._failures + 1, error
                raise
            self._current = channel
            if current is not None:
                self._close(current)
            return channel

    def _connect(self, home: Home, deadline: float | None, serve_options: Sequence[str]) -> Channel:
        launch = Launch(home, serve_options)
        try:
            load_grpc()  # meanwhile
            launch.wait(deadline)
            channel, daemon = self._handshake(home, deadline)
            launch.end(daemon.pid)
        finally:
            launch.end()
        return channel

    def _handshake(self, home: Home, deadline: float | None) -> tuple[Channel, DaemonInfo]:
        left_s = HELLO_TIMEOUT_S if deadline is None else max(0.0, deadline - time.monotonic())
        channel = self._open(home)
        try:
            daemon = channel.hello(min(left_s, HELLO_TIMEOUT_S))
            if daemon.protocol != wire.PROTOCOL_VERSION:
                raise incompatible(
                    f"it is version {daemon.version} with protocol {daemon.protocol},"
                    f" this library speaks {wire.PROTOCOL_VERSION}"
                )
        except BaseException:
            self._close(channel)
            raise
        return channel, daemon

    @contextmanager
    def opened(self, home: Home) -> Iterator[Channel]:
        """A channel of its own, without a handshake."""
        channel = self._open(home)
        try:
            yield channel
        finally:
            self._close(channel)

    def begin_fork(self) -> None:
        """Let no call begin, and return when none is under way and no channel is open."""
        self._changed.acquire()
        self._forking = threading.get_ident()
        self._await_calls(_FORK_PATIENCE_S)
        for channel in self._channels:
            channel.close(Lost("interrupted by a fork of this process", by_fork=True))
        self._channels.clear()
        self._current = None
        self._await_calls(_INTERRUPTION_PATIENCE_S)
        # The lock stays ours across the fork, so that no thread holds it that the child does not have.

    def end_fork(self) -> None:
        """In the parent: go on."""
        self._forking = None
        self._changed.notify_all()
        self._changed.release()

    def _await_calls(self, patience_s: float) -> None:
        # A stream that the forking thread itself is reading cannot end while that thread waits.
        self._changed.wait_for(
            lambda: all(thread == self._forking for thread in self._calls.values()), timeout=patience_s
        )

    def _open(self, home: Home) -> Channel:
        channel = Channel(home)
        with self._changed:
            self._channels.add(channel)
        return channel

    def _close(self, channel: Channel) -> None:
        with self._changed:
            self._channels.discard(channel)
        channel.close()


_link = _Link()
#: Of parent processes; kept, because a channel must not even be deleted in a child.
_inherited: list[_Link] = []


def _begin_fork() -> None:
    _link.begin_fork()


def _end_fork_in_parent() -> None:
    _link.end_fork()


def _end_fork_in_child() -> None:
    global _link
    _inherited.append(_link)
    _link = _Link()


os.register_at_fork(
    before=_begin_fork, after_in_parent=_end_fork_in_parent, after_in_child=_end_fork_in_child
)
