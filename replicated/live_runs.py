"""Which runs of other machines live, by the signs of life that their daemons leave in the repository.

Asked for only when somebody wants to know of a run whose end is not recorded, and then once for all of them.
A sign counts by the clock of the store where that tells how old it is, so that clocks which differ between
machines do not matter. Used by `experiments`, and by mounts that show a whole repository.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from replicate.errors import RepositoryUnreachable
from replicate.records import utc_now
from replicated.repository import Repository

#: So many periods may be missed, and so much more, for clocks that differ and stores that are slow.
MISSED_PERIODS: Final = 3
SLACK_S: Final = 15.0
#: The longest period that a daemon can mean; older signs are not even looked at.
MAX_PERIOD_S: Final = 600.0

_log = logging.getLogger(__name__)


class LiveRuns:
    """The runs that live, of one repository. Thread-safe; the lock is held while the repository is asked."""

    def __init__(
        self,
        repository: Repository,
        max_age_s: float = float("inf"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """What was found counts for `max_age_s`."""
        self._repository = repository
        self._max_age_s = max_age_s
        self._clock = clock
        self._lock = threading.Lock()
        self._found: frozenset[str] | None = None
        self._found_at = 0.0

    def __contains__(self, experiment_id: object) -> bool:
        """Whether a run lives; nobody knows of any while the repository is out of reach."""
        with self._lock:
            now = self._clock()
            if self._found is None or now - self._found_at > self._max_age_s:
                try:
                    self._found = find_live(self._repository)
                except RepositoryUnreachable as error:
                    _log.info("nobody can say which runs live: %s", error)
                    self._found = frozenset()
                self._found_at = now
            return experiment_id in self._found


def find_live(repository: Repository) -> frozenset[str]:
    """The experiments that run, as fresh signs of life tell; one listing, and a read for each daemon."""
    now = utc_now()
    live: set[str] = set()
    for heartbeat, age_s in repository.list_heartbeats(_fresh_s(MAX_PERIOD_S)):
        if age_s is None:
            age_s = (now - heartbeat.time).total_seconds()
        if age_s < _fresh_s(min(heartbeat.period_s, MAX_PERIOD_S)):
            live.update(run.id for run in heartbeat.experiments)
    return frozenset(live)


def _fresh_s(period_s: float) -> float:
    """How old a sign of life may be when it is repeated so often."""
    return MISSED_PERIODS * period_s + SLACK_S
