"""The tools that are measured side by side, ours and the peers: each saves the directory `data` of a project.

A tool is begun with an empty repository and stopped before the next one like it begins. What it costs is wall
time until it says that everything is stored, and the processor time of all its processes meanwhile.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

from measuring.peers import Peer, Peers
from measuring.processes import Family, MemorySampler, cpu_seconds
from measuring.workspace import Workspace

OURS = "replicate"
RESTIC = "restic"
BORG = "borg"
DVC = "DVC"
KEEPSAKE = "Keepsake"

#: What every tool saves.
DATA = "data"


# ruff: noqa: D102  (`Tool` and `Restoring` describe the methods)


class Cost(NamedTuple):
    """Of one call."""

    wall_s: float
    cpu_s: float


class Tool(Protocol):
    """A tool with a repository of its own."""

    name: str

    def save(self) -> Cost:
        """Save what `data` holds now; returns when it is stored."""

    def stored_bytes(self) -> int:
        """Bytes of the repository's files, less what it held before anything was saved."""

    def peak_bytes(self) -> int:
        """Most memory that its processes had at one moment while it saved; 0: not known."""

    def stop(self) -> None:
        """End its processes and remove the repository."""


class Restoring(Tool, Protocol):
    """One that can give back what was saved."""

    def restore(self, number: int, directory: Path) -> Cost:
        """Write what the save of that number held (from 0) below a directory that does not exist yet."""


def begin(workspace: Workspace, peers: Peers, names: Sequence[str]) -> dict[str, Tool]:
    """Those tools of `names` that can be had, all with empty repositories, ours first."""
    makers: dict[str, Callable[[], Tool | None]] = {
        OURS: lambda: Replicate(workspace),
        RESTIC: lambda: _of_command(Restic, peers.find_command("restic", "restic"), workspace),
        BORG: lambda: _of_command(Borg, peers.find_command("borg", "borgbackup"), workspace),
        DVC: lambda: _of_peer(DVC, peers.start_dvc(workspace.project), ".dvc"),
        KEEPSAKE: lambda: _of_peer(KEEPSAKE, peers.start_keepsake(workspace.project), ".keepsake"),
    }
    begun = {name: makers[name]() for name in makers if name in names}
    return {name: tool for name, tool in begun.items() if tool is not None}


def stop(tools: dict[str, Tool]) -> None:
    """Stop all of them."""
    for tool in tools.values():
        tool.stop()


def save_by_turns(tools: dict[str, Tool], *, is_reversed: bool = False) -> dict[str, Cost]:
    """What each of them needs to save the same files; the disk is left in peace before each."""
    costs = {}
    for name in reversed(tools) if is_reversed else tools:
        os.sync()
        costs[name] = tools[name].save()
    return costs


class Replicate:
    """Ours: a daemon, its store process, and the script that calls it, all of which count."""

    name = OURS

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        workspace.renew()
        self._daemon = Family()
        self._before = tree_bytes(workspace.repository)
        url = f"file://{workspace.repository}"
        program = Path(__file__).with_name("save_replicate.py")
        self._script = Peer(Path(sys.executable), program, workspace.project, {}, [url])
        workspace.memory.peaks[OURS] = 0

    def save(self) -> Cost:
        return self._ask(DATA)

    def restore(self, number: int, directory: Path) -> Cost:
        directory.mkdir()
        return self._ask([number, str(directory)])

    def stored_bytes(self) -> int:
        return tree_bytes(self._workspace.repository) - self._before

    def peak_bytes(self) -> int:
        return self._workspace.memory.peaks[OURS]

    def stop(self) -> None:
        self._script.stop()
        self._workspace.stop_daemon()
        shutil.rmtree(self._workspace.repository)

    def _ask(self, request: object) -> Cost:
        before = self._cpu_s()
        self._workspace.memory.label(OURS)
        wall_s = self._script.ask(request)
        self._workspace.memory.label("")
        return Cost(wall_s, self._cpu_s() - before)

    def _cpu_s(self) -> float:
        daemon = cpu_seconds(self._daemon.pids(self._workspace.find_daemon()))
        return daemon + self._script.cpu_seconds()


