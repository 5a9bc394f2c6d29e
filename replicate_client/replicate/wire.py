"""Records ⇄ protobuf messages, and errors ⇄ their details: the only converter, used by both ends.

Pure functions in pairs: `encode_x` makes the message, `decode_x` the record. Decoding checks what the
types of protobuf do not (ids, goals, states), because the other end may be another version or hostile;
it raises `InvalidArgument`. No I/O and no grpc here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import TypeVar, get_args

from replicate import errors
from replicate._pb import daemon_pb2 as pb
from replicate.errors import InvalidArgument, ReplicateError
from replicate.ids import CheckpointId, ExperimentId, is_id
from replicate.records import (
    CheckpointRecord,
    EndStatus,
    ExperimentRecord,
    ExperimentSummary,
    FileChange,
    FileEntry,
    FileType,
    GitState,
    Goal,
    Gpu,
    Part,
    PrimaryMetric,
    ProcessIdentity,
    SnapshotState,
    Status,
    System,
    Value,
)

#: Raised with every change that an older peer would misunderstand.
PROTOCOL_VERSION = 1
#: Trailing metadata of a failed call; the suffix tells gRPC that it is binary.
ERROR_METADATA_KEY = "replicate-error-bin"
#: Trailing metadata of an answer that is not all that was asked for: a sentence, in UTF-8.
WARNING_METADATA_KEY = "replicate-warning-bin"
#: The daemon refuses larger requests; params and metrics are limited well below this.
MAX_REQUEST_BYTES = 4 << 20
#: The client refuses larger answers; long lists are streams and files never travel in one message.
MAX_REPLY_BYTES = 16 << 20

#: More processes than any machine has; a shard's number has nine digits.
MAX_WORLD_SIZE = 1_000_000

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_NANOSECONDS = 10**9
_INT64 = range(-(2**63), 2**63)
_MAX_BIG_INTEGER_DIGITS = 4000

_Word = TypeVar("_Word", bound=str)


def encode_error(error: ReplicateError) -> bytes:
    """An error as the bytes of an ErrorDetail."""
    detail = pb.ErrorDetail(code=error.code, message=encode_text(error.message), hint=encode_text(error.hint))
    detail.fields.update({name: encode_text(value) for name, value in error.fields.items()})
    return detail.SerializeToString()


def decode_error(data: bytes) -> ReplicateError:
    """The error that `encode_error` wrote, of the same class."""
    detail = pb.ErrorDetail.FromString(data)
    return errors.from_code(detail.code, detail.message, detail.hint, dict(detail.fields))


def encode_text(text: str) -> str:
    """Text for people in which paths may occur: undecodable bytes are shown as `\\xNN`."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def encode_path(path: str) -> bytes:
    """A path as the bytes that the file system knows."""
    return os.fsencode(path)


def decode_path(path: bytes) -> str:
    """The path that `encode_path` encoded; undecodable bytes become surrogates."""
    return os.fsdecode(path)


def encode_time(time: datetime) -> int:
    """An aware time as nanoseconds since the epoch."""
    return (time - _EPOCH) // timedelta(microseconds=1) * 1000


