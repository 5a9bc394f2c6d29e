"""How long a worker rests after trouble with its repository, and what is told of it meanwhile.

Pauses grow while the trouble lasts, and end early when there is news. Used by `jobs`.
"""

from __future__ import annotations

import random
import threading
from typing import Final

from replicated.standings import Standings

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 60.0
#: While somebody waits for what is to be stored.
URGENT_PAUSE_S: Final = 2.0


class Rest:
    """The pauses of one worker, whose thread calls `take` and `note_well`; anybody may set `wake`."""

    def __init__(self, repository: str, standings: Standings) -> None:
        self._repository = repository
        self._standings = standings
        self._pause_s = FIRST_PAUSE_S
        #: There is news: a job, or that things may be well again.
        self.wake = threading.Event()
        #: Why the worker rests; empty while it does not. Read by other threads.
        self.because = ""

    def take(self, reason: str, *, is_urgent: bool) -> None:
        """Rest because of this trouble, shorter while somebody waits."""
        self.because = reason
        longest = URGENT_PAUSE_S if is_urgent else LONGEST_PAUSE_S
        # Jitter: many machines that lost the same store must not come back in step.
        pause_s = min(self._pause_s, longest) * random.uniform(0.5, 1.5)
        self._standings.note_trouble(self._repository, reason, pause_s)
        is_woken = self.wake.wait(pause_s)
        self._standings.note_attempt(self._repository)
        self.wake.clear()
        if not is_woken:
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)

    def note_well(self) -> None:
        """The trouble is over, if there was any."""
        self.because = ""
        self._standings.note_well(self._repository)

    def start_anew(self) -> None:
        """The next pause is a short one again."""
        self._pause_s = FIRST_PAUSE_S
