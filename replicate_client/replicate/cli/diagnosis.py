"""What can be wrong on this machine, checked one by one: the contents of `doctor`.

Each check returns findings and raises nothing but `ReplicateError`, which becomes a finding too. Checks look
and do not change anything, except that the daemon is started. `doctor` prints them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from replicate._version import __version__
from replicate.cli.refusals import describe_refusal
from replicate.config import ProjectConfig
from replicate.errors import ReplicateError
from replicate.home import Home, check_private
from replicate.phrases import format_size

if TYPE_CHECKING:
    from replicate.query import ProbeStep

Outcome = Literal["ok", "warn", "fail"]

_FULL_BYTES = 100 << 20
_LOW_BYTES = 1 << 30
#: SQLite's locks and fsync cannot be relied on there.
_REMOTE_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "9p"}
)
_VOLATILE_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
#: Distributions of other people that install modules of our names.
_CLASHING_DISTRIBUTIONS = ("replicate", "replicated")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, and how to mend what is not in order."""

    name: str
    outcome: Outcome
    detail: str
    hint: str = ""
    #: For programs: a word, one of few for each name, or a number; of what was tried of a store.
    value: str = ""


def diagnose(home: Home, find_project: Callable[[], ProjectConfig]) -> Iterator[Finding]:
    """All findings, in the order in which one would look; each check runs whatever the others found."""
    yield from run_check("Python", check_python)
    yield from run_check("Installation", check_name_clash)
    yield from run_check("Run directory", lambda: check_run_directory(home))
    yield from run_check("Journal", lambda: check_journal_place(home))
    yield from run_check("Disk space", lambda: check_space("Disk space", home.state))
    yield from run_check("Daemon", check_daemon)
    yield from run_check("Mounting", check_mounting)
    try:
        project = find_project()
    except ReplicateError as error:
        yield Finding("Project", "fail", error.message, error.hint)
        return
    except OSError as error:
        yield Finding("Project", "fail", *describe_refusal(error))
        return
    yield Finding("Project", "ok", f"{project.directory} (repository {project.repository})")
    yield from run_check("Repository", lambda: check_repository(project))


def diagnose_store(url: str) -> Iterator[Finding]:
    """What a store does, and before it what is needed to ask."""
    yield from run_check("Daemon", check_daemon)
    yield from run_check("Store", lambda: check_store(url))


