"""Takes requests in: capture the files, commit the journal, answer.

When a method here has returned, the snapshot is the daemon's: the training script may change or delete
the files, or die. A request is known by the id that the client chose, so that a repeated one gets the
stored answer and captures nothing twice. Called by `rpc` from many threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from replicate import wire
from replicate.access import scheme_of
from replicate.errors import (
    CallAbandoned,
    CaptureFailed,
    NotFound,
    RepositoryMissing,
    RepositoryUnreachable,
)
from replicate.ids import ExperimentId, short
from replicate.records import (
    CheckpointRecord,
    EndStatus,
    ExperimentRecord,
    ProcessIdentity,
    SnapshotState,
    utc_now,
)
from replicated.admission import Admission, Bounds
from replicated.format.metadata import Edit, EndEdit, ResumeEdit, encode_edit
from replicated.format.shards import RankEdit, decode_rank_edit, encode_rank_edit
from replicated.journal import Job, JobState, Journal, Run, job_id_of
from replicated.processes import current_boot_id
from replicated.repositories import OpenRepositories
from replicated.snapshot.capture import Captured, Capturer, CaptureRequest
from replicated.snapshot.tree_caches import TreeCaches

#: A capture that takes so long may have been interrupted for longer than its client was willing to wait.
_SUSPICIOUSLY_LONG_S = 5.0
_HEARING_S = 0.2


@dataclass(frozen=True, slots=True)
class Terms:
    """What a request says besides the record and the files."""

    bounds: Bounds = field(default_factory=Bounds)
    #: Bytes a second that may be sent to the repository; 0: no limit.
    upload_limit: int = 0
    #: How long calls held up the training since it was last told.
    stall_ns: int = 0
    #: The answer has to survive a power cut (`capture: copy`).
    is_durable: bool = False
    #: Why the checkpoint could not be recorded when it was made; its files are not captured any more.
    missed_because: str = ""
    #: Whether the client still waits for the answer.
    is_wanted: Callable[[], bool] = lambda: True


@dataclass(frozen=True, slots=True)
class Accepted:
    """The answer to a request: what was captured, and what has become of it since."""

    captured: Captured
    state: SnapshotState


class Intake:
    """Accepts experiments, checkpoints and the ends of runs; see the module's text."""

    def __init__(
        self,
        journal: Journal,
        capturer: Capturer,
        repositories: OpenRepositories,
        tree_caches: TreeCaches,
        admission: Admission,
        *,
        wake: Callable[[str], None],
        watch: Callable[[Run], None],
        forget: Callable[[str], None],
        tell_runs: Callable[[str], None] = lambda repository: None,
    ) -> None:
        """`wake` is told of a new job, `watch` and `forget` of runs, `tell_runs` where they have changed."""
        self._journal = journal
        self._capturer = capturer
        self._repositories = repositories
        self._tree_caches = tree_caches
        self._admission = admission
        self._wake = wake
        self._watch = watch
        self._forget = forget
        self._tell_runs = tell_runs
        self._lock = threading.Lock()
        #: Ids being accepted; guarded by the lock. The condition tells that one has left.
        self._in_progress: set[str] = set()
        self._left = threading.Condition(self._lock)

    def create_experiment(
        self,
        repository: str,
        record: ExperimentRecord,
        request: CaptureRequest | None,
        terms: Terms = Terms(),
    ) -> Accepted:
        """Capture and journal an experiment, and watch its process.

        Raises what opening the repository and capturing raise, and `QueueFull`; nothing is recorded then.
        """
        with self._exclusive(record.id):
            answered = self._answered(record.id)
            if answered is not None:
                return answered
            warning = self._check_repository(repository, create=True)
            accepted = self._accept(
                Job(
                    id=record.id,
                    kind="experiment",
                    experiment_id=record.id,
                    repository=repository,
                    record=wire.encode_experiment(record).SerializeToString(),
                    created_ns=time.time_ns(),
                    is_durable=terms.is_durable,
                ),
                request,
                terms,
            )
        if record.process is not None:
            self._begin_run(Run(record.id, repository, record.process))
        if not warning:
            return accepted
        captured = accepted.captured
        return dataclasses.replace(
            accepted, captured=dataclasses.replace(captured, warnings=(warning, *captured.warnings))
        )

    def create_checkpoint(
        self,
        repository: str,
        record: CheckpointRecord,
        request: CaptureRequest | None,
        terms: Terms = Terms(),
    ) -> Accepted:
        """Capture and journal a checkpoint.

        Raises `PathMissing` and `QueueFull` when nothing was recorded, and `CaptureFailed` when the
        checkpoint was recorded, with its metrics and the reason, as failed.
        """
        job_id = job_id_of(record)
        with self._exclusive(job_id):
            answered = self._answered(job_id)
            if answered is not None:
                return answered
            # Another rank may be faster than rank 0, which makes the experiment.
            is_another_rank = record.part is not None and record.part.rank > 0
            self._check_experiment(repository, record.experiment_id, may_be_missing=is_another_rank)
            job = Job(
                id=job_id,
                kind="checkpoint",
                experiment_id=record.experiment_id,
                repository=repository,
                record=wire.encode_checkpoint(record).SerializeToString(),
                created_ns=time.time_ns(),
                is_durable=terms.is_durable,
            )
            if terms.missed_because:
                self._add_failed(job, record, terms.missed_because, terms.stall_ns)
                return Accepted(Captured(0, 0, ()), "failed")
            try:
                return self._accept(job, request, terms)
            except CaptureFailed as error:
                self._add_failed(job, record, error.message, terms.stall_ns)
                raise

    def _add_failed(self, job: Job, record: CheckpointRecord, reason: str, stall_ns: int) -> None:
        """Record a checkpoint without its files, for the sake of its metrics."""
        failed = dataclasses.replace(record, state="failed", error=reason)
        encoded = wire.encode_checkpoint(failed).SerializeToString()
        self._journal.add(dataclasses.replace(job, record=encoded), stall_ns=stall_ns)
        self._wake(job.repository)

    def end_experiment(
        self,
        repository: str,
        experiment_id: ExperimentId,
        status: EndStatus,
        ended: datetime,
        *,
        is_exiting: bool = False,
        stall_ns: int = 0,
    ) -> None:
        """Record how a run ended; with `is_exiting`, its exit status may still make that `failed`."""
        run = self._journal.end_run(experiment_id)
        member = self._find_member(experiment_id)
        if run is not None and is_exiting and status == "stopped":
            self._watch(run)
        else:
            self._forget(experiment_id)
        self._tell_runs(repository)
        if member is not None:
            self._add_member_end(member, status, ended)
        else:
            self._add_end(repository, experiment_id, EndEdit(status, ended), stall_ns)

    def join_experiment(
        self, repository: str, experiment_id: ExperimentId, edit: RankEdit, process: ProcessIdentity
    ) -> None:
        """Record that another process than rank 0 takes part in an experiment, which need not exist yet.

        It is a run of its own, under its `member_id`.
        """
        with suppress(RepositoryMissing):
            self._check_repository(repository, create=False)
        # First what tells the run from that of an experiment.
        self._add_rank_edit(repository, experiment_id, edit, edit.member_id)
        self._begin_run(Run(ExperimentId(edit.member_id), repository, process))

    def _find_member(self, identifier: str) -> Job | None:
        """The job by which a process joined that is known by this id; None for an experiment."""
        job = self._journal.find(identifier)
        return job if job is not None and job.kind == "edit" else None

    def _add_member_end(self, job: Job, status: EndStatus, at: datetime) -> None:
        joined = decode_rank_edit(job.record)
        assert joined is not None, "only a rank's first edit has the id of the rank"
        edit = dataclasses.replace(joined, status=status, time=at)
        identifier = hashlib.sha256(job.id.encode() + encode_rank_edit(edit)).hexdigest()
        self._add_rank_edit(job.repository, job.experiment_id, edit, identifier)

    def _add_rank_edit(
        self, repository: str, experiment_id: ExperimentId, edit: RankEdit, identifier: str
    ) -> None:
        self._journal.add(
            Job(
                id=identifier,
                kind="edit",
                experiment_id=experiment_id,
                repository=repository,
                record=encode_rank_edit(edit),
                created_ns=time.time_ns(),
                is_durable=True,
                boot_id=current_boot_id(),
            )
        )
        self._wake(repository)

    def resume_experiment(
        self, repository: str, experiment_id: ExperimentId, process: ProcessIdentity, at: datetime
    ) -> None:
        """Record that a new process goes on with an experiment."""
        self._check_experiment(repository, experiment_id)
        self._begin_run(Run(experiment_id, repository, process))
        self._add_edit(repository, experiment_id, ResumeEdit(at))

    def process_gone(self, run: Run, exit_status: int | None) -> None:
        """Record that a training process has ended, if that is news; called by the watcher."""
        is_news = self._journal.end_run(run.experiment_id) is not None
        self._tell_runs(run.repository)
        member = self._find_member(run.experiment_id)
        if member is not None:
            if exit_status is not None and exit_status > 0:
                self._add_member_end(member, "failed", utc_now())
            elif is_news:
                self._add_member_end(member, "killed", utc_now())
        elif exit_status is not None and exit_status > 0:
            self._add_end(run.repository, run.experiment_id, EndEdit("failed", utc_now()))
        elif is_news:
            self._add_end(run.repository, run.experiment_id, EndEdit("killed", utc_now()))

    def _check_repository(self, url: str, *, create: bool) -> str:
        """Raise what is wrong with a repository; later trouble with it does not stop training.

        One that this machine has used, in a bucket that cannot be reached now, is trouble of that kind: what
        users are to be told of it.
        """
        try:
            self._repositories.get(url, create=create).check_writable()
        except RepositoryMissing:
            raise
        except RepositoryUnreachable as error:
            if scheme_of(url) is None or not self._repositories.has_used(url):
                raise
            return (
                f"{url} cannot be reached now, so what is saved waits on this machine until it can:"
                f" {error.message}"
            )
        return ""

    def _begin_run(self, run: Run) -> None:
        self._journal.start_run(run)
        self._watch(run)
        self._tell_runs(run.repository)

    def _accept(self, job: Job, request: CaptureRequest | None, terms: Terms) -> Accepted:
        job = dataclasses.replace(job, boot_id=current_boot_id())
        captured = Captured(0, 0, ())
        if request is not None:
            self._admission.wait(job.repository, terms.bounds)
        try:
            if request is not None:
                captured = self._capture(job, request, terms)
                job = dataclasses.replace(
                    job,
                    has_files=True,
                    file_count=captured.file_count,
                    size_bytes=captured.size_bytes,
                    frozen_bytes=captured.frozen_bytes,
                    spooled_bytes=captured.spooled_bytes,
                    upload_limit=terms.upload_limit,
                )
            self._journal.add(job, captured.entries, terms.stall_ns)
        except BaseException:
            self._capturer.forget(job.id)
            raise
        self._wake(job.repository)
        return Accepted(captured, "captured")

    def _capture(self, job: Job, request: CaptureRequest, terms: Terms) -> Captured:
        begun = time.monotonic()
        captured = self._capturer.capture(
            request, _local_directory(job.repository), self._tree_caches.find(job.repository)
        )
        if time.monotonic() - begun > _SUSPICIOUSLY_LONG_S:
            # If this process was stopped meanwhile, it learns a moment later who has gone meanwhile.
            time.sleep(_HEARING_S)
        if not terms.is_wanted():
            # The script has gone on and changed its files: what was captured is not what it asked for.
            raise CallAbandoned(f"{job.kind} {short(job.id)} was given up before it was captured")
        return captured

    def _answered(self, identifier: str) -> Accepted | None:
        job = self._journal.find(identifier)
        if job is None:
            return None
        return Accepted(Captured(job.file_count, job.size_bytes, ()), _public_state(job.state))

    def _check_experiment(
        self, repository: str, experiment_id: ExperimentId, *, may_be_missing: bool = False
    ) -> None:
        job = self._journal.find(experiment_id)
        if job is None and may_be_missing:
            return
        if job is None:
            # What is in a bucket is asked for when it is stored: training does not wait for the network.
            if scheme_of(repository) is None:
                self._repositories.get(repository).load_experiment(experiment_id)
        elif job.state == "removed":
            raise NotFound(
                f"experiment {short(experiment_id)} was deleted",
                hint="call replicate.init() to begin a new one",
                fields={"id": experiment_id},
            )

    def _add_end(
        self, repository: str, experiment_id: ExperimentId, edit: EndEdit, stall_ns: int = 0
    ) -> None:
        """Record an end; from now on it tells for how long calls held up the training."""
        before_ns = self._journal.stalls().get(experiment_id, 0)
        told = dataclasses.replace(edit, stall_ns=before_ns + stall_ns)
        self._add_edit(repository, experiment_id, edit, encode_edit(told), -before_ns)

    def _add_edit(
        self,
        repository: str,
        experiment_id: ExperimentId,
        edit: Edit,
        encoded: bytes = b"",
        stall_ns: int = 0,
    ) -> None:
        plain = encode_edit(edit)
        encoded = encoded or plain
        # Made of what is said, so that a repeated request is the same edit.
        identifier = hashlib.sha256(experiment_id.encode() + plain).hexdigest()
        self._journal.add(
            Job(
                id=identifier,
                kind="edit",
                experiment_id=experiment_id,
                repository=repository,
                record=encoded,
                created_ns=time.time_ns(),
                is_durable=True,
                boot_id=current_boot_id(),
            ),
            stall_ns=stall_ns,
        )
        self._wake(repository)

    @contextmanager
    def _exclusive(self, identifier: str) -> Iterator[None]:
        """One request of an id at a time: a client that lost its connection may repeat it meanwhile."""
        with self._left:
            while identifier in self._in_progress:
                self._left.wait()
            self._in_progress.add(identifier)
        try:
            yield
        finally:
            with self._left:
                self._in_progress.remove(identifier)
                self._left.notify_all()


def _local_directory(repository: str) -> Path | None:
    return Path(repository.removeprefix("file://")) if repository.startswith("file://") else None


def _public_state(state: JobState) -> SnapshotState:
    return "failed" if state == "removed" else state
