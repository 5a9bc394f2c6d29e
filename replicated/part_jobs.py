"""Jobs for one process's part of a checkpoint: stored like others, then looked at until all are there.

A part whose files are in the repository holds up nothing: what was frozen for it is given up, the journal
says what it waits for, and it is looked at again at growing intervals. Belongs to one worker of `jobs` and is
used in its thread; after a restart of the daemon it goes on from the journal.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Final, TypeAlias

from replicate.errors import CaptureFailed, RepositoryDamaged
from replicate.ids import short
from replicate.records import CheckpointRecord
from replicated.format.manifest import RootNode
from replicated.journal import Job, Journal
from replicated.keys import SHARD_PREFIX, shard_key
from replicated.parts import Parts, Settled, adopt, find_record, publish_shard
from replicated.processes import age_s
from replicated.publishing import Publication, publish_checkpoint
from replicated.repository import Repository

#: Pauses between two looks, and the longest while somebody waits for the result.
FIRST_LOOK_S: Final = 0.2
LONGEST_LOOK_S: Final = 30.0
URGENT_LOOK_S: Final = 1.0
_GROWTH: Final = 1.5
#: Ranks of one job do not start at the same moment, and stores count seconds.
_START_SLACK_S: Final = 60.0

#: Has the files of a job stored, and publishes what is made of their root; False when nobody wants it now.
Put: TypeAlias = Callable[[Repository, Job, Callable[[RootNode | None], Publication]], bool]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Waiting:
    """A part that is stored, and waits for others; times of `time.monotonic`."""

    due: float
    news_at: float
    pause_s: float = FIRST_LOOK_S
    present: frozenset[int] = field(default_factory=frozenset)


class PartJobs:
    """See the module's text."""

    def __init__(
        self, journal: Journal, repository_url: str, put: Put, is_urgent: Callable[[], bool]
    ) -> None:
        self._journal = journal
        self._url = repository_url
        self._put = put
        self._is_urgent = is_urgent
        self._parts = Parts()
        self._waiting: dict[str, _Waiting] | None = None

    def take_due(self) -> Job | None:
        """A part that is to be looked at now."""
        now = time.monotonic()
        for job_id, waiting in list(self._known().items()):
            if waiting.due <= now or (
                self._is_urgent() and waiting.due - waiting.pause_s + URGENT_LOOK_S <= now
            ):
                job = self._journal.find(job_id)
                if job is not None and job.waits_for:
                    return job
                del self._known()[job_id]  # removed meanwhile
        return None

    def pause_s(self) -> float | None:
        """How long nothing is due; None when nothing waits."""
        if not self._known():
            return None
        due = min(waiting.due for waiting in self._known().values())
        longest = URGENT_LOOK_S if self._is_urgent() else LONGEST_LOOK_S
        return min(max(0.0, due - time.monotonic()), longest)

    def store(self, repository: Repository, job: Job, record: CheckpointRecord) -> Settled | None:
        """Bring a part into the repository, unless it is there, and see what has become of the checkpoint.

        None when it waits for others, or when nobody wants it any more.
        """
        if not job.waits_for:
            found = find_record(repository, record)
            if found is not None:
                # By an earlier start of the job, or before this daemon died.
                return adopt(record, found, is_stored=False)
            if self._parts.is_alone(repository, record, self._earlier(job)):
                return self._store_alone(repository, job, record)
            if not self._store_shard(repository, job, record):
                return None
            self._known()[job.id] = _Waiting(time.monotonic(), time.monotonic())
        return self._look(repository, job, record)

    def forget(self, job_id: str) -> None:
        """Look no more at a part that is settled."""
        self._known().pop(job_id, None)

    def give_up(self, repository: Repository, record: CheckpointRecord, reason: str) -> None:
        """Let the other ranks know that the part of this one will never be there."""
        publication = publish_shard(dataclasses.replace(record, error=reason), None)
        with suppress(RepositoryDamaged):  # it is there after all
            repository.publisher.publish(publication)

    def _store_alone(self, repository: Repository, job: Job, record: CheckpointRecord) -> Settled | None:
        single = dataclasses.replace(
            record, state="failed" if record.error else "stored", world_size=1, part=None
        )
        if not self._put(repository, job, lambda root: publish_checkpoint(single, root)):
            return None
        return Settled(single.state, single.error)

    def _store_shard(self, repository: Repository, job: Job, record: CheckpointRecord) -> bool:
        assert record.part is not None
        if record.part.rank == 0:
            self._remove_stale(repository, record)
        try:
            is_wanted = self._put_shard(repository, job, record)
        except CaptureFailed as error:
            _log.error("the files of %s are lost: %s", short(job.id), error)
            lost = dataclasses.replace(record, error=error.message)
            is_wanted = self._put_shard(repository, dataclasses.replace(job, has_files=False), lost)
        if is_wanted:
            self._journal.set_waiting(job.id, "waits for the other processes")
        return is_wanted

    def _put_shard(self, repository: Repository, job: Job, record: CheckpointRecord) -> bool:
        assert record.part is not None
        try:
            return self._put(repository, job, lambda root: publish_shard(record, root))
        except RepositoryDamaged:
            key = shard_key(record.experiment_id, record.id, record.part.rank)
            if not repository.store.exists(key):
                raise
            # Of an earlier start of the job, which did not complete this checkpoint.
            repository.store.delete(key)
            return self._put(repository, job, lambda root: publish_shard(record, root))

    def _remove_stale(self, repository: Repository, record: CheckpointRecord) -> None:
        """Before rank 0's part makes it possible that all are there: take away those of an earlier start.

        Only where starts cannot be told apart by the launcher, which else makes other ids.
        """
        run = next((run for run in self._journal.runs() if run.experiment_id == record.experiment_id), None)
        running_s = None if run is None else age_s(run.process)
        if running_s is None:
            return
        prefix = f"{SHARD_PREFIX}{record.experiment_id}/{record.id}/"
        for info in repository.store.list(prefix):
            if info.age_s is not None and info.age_s > running_s + _START_SLACK_S:
                _log.warning("%s is of an earlier start of the job, and is removed", info.key)
                repository.store.delete(info.key)

    def _look(self, repository: Repository, job: Job, record: CheckpointRecord) -> Settled | None:
        now = time.monotonic()
        waiting = self._known().setdefault(job.id, _Waiting(now, now))
        waiting.pause_s = min(waiting.pause_s * _GROWTH, LONGEST_LOOK_S)
        waiting.due = now + waiting.pause_s
        created = datetime.fromtimestamp(job.created_ns / 1e9, timezone.utc)

        def describe(present: frozenset[int]) -> tuple[float, float, str]:
            if present != waiting.present:
                waiting.present, waiting.news_at = present, now
            age = max(0.0, time.time() - job.created_ns / 1e9)
            return age, now - waiting.news_at, f"{created:%Y-%m-%d %H:%M:%S} UTC"

        found = self._parts.look(repository, record, describe)
        if isinstance(found, Settled):
            return found
        if found != job.waits_for:
            self._journal.set_waiting(job.id, found)
        return None

    def _earlier(self, job: Job) -> list[CheckpointRecord]:
        jobs = self._journal.of_experiment(job.experiment_id)
        return [one.checkpoint() for one in jobs if one.kind == "checkpoint" and one.state == "stored"]

    def _known(self) -> dict[str, _Waiting]:
        if self._waiting is None:
            now = time.monotonic()
            self._waiting = {job.id: _Waiting(now, now) for job in self._journal.waiting_parts(self._url)}
        return self._waiting
