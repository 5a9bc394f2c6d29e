"""What differs between two experiments or checkpoints: pure functions over records.

Values are compared as values, not as text. Files are compared by the daemon; everything else is here.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from replicate.cli.damage import is_damaged
from replicate.records import (
    CheckpointRecord,
    ExperimentSummary,
    FileChange,
    GitState,
    System,
    Value,
    format_time,
    is_number,
)


class Absent(enum.Enum):
    """Stands where one side has no such value, which is not the same as null."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT
Side: TypeAlias = "Value | Absent"


@dataclass(frozen=True, slots=True)
class Difference:
    """One name whose values are not the same."""

    name: str
    left: Side
    right: Side


@dataclass(frozen=True, slots=True)
class Compared:
    """One of the two that are compared."""

    summary: ExperimentSummary
    #: None: an experiment alone.
    checkpoint: CheckpointRecord | None

    @property
    def has_files(self) -> bool:
        """Whether any files were saved."""
        return bool(self.summary.record.paths or (self.checkpoint and self.checkpoint.paths))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that differs; each list is in the order of names, and None if it cannot be compared."""

    left: Compared
    right: Compared
    experiment: Sequence[Difference] | None
    params: Sequence[Difference] | None
    python_packages: Sequence[Difference] | None
    git: Sequence[Difference] | None
    checkpoint: Sequence[Difference] | None
    metrics: Sequence[Difference] | None
    files: Sequence[FileChange] | None


def compare(left: Compared, right: Compared, files: Sequence[FileChange] | None) -> Comparison:
    """The comparison of two sides whose files were compared already (or could not be: None).

    What a damaged record would say is not known, and not compared.
    """
    one, other = left.summary.record, right.summary.record
    comparison = Comparison(
        left=left,
        right=right,
        experiment=compare_mappings(_experiment_fields(left.summary), _experiment_fields(right.summary)),
        params=sort_by_name(compare_mappings(one.params, other.params)),
        python_packages=sort_by_name(compare_mappings(one.python_packages, other.python_packages)),
        git=compare_mappings(_git_fields(one.git), _git_fields(other.git)),
        checkpoint=compare_mappings(
            _checkpoint_fields(left.checkpoint), _checkpoint_fields(right.checkpoint)
        ),
        metrics=sort_by_name(
            compare_mappings(
                left.checkpoint.metrics if left.checkpoint else {},
                right.checkpoint.metrics if right.checkpoint else {},
            )
        ),
        files=files,
    )
    if is_damaged(left.summary) or is_damaged(right.summary):
        comparison = replace(comparison, experiment=None, params=None, python_packages=None, git=None)
    if any(side.checkpoint is not None and is_damaged(side.checkpoint) for side in (left, right)):
        comparison = replace(comparison, checkpoint=None, metrics=None)
    return comparison


def compare_mappings(left: Mapping[str, Value], right: Mapping[str, Value]) -> list[Difference]:
    """The names whose values differ or that one side lacks, in the order in which they appear."""
    return [
        Difference(name, left.get(name, ABSENT), right.get(name, ABSENT))
        for name in {**left, **right}
        if name not in left or name not in right or not same_value(left[name], right[name])
    ]


def sort_by_name(differences: Sequence[Difference]) -> list[Difference]:
    """The differences in the order of their names."""
    return sorted(differences, key=lambda difference: difference.name)


def same_value(left: Value, right: Value) -> bool:
    """Whether two values are the same: 1 is 1.0, NaN is NaN, but True is not 1 and "1" is not 1."""
    if is_number(left) and is_number(right):
        return left == right or (left != left and right != right)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(same_value(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_value(left[key], right[key]) for key in left)
    return type(left) is type(right) and left == right


def _experiment_fields(summary: ExperimentSummary) -> dict[str, Value]:
    record = summary.record
    return {
        "name": record.name,
        "tags": list(record.tags),
        "created": format_time(record.created),
        "status": summary.status,
        "command": record.command,
        "path": list(record.paths),
        "host": record.host,
        "user": record.user,
        "python_version": record.python_version,
        **_system_fields(record.system),
    }


def _system_fields(system: System) -> dict[str, Value]:
    return {
        "os": system.os,
        "cpu": system.cpu,
        "cpu_count": system.cpu_count,
        "memory_bytes": system.memory_bytes,
        "gpus": [gpu.name for gpu in system.gpus],
        "driver": system.driver,
    }


def _git_fields(git: GitState | None) -> dict[str, Value]:
    if git is None:
        return {}
    return {"commit": git.commit, "branch": git.branch, "dirty": git.dirty, "diff": git.diff}


def _checkpoint_fields(checkpoint: CheckpointRecord | None) -> dict[str, Value]:
    if checkpoint is None:
        return {}
    primary = checkpoint.primary_metric
    return {
        "created": format_time(checkpoint.created),
        "step": checkpoint.step,
        "path": list(checkpoint.paths),
        "primary_metric": f"{primary.name} ({primary.goal})" if primary else None,
    }
