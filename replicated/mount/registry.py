"""The register of mounts: one JSON file a mount in a directory that is private to the user.

A mount process writes its file before it mounts and removes it after; a file whose process is gone is
stale. The daemon reads them, so that mounts outlive it and a new daemon finds them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from replicate.records import ProcessIdentity


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One mount, as users are shown it."""

    #: Of the checkpoint, else of the experiment; empty for a whole repository.
    id: str
    experiment_id: str
    repository: str
    #: Absolute, without links; undecodable bytes as surrogates.
    directory: str
    pid: int


@dataclass(frozen=True, slots=True)
class Registration:
    """What the register holds of one mount."""

    #: Random; the name of the file.
    name: str
    info: MountInfo
    process: ProcessIdentity
    #: Whether the mount point was made for this mount, so that it goes with it.
    made_directory: bool

    @property
    def directory(self) -> bytes:
        """The mount point, as the kernel knows it."""
        return os.fsencode(self.info.directory)


def write_registration(directory: Path, registration: Registration) -> None:
    """Put a mount into the register, at once as a whole."""
    temporary = directory / f".{registration.name}.tmp"
    temporary.write_text(json.dumps(asdict(registration)), encoding="ascii")
    temporary.replace(_file(directory, registration.name))


def remove_registration(directory: Path, name: str) -> None:
    """Take a mount out of the register; it may be out already."""
    _file(directory, name).unlink(missing_ok=True)


def read_registrations(directory: Path) -> Iterator[Registration]:
    """Every mount in the register, stale ones too. What cannot be read is no mount of ours: skipped."""
    for file in sorted(directory.glob("*.json")):
        try:
            fields = json.loads(file.read_bytes())
            yield Registration(
                name=file.stem,
                info=MountInfo(**fields["info"]),
                process=ProcessIdentity(**fields["process"]),
                made_directory=bool(fields["made_directory"]),
            )
        except (OSError, ValueError, TypeError, KeyError):
            continue


def _file(directory: Path, name: str) -> Path:
    return directory / f"{name}.json"
