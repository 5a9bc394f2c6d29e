"""The connection to the daemon of this user: found or started, kept for the process, made anew after `fork`.

The only module of the library that uses grpc. Callers hand in a protobuf request and the type of the
reply; they get the reply, or the `ReplicateError` that the daemon raised. Everything may be called from
any thread and after a fork. Repeating a request is harmless by protocol (writes carry ids chosen by the
client), so a call that finds the daemon gone starts it again and repeats itself.

Invariant for forks: while a process forks, no thread is inside grpc and no channel of ours is open. grpc
hangs in a child that is forked while another thread makes a call, or that inherits an unfinished one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from replicate.errors import (
    DaemonIncompatible,
    DaemonUnavailable,
    InternalError,
    InvalidArgument,
    ReplicateError,
)
from replicate.home import Home, find_home
from replicate.launch import Launch, SocketAddress, is_alive, is_listening, lock_owner
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

_SERVICE = "/replicate.v1.Daemon"
#: For questions about the daemon itself; anything else takes as long as its work takes.
_HELLO_TIMEOUT_S = 15.0
#: Waits before the repetitions of a call that lost its daemon; with the starts between them some 20 s.
_RETRY_DELAYS_S = (0.0, 0.1, 0.5, 2.0, 5.0)
#: How long a fork waits for the calls of other threads before it interrupts them (they are repeated
#: afterwards), and then for the interrupted ones to return.
_FORK_PATIENCE_S = 1.0
_INTERRUPTION_PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True)
class DaemonInfo:
    """Who answers on the socket."""

    pid: int
    version: str
    protocol: int
    started: datetime


def call(
    method: str, request: Message, reply_type: type[_Reply], *, timeout_s: float | None = None
) -> _Reply:
    """The daemon's reply to one request; starts the daemon when none runs.

    Without `timeout_s`, which bounds all of it, it waits as long as the daemon works on it. Raises the
    error that the daemon raised, `DaemonUnavailable` when none can be reached within about 20 s or the
    time is up, `InternalError` when the daemon failed by a bug.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    repetition = _Repetition(deadline)
    while True:
        try:
            with _link.entered():
                channel = _link.channel(deadline)
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                return channel.unary(method, request, reply_type, left)
        except _Lost as lost:
            repetition.wait(lost)


def stream(method: str, request: Message, reply_type: type[_Reply]) -> Iterator[_Reply]:
    """The daemon's replies to one request, as they come; errors as for `call`.

    Closing the generator cancels the request. It is repeated only as long as no reply has come; later, a
    fork of this process or the end of the daemon ends it with `DaemonUnavailable`.
    """
    repetition = _Repetition()
    has_begun = False
    while True:
        try:
            with _link.entered():
                for reply in _link.channel().stream(method, request, reply_type):
                    has_begun = True
                    yield reply
                return
        except _Lost as lost:
            if has_begun:
                raise lost.error() from None
            repetition.wait(lost)


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
        except _Lost:
            return None


def start_daemon() -> DaemonInfo:
    """The daemon of this home, started if none runs; returns when it answers."""
    request = pb.HelloRequest(protocol=wire.PROTOCOL_VERSION)
    return decode_daemon(call("Hello", request, pb.HelloReply, timeout_s=_HELLO_TIMEOUT_S))


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
            channel.unary("Shutdown", pb.ShutdownRequest(), pb.ShutdownReply, _HELLO_TIMEOUT_S)
    except (_Lost, ReplicateError):
        return False
    return True


def decode_daemon(message: pb.HelloReply) -> DaemonInfo:
    """The daemon's description of itself."""
    return DaemonInfo(message.pid, message.version, message.protocol, wire.decode_time(message.started_ns))


def protocol_error(method: str, problem: str) -> InternalError:
    """The error for a reply that the protocol does not allow."""
    return InternalError(
        f"{method}: {problem}", hint=f"this is a bug; the daemon's log is {find_home().log_file}"
    )


