"""Records as they stand in the database of a catalog, also those that are damaged: these are shown too.

Used by `catalog`, which puts the rows in and takes them out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

from replicate import wire
from replicate._pb import daemon_pb2 as pb
from replicate.errors import ReplicateError, RepositoryDamaged, RepositoryIncompatible
from replicate.ids import CheckpointId, ExperimentId, short
from replicate.records import (
    CheckpointRecord,
    ExperimentRecord,
    ExperimentSummary,
    best_checkpoint,
    latest_checkpoint,
    parse_time,
)
from replicated.format import metadata
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.metadata import Edit, EndEdit, Snapshot
from replicated.keys import Announced

_Member = Literal["python_version", "python_packages", "system", "git", "replicate_version", "process"]
#: Large, and in no list; see SummaryBatch in the protocol.
_NOT_LISTED: Final[tuple[_Member, ...]] = get_args(_Member)
_UNREADABLE_CREATED: Final = "1970-01-01T00:00:00.000000Z"

_log = logging.getLogger(__name__)

#: Id, experiment, time, how the run ended or None, for how long calls held it up.
EditRow: TypeAlias = tuple[str, str, int, str | None, int]


class ExperimentRow(NamedTuple):
    """What is read of an experiment."""

    created_ns: int
    name: str
    record: bytes
    state: str
    error: str

    def tags(self) -> list[str]:
        """The tags of the record."""
        return list(pb.Experiment.FromString(self.record).tags)


class CheckpointRow(NamedTuple):
    """What is read of a checkpoint."""

    created_ns: int
    record: bytes
    is_suspect: bool


class SummaryRow(NamedTuple):
    """What lists show of an experiment; see the table `summaries`."""

    created_ns: int
    id: str
    summary: bytes
    #: Whether it tells all, also how the run stands; else that is to be found out.
    is_ended: bool
    process: bytes | None
    latest_ns: int | None


class ReadCheckpoint(NamedTuple):
    """A checkpoint in both forms."""

    record: CheckpointRecord
    row: CheckpointRow


def experiment_row(record: ExperimentRecord, snapshot: Snapshot | None, *, error: str = "") -> ExperimentRow:
    """The row of an experiment; with an error, or without the files that it says to have, a failed one."""
    if not error and record.paths and snapshot is None:
        error = "the files were never stored"
    return ExperimentRow(
        wire.encode_time(record.created),
        record.name,
        wire.encode_experiment(record).SerializeToString(deterministic=True),
        "failed" if error else "stored",
        error,
    )


def damaged_experiment(identifier: str, damage: ReplicateError) -> ExperimentRow:
    """The row of an experiment that cannot be read: listed all the same; the others are not affected."""
    _log.warning("experiment %s: %s", short(identifier), damage)
    record = ExperimentRecord(ExperimentId(identifier), parse_time(_UNREADABLE_CREATED))
    return experiment_row(record, None, error=damage.message)


def checkpoint_row(record: CheckpointRecord, *, is_suspect: bool = False) -> CheckpointRow:
    """The row of a checkpoint."""
    encoded = wire.encode_checkpoint(record).SerializeToString()
    return CheckpointRow(wire.encode_time(record.created), encoded, is_suspect)


def damaged_checkpoint(experiment_id: str, identifier: str, damage: ReplicateError) -> ReadCheckpoint:
    """What is shown of a checkpoint that cannot be read."""
    _log.warning("checkpoint %s: %s", short(identifier), damage)
    record = CheckpointRecord(
        CheckpointId(identifier),
        ExperimentId(experiment_id),
        parse_time(_UNREADABLE_CREATED),
        step=0,
        state="failed",
        error=damage.message,
    )
    return ReadCheckpoint(record, checkpoint_row(record, is_suspect=True))


def summary_row(
    identifier: str,
    experiment: ExperimentRow,
    checkpoints: Sequence[ReadCheckpoint],
    edits: Sequence[EditRow],
) -> SummaryRow:
    """What lists show, of all that is known of an experiment; checkpoints are in order, and so are edits."""
    record = pb.Experiment.FromString(experiment.record)
    status, ended_ns = (edits[-1][3], edits[-1][2]) if edits else (None, 0)
    process = record.process.SerializeToString() if status is None and record.HasField("process") else None
    leave_out(record)
    message = pb.ExperimentSummary(
        experiment=record,
        state=experiment.state,
        error=wire.encode_text(experiment.error),
        checkpoint_count=len(checkpoints),
        stall_s=sum(edit[4] for edit in edits) / 1e9 if any(edit[4] for edit in edits) else -1.0,
    )
    latest, best = choose_checkpoints(checkpoints)
    if latest is not None:
        message.latest.ParseFromString(latest.row.record)
    if best is not None:
        message.best.ParseFromString(best.row.record)
    if status is not None:
        message.status = status
        message.ended_ns = ended_ns
        message.duration_s = seconds_between(experiment.created_ns, ended_ns)
    return SummaryRow(
        experiment.created_ns,
        identifier,
        message.SerializeToString(),
        status is not None,
        process,
        None if latest is None else latest.row.created_ns,
    )


def whole_row(summary: ExperimentSummary) -> SummaryRow:
    """What lists show of an experiment of which more is known than the repository says."""
    message = wire.encode_summary(summary)
    leave_out(message.experiment)
    created_ns = message.experiment.created_ns
    return SummaryRow(created_ns, summary.record.id, message.SerializeToString(), True, None, None)


def leave_out(experiment: pb.Experiment) -> None:
    """Take away what no list shows."""
    for name in _NOT_LISTED:
        experiment.ClearField(name)


def choose_checkpoints(
    checkpoints: Sequence[ReadCheckpoint],
) -> tuple[ReadCheckpoint | None, ReadCheckpoint | None]:
    """The latest and the best of an experiment."""
    rows = {checkpoint.record.id: checkpoint for checkpoint in checkpoints}
    records = [checkpoint.record for checkpoint in checkpoints]
    latest, best = latest_checkpoint(records), best_checkpoint(records)
    return (
        None if latest is None else rows[latest.id],
        None if best is None else rows[best.id],
    )


def seconds_between(begun_ns: int, ended_ns: int) -> float:
    """How long something took; never less than nothing, whatever the clocks."""
    return max(0, ended_ns - begun_ns) // 1000 / 10**6


def edit_row(identifier: str, experiment_id: str, edit: Edit) -> EditRow:
    """The row of an edit."""
    status = edit.status if isinstance(edit, EndEdit) else None
    stall_ns = edit.stall_ns if isinstance(edit, EndEdit) else 0
    return identifier, experiment_id, wire.encode_time(edit.time), status, stall_ns


def decode_experiment_row(url: str, key: Announced, data: bytes) -> ExperimentRow:
    """The row of a sealed record, whatever it is."""
    try:
        record = metadata.decode_experiment(data)
        _check(key, record.id, record.id)
        return experiment_row(record, metadata.decode_snapshot(data) if record.paths else None)
    except (Malformed, NewerFormat) as error:
        return damaged_experiment(key.id, _explain(url, key, error))


def decode_checkpoint_row(url: str, key: Announced, data: bytes) -> ReadCheckpoint:
    """A sealed record, whatever it is, with its row."""
    try:
        record = metadata.decode_checkpoint(data)
        _check(key, record.id, record.experiment_id)
        return ReadCheckpoint(record, checkpoint_row(record))
    except (Malformed, NewerFormat) as error:
        return damaged_checkpoint(key.experiment_id, key.id, _explain(url, key, error))


def decode_edit_row(url: str, key: Announced, data: bytes) -> EditRow | None:
    """The row of a sealed edit; None when it cannot be read or is of an unknown kind."""
    try:
        edit = metadata.decode_edit(data)
    except (Malformed, NewerFormat) as error:
        _log.warning("edit %s: %s", short(key.id), _explain(url, key, error))
        return None
    return None if edit is None else edit_row(key.id, key.experiment_id, edit)


def _check(key: Announced, found_id: str, found_experiment: str) -> None:
    if (found_id, found_experiment) != (key.id, key.experiment_id):
        raise Malformed(f"it holds the record of {short(found_id)}")


def _explain(url: str, key: Announced, error: Exception) -> ReplicateError:
    if isinstance(error, NewerFormat):
        return RepositoryIncompatible(f"{key.record_key} in {url} was written by a newer version: {error}")
    return RepositoryDamaged(f"{key.record_key} in {url} is damaged: {error}")
