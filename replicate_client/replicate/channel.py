"""One gRPC channel to the daemon of one home: calls, streams, and what their failures mean.

The only module of the library that uses grpc. It finds and starts nothing, and repeats nothing: that is
`connection`, its only caller, which is told by `Lost` that a call may be repeated. A daemon that has been
stopped or hangs is noticed by pings: grpc answers them in its own threads, whatever Python is busy with, so
that a call may take as long as the daemon works on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from replicate import access, notices
from replicate.errors import (
    DaemonIncompatible,
    DaemonUnavailable,
    InternalError,
    InvalidArgument,
)
from replicate.home import Home, find_home
from replicate.launch import SocketAddress, describe_silence
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

#: For questions about the daemon itself; anything else takes as long as its work takes.
HELLO_TIMEOUT_S = 15.0

_SERVICE = "/replicate.v1.Daemon"
#: During a call the daemon is asked this often whether it lives, and is given up after so long a silence.
_PING_INTERVAL_S = 5.0
_PING_PATIENCE_S = 15.0


@dataclass(frozen=True, slots=True)
class DaemonInfo:
    """Who answers on the socket."""

    pid: int
    version: str
    protocol: int
    started: datetime


def decode_daemon(message: pb.HelloReply) -> DaemonInfo:
    """The daemon's description of itself."""
    return DaemonInfo(message.pid, message.version, message.protocol, wire.decode_time(message.started_ns))


def protocol_error(method: str, problem: str) -> InternalError:
    """The error for a reply that the protocol does not allow."""
    return InternalError(
        f"{method}: {problem}", hint=f"this is a bug; the daemon's log is {find_home().log_file}"
    )


def incompatible(reason: str) -> DaemonIncompatible:
    """The error for a daemon that speaks another version of the protocol."""
    return DaemonIncompatible(
        f"the running daemon is of another version: {reason}", hint="`replicate daemon stop`, then try again"
    )


class Lost(Exception):
    """The daemon went away or fell silent during a call, or the call was interrupted by a fork."""

    def __init__(self, reason: str, *, by_fork: bool = False, by_silence: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.by_fork = by_fork
        self.by_silence = by_silence

    def error(self) -> DaemonUnavailable:
        """What users are told of it."""
        return DaemonUnavailable(
            f"the connection to the daemon was lost: {self.reason}",
            hint=f"its log is {find_home().log_file}",
        )


class Channel:
    """A gRPC channel to the daemon of one home, for any number of threads."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._address = SocketAddress(home)
        self._grpc = load_grpc()
        self._closed_because: Lost | None = None
        self._channel = self._grpc.insecure_channel(
            f"unix:{self._address.path}",
            options=[
                # A shared pool would make a new channel wait out the back-off of a broken one.
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.enable_http_proxy", 0),
                ("grpc.enable_retries", 0),
                ("grpc.max_receive_message_length", wire.MAX_REPLY_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_time_ms", int(_PING_INTERVAL_S * 1000)),
                ("grpc.keepalive_timeout_ms", int(_PING_PATIENCE_S * 1000)),
                ("grpc.http2.ping_timeout_ms", int(_PING_PATIENCE_S * 1000)),
                ("grpc.http2.max_pings_without_data", 0),  # as many as a long capture takes
                # Streams are read in the thread that asks: no thread of grpc to be caught in a fork.
                (self._grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),
            ],
        )

    @property
    def is_open(self) -> bool:
        """Whether calls can be made."""
        return self._closed_because is None

    def close(self, because: Lost | None = None) -> None:
        """Interrupt the calls that use it, which tell why; may be repeated."""
        if self._closed_because is None:
            self._closed_because = because or Lost("closed")
            self._channel.close()
            self._address.close()

    def hello(self, timeout_s: float = HELLO_TIMEOUT_S) -> DaemonInfo:
        """The handshake; does not judge the version of the protocol."""
        request = pb.HelloRequest(protocol=wire.PROTOCOL_VERSION)
        return decode_daemon(self.unary("Hello", request, pb.HelloReply, timeout_s))

    def unary(
        self, method: str, request: Message, reply_type: type[_Reply], timeout_s: float | None
    ) -> _Reply:
        """One request and its reply; raises `ReplicateError` or `Lost`."""
        with self._errors_of(method):
            ask = self._channel.unary_unary(
                f"{_SERVICE}/{method}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=reply_type.FromString,
            )
            reply: _Reply
            reply, answered = ask.with_call(request, timeout=timeout_s, metadata=_metadata(request))
            _tell_warnings(answered)
            return reply

    def stream(self, method: str, request: Message, reply_type: type[_Reply]) -> Iterator[_Reply]:
        """One request and its replies; raises `ReplicateError` or `Lost`."""
        with self._errors_of(method):
            replies = self._channel.unary_stream(
                f"{_SERVICE}/{method}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=reply_type.FromString,
            )(request, metadata=_metadata(request))
        try:
            # Not touched once closed: it may then be the child of the process that made it.
            while self.is_open:
                with self._errors_of(method):
                    reply = next(replies, None)
                if reply is None:
                    _tell_warnings(replies)
                    return
                yield reply
            raise self._lost()
        finally:
            if self.is_open:
                replies.cancel()

    def _lost(self) -> Lost:
        because = self._closed_because or Lost("closed")
        # An exception of its own for each thread.
        return Lost(because.reason, by_fork=because.by_fork, by_silence=because.by_silence)

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
            self.close(Lost(details, by_silence="keepalive" in details or "ping" in details))
            return self._lost()
        if status is codes.RESOURCE_EXHAUSTED:
            if "larger than max" in details:
                return InvalidArgument(f"too large for one message: {details}")
            return Lost(details)  # more requests at once than the daemon accepts
        if status is codes.DEADLINE_EXCEEDED:
            reason, hint = describe_silence(self.home)
            return DaemonUnavailable(
                f"the daemon does not answer in time: {method}" + (f"; {reason}" if reason else ""),
                hint=hint,
            )
        if status is codes.UNIMPLEMENTED:
            return incompatible(f"it does not know {method}")
        return protocol_error(method, f"{status.name}: {details}")


def _metadata(request: Message) -> tuple[tuple[str, bytes], ...]:
    """What goes with a request that names a repository in a bucket; with others nothing."""
    url = access.repository_of(request)
    if access.scheme_of(url) is None:
        return ()
    try:
        return ((access.METADATA_KEY, access.encode(url, access.collect(url))),)
    except ValueError as error:
        raise InvalidArgument(str(error), hint="unset those that are not needed to reach it") from None


def _tell_warnings(answered: Any) -> None:
    """Say what the daemon had to say of its answer, such as that it is not the newest."""
    for key, value in answered.trailing_metadata() or ():
        if key == wire.WARNING_METADATA_KEY:
            notices.warn_once(value.decode(errors="replace"))


_grpc: Any = None
#: A channel that never connects. With its last channel grpc takes itself down, in a thread of its own, and
#: a fork meanwhile leaves the child with a lock that nobody releases.
_anchor: Any = None


def load_grpc() -> Any:
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
