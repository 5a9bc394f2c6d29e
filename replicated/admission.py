"""Back-pressure: a capture begins only while what waits to be stored is within bounds.

What is frozen costs descriptors, the user's old file contents or space in the spool until it is stored.
Above the bounds calls wait, and nothing is ever dropped. The client repeats a call that is sent back with
`QueueFull`, so that it can tell the user and be interrupted. Called by `intake`, before anything is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from replicate.errors import QueueFull
from replicated.journal import Journal

DEFAULT_QUEUE_BYTES = 64 * 10**9
DEFAULT_SPOOL_BYTES = 20 * 10**9
#: How long a call waits here before the client is told and asks again.
PATIENCE_S = 0.5


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a project lets wait: bytes that are frozen, and of them, bytes on the disk of the spool."""

    queue_bytes: int = DEFAULT_QUEUE_BYTES
    spool_bytes: int = DEFAULT_SPOOL_BYTES


class Admission:
    """Lets captures begin.

    `wait_for_change` returns when a job has been finished, or after so many seconds; `waiting_because`
    says why nothing can be stored in a repository at the moment, if so.
    """

    def __init__(
        self,
        journal: Journal,
        wait_for_change: Callable[[float], None],
        waiting_because: Callable[[str], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._wait_for_change = wait_for_change
        self._waiting_because = waiting_because
        self._clock = clock

    def wait(self, repository: str, bounds: Bounds) -> None:
        """Return once a capture for a repository may begin; raises `QueueFull` after `PATIENCE_S`.

        The bounds are soft: captures that begin at the same time, and a single one that is larger than
        they are, exceed them.
        """
        deadline = self._clock() + PATIENCE_S
        while True:
            frozen, spooled = self._measure(repository)
            if frozen < bounds.queue_bytes and spooled < bounds.spool_bytes:
                return
            left = deadline - self._clock()
            if left <= 0:
                raise self._full(repository, frozen, spooled, bounds)
            self._wait_for_change(left)

    def _measure(self, repository: str) -> tuple[int, int]:
        """What waits for this repository, and what the spool holds.

        What waits for another one into which nothing can be stored is no reason to hold up this one.
        """
        waiting = self._journal.frozen()
        spooled = sum(
            spooled
            for other, (_, spooled) in waiting.items()
            if other == repository or not self._waiting_because(other)
        )
        return waiting.get(repository, (0, 0))[0], spooled

    def _full(self, repository: str, frozen: int, spooled: int, bounds: Bounds) -> QueueFull:
        if frozen >= bounds.queue_bytes:
            what, key, limit = f"{_size(frozen)} wait to be stored", "queue_limit", bounds.queue_bytes
        else:
            what, key, limit = f"the spool holds {_size(spooled)}", "spool_limit", bounds.spool_bytes
        because = self._waiting_because(repository)
        return QueueFull(
            f"{what}, and `{key}` is {_size(limit)}"
            + (f"; nothing moves at present: {because}" if because else ""),
            hint=f"the call goes on once enough is stored; raise `{key}` in replicate.yaml to wait later",
            fields={
                "frozen_bytes": str(frozen),
                "spooled_bytes": str(spooled),
                "limit_bytes": str(limit),
                "stuck": because,
            },
        )


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 10**9:.1f} GB" if size_bytes >= 10**9 else f"{size_bytes / 10**6:.1f} MB"
