"""What the processes of a distributed job write for each other, as JSON objects of a repository, and back.

A shard is what one rank adds to a checkpoint; when all of them are there they become its record, and go. An
edit of a rank says that it takes part in an experiment, or that it has ended. See "Shards" in docs/format.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, TypeAlias, get_args

from replicate.ids import CheckpointId, ExperimentId
from replicate.records import CheckpointRecord, EndStatus, format_time
from replicated.format.canonical import Malformed, NewerFormat, seal, unseal
from replicated.format.manifest import RootNode
from replicated.format.members import Members
from replicated.format.metadata import (
    RECORD_VERSION,
    checkpoint_members,
    decode_root,
    read_checkpoint,
    snapshot_member,
)

#: `joined`: it takes part; else how it has ended.
RankStatus: TypeAlias = Literal["joined"] | EndStatus

RANK_STATUSES: Final[tuple[RankStatus, ...]] = ("joined", *get_args(EndStatus))


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of one rank of a checkpoint."""

    experiment_id: ExperimentId
    checkpoint_id: CheckpointId
    rank: int
    world_size: int
    #: What it saved, relative to the project directory.
    paths: tuple[str, ...] = ()
    #: None when it adds no files.
    root: RootNode | None = None
    #: Why its files cannot be stored; then neither can the checkpoint.
    error: str = ""
    #: Of rank 0: what is recorded of the checkpoint, in state stored.
    checkpoint: CheckpointRecord | None = None


@dataclass(frozen=True, slots=True)
class RankEdit:
    """What became of another rank than 0."""

    #: Random; of one process.
    member_id: str
    rank: int
    world_size: int
    #: Tells starts of the job from each other; empty when that was not known.
    attempt: str
    status: RankStatus
    time: datetime


def encode_shard(shard: Shard) -> bytes:
    """`shards/<experiment id>/<checkpoint id>/<rank>.json`."""
    record = shard.checkpoint
    return seal(
        {
            "format": RECORD_VERSION,
            "experiment_id": shard.experiment_id,
            "checkpoint_id": shard.checkpoint_id,
            "rank": shard.rank,
            "world_size": shard.world_size,
            "paths": list(shard.paths),
            "error": shard.error,
            **snapshot_member(shard.root),
            "checkpoint": None if record is None else checkpoint_members(record),
        }
    )


def decode_shard(data: bytes) -> Shard:
    """What `encode_shard` wrote."""
    members = _unseal(data)
    record = members.optional("checkpoint")
    shard = Shard(
        experiment_id=ExperimentId(members.id("experiment_id")),
        checkpoint_id=CheckpointId(members.id("checkpoint_id")),
        rank=members.natural("rank"),
        world_size=members.natural("world_size"),
        paths=members.strings("paths"),
        root=decode_root(members),
        error=members.get("error", str, ""),
        checkpoint=None if record is None else read_checkpoint(record),
    )
    if shard.rank >= shard.world_size or (shard.rank == 0) == (shard.checkpoint is None):
        raise Malformed("not the shard of a rank")
    return shard


def encode_rank_edit(edit: RankEdit) -> bytes:
    """An edit of type `rank`."""
    return seal(
        {
            "format": RECORD_VERSION,
            "type": "rank",
            "member": edit.member_id,
            "rank": edit.rank,
            "world_size": edit.world_size,
            "attempt": edit.attempt,
            "status": edit.status,
            "time": format_time(edit.time),
        }
    )


def decode_rank_edit(data: bytes) -> RankEdit | None:
    """What `encode_rank_edit` wrote; None for an edit of another type."""
    members = _unseal(data)
    if members.get("type", str) != "rank":
        return None
    status = members.get("status", str)
    for known in RANK_STATUSES:
        if status == known:
            return RankEdit(
                member_id=members.id("member"),
                rank=members.natural("rank"),
                world_size=members.natural("world_size"),
                attempt=members.get("attempt", str, ""),
                status=known,
                time=members.time("time"),
            )
    return None


def _unseal(data: bytes) -> Members:
    members = Members(unseal(data))
    version = members.natural("format")
    if version > RECORD_VERSION:
        raise NewerFormat(f"a record of format {version}")
    return members
