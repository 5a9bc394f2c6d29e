"""What can befall a request on its way to a store and back; `fault_proxy` says when.

A fault is a function of an exchange: it lets the server do the request, or not, and answers, or not.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Protocol
from urllib.parse import urlsplit

#: `Expect` was answered by us; the others are between two neighbours.
_NOT_FORWARDED = {"expect", "connection", "keep-alive", "transfer-encoding", "content-length"}


class Surroundings(Protocol):
    """What an exchange needs of the proxy that it passes."""

    upstream: str
    is_closed: bool
    #: How often everything was declared well again.
    clearings: int

    def note_applied(self, exchange: "Exchange") -> None: ...

    def hide_new(self, listing: bytes) -> bytes: ...

    def drop(self, connection: socket.socket, *, is_reset: bool = False) -> None: ...


@dataclasses.dataclass
class Exchange:
    """One request, and what became of it; a fault decides with its methods."""

    operation: str
    kind: str
    #: Of LIST the prefix, of the deletion of many every key in a line of its own.
    key: str
    #: As sent: method, path with query, headers, body; the body is forgotten when it is served.
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    proxy: Surroundings
    connection: socket.socket
    bytes_up: int
    #: 0 while, and if, nothing was answered.
    status: int = 0
    bytes_down: int = 0
    fault: str = ""
    #: Whether the connection ends with it.
    is_last: bool = False

    @property
    def is_ended(self) -> bool:
        """Whether this proxy ends, or its client is gone."""
        if self.proxy.is_closed:
            return True
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def forward(self) -> tuple[int, list[tuple[str, str]], bytes]:
        """Let the server do it; what it answers."""
        parts = urlsplit(self.proxy.upstream)
        upstream = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)
        try:
            upstream.putrequest(self.method, self.target, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers:
                if name.lower() not in _NOT_FORWARDED:
                    upstream.putheader(name, value)
            names = {name.lower() for name, _ in self.headers}
            if self.body or names & {"content-length", "transfer-encoding"}:
                upstream.putheader("Content-Length", str(len(self.body)))
            upstream.endheaders(self.body or None)
            reply = upstream.getresponse()
            headers = reply.getheaders()
            body = reply.read()
        finally:
            upstream.close()
        if reply.status < 300:
            self.proxy.note_applied(self)
        if self.operation == "LIST":
            body = self.proxy.hide_new(body)
        return reply.status, headers, body

    def answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, *, sent: int | None = None
    ) -> None:
        """Send this as the answer; only the first `sent` bytes of the body, if said, and then hang up."""
        if self.method != "HEAD":
            headers = [(name, value) for name, value in headers if name.lower() not in _NOT_FORWARDED]
            headers.append(("Content-Length", str(len(body))))
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"]
        lines += [f"{name}: {value}" for name, value in headers if name.lower() != "connection"]
        body = b"" if self.method == "HEAD" else body[:sent]
        self.status, self.bytes_down = status, len(body)
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1"))
        self.send(body)
        if sent is not None:
            self.hang_up()

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        """Answer with an error as S3 writes them; nothing was done."""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{code}</Code><Message>{message}</Message>"
            "<RequestId>fault</RequestId></Error>"
        ).encode()
        length = [("Content-Length", "0")] if self.method == "HEAD" else []
        self.answer(status, [("Content-Type", "application/xml"), *length], body)

    def reset(self) -> None:
        """Break the connection, as one that a router forgot."""
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.hang_up(is_reset=True)

    def hang_up(self, *, is_reset: bool = False) -> None:
        self.is_last = True
        self.proxy.drop(self.connection, is_reset=is_reset)


Fault = Callable[[Exchange], None]


def passing(exchange: Exchange) -> None:
    """No fault: the request and its answer pass."""
    exchange.answer(*exchange.forward())


def server_error(exchange: Exchange) -> None:
    exchange.refuse(500, "InternalError", "We encountered an internal error. Please try again.")


def slow_down(exchange: Exchange) -> None:
    exchange.refuse(503, "SlowDown", "Please reduce your request rate.")


def forbidden(exchange: Exchange) -> None:
    exchange.refuse(403, "AccessDenied", "Access Denied")


def expired_token(exchange: Exchange) -> None:
    exchange.refuse(400, "ExpiredToken", "The provided token has expired.")


def missing(exchange: Exchange) -> None:
    """A phantom 404: the object may well be there."""
    exchange.refuse(404, "NoSuchKey", "The specified key does not exist.")


def hang(exchange: Exchange) -> None:
    """No answer, and nothing done, until the client gives up; `clear` lets it through."""
    clearings = exchange.proxy.clearings
    while not exchange.is_ended:
        if exchange.proxy.clearings != clearings:
            passing(exchange)
            return
        time.sleep(0.02)
    exchange.hang_up()


def reset_before(exchange: Exchange) -> None:
    """The connection breaks and nothing was done."""
    exchange.reset()


def reset_after(exchange: Exchange) -> None:
    """It was done, but the connection breaks before the answer."""
    exchange.status, _, _ = exchange.forward()
    exchange.reset()


def truncate(exchange: Exchange) -> None:
    """Half of the body of the answer, of as many bytes as promised, and then the end."""
    status, headers, body = exchange.forward()
    exchange.answer(status, headers, body, sent=len(body) // 2)


def flip(exchange: Exchange) -> None:
    """One bit of the body of the answer is another one."""
    status, headers, body = exchange.forward()
    exchange.answer(status, headers, _flipped(body) if status < 300 else body)


def flip_sent(exchange: Exchange) -> None:
    """One bit of what is sent is another one when it arrives."""
    exchange.body = _flipped(exchange.body)
    passing(exchange)


def duplicate(exchange: Exchange) -> None:
    """It is done twice, one after the other; the second answer is given."""
    exchange.forward()
    passing(exchange)


def lie(exchange: Exchange) -> None:
    """It is said to be done, and is not."""
    tag = hashlib.md5(exchange.body, usedforsecurity=False).hexdigest()
    exchange.answer(204 if exchange.method == "DELETE" else 200, [("ETag", f'"{tag}"')], b"")


def slow(bytes_per_s: int) -> Fault:
    """So many bytes of the bodies a second, both ways."""

    def slow(exchange: Exchange) -> None:
        _doze(exchange, len(exchange.body) / bytes_per_s)
        status, headers, body = exchange.forward()
        _doze(exchange, len(body) / bytes_per_s)
        exchange.answer(status, headers, body)

    return slow


def hold(until: threading.Event) -> Fault:
    """It is done and answered when the event is set: a request that is long under way."""

    def hold(exchange: Exchange) -> None:
        while not until.wait(0.05):
            if exchange.proxy.is_closed:
                return
        passing(exchange)

    return hold


def late(until: threading.Event) -> Fault:
    """The connection breaks at once, and yet it is done when the event is set, whatever was done since."""

    def late(exchange: Exchange) -> None:
        exchange.hang_up()
        while not until.wait(0.05):
            if exchange.proxy.is_closed:
                return
        exchange.forward()

    return late


#: Those that a client should get over when they pass, by name.
PASSING_FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (server_error, slow_down, reset_before, reset_after, truncate, flip, duplicate)
}


def _flipped(body: bytes) -> bytes:
    if not body:
        return body
    changed = bytearray(body)
    changed[len(body) // 2] ^= 0x10
    return bytes(changed)


def _doze(exchange: Exchange, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and not exchange.is_ended:
        time.sleep(min(left, 0.05))
