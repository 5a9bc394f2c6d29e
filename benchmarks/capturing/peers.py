"""Other tools that save checkpoints, each in a virtual environment and a process of its own.

A peer that cannot be had is skipped, with the reason on stdout.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from capturing.processes import Family, cpu_seconds
from capturing.workspace import progress

#: Keepsake's generated code does not load with a protobuf that came later.
_KEEPSAKE = ("keepsake==0.4.2", "protobuf==3.20.3")
_WANDB = ("wandb==0.31.0",)
#: The Pythons of Keepsake's days first.
_KEEPSAKE_PYTHONS = ("python3.8", "python3.9", "python3.7", "python3.10")
#: A peer that uses less than this for that long has finished what it does in the background.
_IDLE_CPU_S = 0.02
_IDLE_S = 0.5
_SETTLE_PATIENCE_S = 120.0


class Peers:
    """The virtual environments of the peers: those in `directory`, which are made there when missing."""

    def __init__(self, directory: Path, *, keepsake_python: str | None, is_skipped: bool) -> None:
        self._directory = directory
        self._keepsake_python = keepsake_python
        self._problems: dict[str, str] = {}
        if is_skipped:
            reason = "peers are left out of a quick run unless --peers names their environments"
            self._problems = {"keepsake": reason, "wandb": reason}
            print(f"skipped: {reason}")

    def start_keepsake(self, directory: Path) -> "Peer | None":
        """Keepsake in a new project, with an experiment begun."""
        python = self._python("keepsake", _KEEPSAKE, self._keepsake_python or _old_python())
        if python is None:
            return None
        directory.mkdir(parents=True)
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

    def _python(self, name: str, requirements: tuple[str, ...], python: str) -> Path | None:
        """The Python of a peer's environment; None when there is none, which is said once."""
        if name in self._problems:
            return None
        environment = self._directory / name
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
                self._problems[name] = problem
                print(f"skipped: {name}: {problem}", flush=True)
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


def _old_python() -> str:
    """A Python for Keepsake that really runs; what is found by its name may be a shim without one."""
    for name in _KEEPSAKE_PYTHONS:
        if shutil.which(name) and not subprocess.run([name, "--version"], capture_output=True).returncode:
            return name
    return sys.executable


class Peer:
    """A tool that saves a file of `directory` when asked, and times that itself."""

    def __init__(self, python: Path, program: str, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self._family = Family()
        self._process = subprocess.Popen(
            [python, Path(__file__).with_name(program)],
            cwd=directory,
            env={**os.environ, "HOME": str(directory), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()  # it is ready

    def save(self, name: str | None) -> float:
        """Seconds that the tool held up its caller; without a file, for metrics alone."""
        requests: IO[str] = self._process.stdin  # type: ignore[assignment]
        requests.write(json.dumps(name) + "\n")
        requests.flush()
        return float(self._answer())

    def settle(self) -> None:
        """Return when the tool and its children do nothing any more."""
        deadline = time.monotonic() + _SETTLE_PATIENCE_S
        used = -1.0
        while time.monotonic() < deadline:
            before, used = used, cpu_seconds(self._family.pids(self._process.pid))
            if used - before < _IDLE_CPU_S:
                return
            time.sleep(_IDLE_S)

    def stop(self) -> None:
        """Let it end as at the end of a script, and wait for that."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        answers: IO[str] = self._process.stdout  # type: ignore[assignment]
        answer = answers.readline()
        if not answer:
            raise SystemExit(f"error: a peer has ended: {self._process.args}")
        return answer

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