class _Command:
    """A tool that is a program to be called each time.

    `benchmarks/mount.py` calls it with the same `options` and in the same `environment`.
    """

    name: str
    #: What is set in its environment so that it asks nothing and keeps everything below its directory.
    settings: ClassVar[dict[str, str]]

    def __init__(self, program: Path, workspace: Workspace) -> None:
        self.program = program
        self._project = workspace.project
        self.directory = workspace.root / self.name
        self.directory.mkdir()
        self.repository = self.directory / "repository"
        self.environment = {**os.environ, **self.settings, "HOME": str(self.directory)}
        self._pid = 0
        self._memory = MemorySampler(lambda: self._pid)
        self._memory.start()
        self._before = 0

    def stored_bytes(self) -> int:
        return tree_bytes(self.repository) - self._before

    def peak_bytes(self) -> int:
        return self._memory.peaks["save"]

    def stop(self) -> None:
        self._memory.stop()
        shutil.rmtree(self.directory)

    def _run(self, *arguments: str | Path, directory: Path | None = None) -> Cost:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [self.program, *arguments],
            cwd=directory or self._project,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._pid = process.pid
        with process.stderr:
            said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"error: {' '.join(map(str, process.args))}: {said.decode(errors='replace')}")
        return Cost(wall_s, usage.ru_utime + usage.ru_stime)

    def _save(self, *arguments: str | Path) -> Cost:
        self._memory.label("save")
        try:
            return self._run(*arguments)
        finally:
            self._memory.label("")


class Restic(_Command):
    """With its defaults: it encrypts, and compresses what it takes to be compressible."""

    name = RESTIC
    settings: ClassVar = {"RESTIC_PASSWORD": "benchmark"}

    def __init__(self, program: Path, workspace: Workspace) -> None:
        super().__init__(program, workspace)
        self.options = ("--quiet", "--repo", self.repository, "--cache-dir", self.directory / "cache")
        self._run("init", *self.options)
        self._before = tree_bytes(self.repository)

    def save(self) -> Cost:
        return self._save("backup", *self.options, DATA)

    def restore(self, number: int, directory: Path) -> Cost:
        # Named by their time, which is how the last one of several is told from the others.
        names = sorted((self.repository / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return self._run("restore", *self.options, names[number].name, "--target", directory)


class Borg(_Command):
    """Without encryption, with its default compression (lz4)."""

    name = BORG
    settings: ClassVar = {"BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}

    def __init__(self, program: Path, workspace: Workspace) -> None:
        super().__init__(program, workspace)
        self.environment["BORG_BASE_DIR"] = str(self.directory)
        self._saved = 0
        self._run("init", "--encryption", "none", self.repository)
        self._before = tree_bytes(self.repository)

    def save(self) -> Cost:
        cost = self._save("create", f"{self.repository}::{self._saved}", DATA)
        self._saved += 1
        return cost

    def restore(self, number: int, directory: Path) -> Cost:
        directory.mkdir()
        return self._run("extract", f"{self.repository}::{number}", directory=directory)


class _Session:
    """A peer that is called as a library, by a script that runs all the time."""

    def __init__(self, name: str, peer: Peer, repository: str) -> None:
        self.name = name
        self._peer = peer
        self._repository = peer.directory / repository

    def save(self) -> Cost:
        before = self._peer.cpu_seconds()
        wall_s = self._peer.save(DATA)
        self._peer.settle()  # Keepsake's call returns before anything is stored
        return Cost(wall_s, self._peer.cpu_seconds() - before)

    def stored_bytes(self) -> int:
        return tree_bytes(self._repository)

    def peak_bytes(self) -> int:
        return 0

    def stop(self) -> None:
        self._peer.stop()
        shutil.rmtree(self._repository)


def _of_command(
    kind: Callable[[Path, Workspace], Tool], program: Path | None, workspace: Workspace
) -> Tool | None:
    return None if program is None else kind(program, workspace)


def _of_peer(name: str, peer: Peer | None, repository: str) -> Tool | None:
    return None if peer is None else _Session(name, peer, repository)


def tree_bytes(directory: Path) -> int:
    """Sum of the sizes of all files below a directory, each counted once however many names it has."""
    sizes = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())
