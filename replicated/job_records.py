"""What is published of a job: its record, with the root of its files, or its edit. Called by `jobs`."""

from __future__ import annotations

import dataclasses

from replicate.errors import NotFound, RepositoryDamaged
from replicate.ids import short
from replicated.format.canonical import Malformed
from replicated.format.manifest import RootNode
from replicated.format.metadata import decode_checkpoint, decode_edit, decode_experiment, decode_snapshot
from replicated.format.shards import decode_rank_edit
from replicated.journal import Job
from replicated.keys import Announced, checkpoint_key, experiment_key
from replicated.parts import Settled
from replicated.publishing import Publication, RecordRemoved, publish_checkpoint, publish_experiment
from replicated.repository import Repository
from replicated.store.base import KeyMissing


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


def publication_of(job: Job, root: RootNode | None, *, is_first: bool = False) -> Publication:
    """What is published of an experiment or a checkpoint that is stored; `is_first`: it was never tried."""
    if job.kind == "experiment":
        return publish_experiment(job.experiment(), root)
    record = job.checkpoint()
    # One whose files could not be captured is published too, for the sake of its metrics.
    stored = record if record.error else dataclasses.replace(record, state="stored")
    # Its id is random, and no other process has it; an earlier try may have left other bytes.
    return dataclasses.replace(publish_checkpoint(stored, root), is_unique=is_first)


def put_failed(repository: Repository, job: Job, reason: str) -> None:
    """Publish what was recorded of a job without its files, which are lost, and why; of an edit nothing."""
    if job.kind == "experiment":
        repository.put_experiment(job.experiment())
    elif job.kind == "checkpoint":
        check_experiment(repository, job)
        repository.put_checkpoint(dataclasses.replace(job.checkpoint(), state="failed", error=reason))


def check_experiment(repository: Repository, job: Job) -> None:
    """Raise `RecordRemoved` when the experiment of a checkpoint or edit is gone: there is no place for it.

    One that went a moment ago may pass where each request costs; `publishing` sees that at no cost.
    """
    try:
        repository.load_experiment(job.experiment_id)
    except NotFound:
        raise RecordRemoved(
            f"experiment {short(job.experiment_id)} is not in {job.repository} any more"
        ) from None


def find_recorded(repository: Repository, job: Job) -> Settled | None:
    """What an earlier try of a job has recorded, as it is in the repository now; None when it has not."""
    if job.kind == "edit":
        return None
    is_checkpoint = job.kind == "checkpoint"
    key = checkpoint_key(job.experiment_id, job.id) if is_checkpoint else experiment_key(job.experiment_id)
    try:
        data = repository.store.get(key)
        if is_checkpoint:
            found = decode_checkpoint(data)
            is_same = found.id == job.id and found.created == job.checkpoint().created
            return Settled("failed" if found.error else "stored", found.error) if is_same else None
        is_same = decode_experiment(data).created == job.experiment().created
        is_whole = not job.has_files or decode_snapshot(data) is not None
    except KeyMissing:
        return None
    except Malformed as error:
        raise RepositoryDamaged(
            f"{key} in {repository.url} is damaged: {error}", fields={"key": key}
        ) from error
    if not is_same:
        # Another process has begun the same experiment: the record that was there first is that of both.
        return Settled("stored")
    return Settled("stored") if is_whole else Settled("failed", "it was recorded without its files")
