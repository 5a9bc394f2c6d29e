"""Records as the JSON of the public contract (`--json`).

Pure functions from records to plain dicts, and `to_json` for the text. What JSON cannot hold is written so
that every parser accepts it and nothing is lost: NaN and infinities are the strings "NaN", "Infinity" and
"-Infinity"; a path that is not UTF-8 keeps its bytes as surrogate escapes, and once more as base64 beside it.
Times are RFC 3339 in UTC. Names of keys never change; new ones may be added.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import TypeAlias

from replicate.cli.damage import is_damaged
from replicate.records import (
    CheckpointRecord,
    ExperimentSummary,
    FileEntry,
    GitState,
    System,
    Value,
    format_time,
    paths_argument,
)

Json: TypeAlias = "None | bool | int | float | str | Sequence[Json] | Mapping[str, Json]"

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def to_json(data: Json) -> str:
    """The text, indented and in ASCII, so that it survives any locale on its way through a pipe."""
    return json.dumps(data, indent=2, allow_nan=False)


def to_json_line(data: Json) -> str:
    """The same on one line."""
    return json.dumps(data, allow_nan=False)


def value_json(value: Value) -> Json:
    """A param or metric, with a string for a float that JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, list):
        return [value_json(item) for item in value]
    if isinstance(value, dict):
        return mapping_json(value)
    return value


def mapping_json(values: Mapping[str, Value]) -> dict[str, Json]:
    """Params or metrics, in their order."""
    return {key: value_json(value) for key, value in values.items()}


def time_json(time: datetime | None) -> str | None:
    """A time in UTC."""
    return None if time is None else format_time(time)


def checkpoint_json(checkpoint: CheckpointRecord) -> dict[str, Json]:
    """A checkpoint."""
    primary = checkpoint.primary_metric
    return {
        "id": checkpoint.id,
        "experiment_id": checkpoint.experiment_id,
        "created": time_json(checkpoint.created),
        "step": checkpoint.step,
        "path": paths_argument(checkpoint.paths),
        "metrics": mapping_json(checkpoint.metrics),
        "primary_metric": {"name": primary.name, "goal": primary.goal} if primary else None,
        "state": checkpoint.state,
        "error": checkpoint.error or None,
        "world_size": checkpoint.world_size,
        "waits_for": checkpoint.waits_for or None,
    }


def summary_json(summary: ExperimentSummary) -> dict[str, Json]:
    """An experiment as `ls` lists it."""
    record = summary.record
    return {
        "id": record.id,
        "created": time_json(record.created),
        "name": record.name,
        "tags": list(record.tags),
        "params": mapping_json(record.params),
        "path": paths_argument(record.paths),
        "command": record.command,
        "user": record.user,
        "host": record.host,
        "status": summary.status,
        "ended": time_json(summary.ended),
        "duration_s": None if is_damaged(summary) else summary.duration_s,
        "stall_seconds": None if is_damaged(summary) else summary.stall_s,
        "state": summary.state,
        "error": summary.error or None,
        "num_checkpoints": summary.checkpoint_count,
        "latest_checkpoint": checkpoint_json(summary.latest) if summary.latest else None,
        "best_checkpoint": checkpoint_json(summary.best) if summary.best else None,
    }


def experiment_json(
    summary: ExperimentSummary, checkpoints: Sequence[CheckpointRecord] | None
) -> dict[str, Json]:
    """Everything about an experiment; with its checkpoints unless they are None."""
    record = summary.record
    whole: dict[str, Json] = {
        **summary_json(summary),
        "python_version": record.python_version,
        "python_packages": dict(record.python_packages),
        "system": system_json(record.system),
        "git": git_json(record.git),
        "replicate_version": record.replicate_version,
    }
    if checkpoints is not None:
        whole["checkpoints"] = [checkpoint_json(checkpoint) for checkpoint in checkpoints]
    return whole


def system_json(system: System) -> dict[str, Json]:
    """A machine."""
    return {
        "os": system.os,
        "cpu": system.cpu,
        "cpu_count": system.cpu_count,
        "memory_bytes": system.memory_bytes,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.memory_bytes} for gpu in system.gpus],
        "driver": system.driver,
    }


def git_json(git: GitState | None) -> dict[str, Json] | None:
    """The state of a Git work tree."""
    if git is None:
        return None
    return {"commit": git.commit, "branch": git.branch, "dirty": git.dirty, "diff": git.diff}


def file_json(entry: FileEntry) -> dict[str, Json]:
    """A file of a snapshot; `mode` is a number, `mtime` has microseconds and `mtime_ns` is exact."""
    shown: dict[str, Json] = {
        "path": entry.path,
        "type": entry.type,
        "mode": entry.mode,
        "size": entry.size,
        "mtime": mtime_json(entry.mtime_ns),
        "mtime_ns": entry.mtime_ns,
        "hash": entry.hash or None,
    }
    if entry.type == "symlink":
        shown["target"] = entry.target
    return {**shown, **_undecodable("path", entry.path), **_undecodable("target", entry.target)}


def path_json(key: str, path: str) -> dict[str, Json]:
    """A path under `key`, and its bytes in base64 under `key_bytes` if it is not UTF-8."""
    return {key: path, **_undecodable(key, path)}


def mtime_json(mtime_ns: int) -> str | None:
    """A file's time in RFC 3339, or None for one before year 1 or after 9999."""
    try:
        return format_time(_EPOCH + timedelta(microseconds=mtime_ns // 1000))
    except OverflowError:
        return None


def _undecodable(key: str, path: str) -> dict[str, Json]:
    try:
        path.encode()
    except UnicodeEncodeError:
        return {f"{key}_bytes": base64.b64encode(os.fsencode(path)).decode()}
    return {}
