"""What the daemon and its store process say to each other: MessagePack arrays over a socket of packets.

An ingest is one request; until it is answered, the process may report progress, pass on lines for the
log and ask for held files, whose descriptors come with the answer. Both ends are of the same version.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import sqlite3
import traceback
from typing import Any, Final, NamedTuple

import msgpack

from replicate.errors import ReplicateError, from_code
from replicated.format.manifest import RootNode

#: From the daemon: [url, experiment, snapshot, entries, spool directory, bytes a second].
INGEST: Final = "ingest"
#: From the daemon: [url, {name: value}], before an ingest: the variables with which a bucket is reached.
ACCESS: Final = "access"
#: From the daemon: what is running is not wanted any more; answered like an ingest.
ABORT: Final = "abort"
#: From the daemon: [slot or None], with a descriptor; or one of the failures.
HELD: Final = "held"

#: From the process: [number]; answered by HELD.
OPEN_HELD: Final = "open held"
#: From the process: [bytes done].
PROGRESS: Final = "progress"
#: From the process: [level, logger, text].
LOG: Final = "log"
#: From the process: [generation, *a root as `entries.pack_root`].
DONE: Final = "done"
#: From the process: it was aborted.
ABORTED: Final = "aborted"

#: [code, message, hint, fields]
ERROR: Final = "error"
#: [errno, text]: the operating system, or SQLite, has refused something.
REFUSED: Final = "refused"
#: [traceback]: a bug.
BROKEN: Final = "broken"

#: What an ingest can be answered with.
ANSWERS: Final = (DONE, ABORTED, ERROR, REFUSED, BROKEN)

#: The entries of an ingest are the longest part of a message; the rest is a path or two.
MAX_MESSAGE_BYTES: Final = 160 << 10
MAX_TEXT: Final = 16 << 10


class Message(NamedTuple):
    """One message; who receives a descriptor has to close it."""

    kind: str
    values: tuple[Any, ...]
    descriptor: int | None = None


class StoredTree(NamedTuple):
    """A tree that is in the repository, and the `Index.generation` under which all of it was found or put."""

    generation: int
    root: RootNode


class ChannelClosed(Exception):
    """The other end is gone."""


class StoringFailed(OSError):
    """The operating system has refused something at the other end."""


class StoringBroken(Exception):
    """A bug of ours at the other end; the text is its traceback."""


class Channel:
    """One end of the socket. Sending is allowed from any thread, receiving from one at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, kind: str, *values: object, descriptor: int | None = None) -> None:
        """Send a message; raises `ChannelClosed`."""
        data = msgpack.packb((kind, *values), use_bin_type=True, unicode_errors="surrogatepass")
        try:
            if descriptor is None:
                self._socket.send(data, socket.MSG_NOSIGNAL)
            else:
                socket.send_fds(self._socket, [data], [descriptor], socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed from error

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message, or None when none comes in time; raises `ChannelClosed`."""
        if timeout_s is not None:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            if not poll.poll(timeout_s * 1000):
                return None
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self._socket, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError as error:
            raise ChannelClosed from error
        if not data:
            raise ChannelClosed
        kind, *values = msgpack.unpackb(
            data, raw=False, use_list=False, unicode_errors="surrogatepass", strict_map_key=False
        )
        return Message(kind, tuple(values), descriptors[0] if descriptors else None)

    def close(self) -> None:
        """Close this end; the other one notices."""
        self._socket.close()


def describe_failure(error: Exception) -> tuple[Any, ...]:
    """A failure as the kind and the values of a message."""
    if isinstance(error, ReplicateError):
        return (
            ERROR,
            error.code,
            error.message[:MAX_TEXT],
            error.hint[:MAX_TEXT],
            {name: value[:MAX_TEXT] for name, value in error.fields.items()},
        )
    if isinstance(error, OSError):
        return REFUSED, error.errno or errno.EIO, _text_of(error)
    if isinstance(error, sqlite3.OperationalError):
        return REFUSED, errno.EIO, _text_of(error)
    if isinstance(error, MemoryError):
        return REFUSED, errno.ENOMEM, "out of memory"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return REFUSED, errno.EAGAIN, str(error)
    return BROKEN, "".join(traceback.format_exception(error))[-MAX_TEXT:]


def failure_of(message: Message) -> Exception:
    """The failure that `describe_failure` described."""
    if message.kind == ERROR:
        code, text, hint, fields = message.values
        return from_code(code, text, hint, fields)
    if message.kind == REFUSED:
        number, text = message.values
        return StoringFailed(number, text)
    (text,) = message.values
    return StoringBroken(text)


def _text_of(error: Exception) -> str:
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    name = getattr(error, "filename", None)
    if name is not None:
        text = f"{text}: {os.fsdecode(name) if isinstance(name, bytes) else name}"
    return text[:MAX_TEXT]
