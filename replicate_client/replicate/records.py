"""Frozen records of what is recorded, and the checks on what users pass in.

Both ends of the wire and the repository format speak in these records; they hold no connection and do
no I/O. A record that exists is valid: the functions below raise `TypeError` or `ValueError` naming the
argument before anything is sent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from pathlib import PurePath
from typing import Literal, TypeAlias, TypeGuard, get_args

from replicate.ids import CheckpointId, ExperimentId, short

#: What params and metrics consist of once validated. Floats may be NaN or infinite.
Value: TypeAlias = "None | bool | int | float | str | list[Value] | dict[str, Value]"

Goal = Literal["minimize", "maximize"]
#: captured: frozen by the daemon; stored: durable in the repository; failed: will never be stored.
SnapshotState = Literal["captured", "stored", "failed"]
#: See "States of an experiment" in docs/concepts.md.
Status = Literal["running", "stopped", "failed", "killed", "unknown"]
EndStatus = Literal["stopped", "failed", "killed"]
FileType = Literal["file", "directory", "symlink"]

GOALS: tuple[str, ...] = get_args(Goal)
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
#: Deeper values are refused: protobuf parsers stop at a depth of 100 messages, three a level.
MAX_VALUE_DEPTH = 28
#: Params and metrics are for looking at and comparing; bulk belongs into a file.
MAX_VALUE_BYTES = 1 << 20
#: Some 3900 digits; Python refuses to write and read numbers of more than 4300.
MAX_INTEGER_BITS = 13_000
MAX_STEP = 2**63 - 1


@dataclass(frozen=True, slots=True)
class PrimaryMetric:
    """The metric by which checkpoints are ranked, and the direction that is better."""

    name: str
    goal: Goal


@dataclass(frozen=True, slots=True)
class GitState:
    """The Git work tree that holds the project when the experiment began."""

    commit: str
    branch: str
    dirty: bool
    #: `git diff HEAD`, cut at a limit; untracked files are saved as files, not here.
    diff: str = ""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One graphics processor."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class System:
    """The machine that an experiment ran on."""

    os: str = ""
    cpu: str = ""
    cpu_count: int = 0
    memory_bytes: int = 0
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""

    @property
    def memory(self) -> int:
        """Main memory in bytes."""
        return self.memory_bytes


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process of one boot of one machine; a pid alone is reused."""

    pid: int
    #: Field 22 of /proc/PID/stat: clock ticks since boot; 0 when unknown.
    start_ticks: int
    #: /proc/sys/kernel/random/boot_id.
    boot_id: str


