"""`replicate rm`: remove experiments and checkpoints, stored or not, so that they do not come back.

Everything is resolved before anything is deleted. Tombstones in the journal come first: a job that is
being stored at that moment sees its own and publishes nothing. Only records go, and with them what
leads to the data; the data itself is left to the collector.
"""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

from replicate.errors import InvalidArgument, RepositoryMissing
from replicate.ids import CheckpointId, ExperimentId, short
from replicated.experiments import Experiments
from replicated.jobs import Jobs
from replicated.journal import Job, Journal
from replicated.mount.life.table import MountTable
from replicated.repositories import OpenRepositories
from replicated.repository import Repository
from replicated.snapshot.capture import Capturer


@dataclass(frozen=True, slots=True)
class Removable:
    """One thing that a removal takes away."""

    id: str
    kind: Literal["experiment", "checkpoint"]
    experiment_id: ExperimentId
    checkpoint_count: int
    step: int


class Removal:
    """Plans and does removals; called by `rpc`."""

    def __init__(
        self,
        journal: Journal,
        capturer: Capturer,
        jobs: Jobs,
        experiments: Experiments,
        repositories: OpenRepositories,
        mounts: MountTable,
    ) -> None:
        self._journal = journal
        self._capturer = capturer
        self._jobs = jobs
        self._experiments = experiments
        self._repositories = repositories
        self._mounts = mounts

    def plan(self, repository: str, references: Sequence[str], *, force: bool) -> list[Removable]:
        """What these references would take away; raises as `Experiments.resolve`.

        What is running or mounted is refused with `InvalidArgument` unless `force` is set.
        """
        plan: dict[str, Removable] = {}
        for reference in references:
            resolution = self._experiments.resolve(repository, reference)
            summary, checkpoint = resolution.summary, resolution.checkpoint
            experiment_id = summary.record.id
            whole = resolution.named_experiment and ":" not in reference
            if whole and summary.status == "running" and not force:
                raise InvalidArgument(
                    f"experiment {short(experiment_id)} is running",
                    hint="stop it first, or use -f/--force",
                    fields={"id": experiment_id},
                )
            if whole or checkpoint is None:
                plan[experiment_id] = Removable(
                    experiment_id, "experiment", experiment_id, summary.checkpoint_count, 0
                )
            else:
                plan[checkpoint.id] = Removable(
                    checkpoint.id, "checkpoint", experiment_id, 0, checkpoint.step
                )
        if not force:
            self._refuse_mounted(repository, plan)
        return list(plan.values())

    def remove(self, repository: str, plan: Sequence[Removable]) -> None:
        """Take away what a plan lists; durable on return, and harmless to repeat."""
        opened = self._open(repository, plan)
        for item in plan:
            jobs = [job.id for job in self._jobs_of(item)]
            with self._jobs.publishing(repository):
                self._journal.remove(jobs, time.time_ns())
                if item.kind == "experiment":
                    self._journal.end_run(item.experiment_id)
                if opened is not None and item.kind == "experiment":
                    opened.delete_experiment(item.experiment_id)
                elif opened is not None:
                    opened.delete_checkpoint(item.experiment_id, CheckpointId(item.id))
            progress = self._jobs.progress()
            for job in jobs:
                # What a job that is being stored has frozen is given up by its worker.
                if job not in progress.active_ids:
                    self._capturer.forget(job)

        self._jobs.wake(repository)  # what it waited for may be gone

    def _refuse_mounted(self, repository: str, plan: Container[str]) -> None:
        for mount in self._mounts.list():
            if mount.repository != repository:
                continue
            for identifier in (mount.id, mount.experiment_id):
                if identifier in plan:
                    raise InvalidArgument(
                        f"{short(identifier)} is mounted on {mount.directory}",
                        hint="unmount it first (`replicate umount`), or use -f/--force",
                        fields={"id": identifier},
                    )

    def _open(self, repository: str, plan: Sequence[Removable]) -> Repository | None:
        """The repository; None when it is missing and nothing of the plan is in it yet."""
        try:
            return self._repositories.get(repository)
        except RepositoryMissing:
            if any(job.state == "stored" for item in plan for job in self._jobs_of(item)):
                raise
            return None

    def _jobs_of(self, item: Removable) -> list[Job]:
        jobs = self._journal.of_experiment(item.experiment_id)
        return [job for job in jobs if item.kind == "experiment" or job.subject_id == item.id]
