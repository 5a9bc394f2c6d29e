"""The register of mounts: one JSON file a mount in a directory that is private to the user.

A mount process writes its file before it mounts, adds what serves it, and removes it when it was told to
end. So a file whose process is gone means a mount that died; and as mounts outlive the daemon, a new one
finds all of them here. Beside it lies how far reading in advance has come.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from replicate.records import ProcessIdentity
from replicated.mount.options import EngineReport, MountOptions

_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True)
class PrefetchProgress:
    """How far reading in advance has come."""

    files_done: int = 0
    files_total: int = 0
    bytes_done: int = 0
    bytes_total: int = 0
    is_finished: bool = False
    #: Why it ended early, or how many files could not be read.
    error: str = ""


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One mount, as users are shown it."""

    #: Of the checkpoint, else of the experiment; empty for a whole repository.
    id: str
    experiment_id: str
    repository: str
    #: Absolute, without links; undecodable bytes as surrogates.
    directory: str
    #: 0 while it is not mounted.
    pid: int
    engine: str = ""
    passthrough: bool = False
    #: Why it is not faster than that.
    engine_reason: str = ""
    persist: bool = False
    #: How often it was mounted again after its process had died.
    restarts: int = 0
    #: Why it is not mounted.
    error: str = ""
    #: Nobody tries any more to mount it again.
    is_given_up: bool = False
    prefetch: PrefetchProgress | None = None


@dataclass(frozen=True, slots=True)
class MountOrder:
    """What is to be mounted where, and how: enough to mount it again."""

    #: Random; names the files of the mount.
    name: str
    #: URL, absolute.
    repository: str
    #: Empty for a whole repository, as `snapshot_ids` are.
    experiment_id: str
    checkpoint_id: str
    #: Later ones are laid over earlier ones.
    snapshot_ids: tuple[str, ...]
    #: As in `MountInfo`.
    directory: str
    #: Whether the mount point was made for this mount, so that it goes with it.
    made_directory: bool = False
    options: MountOptions = field(default_factory=MountOptions)
    #: The process that the mount must not outlive.
    owner: ProcessIdentity | None = None

    @property
    def target(self) -> bytes:
        """The mount point, as the kernel knows it."""
        return os.fsencode(self.directory)

    @property
    def shown_id(self) -> str:
        """Of the checkpoint, else of the experiment; empty for a whole repository."""
        return self.checkpoint_id or self.experiment_id


@dataclass(frozen=True, slots=True)
class Registration:
    """What the register holds of one mount."""

    order: MountOrder
    #: None: it has still to be started.
    process: ProcessIdentity | None = None
    #: What serves it; None until it was mounted for the first time.
    report: EngineReport | None = None
    restarts: int = 0
    #: Why it was given up; empty otherwise.
    error: str = ""

    @property
    def name(self) -> str:
        """The name of its files."""
        return self.order.name

    @property
    def target(self) -> bytes:
        """The mount point, as the kernel knows it."""
        return self.order.target

    @property
    def is_wanted_back(self) -> bool:
        """Whether it is to be mounted again when its process is gone."""
        return not self.error and (self.report is not None or self.order.options.persist)

    def describe(self, progress: PrefetchProgress | None = None, *, trouble: str = "") -> MountInfo:
        """The mount as users are shown it; `trouble` says why it is not there at present."""
        order, report = self.order, self.report
        is_there = self.process is not None and not (self.error or trouble)
        return MountInfo(
            id=order.shown_id,
            experiment_id=order.experiment_id,
            repository=order.repository,
            directory=order.directory,
            pid=self.process.pid if self.process is not None and is_there else 0,
            engine=report.engine if report else "",
            passthrough=report is not None and report.passthrough,
            engine_reason=report.reason if report else "",
            persist=order.options.persist,
            restarts=self.restarts,
            error=self.error or trouble,
            is_given_up=bool(self.error),
            prefetch=progress,
        )


def write_registration(directory: Path, registration: Registration) -> None:
    """Put a mount into the register, at once as a whole."""
    _write(_file(directory, registration.name), encode(registration))


def read_registration(directory: Path, name: str) -> Registration | None:
    """What the register holds under a name."""
    try:
        return decode_registration(_file(directory, name).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def remove_registration(directory: Path, name: str) -> None:
    """Take a mount out of the register; it may be out already."""
    _file(directory, name).unlink(missing_ok=True)
    _progress_file(directory, name).unlink(missing_ok=True)


def read_registrations(directory: Path) -> Iterator[Registration]:
    """Every mount in the register, dead ones too. What cannot be read is no mount of ours: skipped."""
    for file in sorted(directory.glob("*.json")):
        registration = read_registration(directory, file.stem)
        if registration is not None:
            yield registration


def write_progress(directory: Path, name: str, progress: PrefetchProgress) -> None:
    """Note how far reading in advance has come; it is no error when that cannot be noted."""
    with suppress(OSError):
        _write(_progress_file(directory, name), json.dumps(asdict(progress)))


def read_progress(directory: Path, name: str) -> PrefetchProgress | None:
    """How far reading in advance has come; None when nothing is read."""
    try:
        return _record(PrefetchProgress, json.loads(_progress_file(directory, name).read_bytes()))
    except (OSError, ValueError):
        return None


def encode(record: Registration | MountOrder) -> str:
    """A record as JSON, in ASCII: also names that are no UTF-8 survive."""
    return json.dumps(asdict(record))


def decode_registration(text: str) -> Registration:
    """What `encode` made of a registration; raises `ValueError`."""
    values = _mapping(json.loads(text))
    process, report = values.get("process"), values.get("report")
    return _record(
        Registration,
        {
            **values,
            "order": _order(values.get("order")),
            "process": process and _record(ProcessIdentity, process),
            "report": report and _record(EngineReport, report),
        },
    )


def decode_order(text: str) -> MountOrder:
    """What `encode` made of an order; raises `ValueError`."""
    return _order(json.loads(text))


def _order(value: Any) -> MountOrder:
    values = _mapping(value)
    owner = values.get("owner")
    snapshot_ids = values.get("snapshot_ids")
    if not isinstance(snapshot_ids, list):
        raise ValueError("no list of snapshots")
    return _record(
        MountOrder,
        {
            **values,
            "snapshot_ids": tuple(map(str, snapshot_ids)),
            "options": _record(MountOptions, values.get("options")),
            "owner": owner and _record(ProcessIdentity, owner),
        },
    )


def _record(kind: type[_Record], value: Any) -> _Record:
    """A record from the values of its fields; what a newer version has added is left out."""
    values = _mapping(value)
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]  # every kind is a dataclass
    try:
        return kind(**{key: value for key, value in values.items() if key in known})
    except TypeError as error:
        raise ValueError(f"fields are missing: {error}") from None


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="ascii")
    temporary.replace(file)


def _file(directory: Path, name: str) -> Path:
    return directory / f"{name}.json"


def _progress_file(directory: Path, name: str) -> Path:
    return directory / f"{name}.progress"