@dataclass(frozen=True, slots=True)
class ExperimentRecord:
    """What `init` recorded; written once."""

    id: ExperimentId
    created: datetime
    name: str = ""
    tags: tuple[str, ...] = ()
    user: str = ""
    host: str = ""
    #: The command line as a shell would take it.
    command: str = ""
    #: Relative to the project directory; empty when no files were saved.
    paths: tuple[str, ...] = ()
    params: Mapping[str, Value] = field(default_factory=dict)
    python_version: str = ""
    #: Distribution name → version, of the distributions whose modules were imported.
    python_packages: Mapping[str, str] = field(default_factory=dict)
    system: System = System()
    git: GitState | None = None
    replicate_version: str = ""
    process: ProcessIdentity | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """What one of the processes of a distributed job adds to a checkpoint of all of them."""

    rank: int
    world_size: int
    #: Nobody said that others add to the checkpoint: without a sign of them it is that of rank 0 alone.
    is_detected: bool = False
    #: The launcher named the experiment, so that others are likely to join.
    is_expected: bool = False
    #: Tells this start of the job from others; the same in all ranks.
    attempt: str = ""
    #: How long to wait for the other parts without news of them; 0: the default.
    patience_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """What one `checkpoint` recorded; written once."""

    id: CheckpointId
    experiment_id: ExperimentId
    created: datetime
    step: int
    paths: tuple[str, ...] = ()
    metrics: Mapping[str, Value] = field(default_factory=dict)
    primary_metric: PrimaryMetric | None = None
    state: SnapshotState = "captured"
    #: Why it failed, for state `failed`.
    error: str = ""
    #: How many processes made it together.
    world_size: int = 1
    #: What one of several processes waits for, for state `captured`; a sentence.
    waits_for: str = ""
    #: Of a request only: which part of the checkpoint this process adds.
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class ExperimentSummary:
    """An experiment as a list shows it: the record, its edits applied, and its state at the query."""

    record: ExperimentRecord
    status: Status
    #: State of the files that `init` saved.
    state: SnapshotState
    error: str = ""
    ended: datetime | None = None
    checkpoint_count: int = 0
    latest: CheckpointRecord | None = None
    best: CheckpointRecord | None = None
    duration_s: float | None = None
    #: How long calls of this library held up the training, in all; None when nobody told.
    stall_s: float | None = None


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One entry of a snapshot. `path` is relative, with `/`, undecodable bytes as surrogates."""

    path: str
    type: FileType
    #: Permission bits only.
    mode: int
    size: int
    mtime_ns: int
    #: BLAKE3 of the content in hexadecimal; of a link, of its target; empty for directories.
    hash: str
    #: Where a symlink points to, as written in it; empty otherwise.
    target: str = ""


@dataclass(frozen=True, slots=True)
class FileChange:
    """One difference between two snapshots; `left` or `right` is None where the file is absent."""

    path: str
    left: FileEntry | None
    right: FileEntry | None


def paths_argument(paths: Sequence[str]) -> None | str | list[str]:
    """Saved paths in the form in which users gave them: None, one path, or a list."""
    if not paths:
        return None
    return paths[0] if len(paths) == 1 else list(paths)


def best_checkpoint(checkpoints: Sequence[CheckpointRecord]) -> CheckpointRecord | None:
    """The checkpoint with the best primary metric, or None when none can be ranked.

    Name and goal come from the newest checkpoint that has a primary metric; checkpoints in which that
    metric is absent, not a number, NaN or failed to be stored do not take part; ties go to the later one.
    """
    primary = next((c.primary_metric for c in reversed(checkpoints) if c.primary_metric), None)
    if primary is None:
        return None
    best: CheckpointRecord | None = None
    best_value = math.nan
    for checkpoint in checkpoints:
        value = checkpoint.metrics.get(primary.name)
        if checkpoint.state == "failed" or not is_number(value) or value != value:
            continue
        better = value <= best_value if primary.goal == "minimize" else value >= best_value
        if best is None or better:
            best, best_value = checkpoint, value
    return best


def latest_checkpoint(checkpoints: Sequence[CheckpointRecord]) -> CheckpointRecord | None:
    """The newest checkpoint that did not fail, else the newest, else None."""
    stored = [checkpoint for checkpoint in checkpoints if checkpoint.state != "failed"]
    candidates = stored or checkpoints
    return max(candidates, key=lambda c: (c.created, c.step)) if candidates else None


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value compares as a number (bool does not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def checkpoint_label(checkpoint: CheckpointRecord) -> str:
    """A checkpoint as messages call it: short id and step."""
    return f"{short(checkpoint.id)} (step {checkpoint.step})"


def utc_now() -> datetime:
    """The current time, aware, in UTC."""
    return datetime.now(timezone.utc)


def format_time(time: datetime) -> str:
    """RFC 3339 in UTC with microseconds, for example `2026-11-23T05:30:00.123456Z`."""
    return time.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(text: str) -> datetime:
    """The time that `format_time` wrote; raises `ValueError`."""
    if _TIME.fullmatch(text):  # ten times as fast as what follows, which takes more
        return datetime.fromisoformat(f"{text[:-1]}+00:00")
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)


def validate_mapping(values: object, argument: str) -> dict[str, Value]:
    """Params or metrics as plain values, or `TypeError`/`ValueError` naming the key.

    Accepted: bool, int, float (NaN and infinities too), str, None, list, tuple, dict with string keys,
    numpy scalars and arrays, torch, TensorFlow and JAX tensors (recognised by what they can do; nothing
    is imported), `pathlib.Path` (as str), `datetime` (as ISO 8601 text).
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"{argument} must be a dict, not {type(values).__name__}")
    budget = _Budget(argument)
    return {
        _validate_key(key, argument): _validate_value(value, f"{argument}[{key!r}]", 1, budget)
        for key, value in values.items()
    }


def validate_step(step: object) -> int:
    """A step as int; raises `TypeError` or `ValueError` with the value."""
    number = _unwrap_scalar(step)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"step must be an int, not {step!r}")
    if not 0 <= number <= MAX_STEP:
        raise ValueError(f"step must be between 0 and 2**63 - 1, not {number}")
    return number


def validate_primary_metric(primary: object, metrics: Mapping[str, Value]) -> PrimaryMetric | None:
    """A `(name, goal)` pair as a record; raises `TypeError` or `ValueError` naming what is wrong."""
    if primary is None:
        return None
    if isinstance(primary, str) or not isinstance(primary, Sequence) or len(primary) != 2:
        raise TypeError(f'primary_metric must be ("name", "minimize" or "maximize"), not {primary!r}')
    name, goal = primary
    if not isinstance(name, str):
        raise TypeError(f"the name in primary_metric must be a str, not {name!r}")
    if goal not in GOALS:
        raise ValueError(f'the goal in primary_metric must be "minimize" or "maximize", not {goal!r}')
    if name not in metrics:
        known = ", ".join(sorted(metrics)) or "none"
        raise ValueError(f"primary_metric names {name!r}, which is not in metrics (there: {known})")
    return PrimaryMetric(_plain(name), "minimize" if goal == "minimize" else "maximize")


