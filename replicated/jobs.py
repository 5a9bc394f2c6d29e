"""Workers that bring captured snapshots from the spool into their repositories, in order.

One thread a repository takes the oldest captured job of the journal, has it stored by a process of its own
(`storing`), publishes it and commits what became of it; nothing is kept in memory that the journal does not
know, so a daemon that dies is continued by the next one. Trouble with a repository is retried for ever, with
growing pauses, and visible in `status`; only the loss of what was captured makes a job fail.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from replicate.errors import CaptureFailed, ReplicateError, RepositoryUnreachable
from replicate.ids import CheckpointId, short
from replicated import job_records as records
from replicated.format.manifest import RootNode
from replicated.journal import Job, Journal
from replicated.part_jobs import PartJobs
from replicated.parts import Settled
from replicated.processes import current_boot_id
from replicated.publishing import Publication, RecordRemoved
from replicated.repositories import OpenRepositories
from replicated.repository import Repository
from replicated.resting import Rest
from replicated.snapshot.capture import Capturer
from replicated.snapshot.held import HeldFiles
from replicated.snapshot.spool import Spool
from replicated.snapshot.store_channel import StoredTree
from replicated.standings import Standings
from replicated.storing import StoreProcessDied, Storing
from replicated.upkeep import keep_up

#: Somebody who waited is likely to wait again: clients ask in steps.
URGENT_AFTER_WAIT_S = 2.0
#: A bug of ours is tried this often before the job fails, so that it cannot block the queue for ever.
UNEXPECTED_TRIES = 3
#: Collectors would have to take what is relied on so often in a row; then it waits a while.
MOST_STORED_ANEW = 5

_AFTER_YOU_S = 0.01

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Frozen:
    """Where the captured bytes are until they are stored."""

    spool: Spool
    held: HeldFiles
    capturer: Capturer


@dataclass(frozen=True, slots=True)
class Progress:
    """What the workers do at the moment."""

    active_ids: frozenset[str] = frozenset()
    #: The job of which the figures below speak; empty when none.
    active_id: str = ""
    bytes_done: int = 0
    bytes_total: int = 0
    bytes_per_second: float = 0.0
    #: Why nothing moves, when a repository cannot be written to.
    waiting_because: str = ""


class Jobs:
    """Owner of the worker threads; see the module's text. Thread-safe."""

    def __init__(
        self,
        journal: Journal,
        repositories: OpenRepositories,
        frozen: Frozen,
        make_storing: Callable[[], Storing],
        standings: Standings,
        *,
        lost: Mapping[str, str] | None = None,
        upload_limit: int = 0,
    ) -> None:
        """`lost`: captures that did not survive the last daemon, and why. `upload_limit` is for all.

        `standings` is told how it stands with each repository.
        """
        self._standings = standings
        self._journal = journal
        self._repositories = repositories
        self._frozen = frozen
        self._make_storing = make_storing
        self._lost = dict(lost or {})
        self._upload_limit = upload_limit
        self._lock = threading.Lock()
        #: Notified when a job is finished or the workers are to stop.
        self._changed = threading.Condition(self._lock)
        self._workers: dict[str, _Worker] = {}
        self._stopping = False
        #: Jobs of which something may be in the repository: tried here, or from before this daemon.
        self._tried: set[str] = set()
        #: Threads that wait for something to be stored, and until when that counts after they left.
        self._waiting = 0
        self._urgent_until = 0.0
        #: By repository; see `publishing`.
        self._publishing: dict[str, threading.Lock] = {}

    def publishing(self, repository: str) -> threading.Lock:
        """Who publishes there or removes holds it: so nothing that was removed can appear afterwards."""
        with self._lock:
            return self._publishing.setdefault(repository, threading.Lock())

    def start(self) -> None:
        """Continue what the journal holds; call once."""
        waiting = self._journal.captured()
        self._tried.update(job.id for job in waiting)
        for repository in {job.repository for job in waiting}:
            self.wake(repository)

    def wake(self, repository: str) -> None:
        """Tell that the journal has a new job for a repository."""
        with self._lock:
            if self._stopping:
                return
            worker = self._workers.get(repository)
            if worker is None:
                worker = _Worker(self, repository)
                worker.thread.start()
                self._workers[repository] = worker
        worker.rest.wake.set()

    def stop(self) -> None:
        """Let the workers stop after the chunk they are at; what is not stored stays in the journal."""
        with self._lock:
            self._stopping = True
            workers = list(self._workers.values())
            self._changed.notify_all()
        for worker in workers:
            worker.rest.wake.set()
        for worker in workers:
            worker.thread.join()

    def secure_all(self, patience_s: float) -> None:
        """After `stop`: copy into the spool what lives elsewhere, before this daemon can watch it no more.

        Gives up after `patience_s`: what is left is as after the death of a daemon.
        """
        deadline = time.monotonic() + patience_s

        def secure() -> None:
            for job in self._journal.captured():
                if time.monotonic() > deadline or not self._secure(job):
                    return

        thread = threading.Thread(target=secure, name="secure", daemon=True)
        thread.start()
        thread.join(patience_s)
        if thread.is_alive():
            _log.warning("leaving with captured files that are not in the spool")

    def _secure(self, job: Job) -> bool:
        """Make the files of a waiting job survive daemon and power; False when there is trouble."""
        if not job.has_files or job.is_durable or job.boot_id != current_boot_id() or job.id in self._lost:
            return True
        frozen = self._frozen
        try:
            frozen.capturer.finish(job.id)
            frozen.held.secure(job.id)
            frozen.spool.sync(job.id)
        except CaptureFailed as error:
            _log.warning("%s is lost: %s", short(job.id), error)
            return True  # its job will say so
        except OSError as error:
            _log.warning("cannot make the files of %s safe: %s", short(job.id), error)
            return False
        self._journal.set_durable(job.id)
        return True

    def progress(self) -> Progress:
        """What the workers do at the moment."""
        with self._lock:
            workers = list(self._workers.values())
        active = [worker for worker in workers if worker.active is not None]
        waiting = next((worker.rest.because for worker in workers if worker.rest.because), "")
        if not active:
            return Progress(waiting_because=waiting)
        ids = frozenset(worker.active.id for worker in active if worker.active)
        first = active[0]
        job = first.active
        elapsed = time.monotonic() - first.started
        return Progress(
            active_ids=ids,
            active_id=job.id if job else "",
            bytes_done=first.bytes_done,
            bytes_total=job.size_bytes if job else 0,
            bytes_per_second=first.bytes_done / elapsed if elapsed > 0 else 0.0,
            waiting_because=waiting,
        )

    def waiting_because(self, repository: str) -> str:
        """Why nothing can be stored in a repository at the moment; empty when it can."""
        with self._lock:
            worker = self._workers.get(repository)
        return worker.rest.because if worker else ""

    def wait(self, ids: Iterable[str], timeout_s: float) -> None:
        """Return when no captured job is left, of these experiments and checkpoints or of all, or late."""
        wanted = frozenset(ids)
        deadline = time.monotonic() + timeout_s
        if timeout_s > 0:
            with self._lock:
                # Also one that only looks now and then for the parts of other processes.
                resting = [worker for worker in self._workers.values() if worker.active is None]
            for worker in resting:
                worker.rest.wake.set()  # it may be well again
        while not self._stopping:
            # Registered before the journal is asked, so that a job finished in between is not missed.
            with self._changed:
                if not self._journal.has_captured(wanted):
                    return
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                self._wait_urgently(left)

    def wait_for_change(self, timeout_s: float) -> None:
        """Return when a job has been finished, or late."""
        with self._changed:
            if not self._stopping:
                self._wait_urgently(timeout_s)

    def _wait_urgently(self, timeout_s: float) -> None:
        """Wait for a change; what is stored meanwhile is stored at a higher priority."""
        self._waiting += 1
        try:
            self._changed.wait(timeout_s)
        finally:
            self._waiting -= 1
            self._urgent_until = time.monotonic() + URGENT_AFTER_WAIT_S

    @property
    def is_urgent(self) -> bool:
        """Whether somebody waits for what is being stored: a user, or training that is held up."""
        return self._waiting > 0 or time.monotonic() < self._urgent_until

    def _finished(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping


class _Stopped(Exception):
    """The daemon stops: the job is left as it is."""


class _Worker:
    """The thread that stores the jobs of one repository."""

    def __init__(self, jobs: Jobs, repository: str) -> None:
        self._jobs = jobs
        self._repository = repository
        self.rest = Rest(repository, jobs._standings)
        # Read by other threads for `status` only; each is replaced as a whole.
        self.active: Job | None = None
        self.bytes_done = 0
        self.started = 0.0
        # The thread's own.
        self._storing = jobs._make_storing()
        self._parts = PartJobs(jobs._journal, repository, self._put, lambda: jobs.is_urgent)
        self._unexpected = 0
        self.thread = threading.Thread(target=self._run, name="store", daemon=True)

    def _run(self) -> None:
        try:
            while not self._jobs.is_stopping:
                try:
                    self._take_next()
                except _Stopped:
                    return
                except Exception as error:
                    # Nothing may end this thread but a stop: the journal itself can be out of space.
                    _log.exception("the worker of %s", self._repository)
                    self._rest(str(error))
        finally:
            self._storing.stop()

    def _take_next(self) -> None:
        """Store the oldest job, or wait for one; after trouble, wait for better times."""
        job = self._parts.take_due() or self._jobs._journal.next_captured(self._repository)
        if job is None:
            self.rest.note_well()
            is_woken = self.rest.wake.wait(self._parts.pause_s())
            self.rest.wake.clear()
            if not is_woken:
                return
            # The request that told of it is not answered yet, and would wait for Python's lock.
            time.sleep(_AFTER_YOU_S)
            return
        self.active, self.bytes_done, self.started = job, 0, time.monotonic()
        try:
            self._store(job)
        except RecordRemoved as error:
            self._parts.forget(job.id)
            self._end(job, Settled("failed", error.message))
        except CaptureFailed as error:
            self._fail(job, error.message)
        except (ReplicateError, OSError, sqlite3.OperationalError, StoreProcessDied) as error:
            if isinstance(error, StoreProcessDied) and error.is_crash:
                self._bear_with(job, error)
                return
            # No space, no descriptors, no memory, no repository: none of it is the snapshot's fault.
            _log.warning("storing %s: %s", short(job.id), error)
            self._wait_for_better_times(job, str(error))
        except _Stopped:
            raise
        except Exception as error:
            self._bear_with(job, error)
        else:
            self._unexpected = 0
            self.rest.start_anew()
            self.rest.note_well()
            keep_up(self._jobs._repositories.known(job.repository))
        finally:
            self.active = None

    def _bear_with(self, job: Job, error: Exception) -> None:
        """After a bug of ours: try again, but not for ever."""
        self._unexpected += 1
        _log.error("storing %s failed unexpectedly (try %d)", short(job.id), self._unexpected, exc_info=error)
        if self._unexpected < UNEXPECTED_TRIES:
            self._wait_for_better_times(job, f"{type(error).__name__}: {error}")
        else:
            self._unexpected = 0
            self._fail(job, f"internal error: {type(error).__name__}: {error}")

    def _wait_for_better_times(self, job: Job, reason: str) -> None:
        self.active = None
        if self._is_wanted(job):
            self._make_durable()
            self._rest(reason)
        else:
            # Removed meanwhile, by somebody who left its files to whoever was reading them.
            self._forget(job)

    def _rest(self, reason: str) -> None:
        self.rest.take(reason, is_urgent=self._jobs.is_urgent)

    def _store(self, job: Job) -> None:
        jobs = self._jobs
        # Only an experiment may make a repository: elsewhere a missing one has been moved or unmounted, and
        # an empty one in its place would take in checkpoints of experiments that it does not hold.
        repository = jobs._repositories.get(job.repository, create=job.kind == "experiment")
        rank = records.rank_of(job)
        # Ranks other than 0 may be faster than rank 0, which makes the experiment.
        if job.kind != "experiment" and not rank:
            records.check_experiment(repository, job)
        is_first = job.id not in jobs._tried
        jobs._tried.add(job.id)
        if rank is None and not is_first and (found := records.find_recorded(repository, job)) is not None:
            self._end(job, found)  # by an earlier try, or before this daemon died
            return
        if job.kind == "edit":
            with jobs.publishing(job.repository):
                records.put_edit(repository, job)
            self._finish(job)
        elif rank is not None:
            settled = self._parts.store(repository, job, job.checkpoint())
            self._forget(job)  # its files are in the repository, or will never be
            if settled is not None:
                self._settle(repository, job, settled)
        elif self._put(repository, job, lambda root: records.publication_of(job, root, is_first=is_first)):
            self._finish(job)

    def _put(self, repository: Repository, job: Job, make: Callable[[RootNode | None], Publication]) -> bool:
        """Have the files of a job stored, and publish what is made of their root.

        Gives False, and publishes nothing, when nobody wants it any more.
        """
        jobs = self._jobs
        for _ in range(MOST_STORED_ANEW):
            stored = self._ingest(job) if job.has_files else None
            publication = make(stored.root if stored else None)
            if stored is None or self._announce(repository, job, publication, stored):
                break
            _log.info("%s: what it relied on was collected meanwhile, storing it again", short(job.id))
        else:
            raise RepositoryUnreachable(
                f"what {short(job.id)} relies on in {job.repository} is collected again and again"
            )
        with jobs.publishing(job.repository):
            if not self._is_wanted(job):
                repository.publisher.withdraw(publication)
                self._forget(job)
                return False
            if stored is None:
                repository.publisher.publish(publication)
            else:
                repository.publisher.commit(publication)
        return True

    def _settle(self, repository: Repository, job: Job, settled: Settled) -> None:
        """Commit what has become of a checkpoint that several processes made."""
        jobs = self._jobs
        self._parts.forget(job.id)
        with jobs.publishing(job.repository):
            if not self._is_wanted(job):
                # Removed while it was published.
                repository.delete_checkpoint(job.experiment_id, CheckpointId(job.subject_id))
        jobs._journal.finish(job.id, settled.state, time.time_ns(), settled.error)
        jobs._finished()

    def _announce(
        self, repository: Repository, job: Job, publication: Publication, stored: StoredTree
    ) -> bool:
        """Announce what has been stored; whether all of it is there to stay."""
        with self._jobs.publishing(job.repository):
            if not self._is_wanted(job):
                return True  # nothing is committed
            repository.publisher.announce(publication)
        return repository.publisher.settle(publication, stored.generation)

    def _ingest(self, job: Job) -> StoredTree:
        """Bring the files of a job into the repository; nothing is visible to readers yet."""
        jobs = self._jobs
        if job.id in jobs._lost:
            raise CaptureFailed(jobs._lost[job.id])
        if not job.is_durable and job.boot_id != current_boot_id():
            raise CaptureFailed("the machine restarted before the captured files were safe on disk")
        jobs._frozen.capturer.finish(job.id)
        limits = [limit for limit in (job.upload_limit, jobs._upload_limit) if limit]
        return self._storing.ingest(
            job.repository,
            job.experiment_id,
            job.id,
            jobs._journal.entries(job.id),
            jobs._frozen.spool.path(job.id),
            upload_limit=min(limits, default=0),
            on_progress=self._on_progress,
            is_urgent=lambda: jobs.is_urgent,
        )

    def _forget(self, job: Job) -> None:
        """Give up what was frozen for a job."""
        if job.has_files:
            self._jobs._frozen.capturer.forget(job.id)

    def _is_wanted(self, job: Job) -> bool:
        current = self._jobs._journal.find(job.id)
        return current is not None and current.state == "captured"

    def _finish(self, job: Job) -> None:
        error = job.checkpoint().error if job.kind == "checkpoint" else ""
        self._end(job, Settled("failed" if error else "stored", error))

    def _end(self, job: Job, settled: Settled) -> None:
        if self._is_wanted(job):
            self._jobs._journal.finish(job.id, settled.state, time.time_ns(), settled.error)
        self._jobs._tried.discard(job.id)
        self._forget(job)
        self._jobs._finished()

    def _fail(self, job: Job, reason: str) -> None:
        """Give up a job: what was recorded is published without its files, and says so."""
        _log.error("%s %s will not be stored: %s", job.kind, short(job.id), reason)
        jobs = self._jobs
        settled = Settled("failed", reason)
        try:
            repository = jobs._repositories.get(job.repository)
            with jobs.publishing(job.repository):
                if not self._is_wanted(job):
                    self._forget(job)
                    return
                if records.rank_of(job) is not None:
                    self._parts.give_up(repository, job.checkpoint(), reason)
                elif (found := records.find_recorded(repository, job)) is not None:
                    settled = found  # all of it was there already
                else:
                    records.put_failed(repository, job, reason)
        except ReplicateError as error:
            _log.warning("the record of %s was not written either: %s", short(job.id), error)
        self._end(job, settled)

    def _make_durable(self) -> None:
        """Copy and fsync what waits: jobs that cannot be stored now may have to survive a power cut."""
        jobs = self._jobs
        for job in jobs._journal.captured(self._repository):
            if jobs.is_stopping or not jobs._secure(job):
                return

    def _on_progress(self, bytes_done: int) -> None:
        self.bytes_done = bytes_done
        if self._jobs.is_stopping:
            raise _Stopped