def decode_time(time_ns: int) -> datetime:
    """The time that `encode_time` encoded, in UTC with microseconds."""
    try:
        return _EPOCH + timedelta(microseconds=time_ns // 1000)
    except OverflowError:
        raise InvalidArgument(f"time out of range: {time_ns} ns") from None


def encode_value(value: Value) -> pb.Value:
    """One param or metric as a message."""
    if value is None:
        return pb.Value(null=True)
    if isinstance(value, bool):
        return pb.Value(boolean=value)
    if isinstance(value, int):
        if value in _INT64:
            return pb.Value(integer=value)
        return pb.Value(big_integer=str(value))
    if isinstance(value, float):
        return pb.Value(number=value)
    if isinstance(value, str):
        return pb.Value(text=value)
    if isinstance(value, list):
        return pb.Value(list=pb.ValueList(values=[encode_value(item) for item in value]))
    return pb.Value(map=encode_mapping(value))


def decode_value(message: pb.Value) -> Value:
    """The value that `encode_value` encoded; raises `InvalidArgument` for an unknown kind."""
    kind = message.WhichOneof("kind")
    if kind == "null":
        return None
    if kind == "boolean":
        return message.boolean
    if kind == "integer":
        return message.integer
    if kind == "big_integer":
        digits = message.big_integer
        if len(digits) > _MAX_BIG_INTEGER_DIGITS or not digits.lstrip("-").isdecimal():
            raise InvalidArgument(f"not an integer: {digits[:40]!r}")
        return int(digits)
    if kind == "number":
        return message.number
    if kind == "text":
        return message.text
    if kind == "list":
        return [decode_value(item) for item in message.list.values]
    if kind == "map":
        return decode_mapping(message.map)
    raise InvalidArgument("a value of a kind that this version does not know")


def encode_mapping(values: Mapping[str, Value]) -> pb.ValueMap:
    """Params or metrics as a message, in their order."""
    return pb.ValueMap(
        entries=[pb.ValueEntry(key=key, value=encode_value(value)) for key, value in values.items()]
    )


def decode_mapping(message: pb.ValueMap) -> dict[str, Value]:
    """The mapping that `encode_mapping` encoded."""
    return {entry.key: decode_value(entry.value) for entry in message.entries}


def encode_experiment(record: ExperimentRecord) -> pb.Experiment:
    """An experiment's record as a message."""
    message = pb.Experiment(
        id=record.id,
        created_ns=encode_time(record.created),
        name=record.name,
        tags=record.tags,
        user=record.user,
        host=record.host,
        command=encode_path(record.command),
        paths=[encode_path(path) for path in record.paths],
        params=encode_mapping(record.params),
        python_version=record.python_version,
        python_packages=record.python_packages,
        system=_encode_system(record.system),
        replicate_version=record.replicate_version,
    )
    if record.git is not None:
        git = record.git
        message.git.CopyFrom(pb.Git(commit=git.commit, branch=git.branch, dirty=git.dirty, diff=git.diff))
    if record.process is not None:
        message.process.CopyFrom(encode_process(record.process))
    return message


def decode_experiment(message: pb.Experiment) -> ExperimentRecord:
    """The record that `encode_experiment` encoded."""
    git = message.git
    return ExperimentRecord(
        id=ExperimentId(_checked_id(message.id, "experiment")),
        created=decode_time(message.created_ns),
        name=message.name,
        tags=tuple(message.tags),
        user=message.user,
        host=message.host,
        command=decode_path(message.command),
        paths=tuple(decode_path(path) for path in message.paths),
        params=decode_mapping(message.params),
        python_version=message.python_version,
        python_packages=dict(message.python_packages),
        system=_decode_system(message.system),
        git=GitState(git.commit, git.branch, git.dirty, git.diff) if message.HasField("git") else None,
        replicate_version=message.replicate_version,
        process=decode_process(message.process) if message.HasField("process") else None,
    )


def encode_process(process: ProcessIdentity) -> pb.Process:
    """A process as a message."""
    return pb.Process(pid=process.pid, start_ticks=process.start_ticks, boot_id=process.boot_id)


def decode_process(message: pb.Process) -> ProcessIdentity:
    """The process that `encode_process` encoded."""
    return ProcessIdentity(message.pid, message.start_ticks, message.boot_id)


def encode_checkpoint(record: CheckpointRecord) -> pb.Checkpoint:
    """A checkpoint's record as a message."""
    message = pb.Checkpoint(
        id=record.id,
        experiment_id=record.experiment_id,
        created_ns=encode_time(record.created),
        step=record.step,
        paths=[encode_path(path) for path in record.paths],
        metrics=encode_mapping(record.metrics),
        state=record.state,
        error=encode_text(record.error),
    )
    if record.primary_metric is not None:
        message.primary_metric.CopyFrom(
            pb.PrimaryMetric(name=record.primary_metric.name, goal=record.primary_metric.goal)
        )
    if record.world_size > 1:
        message.world_size = record.world_size
    if record.waits_for:
        message.waits_for = encode_text(record.waits_for)
    if record.part is not None:
        message.part.CopyFrom(_encode_part(record.part))
    return message


def decode_checkpoint(message: pb.Checkpoint) -> CheckpointRecord:
    """The record that `encode_checkpoint` encoded."""
    primary = None
    if message.HasField("primary_metric"):
        goal = decode_word(message.primary_metric.goal, get_args(Goal), "goal")
        primary = PrimaryMetric(message.primary_metric.name, goal)
    return CheckpointRecord(
        id=CheckpointId(_checked_id(message.id, "checkpoint")),
        experiment_id=ExperimentId(_checked_id(message.experiment_id, "experiment")),
        created=decode_time(message.created_ns),
        step=message.step,
        paths=tuple(decode_path(path) for path in message.paths),
        metrics=decode_mapping(message.metrics),
        primary_metric=primary,
        state=decode_word(message.state, get_args(SnapshotState), "state"),
        error=message.error,
        world_size=message.world_size or 1,
        waits_for=message.waits_for,
        part=_decode_part(message.part) if message.HasField("part") else None,
    )


def encode_summary(summary: ExperimentSummary) -> pb.ExperimentSummary:
    """An experiment as a list shows it, as a message."""
    message = pb.ExperimentSummary(
        experiment=encode_experiment(summary.record),
        status=summary.status,
        state=summary.state,
        error=encode_text(summary.error),
        ended_ns=encode_time(summary.ended) if summary.ended else 0,
        checkpoint_count=summary.checkpoint_count,
        duration_s=-1.0 if summary.duration_s is None else summary.duration_s,
        stall_s=-1.0 if summary.stall_s is None else summary.stall_s,
    )
    if summary.latest is not None:
        message.latest.CopyFrom(encode_checkpoint(summary.latest))
    if summary.best is not None:
        message.best.CopyFrom(encode_checkpoint(summary.best))
    return message


def decode_summary(message: pb.ExperimentSummary) -> ExperimentSummary:
    """The summary that `encode_summary` encoded."""
    return ExperimentSummary(
        record=decode_experiment(message.experiment),
        status=decode_word(message.status, get_args(Status), "status"),
        state=decode_word(message.state, get_args(SnapshotState), "state"),
        error=message.error,
        ended=decode_time(message.ended_ns) if message.ended_ns else None,
        checkpoint_count=message.checkpoint_count,
        latest=decode_checkpoint(message.latest) if message.HasField("latest") else None,
        best=decode_checkpoint(message.best) if message.HasField("best") else None,
        duration_s=None if message.duration_s < 0 else message.duration_s,
        stall_s=None if message.stall_s < 0 else message.stall_s,
    )


def decode_end_status(word: str) -> EndStatus:
    """How a run ended, checked."""
    return decode_word(word, get_args(EndStatus), "status")


def encode_file_entry(entry: FileEntry) -> pb.FileEntry:
    """One entry of a snapshot as a message."""
    return pb.FileEntry(
        path=encode_path(entry.path),
        type=entry.type,
        mode=entry.mode,
        size=entry.size,
        mtime_s=entry.mtime_ns // _NANOSECONDS,
        mtime_nanos=entry.mtime_ns % _NANOSECONDS,
        hash=bytes.fromhex(entry.hash),
        target=encode_path(entry.target),
    )


def decode_file_entry(message: pb.FileEntry) -> FileEntry:
    """The entry that `encode_file_entry` encoded."""
    return FileEntry(
        path=decode_path(message.path),
        type=decode_word(message.type, get_args(FileType), "file type"),
        mode=message.mode,
        size=message.size,
        mtime_ns=message.mtime_s * _NANOSECONDS + message.mtime_nanos,
        hash=message.hash.hex(),
        target=decode_path(message.target),
    )


def encode_file_change(change: FileChange) -> pb.FileChange:
    """One difference between two snapshots as a message."""
    message = pb.FileChange()
    if change.left is not None:
        message.left.CopyFrom(encode_file_entry(change.left))
    if change.right is not None:
        message.right.CopyFrom(encode_file_entry(change.right))
    return message


def decode_file_change(message: pb.FileChange) -> FileChange:
    """The difference that `encode_file_change` encoded."""
    left = decode_file_entry(message.left) if message.HasField("left") else None
    right = decode_file_entry(message.right) if message.HasField("right") else None
    present = left or right
    if present is None:
        raise InvalidArgument("a file change without a file")
    return FileChange(present.path, left, right)


def decode_word(word: str, allowed: Sequence[_Word], what: str) -> _Word:
    """A word of a fixed vocabulary, checked; raises `InvalidArgument`."""
    for candidate in allowed:
        if word == candidate:
            return candidate
    raise InvalidArgument(f"unknown {what}: {word!r}")


def _encode_part(part: Part) -> pb.Part:
    return pb.Part(
        rank=part.rank,
        world_size=part.world_size,
        is_detected=part.is_detected,
        is_expected=part.is_expected,
        attempt=part.attempt,
        patience_s=part.patience_s,
    )


def _decode_part(message: pb.Part) -> Part:
    if not message.rank < message.world_size <= MAX_WORLD_SIZE:
        raise InvalidArgument(f"no rank of {message.world_size} processes: {message.rank}")
    return Part(
        message.rank,
        message.world_size,
        message.is_detected,
        message.is_expected,
        message.attempt,
        message.patience_s if 0 <= message.patience_s < math.inf else 0.0,
    )


def _encode_system(system: System) -> pb.System:
    return pb.System(
        os=system.os,
        cpu=system.cpu,
        cpu_count=system.cpu_count,
        memory_bytes=system.memory_bytes,
        gpus=[pb.Gpu(name=gpu.name, memory_bytes=gpu.memory_bytes) for gpu in system.gpus],
        driver=system.driver,
    )


def _decode_system(message: pb.System) -> System:
    return System(
        os=message.os,
        cpu=message.cpu,
        cpu_count=message.cpu_count,
        memory_bytes=message.memory_bytes,
        gpus=tuple(Gpu(gpu.name, gpu.memory_bytes) for gpu in message.gpus),
        driver=message.driver,
    )


def _checked_id(text: str, what: str) -> str:
    if not is_id(text):
        raise InvalidArgument(f"not a valid {what} id: {text!r}")
    return text
