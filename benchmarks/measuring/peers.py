"""Other tools that save checkpoints, each in a virtual environment and a process of its own.

A peer that cannot be had is skipped, with the reason on stdout.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from measuring.processes import Family, cpu_seconds
from measuring.workspace import progress

#: Keepsake's generated code does not load with a protobuf that came later.
_KEEPSAKE = ("keepsake==0.4.2", "protobuf==3.20.3")
_WANDB = ("wandb==0.31.0",)
_DVC = ("dvc==3.67.1",)
_TORCH = ("torch", "numpy")
#: The Pythons of Keepsake's days first.
_KEEPSAKE_PYTHONS = ("python3.8", "python3.9", "python3.7", "python3.10")
#: A peer that uses less than this for that long has finished what it does in the background.
_IDLE_CPU_S = 0.02
_IDLE_S = 0.5
_SETTLE_PATIENCE_S = 120.0


class Peers:
    """The virtual environments of the peers: those in `directory`, which are made there when missing."""

    def __init__(
        self, directory: Path, *, keepsake_python: str | None, is_skipped: bool, is_silent: bool = False
    ) -> None:
        self.directory = directory
        self._keepsake_python = keepsake_python
        self._problems: dict[str, str] = {}
        self._is_skipped = is_skipped
        if is_skipped and not is_silent:
            print("skipped: all peers")

    def start_keepsake(self, directory: Path) -> "Peer | None":
        """Keepsake in a new project, with an experiment begun."""
        python = self._python("keepsake", _KEEPSAKE, self._keepsake_python or _old_python())
        if python is None:
            return None
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "keepsake.yaml").write_text('repository: "file://.keepsake"\n')
        return Peer(python, "save_keepsake.py", directory, {"KEEPSAKE_NO_ANALYTICS": "1"})

    def start_wandb(self, directory: Path) -> "Peer | None":
        """Weights & Biases, offline, with a run begun."""
        python = self._python("wandb", _WANDB, sys.executable)
        if python is None:
            return None
        directory.mkdir(parents=True)
        places = {
            f"WANDB_{name}_DIR": str(directory / name.lower()) for name in ("DATA", "CACHE", "ARTIFACT")
        }
        return Peer(
            python, "save_wandb.py", directory, {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **places}
        )

    def start_dvc(self, directory: Path) -> "Peer | None":
        """DVC with a new repository in `directory`, its caches beside it."""
        python = self._python("dvc", _DVC, sys.executable)
        if python is None:
            return None
        places = {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(directory / ".dvc-site")}
        return Peer(python, "save_dvc.py", directory, places)

    def find_torch(self) -> Path | None:
        """A Python that has torch and numpy."""
        return self._python("torch", _TORCH, sys.executable)

    def find_command(self, name: str, package: str) -> Path | None:
        """A program of a Debian package, which is installed when it is missing and this is root."""
        if self._is_skipped or name in self._problems:
            return None
        if shutil.which(name) is None:
            if os.geteuid() != 0 or shutil.which("apt-get") is None:
                self._skip(name, f"not installed; it comes with the Debian package {package}")
                return None
            progress(f"{name}: installing the package {package}")
            if problem := _run(["apt-get", "install", "--yes", "--no-install-recommends", package]):
                self._skip(name, problem)
                return None
        return Path(shutil.which(name) or name)

    def find_borg_mount(self, borg: Path) -> bool:
        """Whether `borg mount` works, for which it needs one of two more packages."""
        if "borg mount" in self._problems:
            return False
        if not _run([borg, "mount", "--help"]):
            for module in ("llfuse", "pyfuse3"):
                if not _run([_interpreter(borg), "-c", f"import {module}"]):
                    return True
        package = "python3-llfuse"
        if os.geteuid() == 0 and shutil.which("apt-get") is not None:
            progress(f"borg mount: installing the package {package}")
            if not (problem := _run(["apt-get", "install", "--yes", "--no-install-recommends", package])):
                return True
        else:
            problem = f"it needs the Debian package {package}"
        self._skip("borg mount", problem)
        return False

    def _skip(self, name: str, problem: str) -> None:
        self._problems[name] = problem
        print(f"skipped: {name}: {problem}", flush=True)

    def _python(self, name: str, requirements: tuple[str, ...], python: str) -> Path | None:
        """The Python of a peer's environment; None when there is none, which is said once."""
        if self._is_skipped or name in self._problems:
            return None
        environment = self.directory / name
        found = environment / "bin" / "python"
        making: list[list[str | Path]] = []
        if not found.exists():
            progress(f"{name}: making its virtual environment")
            making = [
                [python, "-m", "venv", environment],
                [found, "-m", "pip", "install", "--quiet", *requirements],
            ]
        for command in (*making, [found, "-c", f"import {name}"]):
            if problem := _run(command):
                self._skip(name, problem)
                if making:
                    shutil.rmtree(environment, ignore_errors=True)
                return None
        return found


def _run(command: list[str | Path]) -> str:
    """Run a command; what it said last when it failed, else nothing."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    said = ran.stderr.strip() or f"{command[0]} exited with status {ran.returncode}"
    return said.splitlines()[-1] if ran.returncode else ""


def _interpreter(program: Path) -> str:
    """What runs a program that is a script."""
    with program.open("rb") as file:
        first = file.readline(200)
    return os.fsdecode(first[2:].strip()) if first.startswith(b"#!") else sys.executable


def _old_python() -> str:
    """A Python for Keepsake that really runs; what is found by its name may be a shim without one."""
    for name in _KEEPSAKE_PYTHONS:
        if shutil.which(name) and not subprocess.run([name, "--version"], capture_output=True).returncode:
            return name
    return sys.executable


class Peer:
    """A tool that saves a file of `directory` when asked, and times that itself."""

    def __init__(
        self,
        python: Path,
        program: str | Path,
        directory: Path,
        environment: dict[str, str],
        arguments: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self._family = Family()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, Path(__file__).parent / program, *arguments],
            cwd=directory,
            env={**os.environ, "HOME": str(directory), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        self._answer()  # it is ready

    @property
    def pid(self) -> int:
        """Of the script that calls the tool."""
        return self._process.pid

    def save(self, name: str | None) -> float:
        """Seconds that the tool held up its caller; without a file, for metrics alone."""
        return self.ask(name)

    def ask(self, request: object) -> float:
        """Seconds that a request took, which is what the program of this peer understands."""
        requests: IO[str] = self._process.stdin  # type: ignore[assignment]
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        return float(self._answer())

    def cpu_seconds(self) -> float:
        """Processor time of the tool and its children so far."""
        return cpu_seconds(self._family.pids(self.pid))

    def settle(self) -> None:
        """Return when the tool and its children do nothing any more."""
        deadline = time.monotonic() + _SETTLE_PATIENCE_S
        used = -1.0
        while time.monotonic() < deadline:
            before, used = used, self.cpu_seconds()
            if used - before < _IDLE_CPU_S:
                return
            time.sleep(_IDLE_S)

    def stop(self) -> None:
        """Let it end as at the end of a script, and wait for that."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        self._said.close()

    def _answer(self) -> str:
        answers: IO[str] = self._process.stdout  # type: ignore[assignment]
        answer = answers.readline()
        if not answer:
            self._said.seek(0)
            said = self._said.read().decode(errors="replace").strip().splitlines()
            last = said[-1] if said else "it said nothing"
            raise SystemExit(f"error: {self._process.args[1]} has ended: {last}")
        return answer

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
