"""Watches the training processes of this machine: who is gone is noticed at once.

One thread waits on a pidfd for each run and calls `on_gone` when its process has ended. Which runs exist is
the journal's knowledge; this module only holds descriptors, which belong to its thread: other threads post
what they want. What other machines see of the runs is up to `heartbeats`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from replicate.ids import short
from replicated.journal import Run
from replicated.processes import exit_status, open_pidfd

#: The kernel tells an exit status when the parent has taken note of the end, usually at once.
REAP_PATIENCE_S = 5.0
_REAP_POLL_S = 0.01

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Watch:
    run: Run
    #: Negative when the process had ended before it could be watched.
    descriptor: int
    #: When to stop waiting for the exit status of a process that has ended; None while it lives.
    patience_ends: float | None = None


class RunWatcher:
    """Owner of the watching thread. Every method may be called from any thread.

    `on_gone(run, status)` gets the exit code, minus a signal, or None when the kernel does not tell.
    """

    def __init__(self, on_gone: Callable[[Run, int | None], None]) -> None:
        self._on_gone = on_gone
        #: A watch to begin, an id to forget, None to stop.
        self._posts: queue.SimpleQueue[_Watch | str | None] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._loop, name="liveness", daemon=True)
        # The thread's own.
        self._watches: dict[str, _Watch] = {}
        self._selector = selectors.DefaultSelector()

    def start(self) -> None:
        """Begin to watch; call once."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the runs go on unwatched. Call once."""
        self._post(None)
        self._thread.join()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def watch(self, run: Run) -> None:
        """Watch a run; one that is watched already is watched in this way instead."""
        # Opened here: by the time the thread gets to it, the process may have ended, and its status be lost.
        descriptor = open_pidfd(run.process)
        self._post(_Watch(run, -1 if descriptor is None else descriptor))

    def forget(self, experiment_id: str) -> None:
        """Stop watching a run that has ended."""
        self._post(experiment_id)

    def _post(self, post: _Watch | str | None) -> None:
        self._posts.put(post)
        with contextlib.suppress(BlockingIOError):  # full of wake-ups already
            os.write(self._wake_writer, b"\0")

    def _loop(self) -> None:
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        while self._take_posts():
            self._settle_ended()
            waiting = any(watch.patience_ends is not None for watch in self._watches.values())
            ready = self._selector.select(_REAP_POLL_S if waiting else None)
            for key, _ in ready:
                if key.data is None:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_reader, 4096)
                else:
                    self._selector.unregister(key.fd)
                    self._watches[key.data].patience_ends = time.monotonic() + REAP_PATIENCE_S
        for watch in self._watches.values():
            os.close(watch.descriptor)
        self._selector.close()

    def _take_posts(self) -> bool:
        """Do what was posted; False when the thread is to end."""
        while not self._posts.empty():
            post = self._posts.get()
            if post is None:
                return False
            if isinstance(post, str):
                self._drop(post)
                continue
            experiment_id = post.run.experiment_id
            self._drop(experiment_id)
            if post.descriptor < 0:
                self._tell_gone(post.run, None)
                continue
            self._watches[experiment_id] = post
            self._selector.register(post.descriptor, selectors.EVENT_READ, experiment_id)
        return True

    def _settle_ended(self) -> None:
        """Tell of the processes that have ended, once their exit status is known or not to be had."""
        for watch in list(self._watches.values()):
            if watch.patience_ends is None:
                continue
            status = exit_status(watch.descriptor)
            if status is not None or time.monotonic() >= watch.patience_ends:
                self._drop(watch.run.experiment_id)
                self._tell_gone(watch.run, status)

    def _drop(self, experiment_id: str) -> None:
        watch = self._watches.pop(experiment_id, None)
        if watch is not None:
            if watch.patience_ends is None:
                self._selector.unregister(watch.descriptor)
            os.close(watch.descriptor)

    def _tell_gone(self, run: Run, status: int | None) -> None:
        with _logged(run):
            self._on_gone(run, status)


@contextlib.contextmanager
def _logged(run: Run) -> Iterator[None]:
    try:
        yield
    except Exception:
        _log.exception("run %s", short(run.experiment_id))
