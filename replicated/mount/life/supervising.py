"""Brings back mounts whose process has died, and ends those whose owner has.

Every mount in the register has a thread of the daemon that sleeps until its process ends. What it does then
is done by `table`; when, and whether, is decided by `next_attempt_s`. A mount that lives needs nothing of
this: while no daemon runs, mounts go on, and the next daemon brings back what died meanwhile.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Sequence

from replicate.errors import MountFailed, ReplicateError
from replicate.records import ProcessIdentity
from replicated.mount.life.registry import Registration
from replicated.mount.life.table import MountTable, is_running
from replicated.processes import exit_status, is_alive, open_pidfd

_LOG = logging.getLogger(__name__)

#: A mount that has failed so often in so many seconds is not brought back any more.
MAX_FAILURES = 5
FAILURES_WITHIN_S = 60.0
#: How long to wait after the first failure, the second, and so on.
_DELAYS_S = (0.0, 0.2, 1.0, 3.0)
#: What was promised to come back, and cannot, is tried so often: its repository may be there later.
_PATIENT_DELAY_S = 20.0
#: A mount that is to end with its owner, but is in use, is tried so often; also after a bug.
_RETRY_S = 1.0
_STOP_PATIENCE_S = 5.0


def next_attempt_s(failures: Sequence[float], now_s: float, *, is_patient: bool) -> float | None:
    """When to bring a mount back that has failed at these times: seconds from now; None: not any more.

    `is_patient`: it is not given up.
    """
    recent = sum(now_s - failure < FAILURES_WITHIN_S for failure in failures)
    if recent >= MAX_FAILURES:
        return _PATIENT_DELAY_S if is_patient else None
    return _DELAYS_S[recent - 1] if recent else 0.0


class Supervisor:
    """Watches over the mounts of a table from `start` to `stop`."""

    def __init__(self, table: MountTable) -> None:
        self._table = table
        #: Readable for ever from the moment when everything is to be let be.
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        # Guards what follows; a leaf.
        self._lock = threading.Lock()
        self._threads: dict[str, threading.Thread] = {}

    def start(self) -> None:
        """Watch all that is in the register, and what is mounted from now on."""
        self._table.on_mounted(self._watch)
        for registration in self._table.registrations():
            self._watch(registration.name)

    def stop(self) -> None:
        """Let everything be. A mount that is just being brought back is, and lives on."""
        os.eventfd_write(self._stop, 1)
        deadline = time.monotonic() + _STOP_PATIENCE_S
        with self._lock:
            threads = list(self._threads.values())
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _watch(self, name: str) -> None:
        thread = threading.Thread(target=self._run, args=(name,), name=f"mount {name}", daemon=True)
        with self._lock:
            self._threads[name] = thread
        thread.start()

    def _run(self, name: str) -> None:
        while True:
            try:
                self._keep(name)
                break
            except Exception:
                # A bug, or a register that cannot be read: the mount is to be watched all the same.
                _LOG.exception("watching over the mount %s failed", name)
                if self._sleep(_RETRY_S):
                    break
        with self._lock:
            self._threads.pop(name, None)

    def _keep(self, name: str) -> None:
        """Keep a mount until it is ended or given up, or this supervisor stops."""
        failures: list[float] = []
        reason, was_refused = "its process has died", False
        counted: ProcessIdentity | None = None
        while (registration := self._table.find(name)) is not None and not self._sleep(0):
            owner = registration.order.owner
            if owner is not None and not is_alive(owner):
                if self._end(registration) or self._sleep(_RETRY_S):
                    return
                continue
            if is_running(registration):
                reason = self._wait_for_end(registration)
                continue
            if not registration.is_wanted_back:
                return
            if registration.process not in (None, counted):
                counted, was_refused = registration.process, False
                failures.append(time.monotonic())
            is_patient = was_refused and registration.order.options.persist
            wait_s = next_attempt_s(failures, time.monotonic(), is_patient=is_patient)
            if wait_s is None:
                _LOG.error("the mount on %s is given up: %s", registration.order.directory, reason)
                self._table.give_up(registration, f"given up after {MAX_FAILURES} failures: {reason}")
                return
            if self._sleep(wait_s):
                return
            try:
                self._table.bring_back(registration)
            except ReplicateError as error:
                failures.append(time.monotonic())
                reason, was_refused = error.message, True

    def _wait_for_end(self, registration: Registration) -> str:
        """How the process of a mount ended; empty when it lives on, but its owner or we have an end."""
        assert registration.process is not None, "it runs"
        process = open_pidfd(registration.process)
        if process is None:
            return "its process has died"
        try:
            if not self._sleep_until_end(process, registration.order.owner):
                return ""
            # The system tells how once the parent has taken note, which may be us.
            self._table.reap()
            how = f"its process {_describe_end(exit_status(process))}"
        finally:
            os.close(process)
        if self._table.find(registration.name) is not None:
            _LOG.warning("the mount on %s is gone: %s", registration.order.directory, how)
        return how

    def _sleep_until_end(self, process: int, owner: ProcessIdentity | None) -> bool:
        """Wait for the end of a process, of its owner or of this supervisor; whether it was the first."""
        watched = open_pidfd(owner) if owner is not None else None
        if owner is not None and watched is None:
            return False
        try:
            poll = select.poll()
            for descriptor in (process, self._stop, watched):
                if descriptor is not None:
                    poll.register(descriptor, select.POLLIN)
            return any(descriptor == process for descriptor, _ in poll.poll())
        finally:
            if watched is not None:
                os.close(watched)

    def _end(self, registration: Registration) -> bool:
        """Unmount what has lost its owner; whether that was possible."""
        try:
            self._table.end(registration)
        except MountFailed as error:
            _LOG.info("%s", error.message)
            return False
        return True

    def _sleep(self, wait_s: float) -> bool:
        """Wait; whether this supervisor stops."""
        return bool(select.select([self._stop], [], [], wait_s)[0])


def _describe_end(status: int | None) -> str:
    if status is None:
        return "has died"
    if status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"
    return f"ended with status {status}"
