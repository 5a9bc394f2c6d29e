"""Runs a checkout in a thread of its own, so that whoever asked for it can be told how far it is.

Called by `rpc`, which streams the reports. The thread ends with the work, or at its next report once nobody
wants it any more.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator


class _Unwanted(Exception):
    """The client has gone in the middle of a stream."""


def progress_of(
    work: Callable[[Callable[[int, int], None]], None], is_wanted: Callable[[], bool]
) -> Iterator[tuple[int, int]]:
    """What `work` reports while it runs in a thread of its own; its exception, if it raises.

    When the client has gone, the next report raises in the thread, so that the work ends early.
    """
    events: queue.SimpleQueue[tuple[int, int] | BaseException | None] = queue.SimpleQueue()

    def report(files: int, size_bytes: int) -> None:
        if not is_wanted():
            raise _Unwanted
        events.put((files, size_bytes))

    def run() -> None:
        try:
            work(report)
        except BaseException as error:
            events.put(error)
        else:
            events.put(None)

    threading.Thread(target=run, name="checkout", daemon=True).start()
    while True:
        event = events.get()
        if event is None:
            return
        if isinstance(event, BaseException):
            raise event
        yield event
