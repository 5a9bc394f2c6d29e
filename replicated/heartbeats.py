"""Tells other machines which runs of this one live: one small object a repository, replaced steadily.

The object stands for this daemon and names all its live runs, so that what it costs does not grow with them.
Which runs live is the journal's knowledge. A repository that is out of reach holds up no other one, nor the
watching of processes: each has a thread for as long as runs of it live.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from replicate.errors import ReplicateError, RepositoryMissing
from replicate.records import utc_now
from replicated.format.metadata import Heartbeat, LiveRun
from replicated.journal import Journal
from replicated.repositories import OpenRepositories
from replicated.repository import Repository

PERIOD_S: Final = 10
#: Where each request costs money.
COSTLY_PERIOD_S: Final = 60
#: Runs that begin together are told of together; where requests cost money, no sooner than after so long.
_GATHER_S: Final = 0.2
_COSTLY_GATHER_S: Final = 5.0

_log = logging.getLogger(__name__)


class Heartbeats:
    """Owner of the threads. Thread-safe; the lock is a leaf."""

    def __init__(
        self,
        journal: Journal,
        repositories: OpenRepositories,
        daemon_id: str,
        host: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._repositories = repositories
        self._daemon_id = daemon_id
        self._host = host
        self._clock = clock
        self._lock = threading.Lock()
        self._pulses: dict[str, _Pulse] = {}
        self._is_stopping = False

    def wake(self, url: str) -> None:
        """Runs of a repository have begun or ended."""
        with self._lock:
            if self._is_stopping:
                return
            pulse = self._pulses.get(url)
            if pulse is None:
                pulse = self._pulses[url] = _Pulse(self, url)
                pulse.thread.start()
            pulse.changed.set()

    def stop(self) -> None:
        """Tell no more; the last signs are left to become old, as the runs go on. Call once."""
        with self._lock:
            self._is_stopping = True
            pulses = list(self._pulses.values())
        for pulse in pulses:
            pulse.changed.set()
        for pulse in pulses:
            # One that waits for a store which does not answer is left behind.
            pulse.thread.join(_GATHER_S)

    def runs(self, url: str) -> tuple[LiveRun, ...]:
        """The live runs of a repository."""
        return tuple(
            LiveRun(run.experiment_id, run.process) for run in self._journal.runs() if run.repository == url
        )

    def _leave(self, pulse: _Pulse) -> bool:
        """Whether a thread may end: nothing has begun since it looked."""
        with self._lock:
            if pulse.changed.is_set() and not self._is_stopping:
                return False
            del self._pulses[pulse.url]
            return True


class _Pulse:
    """The sign of life in one repository."""

    def __init__(self, owner: Heartbeats, url: str) -> None:
        self.url = url
        self.changed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._owner = owner
        self._is_in_trouble = False

    def _run(self) -> None:
        owner = self._owner
        while not owner._is_stopping:
            self.changed.clear()
            runs = owner.runs(self.url)
            pause_s, gather_s = PERIOD_S, _GATHER_S
            try:
                repository = owner._repositories.get(self.url)
                if repository.store.capabilities.has_costly_requests:
                    pause_s, gather_s = COSTLY_PERIOD_S, _COSTLY_GATHER_S
                self._tell(repository, runs, pause_s)
            except RepositoryMissing:
                pass  # not made yet, or unmounted: whoever stores in it says so
            except ReplicateError as error:
                if not self._is_in_trouble:
                    _log.warning("other machines cannot be told which runs live: %s", error)
                self._is_in_trouble = True
            except Exception:
                _log.exception("telling which runs live in %s", self.url)
            else:
                self._is_in_trouble = False
            if not runs and owner._leave(self):
                return
            begun = owner._clock()
            if self.changed.wait(pause_s):
                # What begins in the same moment is told together.
                time.sleep(max(0.0, min(gather_s, gather_s - (owner._clock() - begun))))

    def _tell(self, repository: Repository, runs: tuple[LiveRun, ...], period_s: int) -> None:
        owner = self._owner
        if runs:
            repository.put_heartbeat(Heartbeat(owner._daemon_id, utc_now(), owner._host, period_s, runs))
        else:
            repository.delete_heartbeat(owner._daemon_id)
