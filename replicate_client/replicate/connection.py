"""The connection to the daemon of this user: found or started, kept for the process, made anew after `fork`.

The only module of the library that uses grpc. Callers hand in a protobuf request and the type of the
reply; they get the reply, or the `ReplicateError` that the daemon raised. Everything may be called from
any thread and after a fork. Repeating a request is harmless by protocol (writes carry ids chosen here),
so a call that finds the daemon gone starts it again and repeats itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar

from replicate.errors import InternalError
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

    Without `timeout_s` it waits as long as the daemon works on it. Raises the error that the daemon
    raised, `DaemonUnavailable` when none can be reached within about 20 s or `timeout_s` has passed,
    `InternalError` when the daemon failed by a bug.
    """
    raise NotImplementedError


def stream(method: str, request: Message, reply_type: type[_Reply]) -> Iterator[_Reply]:
    """The daemon's replies to one request, as they come; errors as for `call`.

    Closing the generator cancels the request. Only repeated as long as no reply has come.
    """
    raise NotImplementedError
    yield


def probe() -> DaemonInfo | None:
    """Who answers on the socket of this home; None when nobody does. Starts nothing.

    Raises `DaemonUnavailable` when the directory of the socket is not private to this user. A daemon
    with another protocol version is reported, not refused.
    """
    raise NotImplementedError


def start_daemon() -> DaemonInfo:
    """The daemon of this home, started if none runs; returns when it answers."""
    raise NotImplementedError


def stop_daemon(timeout_s: float = 30.0) -> bool:
    """Stop the daemon and wait until it is gone; False when none was running.

    What is captured stays in its journal and is stored by the next one. Raises `DaemonUnavailable` when
    it is still there after `timeout_s`. Stops a daemon of another protocol version too.
    """
    raise NotImplementedError


def decode_daemon(message: pb.HelloReply) -> DaemonInfo:
    """The daemon's description of itself."""
    return DaemonInfo(message.pid, message.version, message.protocol, wire.decode_time(message.started_ns))


def protocol_error(method: str, problem: str) -> InternalError:
    """The error for a reply that the protocol does not allow."""
    raise NotImplementedError
