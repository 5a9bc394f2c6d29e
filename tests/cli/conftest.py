"""Records as the daemon would send them, a view without a terminal, and projects with a real daemon."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import ClassVar

import pytest

from replicate.cli import main
from replicate.cli.view import View
from replicate.records import (
    CheckpointRecord,
    ExperimentRecord,
    ExperimentSummary,
    PrimaryMetric,
    best_checkpoint,
    latest_checkpoint,
)

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=timezone.utc)
DEADLINE_S = 60.0

TRAIN = """\
import pathlib, sys
import replicate

lr = float(sys.argv[1])
experiment = replicate.init(path=["train.py", "data"], params={"lr": lr, "opt": "adam"}, name=f"run-{lr}")
for step in range(3):
    pathlib.Path("model.pt").write_bytes(bytes([0, step]) * 50_000)
    experiment.checkpoint(
        path="model.pt",
        metrics={"loss": lr / (step + 1), "odd": float("nan")},
        primary_metric=("loss", "minimize"),
    )
experiment.stop()
"""


def full_id(start):
    return start + "0" * (64 - len(start))


@pytest.fixture
def now():
    return NOW


@pytest.fixture
def view():
    return View(now=NOW)


@pytest.fixture
def make_checkpoint():
    def make(start, step=0, *, minutes_ago=0, metrics=None, primary=None, state="stored", **fields):
        return CheckpointRecord(
            id=full_id(start),
            experiment_id=fields.pop("experiment_id", full_id("ee")),
            created=NOW - timedelta(minutes=minutes_ago),
            step=step,
            metrics=metrics or {},
            primary_metric=PrimaryMetric(*primary) if primary else None,
            state=state,
            **fields,
        )

    return make


@pytest.fixture
def make_summary():
    def make(start, checkpoints=(), *, minutes_ago=0, status="stopped", state="stored", error="", **fields):
        return ExperimentSummary(
            record=ExperimentRecord(
                id=full_id(start), created=NOW - timedelta(minutes=minutes_ago), **fields
            ),
            status=status,
            state=state,
            error=error,
            checkpoint_count=len(checkpoints),
            latest=latest_checkpoint(checkpoints),
            best=best_checkpoint(checkpoints),
        )

    return make


@dataclass
class Project:
    """A project directory with its own home; `replicate` runs the command line in it."""

    home: Path
    directory: Path
    #: The script that is run, and how long to wait for anything.
    script: ClassVar[str] = TRAIN
    deadline_s: ClassVar[float] = DEADLINE_S

    @property
    def environment(self):
        environment = {**os.environ, "REPLICATE_HOME": str(self.home), "COLUMNS": "100"}
        for name in ("REPLICATE_REPOSITORY", "REPLICATE_PROJECT_DIR", "NO_COLOR"):
            environment.pop(name, None)
        return environment

    def command(self, *arguments):
        return [sys.executable, "-m", "replicate.cli", *map(str, arguments)]

    def run(self, *arguments, cwd=None, text=True):
        """Run a command line in this process, which saves most of the time that a process takes."""
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
            for name in os.environ.keys() - self.environment.keys():
                patch.delenv(name)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            patch.chdir(cwd or self.directory)
            patch.setattr(sys, "stdin", nothing)
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            status = main.run([str(argument) for argument in arguments])
            out.flush()
            err.flush()
        stdout, stderr = out.buffer.getvalue(), err.buffer.getvalue().decode()
        return subprocess.CompletedProcess(arguments, status, stdout.decode() if text else stdout, stderr)

    def replicate(self, *arguments, **options):
        result = self.run(*arguments, **options)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def json(self, *arguments):
        return json.loads(self.replicate(*arguments, "--json"))

    def train(self, lr, *, flush=True):
        command = [sys.executable, "train.py", str(lr)]
        subprocess.run(command, env=self.environment, cwd=self.directory, check=True, capture_output=True)
        if flush:
            self.replicate("flush")

    @contextmanager
    def running(self, *arguments, **streams):
        """A command as a process, which does not outlive the block."""
        process = subprocess.Popen(
            self.command(*arguments),
            env=self.environment,
            cwd=self.directory,
            text=True,
            **streams,
        )
        try:
            yield process
            assert process.poll() is not None, "the test left it running"
        finally:
            process.kill()
            process.communicate()

    def on_terminal(self, arguments, answers=()):
        """Run a command on a terminal, answer its questions, and give its status and what it printed."""
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            self.command(*arguments),
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**self.environment, "NO_COLOR": "1"},
            cwd=self.directory,
        )
        os.close(follower)
        for answer in answers:
            os.write(leader, f"{answer}\n".encode())
        output = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # how a pseudo-terminal says that nobody writes to it any more
                break
            if not piece:
                break
            output += piece
        os.close(leader)
        return process.wait(timeout=DEADLINE_S), output.decode()


def make_project():
    home = Path(tempfile.mkdtemp(prefix="rpl-"))  # short: the path of a socket holds 107 bytes
    project = Project(home, home / "project")
    project.directory.mkdir()
    (project.directory / "train.py").write_text(TRAIN)
    (project.directory / "data").mkdir()
    (project.directory / "data" / "new\nline").write_bytes(b"x")
    (project.directory / os.fsdecode(b"data/\xff")).write_bytes(b"odd")
    (project.directory / "data" / "link").symlink_to("../train.py")
    return project


def end_project(project):
    project.run("umount", "--all")
    project.run("daemon", "stop")
    shutil.rmtree(project.home)


@pytest.fixture(scope="module")
def project():
    """Two finished runs; tests that share it only look."""
    project = make_project()
    try:
        project.train(0.1)
        project.train(0.01)
        yield project
    finally:
        end_project(project)


@pytest.fixture
def own_project():
    """A project with one run, to be changed."""
    project = make_project()
    try:
        project.train(0.1)
        yield project
    finally:
        end_project(project)