class _Lost(Exception):
    """The daemon went away during a call, or the call was interrupted by a fork."""

    def __init__(self, reason: str, *, by_fork: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.by_fork = by_fork

    def error(self) -> DaemonUnavailable:
        """What users are told of it."""
        return DaemonUnavailable(
            f"the connection to the daemon was lost: {self.reason}",
            hint=f"its log is {find_home().log_file}",
        )


class _Repetition:
    """Paces the repetitions of one call."""

    def __init__(self, deadline: float | None = None) -> None:
        self._delays = iter(_RETRY_DELAYS_S)
        self._deadline = deadline

    def wait(self, lost: _Lost) -> None:
        """Wait until the call may be repeated; raises `DaemonUnavailable` when that is enough."""
        if lost.by_fork:
            return
        delay = next(self._delays, None)
        if delay is None or (self._deadline is not None and time.monotonic() + delay > self._deadline):
            raise lost.error() from None
        time.sleep(delay)


class _Channel:
    """A gRPC channel to the daemon of one home, for any number of threads."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._address = SocketAddress(home)
        self._grpc = _load_grpc()
        self._closed_because = ""
        self._closed_for_fork = False
        self._channel = self._grpc.insecure_channel(
            f"unix:{self._address.path}",
            options=[
                # A shared pool would make a new channel wait out the back-off of a broken one.
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.enable_http_proxy", 0),
                ("grpc.enable_retries", 0),
                ("grpc.max_receive_message_length", wire.MAX_REPLY_BYTES),
                ("grpc.max_send_message_length", -1),
                # Streams are read in the thread that asks: no thread of grpc to be caught in a fork.
                (self._grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),
            ],
        )

    @property
    def is_open(self) -> bool:
        """Whether calls can be made."""
        return not self._closed_because

    def close(self, because: str = "closed", *, for_fork: bool = False) -> None:
        """Interrupt the calls that use it; may be repeated."""
        if not self._closed_because:
            self._closed_because = "interrupted by a fork of this process" if for_fork else because
            self._closed_for_fork = for_fork
            self._channel.close()
            self._address.close()

    def hello(self) -> DaemonInfo:
        """The handshake; does not judge the version of the protocol."""
        request = pb.HelloRequest(protocol=wire.PROTOCOL_VERSION)
        return decode_daemon(self.unary("Hello", request, pb.HelloReply, _HELLO_TIMEOUT_S))

    def unary(
        self, method: str, request: Message, reply_type: type[_Reply], timeout_s: float | None
    ) -> _Reply:
        """One request and its reply; raises `ReplicateError` or `_Lost`."""
        with self._errors_of(method):
            ask = self._channel.unary_unary(
                f"{_SERVICE}/{method}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=reply_type.FromString,
            )
            reply: _Reply = ask(request, timeout=timeout_s)
            return reply

    def stream(self, method: str, request: Message, reply_type: type[_Reply]) -> Iterator[_Reply]:
        """One request and its replies; raises `ReplicateError` or `_Lost`."""
        with self._errors_of(method):
            replies = self._channel.unary_stream(
                f"{_SERVICE}/{method}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=reply_type.FromString,
            )(request)
        try:
            # Not touched once closed: it may then be the child of the process that made it.
            while self.is_open:
                with self._errors_of(method):
                    reply = next(replies, None)
                if reply is None:
                    return
                yield reply
            raise self._lost()
        finally:
            if self.is_open:
                replies.cancel()

    def _lost(self) -> _Lost:
        return _Lost(self._closed_because, by_fork=self._closed_for_fork)

    @contextmanager
    def _errors_of(self, method: str) -> Iterator[None]:
        try:
            yield
        except self._grpc.RpcError as error:
            raise self._translate(method, error) from None
        except ValueError:
            if self.is_open:
                raise
            raise self._lost() from None

    def _translate(self, method: str, error: Any) -> Exception:
        for key, value in error.trailing_metadata() or ():
            if key == wire.ERROR_METADATA_KEY:
                return wire.decode_error(value)
        status, details = error.code(), error.details()
        codes = self._grpc.StatusCode
        if not self.is_open:
            return self._lost()
        if status in (codes.UNAVAILABLE, codes.CANCELLED):
            self.close(details)
            return _Lost(details, by_fork=False)
        if status is codes.RESOURCE_EXHAUSTED:
            if "larger than max" in details:
                return InvalidArgument(f"too large for one message: {details}")
            return _Lost(details, by_fork=False)  # more requests at once than the daemon accepts
        if status is codes.DEADLINE_EXCEEDED:
            return DaemonUnavailable(
                f"the daemon does not answer in time: {method}",
                hint=f"its log is {self.home.log_file}",
            )
        if status is codes.UNIMPLEMENTED:
            return _incompatible(f"it does not know {method}")
        return protocol_error(method, f"{status.name}: {details}")


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
        self._channels: set[_Channel] = set()
        self._current: _Channel | None = None

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

    def channel(self, deadline: float | None = None) -> _Channel:
        """The channel to the daemon of this home, which is started when none runs.

        Raises `DaemonUnavailable` or `DaemonIncompatible`, and `_Lost` when it leaves at once.
        """
        home = find_home()
        with self._connecting:
            current = self._current
            if current is not None and current.is_open and current.home == home:
                return current
            launch = Launch(home)
            try:
                _load_grpc()  # meanwhile
                launch.wait(deadline)
                channel, daemon = self._handshake(home)
                launch.end(daemon.pid)
            finally:
                launch.end()
            self._current = channel
            if current is not None:
                self._close(current)
            return channel

    def _handshake(self, home: Home) -> tuple[_Channel, DaemonInfo]:
        channel = self._open(home)
        try:
            daemon = channel.hello()
            if daemon.protocol != wire.PROTOCOL_VERSION:
                raise _incompatible(
                    f"it is version {daemon.version} with protocol {daemon.protocol},"
                    f" this library speaks {wire.PROTOCOL_VERSION}"
                )
        except BaseException:
            self._close(channel)
            raise
        return channel, daemon

    @contextmanager
    def opened(self, home: Home) -> Iterator[_Channel]:
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
            channel.close(for_fork=True)
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

    def _open(self, home: Home) -> _Channel:
        channel = _Channel(home)
        with self._changed:
            self._channels.add(channel)
        return channel

    def _close(self, channel: _Channel) -> None:
        with self._changed:
            self._channels.discard(channel)
        channel.close()


def _incompatible(reason: str) -> DaemonIncompatible:
    return DaemonIncompatible(
        f"the running daemon is of another version: {reason}", hint="`replicate daemon stop`, then try again"
    )


_grpc: Any = None
#: A channel that never connects. With its last channel grpc takes itself down, in a thread of its own, and
#: a fork meanwhile leaves the child with a lock that nobody releases.
_anchor: Any = None


def _load_grpc() -> Any:
    """The module grpc, imported so that it survives forks and is silent."""
    global _grpc, _anchor
    if _grpc is None:
        # Read once, as grpc is initialised; children should not inherit them.
        ours = {"GRPC_ENABLE_FORK_SUPPORT": "1", "GRPC_VERBOSITY": "NONE"}
        added = {name: value for name, value in ours.items() if name not in os.environ}
        os.environ.update(added)
        try:
            import grpc
            import grpc.experimental

            _anchor = grpc.insecure_channel("unix:/dev/null")
        finally:
            for name in added:
                os.environ.pop(name, None)
        _grpc = grpc
    return _grpc


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
