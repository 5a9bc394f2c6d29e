"""Experiments, checkpoints and edits as the JSON objects of a repository, and back.

The record of an experiment or checkpoint that saved files holds the root of their tree: its snapshot.
Members that this version does not know are ignored, members that it needs are checked by type: an
object that cannot be a record is `Malformed`, one of a later version `NewerFormat`. Heartbeats are
overwritten all the time and not sealed; the rest is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeAlias, TypeVar, get_args

from replicate.ids import CheckpointId, ExperimentId, SnapshotId
from replicate.records import (
    GOALS,
    CheckpointRecord,
    EndStatus,
    ExperimentRecord,
    GitState,
    Gpu,
    PrimaryMetric,
    ProcessIdentity,
    System,
    format_time,
)
from replicated.format.canonical import (
    Malformed,
    NewerFormat,
    dump_json,
    encode_value,
    load_json,
    seal,
    unseal,
)
from replicated.format.manifest import MAX_MODE, NANOSECONDS, RootNode
from replicated.format.members import Members

#: Version of each JSON object; readers refuse a later one.
RECORD_VERSION: Final = 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of one experiment or checkpoint, complete in the repository."""

    #: As made by `keys.snapshot_of`.
    id: SnapshotId
    root: RootNode


@dataclass(frozen=True, slots=True)
class EndEdit:
    """The end of a run, as its process said or as the daemon saw."""

    status: EndStatus
    time: datetime
    #: How long calls of this library held up the training, in nanoseconds; 0: not told.
    stall_ns: int = 0


@dataclass(frozen=True, slots=True)
class ResumeEdit:
    """A new process went on with an experiment that had ended."""

    time: datetime


#: What may be written about an experiment after its record; the newest word on its run counts.
Edit: TypeAlias = EndEdit | ResumeEdit