def validate_text(text: object, argument: str) -> str:
    """A plain `str` that can be written as UTF-8; raises `TypeError` or `ValueError`."""
    if not isinstance(text, str):
        raise TypeError(f"{argument} must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{argument} holds a lone surrogate and is not text: {text!r}") from None
    return _plain(text)


def validate_tags(tags: object) -> tuple[str, ...]:
    """Tags as a tuple without repetition, in the order given; raises `TypeError` or `ValueError`."""
    if isinstance(tags, str) or not isinstance(tags, Sequence):
        raise TypeError(f"tags must be a list of str, not {tags!r}")
    checked = [validate_text(tag, f"tags[{number}]") for number, tag in enumerate(tags)]
    for tag in checked:
        if not tag or any(character.isspace() or character in "/,+" for character in tag):
            raise ValueError(f"a tag is a word without spaces, `/`, `,` or `+`: {tag!r}")
    return tuple(dict.fromkeys(checked))


class _Budget:
    """Counts the size of one argument, so that a huge value is refused before it is copied."""

    def __init__(self, argument: str) -> None:
        self._argument = argument
        self._left = MAX_VALUE_BYTES

    def spend(self, size_bytes: int) -> None:
        self._left -= size_bytes
        if self._left < 0:
            raise ValueError(
                f"{self._argument} are larger than {MAX_VALUE_BYTES >> 20} MiB; save bulk data as a file"
            )


def _validate_key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"keys of {where} must be str, not {key!r}")
    return validate_text(key, f"a key of {where}")


def _validate_value(value: object, where: str, depth: int, budget: _Budget) -> Value:
    if depth > MAX_VALUE_DEPTH:
        raise ValueError(f"{where[:80]}… is nested deeper than {MAX_VALUE_DEPTH} levels")
    budget.spend(8)
    # Exact types first: subclasses such as numpy.float64 are reduced to the plain type below.
    if value is None or type(value) in (bool, int, float):
        return value if type(value) is not int else _check_integer(value, where)  # type: ignore[return-value]
    if isinstance(value, str):
        budget.spend(len(value))
        return validate_text(value, where)
    if isinstance(value, PurePath):
        return validate_text(str(value), where)
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    if isinstance(value, (list, tuple)):
        return [
            _validate_value(item, f"{where}[{number}]", depth + 1, budget)
            for number, item in enumerate(value)
        ]
    if isinstance(value, Mapping):
        budget.spend(sum(len(key) for key in value if isinstance(key, str)))
        return {
            _validate_key(key, where): _validate_value(item, f"{where}[{key!r}]", depth + 1, budget)
            for key, item in value.items()
        }
    if isinstance(value, int):
        return _check_integer(int(value), where)
    if isinstance(value, float):
        return float(value)
    count = _count_elements(value)
    if count is not None:
        budget.spend(8 * count)
        unwrapped = _unwrap_array(value, where)
        if type(unwrapped) is not type(value):
            return _validate_value(unwrapped, where, depth + 1, budget)
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be recorded; "
        "use bool, int, float, str, None, list, dict, an array or a tensor"
    )


def _plain(text: str) -> str:
    """The text itself of a subclass such as an Enum, whose `str` is the name of the member."""
    return str.__str__(text)


def _check_integer(value: int, where: str) -> int:
    if value.bit_length() > MAX_INTEGER_BITS:
        raise ValueError(f"{where} is an int of {value.bit_length()} bits; at most {MAX_INTEGER_BITS} fit")
    return value


def _unwrap_scalar(value: object) -> object:
    """The Python scalar inside a numpy or tensor scalar, else the value itself."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    item = getattr(value, "item", None)
    shape = getattr(value, "shape", None)
    if callable(item) and shape is not None and len(shape) == 0:
        try:
            return item()
        except Exception:  # of the tensor's library; what cannot be read is no number
            return value
    return value


def _count_elements(value: object) -> int | None:
    """How many elements an array or tensor has; None for anything else."""
    shape = getattr(value, "shape", None)
    if shape is None or isinstance(value, type):
        return None
    try:
        return math.prod(int(length) for length in shape)
    except (TypeError, ValueError):
        return None


def _unwrap_array(value: object, where: str) -> object:
    """An array or tensor as (nested lists of) Python numbers, or as it is when that cannot be had.

    They are known by what they share: `tolist` (numpy, torch, JAX) or `numpy` (TensorFlow). Raises
    `TypeError` when the array's own code fails, with whatever exception.
    """
    try:
        for method in ("detach", "cpu"):
            step = getattr(value, method, None)
            if callable(step):
                value = step()
        if callable(as_list := getattr(value, "tolist", None)):
            plain = as_list()
        elif callable(as_numpy := getattr(value, "numpy", None)):
            plain = as_numpy().tolist()
        else:
            return value
        # numpy.longdouble gives itself; Python has no float of that precision.
        is_float = type(plain) is type(value) and getattr(getattr(value, "dtype", None), "kind", "") == "f"
        return float(plain) if is_float else plain
    except Exception as error:
        raise TypeError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
