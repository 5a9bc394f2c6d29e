"""What shows the same files as a directory: the file system they lie in, our mounts, and those of the peers.

Each serves the directory `data` of the project: ours, restic and borg out of a repository of their own into
which it was saved, rclone out of the directory itself. A mount is made anew for each measurement, so the
kernel knows nothing of it, and is gone before the next server is asked.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from measuring.peers import Peers
from measuring.processes import Family, cpu_seconds, peak_bytes
from measuring.workspace import Workspace
from storing.tools import BORG, DATA, RESTIC, Borg, Restic

from replicate.home import find_home

# ruff: noqa: D102  (`Server` describes the methods)

NATIVE = "native"
RCLONE = "rclone"

_READY_TIMEOUT_S = 120.0
_READY_LOOK_S = 0.002
_END_TIMEOUT_S = 30.0
#: Longer than anything that a person would wait for.
_COMMAND_TIMEOUT_S = 300.0
_REPLICATE = Path(sys.executable).with_name("replicate")


@dataclass(frozen=True)
class Mount:
    """Something mounted, and who serves it."""

    #: What was saved as `data`.
    directory: Path
    #: 0: nobody but the kernel.
    pid: int = 0
    #: What it says of itself.
    details: str = ""

    def cpu_seconds(self) -> float:
        """Processor time of the serving process and its children so far."""
        return cpu_seconds(Family().pids(self.pid)) if self.pid else 0.0

    def peak_bytes(self) -> int:
        """The most memory that the serving process itself has had."""
        return peak_bytes(self.pid) if self.pid else 0


class Server(Protocol):
    """One who shows the files."""

    @property
    def name(self) -> str:
        """As it is called in the figures."""

    def backing(self) -> Sequence[Path]:
        """The directories out of which it serves."""

    @contextmanager
    def mounted(self) -> Iterator[Mount]:
        """A new mount, which is usable at once and gone afterwards."""


@dataclass(frozen=True)
class Variant:
    """A way to mount with this project: its name in the figures, and the options of the command."""

    name: str
    options: tuple[str, ...] = ()


class Native:
    """The directory itself."""

    name = NATIVE

    def __init__(self, project: Path) -> None:
        self._data = project / DATA

    def backing(self) -> Sequence[Path]:
        return [self._data]

    @contextmanager
    def mounted(self) -> Iterator[Mount]:
        yield Mount(self._data)


class Ours:
    """`replicate mount` of an experiment whose code is `data`."""

    def __init__(self, workspace: Workspace, experiment_id: str, variant: Variant) -> None:
        self.name = variant.name
        self._options = variant.options
        self._repository = workspace.repository
        self._experiment_id = experiment_id
        self._directory = workspace.root / "mounted"

    def backing(self) -> Sequence[Path]:
        return [self._repository, find_home().cache]

    @contextmanager
    def mounted(self, *more_options: str) -> Iterator[Mount]:
        command = ("mount", "--json", *self._options, *more_options, self._experiment_id, self._directory)
        said = json.loads(_run_replicate(self._repository, *command))
        try:
            shown = {name: said[name] for name in ("engine", "passthrough", "reason") if said.get(name)}
            details = ", ".join(f"{name} {value}" for name, value in shown.items())
            yield Mount(self._directory / DATA, said["pid"], details)
        finally:
            _run_replicate(self._repository, "umount", self._directory)


class Foreground:
    """A program that serves in the foreground until its mount is gone."""

    name: str
    #: Where the files that were saved are, below the mount point.
    _inside = "."

    def __init__(self, root: Path) -> None:
        self._directory = root / f"mounted-{self.name}"

    def _command(self, directory: Path) -> Sequence[str | Path]:
        raise NotImplementedError

    def _surroundings(self) -> dict[str, str]:
        return {}

    @contextmanager
    def mounted(self) -> Iterator[Mount]:
        self._directory.mkdir()
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(
                self._command(self._directory),
                env={**os.environ, **self._surroundings()},
                stdin=subprocess.DEVNULL,
                stdout=complaints,
                stderr=complaints,
            )
            try:
                shown = self._directory / self._inside / DATA
                _await(shown, process, complaints.fileno())
                yield Mount(shown, process.pid)
            finally:
                _end(self._directory, process)
        self._directory.rmdir()


class Rclone(Foreground):
    """With its defaults: nothing is kept on disk. What it is given is a remote, or a directory."""

    name = RCLONE

    def __init__(self, program: Path, root: Path, source: Path | str, *options: str) -> None:
        super().__init__(root)
        self._program = program
        self._source = source
        self._options = options

    def backing(self) -> Sequence[Path]:
        return [self._source / DATA] if isinstance(self._source, Path) else []

    def _command(self, directory: Path) -> Sequence[str | Path]:
        # Named, or it says that there is none and looks into the user's.
        return [
            self._program,
            "mount",
            "--config=/dev/null",
            "--read-only",
            *self._options,
            self._source,
            directory,
        ]


class ResticMount(Foreground):
    """`restic mount`."""

    name = RESTIC
    _inside = "snapshots/latest"

    def __init__(self, tool: Restic, root: Path) -> None:
        super().__init__(root)
        self._tool = tool

    def backing(self) -> Sequence[Path]:
        return [self._tool.directory]

    def _command(self, directory: Path) -> Sequence[str | Path]:
        return [self._tool.program, "mount", *self._tool.options, directory]

    def _surroundings(self) -> dict[str, str]:
        return self._tool.environment


class BorgMount(Foreground):
    """`borg mount` of the archive, which needs one of two Python packages."""

    name = BORG

    def __init__(self, tool: Borg, root: Path) -> None:
        super().__init__(root)
        self._tool = tool

    def backing(self) -> Sequence[Path]:
        return [self._tool.directory]

    def _command(self, directory: Path) -> Sequence[str | Path]:
        return [self._tool.program, "mount", "--foreground", f"{self._tool.repository}::0", directory]

    def _surroundings(self) -> dict[str, str]:
        return self._tool.environment


class Saved:
    """What `data` holds now, saved with ours and with the peers: the servers of it.

    The repositories are new. `close` removes those of the peers; ours is renewed by the next one.
    """

    def __init__(self, workspace: Workspace, peers: Peers) -> None:
        self._workspace = workspace
        workspace.renew()
        experiment = workspace.begin(DATA)
        experiment.stop()
        workspace.settle()
        self.experiment_id = experiment.id
        self.native = Native(workspace.project)
        self._tools: list[Restic | Borg] = []
        self.peers: list[Server] = []
        if rclone := peers.find_command("rclone", "rclone"):
            self.peers.append(Rclone(rclone, workspace.root, workspace.project))
        if program := peers.find_command("restic", "restic"):
            restic = Restic(program, workspace)
            self._tools.append(restic)
            self.peers.append(ResticMount(restic, workspace.root))
        program = peers.find_command("borg", "borgbackup")
        if program and peers.find_borg_mount(program):
            borg = Borg(program, workspace)
            self._tools.append(borg)
            self.peers.append(BorgMount(borg, workspace.root))
        for tool in self._tools:
            tool.save()
        os.sync()

    def ours(self, variant: Variant) -> Ours:
        """A server that mounts in this way."""
        return Ours(self._workspace, self.experiment_id, variant)

    def close(self) -> None:
        """Remove the repositories of the peers."""
        for tool in self._tools:
            tool.stop()


def find_variants(engines: Sequence[str]) -> list[Variant]:
    """The ways to mount that can be told apart here: ours with and without passthrough, and more engines."""
    said = subprocess.run([_REPLICATE, "mount", "--help"], capture_output=True, text=True, check=True).stdout
    if "--engine" not in said:
        print("not measured apart: engines and passthrough, because `replicate mount` has no such options")
        return [Variant("replicate")]
    return [
        Variant("passthrough", ("--engine", "native", "--passthrough")),
        Variant("no passthrough", ("--engine", "native", "--no-passthrough")),
        *(Variant(engine, ("--engine", engine)) for engine in engines if engine != "native"),
    ]


def can_prefetch() -> bool:
    """Whether mounts can be told to read in advance."""
    said = subprocess.run([_REPLICATE, "mount", "--help"], capture_output=True, text=True, check=True).stdout
    return "--prefetch" in said


def forget_cache() -> None:
    """Remove what earlier mounts have cached of the content of files."""
    shutil.rmtree(find_home().cache / "content", ignore_errors=True)


def unmount_all(workspace: Workspace) -> None:
    """Leave no mount of ours behind, whatever has happened."""
    with suppress(SystemExit):
        _run_replicate(workspace.repository, "umount", "--all")


def _run_replicate(repository: Path, *arguments: str | Path) -> str:
    try:
        ran = subprocess.run(
            [_REPLICATE, "--repository", f"file://{repository}", *arguments],
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        waited = f"{_COMMAND_TIMEOUT_S:.0f} s"
        raise SystemExit(f"error: `replicate {arguments[0]}` has not ended after {waited}") from None
    if ran.returncode:
        raise SystemExit(f"error: `replicate {arguments[0]}` has failed: {ran.stderr.strip()}")
    return ran.stdout


def _await(shown: Path, process: subprocess.Popen[bytes], complaints: int) -> None:
    """Return when the path is there."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(OSError):
            os.stat(shown)
            return
        if process.poll() is not None:
            break
        time.sleep(_READY_LOOK_S)
    said = os.pread(complaints, 1 << 16, 0).decode(errors="replace").strip().splitlines()
    raise SystemExit(f"error: {process.args} has not mounted: {said[-1] if said else 'it said nothing'}")


def _end(directory: Path, process: subprocess.Popen[bytes]) -> None:
    """Unmount, and end the process should it not do so itself."""
    while os.path.ismount(directory) and process.poll() is None:
        unmounting = subprocess.run(["fusermount3", "-u", directory], capture_output=True)
        if unmounting.returncode == 0:
            break
        time.sleep(0.1)  # still in use: the kernel is not done with what was just closed
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        subprocess.run(["fusermount3", "-u", "-z", directory], capture_output=True)