@dataclass(frozen=True, slots=True)
class LiveRun:
    """A run that lives, as its daemon says."""

    id: ExperimentId
    process: ProcessIdentity | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life of all runs that one daemon watches."""

    #: Its id, which names the object.
    daemon: str
    time: datetime
    host: str
    #: How soon it is replaced.
    period_s: int
    experiments: tuple[LiveRun, ...] = ()


# Experiments


def encode_experiment(record: ExperimentRecord, root: RootNode | None = None) -> bytes:
    """`experiments/<id>.json`; with the root of the files that it saved, if it did."""
    return _seal(
        {
            "id": record.id,
            "created": format_time(record.created),
            "name": record.name,
            "tags": list(record.tags),
            "user": record.user,
            "host": record.host,
            "command": record.command,
            "paths": list(record.paths),
            "params": encode_value(record.params),
            "python_version": record.python_version,
            "python_packages": dict(record.python_packages),
            "system": _encode_system(record.system),
            "git": _encode_git(record.git),
            "replicate_version": record.replicate_version,
            "process": _encode_process(record.process),
            **snapshot_member(root),
        }
    )


def decode_experiment(data: bytes) -> ExperimentRecord:
    """What `encode_experiment` wrote."""
    members = _unseal(data)
    return ExperimentRecord(
        id=ExperimentId(members.id("id")),
        created=members.time("created"),
        name=members.get("name", str, ""),
        tags=members.strings("tags"),
        user=members.get("user", str, ""),
        host=members.get("host", str, ""),
        command=members.get("command", str, ""),
        paths=members.strings("paths"),
        params=members.values("params"),
        python_version=members.get("python_version", str, ""),
        python_packages=members.string_map("python_packages"),
        system=_decode_system(members.object("system")),
        git=_decode_optional(members.optional("git"), _decode_git),
        replicate_version=members.get("replicate_version", str, ""),
        process=_decode_optional(members.optional("process"), _decode_process),
    )


# Checkpoints


def encode_checkpoint(record: CheckpointRecord, root: RootNode | None = None) -> bytes:
    """`checkpoints/<experiment id>/<id>.json`; the state is stored or failed, with a `root` stored."""
    return _seal({**checkpoint_members(record), **snapshot_member(root)})


def decode_checkpoint(data: bytes) -> CheckpointRecord:
    """What `encode_checkpoint` wrote."""
    return read_checkpoint(_unseal(data))


def checkpoint_members(record: CheckpointRecord) -> dict[str, Any]:
    """The members of the record of a checkpoint in state stored or failed, but for its snapshot."""
    if record.state == "captured":
        raise ValueError(f"a checkpoint that is not stored yet has no place in a repository: {record.id}")
    primary = record.primary_metric
    return {
        "id": record.id,
        "experiment_id": record.experiment_id,
        "created": format_time(record.created),
        "step": record.step,
        "paths": list(record.paths),
        "metrics": encode_value(record.metrics),
        "primary_metric": None if primary is None else {"name": primary.name, "goal": primary.goal},
        "state": record.state,
        "error": record.error,
        # Absent for one process, so that the record of a checkpoint of rank 0 alone is as ever.
        **({"world_size": record.world_size} if record.world_size > 1 else {}),
    }


def read_checkpoint(members: Members) -> CheckpointRecord:
    """The record that `checkpoint_members` describes."""
    return CheckpointRecord(
        id=CheckpointId(members.id("id")),
        experiment_id=ExperimentId(members.id("experiment_id")),
        created=members.time("created"),
        step=members.natural("step"),
        paths=members.strings("paths"),
        metrics=members.values("metrics"),
        primary_metric=_decode_optional(members.optional("primary_metric"), _decode_primary_metric),
        state="failed" if _choice(members, "state", ("stored", "failed")) == "failed" else "stored",
        error=members.get("error", str, ""),
        world_size=max(1, members.natural("world_size", 1)),
    )


# Edits and heartbeats


def encode_edit(edit: Edit) -> bytes:
    """`edits/<experiment id>/<id>.json`."""
    if isinstance(edit, EndEdit):
        told = {"stall_ns": edit.stall_ns} if edit.stall_ns else {}
        return _seal({"type": "end", "status": edit.status, "time": format_time(edit.time), **told})
    return _seal({"type": "resume", "time": format_time(edit.time)})


def decode_edit(data: bytes) -> Edit | None:
    """What `encode_edit` wrote; None for a type of edit that this version does not know."""
    members = _unseal(data)
    kind = members.get("type", str)
    if kind == "resume":
        return ResumeEdit(members.time("time"))
    if kind != "end":
        return None
    status = _choice(members, "status", get_args(EndStatus))
    stall_ns = members.natural("stall_ns", 0)
    return EndEdit(status, members.time("time"), stall_ns)  # type: ignore[arg-type]  # checked above


def encode_heartbeat(heartbeat: Heartbeat) -> bytes:
    """`heartbeats/<daemon id>.json`."""
    return dump_json(
        {
            "format": RECORD_VERSION,
            "daemon": heartbeat.daemon,
            "time": format_time(heartbeat.time),
            "host": heartbeat.host,
            "period_s": heartbeat.period_s,
            "experiments": [
                {"id": run.id, "process": _encode_process(run.process)} for run in heartbeat.experiments
            ],
        }
    )


def decode_heartbeat(data: bytes) -> Heartbeat:
    """What `encode_heartbeat` wrote."""
    members = _check_version(Members(load_json(data)))
    return Heartbeat(
        daemon=members.id("daemon"),
        time=members.time("time"),
        host=members.get("host", str, ""),
        period_s=members.natural("period_s"),
        experiments=tuple(_decode_live_run(run) for run in members.get("experiments", list, [])),
    )


def _decode_live_run(value: object) -> LiveRun:
    if not isinstance(value, dict):
        raise Malformed("a member of 'experiments' is not an object")
    members = Members(value)
    return LiveRun(
        ExperimentId(members.id("id")), _decode_optional(members.optional("process"), _decode_process)
    )


# What is gone


def encode_complete() -> bytes:
    """`log/records/complete`, always the same."""
    return _seal({})


def encode_removal(removed: datetime) -> bytes:
    """`log/new/x-…`: that an experiment or a checkpoint was removed."""
    return _seal({"removed": format_time(removed)})


# Snapshots


def decode_snapshot(data: bytes) -> Snapshot | None:
    """The snapshot in the record of an experiment or a checkpoint; None when it has none."""
    members = _unseal(data)
    root = decode_root(members)
    if root is None:
        return None
    name = members.id("id")
    if experiment_id := members.get("experiment_id", str, ""):
        members.id("experiment_id")
        name = f"{experiment_id}/{name}"
    return Snapshot(SnapshotId(name), root)


def snapshot_member(root: RootNode | None) -> dict[str, Any]:
    """The member `snapshot` of a record, if it has files."""
    return {} if root is None else {"snapshot": encode_root(root)}


def encode_root(root: RootNode) -> dict[str, Any]:
    """The member `snapshot` of a record."""
    seconds, nanoseconds = divmod(root.mtime_ns, NANOSECONDS)
    return {
        # Two integers, because in many languages the numbers of JSON are floats.
        "root": {"node": root.node.hex(), "mode": root.mode, "mtime": [seconds, nanoseconds]},
        "files": root.files,
        "directories": root.directories,
        "symlinks": root.symlinks,
        "size_bytes": root.size_bytes,
    }


def decode_root(members: Members) -> RootNode | None:
    """What `encode_root` made, out of the record that holds it."""
    snapshot = members.optional("snapshot")
    if snapshot is None:
        return None
    root = snapshot.object("root")
    return RootNode(
        node=root.digest("node"),
        mode=root.natural("mode", maximum=MAX_MODE),
        mtime_ns=_decode_mtime(root),
        files=snapshot.natural("files"),
        directories=snapshot.natural("directories"),
        symlinks=snapshot.natural("symlinks"),
        size_bytes=snapshot.natural("size_bytes"),
    )


def _decode_mtime(root: Members) -> int:
    match root.get("mtime", list):
        case [int(seconds), int(nanoseconds)] if 0 <= nanoseconds < NANOSECONDS and abs(seconds) < 2**63:
            return seconds * NANOSECONDS + nanoseconds
    raise Malformed("member 'mtime' is not a time")


# Parts of records


def _encode_system(system: System) -> dict[str, Any]:
    return {
        "os": system.os,
        "cpu": system.cpu,
        "cpu_count": system.cpu_count,
        "memory_bytes": system.memory_bytes,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.memory_bytes} for gpu in system.gpus],
        "driver": system.driver,
    }


def _decode_system(members: Members) -> System:
    gpus = members.get("gpus", list, [])
    if not all(type(gpu) is dict for gpu in gpus):
        raise Malformed("member 'gpus' is not a list of objects")
    return System(
        os=members.get("os", str, ""),
        cpu=members.get("cpu", str, ""),
        cpu_count=members.natural("cpu_count", 0),
        memory_bytes=members.natural("memory_bytes", 0),
        gpus=tuple(
            Gpu(gpu.get("name", str, ""), gpu.natural("memory_bytes", 0)) for gpu in map(Members, gpus)
        ),
        driver=members.get("driver", str, ""),
    )


def _encode_git(git: GitState | None) -> dict[str, Any] | None:
    if git is None:
        return None
    return {"commit": git.commit, "branch": git.branch, "dirty": git.dirty, "diff": git.diff}


def _decode_git(members: Members) -> GitState:
    return GitState(
        commit=members.get("commit", str, ""),
        branch=members.get("branch", str, ""),
        dirty=members.get("dirty", bool, False),
        diff=members.get("diff", str, ""),
    )


def _encode_process(process: ProcessIdentity | None) -> dict[str, Any] | None:
    if process is None:
        return None
    return {"pid": process.pid, "start_ticks": process.start_ticks, "boot_id": process.boot_id}


def _decode_process(members: Members) -> ProcessIdentity:
    return ProcessIdentity(
        pid=members.natural("pid"),
        start_ticks=members.natural("start_ticks", 0),
        boot_id=members.get("boot_id", str, ""),
    )


def _decode_primary_metric(members: Members) -> PrimaryMetric:
    goal = _choice(members, "goal", GOALS)
    return PrimaryMetric(members.get("name", str), "minimize" if goal == "minimize" else "maximize")


def _decode_optional(members: Members | None, decode: Callable[[Members], T]) -> T | None:
    return None if members is None else decode(members)


def _choice(members: Members, name: str, choices: tuple[str, ...]) -> str:
    value = members.get(name, str)
    if value not in choices:
        raise Malformed(f"member {name!r} is none of {', '.join(choices)}")
    return value


def _seal(members: Mapping[str, Any]) -> bytes:
    return seal({"format": RECORD_VERSION, **members})


def _unseal(data: bytes) -> Members:
    return _check_version(Members(unseal(data)))


def _check_version(members: Members) -> Members:
    version = members.natural("format")
    if version > RECORD_VERSION:
        raise NewerFormat(f"a record of format {version}")
    return members
