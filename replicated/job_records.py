"""What is published of a job: its record, with the root of its files, or its edit. Called by `jobs`."""

from __future__ import annotations

import dataclasses

from replicated.format.manifest import RootNode
from replicated.format.metadata import decode_edit
from replicated.format.shards import decode_rank_edit
from replicated.journal import Job
from replicated.keys import Announced
from replicated.publishing import Publication, publish_checkpoint, publish_experiment
from replicated.repository import Repository


def rank_of(job: Job) -> int | None:
    """Whose part of a checkpoint, or whose edit, a job is; None when it is no matter of ranks."""
    if job.kind == "checkpoint":
        part = job.checkpoint().part
        return None if part is None else part.rank
    edit = decode_rank_edit(job.record) if job.kind == "edit" else None
    return None if edit is None else edit.rank


def put_edit(repository: Repository, job: Job) -> None:
    """Write an edit."""
    edit = decode_edit(job.record)
    if edit is None:
        announced = Announced("edit", job.experiment_id, job.id)
        repository.publisher.publish(Publication(announced, job.record, is_unique=True))
        return
    repository.put_edit(job.experiment_id, job.id, edit)


def publication_of(job: Job, root: RootNode | None) -> Publication:
    """What is published of an experiment or a checkpoint that is stored."""
    if job.kind == "experiment":
        return publish_experiment(job.experiment(), root)
    record = job.checkpoint()
    # One whose files could not be captured is published too, for the sake of its metrics.
    stored = record if record.error else dataclasses.replace(record, state="stored")
    # Its id is random, and no other process has it.
    return dataclasses.replace(publish_checkpoint(stored, root), is_unique=True)