def run_check(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of a check; whatever it raises becomes one."""
    try:
        return check()
    except ReplicateError as error:
        return [Finding(name, "fail", error.message, error.hint)]
    except OSError as error:
        return [Finding(name, "fail", *describe_refusal(error))]


def check_python() -> list[Finding]:
    """The interpreter, for the report."""
    version = platform.python_version()
    return [Finding("Python", "ok", f"{version} ({sys.executable}), replicate {__version__}")]


def check_name_clash() -> list[Finding]:
    """Whether another distribution installs a module of our name, over ours or before it."""
    clashing = [
        f"{name} {version}" for name in _CLASHING_DISTRIBUTIONS if (version := _installed_version(name))
    ]
    if not clashing:
        return [Finding("Installation", "ok", "no other package is called replicate")]
    names = ", ".join(clashing)
    uninstall = "pip uninstall " + " ".join(name.split()[0] for name in clashing)
    return [
        Finding(
            "Installation",
            "fail",
            f"another package has modules of the same name: {names}",
            f"`{uninstall}`, then `pip install --force-reinstall --no-deps replicate-vcs`; "
            "or keep them in separate virtual environments",
        )
    ]


def check_run_directory(home: Home) -> list[Finding]:
    """Whether only this user can reach the socket."""
    try:
        check_private(home.run)
    except FileNotFoundError:
        return [Finding("Run directory", "ok", f"{home.run} (not made yet)")]
    return [Finding("Run directory", "ok", f"{home.run}, private")]


def check_journal_place(home: Home) -> list[Finding]:
    """Whether the journal lies on a file system that keeps what it is told to keep."""
    kind = file_system_type(home.state, Path("/proc/self/mountinfo").read_text(encoding="utf-8"))
    hint = "set REPLICATE_HOME to a directory on a local disk"
    if kind in _REMOTE_FILE_SYSTEMS or kind.startswith("fuse"):
        detail = f"{home.state} is on {kind}, where locks and fsync may not hold"
        return [Finding("Journal", "warn", detail, hint)]
    if kind in _VOLATILE_FILE_SYSTEMS:
        detail = f"{home.state} is on {kind}: what is captured but not stored is lost at a restart"
        return [Finding("Journal", "warn", detail, hint)]
    return [Finding("Journal", "ok", f"{home.state} (on {kind or 'an unknown file system'})")]


def check_space(name: str, directory: Path) -> list[Finding]:
    """Whether there is room where captured files wait."""
    existing = _nearest_existing(directory)
    free = shutil.disk_usage(existing).free
    detail = f"{format_size(free)} free at {existing}"
    if free >= _LOW_BYTES:
        return [Finding(name, "ok", detail)]
    outcome: Outcome = "fail" if free < _FULL_BYTES else "warn"
    return [Finding(name, outcome, detail, "free some space, or set REPLICATE_HOME to another disk")]


def check_daemon() -> list[Finding]:
    """Whether the daemon answers (it is started if it does not run) and is of our version."""
    from replicate import connection

    info = connection.start_daemon()
    detail = f"pid {info.pid}, version {info.version}"
    if info.version != __version__:
        hint = "`replicate daemon stop`; the next command starts the right one"
        return [Finding("Daemon", "warn", f"{detail}, but this command is {__version__}", hint)]
    return [Finding("Daemon", "ok", detail)]


def check_mounting() -> list[Finding]:
    """Which engines the daemon can mount with; only the best of them is needed."""
    from replicate import mounts

    findings = []
    is_served = False
    engines = mounts.probe_mounting()
    is_possible = any(engine.is_usable for engine in engines)
    for engine in engines:
        name = f"Mounting, {engine.name}"
        if engine.is_usable:
            detail = engine.detail if is_served else f"{engine.detail} (the one that is used)"
            findings.append(Finding(name, "ok", detail, engine.hint))
            is_served = True
        elif is_served:
            findings.append(Finding(name, "ok", f"not usable, and not needed: {engine.detail}"))
        else:
            outcome: Outcome = "warn" if is_possible else "fail"
            findings.append(Finding(name, outcome, f"not usable: {engine.detail}", engine.hint))
    return findings


def check_repository(project: ProjectConfig) -> list[Finding]:
    """What the daemon finds when it tries the repository."""
    from replicate import query

    return _of_steps(query.probe_repository(project.repository))


def check_store(url: str) -> list[Finding]:
    """What the daemon finds when it tries out a store."""
    from replicate import query

    return _of_steps(query.probe_store(url))


def _of_steps(steps: Sequence[ProbeStep]) -> list[Finding]:
    return [
        Finding(step.name.capitalize(), step.outcome, step.detail, step.hint, step.value) for step in steps
    ]


def file_system_type(path: Path, mount_info: str) -> str:
    """The type of the file system that `path` is or will be on, from the text of mountinfo; or empty."""
    target = os.path.realpath(_nearest_existing(path))
    best, kind = "", ""
    for line in mount_info.splitlines():
        fields = line.split(" ")
        if "-" not in fields[6:]:
            continue
        mount_point = _unescape_octal(fields[4])
        inside = target == mount_point or target.startswith(mount_point.rstrip("/") + "/")
        # Of several mounts on one directory, the last covers the others.
        if inside and len(mount_point) >= len(best):
            best, kind = mount_point, fields[fields.index("-", 6) + 1]
    return kind


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nearest_existing(path: Path) -> Path:
    return next((parent for parent in (path, *path.parents) if parent.exists()), Path("/"))


def _unescape_octal(text: str) -> str:
    """A path of mountinfo, in which a space is written `\\040`."""
    parts = text.split("\\")
    return parts[0] + "".join(chr(int(part[:3], 8)) + part[3:] for part in parts[1:])
