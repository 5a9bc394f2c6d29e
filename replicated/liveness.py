"""Watches the training processes of this machine: who is gone is noticed at once, who lives shows it.

One thread waits on a pidfd for each run and calls `on_gone` when its process ends without having said
so; between, it calls `on_beat` for every live run at a steady interval, which writes the heartbeat that
other machines see. Which runs exist is the journal's knowledge; this module only holds descriptors,
which its thread alone touches: other threads post what they want.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import threading
import time
from collections.abc import Callable

from replicate.ids import short
from replicated.journal import Run
from replicated.processes import open_pidfd

#: Heartbeats are for readers on other machines; on this one the pidfd tells at once.
HEARTBEAT_INTERVAL_S = 10.0

_log = logging.getLogger(__name__)


class RunWatcher:
    """Owner of the watching thread. Every method may be called from any thread."""

    def __init__(self, on_gone: Callable[[Run], None], on_beat: Callable[[Run], None]) -> None:
        self._on_gone = on_gone
        self._on_beat = on_beat
        #: Runs to watch, ids to forget, None to stop.
        self._posts: queue.SimpleQueue[Run | str | None] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._loop, name="liveness", daemon=True)

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
        """Watch a run; one that is watched already is watched in its new process instead."""
        self._post(run)

    def forget(self, experiment_id: str) -> None:
        """Stop watching a run that has ended."""
        self._post(experiment_id)

    def _post(self, post: Run | str | None) -> None:
        self._posts.put(post)
        with contextlib.suppress(BlockingIOError):  # full of wake-ups already
            os.write(self._wake_writer, b"\0")

    def _loop(self) -> None:
        runs: dict[str, tuple[Run, int]] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_reader, selectors.EVENT_READ)
            next_beat = time.monotonic() + HEARTBEAT_INTERVAL_S
            while True:
                ready = selector.select(max(0.0, next_beat - time.monotonic()))
                gone = [key.data for key, _ in ready if key.data is not None]
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_reader, 4096)
                while not self._posts.empty():
                    post = self._posts.get()
                    if post is None:
                        for _, descriptor in runs.values():
                            os.close(descriptor)
                        return
                    identifier = post if isinstance(post, str) else post.experiment_id
                    self._drop(runs, selector, identifier)
                    if isinstance(post, Run) and not self._add(runs, selector, post):
                        gone.append(post.experiment_id)
                        runs[post.experiment_id] = post, -1
                for identifier in gone:
                    known = self._drop(runs, selector, identifier)
                    if known is not None:
                        self._guard(self._on_gone, known)
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + HEARTBEAT_INTERVAL_S
                    for run, _ in runs.values():
                        self._guard(self._on_beat, run)

    def _add(self, runs: dict[str, tuple[Run, int]], selector: selectors.DefaultSelector, run: Run) -> bool:
        """Whether the process of a run is alive and from now on watched."""
        descriptor = open_pidfd(run.process)
        if descriptor is None:
            return False
        selector.register(descriptor, selectors.EVENT_READ, run.experiment_id)
        runs[run.experiment_id] = run, descriptor
        self._guard(self._on_beat, run)
        return True

    @staticmethod
    def _drop(
        runs: dict[str, tuple[Run, int]], selector: selectors.DefaultSelector, identifier: str
    ) -> Run | None:
        run, descriptor = runs.pop(identifier, (None, -1))
        if descriptor >= 0:
            selector.unregister(descriptor)
            os.close(descriptor)
        return run

    @staticmethod
    def _guard(callback: Callable[[Run], None], run: Run) -> None:
        try:
            callback(run)
        except Exception:
            _log.exception("run %s", short(run.experiment_id))
