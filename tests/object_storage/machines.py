"""A machine with a user on it: a home, a project, a daemon of its own, and what reaches the bucket."""

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from replicate import connection
from replicate.cli import main

DEADLINE_S = 100.0
#: Saves its code, and then a model of so many bytes in each of so many steps; each model is another one.
TRAIN = """\
import pathlib, random, sys
import replicate

steps, size, seed = (int(word) for word in sys.argv[1:4])
pathlib.Path("code").mkdir(exist_ok=True)
for name in ("train.py", "model.py"):
    pathlib.Path("code", name).write_text(f"# {name} {seed}\\n" * 50)
experiment = replicate.init(path="code", params={"seed": seed, "lr": 0.1}, name=f"run-{seed}", quiet=True)
print(experiment.id, flush=True)
for step in range(steps):
    numbers = random.Random(f"{seed} {step}")
    pieces = (numbers.randbytes(min(1 << 24, size - at)) for at in range(0, size, 1 << 24))
    pathlib.Path("model.pt").write_bytes(b"".join(pieces))
    checkpoint = experiment.checkpoint(
        path="model.pt",
        step=step,
        metrics={"loss": 1 / (step + 1)},
        primary_metric=("loss", "minimize"),
        quiet=True,
    )
    print(checkpoint.id, flush=True)
    for word in sys.argv[4:]:
        exec(word)
"""


def model(seed: int, step: int, size: int) -> bytes:
    """What `TRAIN` saves in a step."""
    numbers = random.Random(f"{seed} {step}")
    return b"".join(numbers.randbytes(min(1 << 24, size - at)) for at in range(0, size, 1 << 24))


def wait_until(condition: Callable[[], object], what: str):
    """Wait for a condition to hold; what it gave."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)
    return found


@dataclasses.dataclass
class Machine:
    """A home and a project, and what its user has in the environment."""

    home: Path
    directory: Path
    #: That reaches the bucket.
    access: dict[str, str]
    script: ClassVar[str] = TRAIN

    @property
    def environment(self) -> dict[str, str]:
        own = ("AWS_", "REPLICATE_", "NO_COLOR")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        return {**inherited, **self.access, "REPLICATE_HOME": str(self.home), "COLUMNS": "100"}

    @contextlib.contextmanager
    def being(self) -> Iterator[None]:
        """Let this process be one of this machine's."""
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ.keys() - self.environment.keys():
                patch.delenv(name)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            patch.chdir(self.directory)
            yield

    def run(self, *words: object, text: bool = True) -> subprocess.CompletedProcess:
        """Run a command line in this process, which saves most of the time that a process takes."""
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        with self.being(), pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
            patch.setattr(sys, "stdin", nothing)
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            status = main.run([str(word) for word in words])
            out.flush()
            err.flush()
        stdout, stderr = out.buffer.getvalue(), err.buffer.getvalue().decode()
        return subprocess.CompletedProcess(words, status, stdout.decode() if text else stdout, stderr)

    def replicate(self, *words: object) -> str:
        done = self.run(*words)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def json(self, *words: object):
        return json.loads(self.replicate(*words, "--json"))

    def status(self) -> dict:
        """What `status` says, which also fails when something has failed."""
        return json.loads(self.run("status", "--json").stdout)

    def begin(self, steps: int = 1, size: int = 1000, seed: int = 1, *more: str) -> subprocess.Popen:
        """Start the training script; `more` is Python that it executes after each step."""
        script = self.directory / "train.py"
        script.write_text(self.script)
        command = [sys.executable, "-W", "error", script.name, str(steps), str(size), str(seed), *more]
        return subprocess.Popen(
            command,
            env=self.environment,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(self, steps: int = 1, size: int = 1000, seed: int = 1, *more: str) -> list[str]:
        """Run the training script to its end; the ids of its experiment and checkpoints."""
        with self.begin(steps, size, seed, *more) as process:
            output, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, errors
        return output.split()

    def flush(self) -> None:
        self.replicate("flush", "--timeout", DEADLINE_S)

    def pids(self, word: bytes) -> list[int]:
        """The processes of this home with a word in their command line."""
        setting = b"REPLICATE_HOME=" + os.fsencode(self.home)
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                command = (process / "cmdline").read_bytes().split(b"\0")
                is_ours = setting in (process / "environ").read_bytes().split(b"\0")
                if is_ours and b"replicated" in command and word in command:
                    found.append(int(process.name))
        return found

    def kill(self, word: bytes) -> None:
        """Kill -9 the `serve` or `store-process` processes of this home, and see them gone."""
        for pid in self.pids(word):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.pids(word), f"{word} is dead")

    def kill_daemon(self) -> None:
        """As when the machine's memory ran out: at once, with all that it has started to store."""
        self.kill(b"serve")
        self.kill(b"store-process")

    def leave(self) -> None:
        with self.being(), contextlib.suppress(Exception):
            connection.stop_daemon()
        self.kill_daemon()
        shutil.rmtree(self.home)
