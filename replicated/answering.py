"""How a method of the server answers: what goes round every call, and is the same for all.

Errors of ours travel with their class, fields and hint; anything else is our bug, logged with its traceback
and told as such. What was remarked beside an answer goes with it, and what came with a request and tells how
a bucket is reached is noted before anything is asked of that bucket.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import grpc

from replicate import access, wire
from replicate.errors import InternalError, InvalidArgument, ReplicateError
from replicated.remarks import collecting

_log = logging.getLogger(__name__)


class Activity:
    """When the last request was answered, and whether one is being answered; for the idle exit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active = 0
        self._last = time.monotonic()

    def __enter__(self) -> None:
        with self._lock:
            self._active += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._active -= 1
            self._last = time.monotonic()

    def idle_s(self) -> float:
        """Seconds since the last request; 0 during one."""
        with self._lock:
            return 0.0 if self._active else time.monotonic() - self._last


class Answerer(Protocol):
    """Whose methods these are."""

    activity: Activity

    def note_access(self, url: str, variables: Mapping[str, str]) -> None:
        """A request says how the bucket of a repository is reached."""
        ...


def unary(method: Callable[..., Any], *, with_wanted: bool = False) -> Callable[..., Any]:
    """A method that has one answer."""

    @functools.wraps(method)
    def answer(self: Answerer, request: Any, context: grpc.ServicerContext) -> Any:
        with answering(self, context, method.__name__):
            return method(self, request, context.is_active) if with_wanted else method(self, request)

    return answer


#: One that must have no effect once its client has given it up: it can ask.
wanted_unary = functools.partial(unary, with_wanted=True)


def stream(method: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
    """A method that has many answers."""

    @functools.wraps(method)
    def answer(self: Answerer, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with answering(self, context, method.__name__):
            yield from method(self, request)

    return answer


@contextlib.contextmanager
def answering(self: Answerer, context: grpc.ServicerContext, method: str) -> Iterator[None]:
    """What goes round a call, for a method that is not decorated."""
    with self.activity, collecting() as remarks:
        try:
            _note_access(self, context)
            yield
            if remarks:
                context.set_trailing_metadata(
                    tuple((wire.WARNING_METADATA_KEY, wire.encode_text(text).encode()) for text in remarks)
                )
        except ReplicateError as error:
            _abort(context, error)
        except Exception as error:
            if not context.is_active():
                raise  # the client has gone; nobody to tell
            _log.exception("%s failed", method)
            _abort(context, InternalError(f"internal error in the daemon: {type(error).__name__}: {error}"))


def _note_access(self: Answerer, context: grpc.ServicerContext) -> None:
    for key, value in context.invocation_metadata():
        if key == access.METADATA_KEY and isinstance(value, bytes):
            try:
                url, variables = access.decode(value)
            except ValueError as error:
                raise InvalidArgument(str(error)) from None
            if access.scheme_of(url) is not None:
                self.note_access(url, variables)


def _abort(context: grpc.ServicerContext, error: ReplicateError) -> None:
    context.set_trailing_metadata(((wire.ERROR_METADATA_KEY, wire.encode_error(error)),))
    status = (
        grpc.StatusCode.INTERNAL if isinstance(error, InternalError) else grpc.StatusCode.FAILED_PRECONDITION
    )
    if isinstance(error, InvalidArgument):
        status = grpc.StatusCode.INVALID_ARGUMENT
    context.abort(status, wire.encode_text(error.message))
