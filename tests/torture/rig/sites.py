"""Where a script trains: a project, its repository and the home of its daemon, on a chosen file system.

`TORTURE_ROUNDS` makes every script that long, and adds the cases that short runs leave out; `TORTURE_SEED`
chooses what happens in them.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rig.file_systems import CAN_REFLINK, NAMES
from rig.oracle import Chronicle, Description, differences, judge, using
from rig.training import Plan

import replicate

IS_LONG = "TORTURE_ROUNDS" in os.environ
SEED = int(os.environ.get("TORTURE_SEED", "1"))
#: For one training script.
DEADLINE_S = 110 + 10 * int(os.environ.get("TORTURE_ROUNDS", "0"))


def rounds(few: int) -> int:
    """How many rounds a script has: few, unless many were asked for."""
    return int(os.environ.get("TORTURE_ROUNDS", few))


@dataclasses.dataclass
class Site:
    """One script's surroundings."""

    home: Path
    project: Path
    repository: Path
    #: The home of those who judge: it knows nothing but the repository.
    reader_home: Path
    chronicle: Chronicle
    #: Rungs of the capture ladder that this file system does not have.
    impossible: tuple[str, ...]

    @property
    def url(self) -> str:
        return f"file://{self.repository}"

    @property
    def environment(self) -> dict[str, str]:
        search = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "REPLICATE_HOME": str(self.home),
            "REPLICATE_REPOSITORY": self.url,
            "PYTHONPATH": os.pathsep.join(search),
        }

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python with some arguments in the project, to its end."""
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.project,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

    def start_daemon(self, descriptors: int) -> None:
        """Start the daemon, which may open so many descriptors."""
        start = f"ulimit -n {descriptors} && exec '{sys.executable}' -m replicate.cli daemon start"
        subprocess.run(["sh", "-c", start], env=self.environment, check=True)

    def train(self, **choices: object) -> None:
        """Run a training script to its end, which must be a good one."""
        plan = Plan(seed=SEED, impossible=self.impossible, **choices)
        fields = json.dumps(dataclasses.asdict(plan))
        done = self.run("-W", "error", "-m", "rig.training", fields, str(self.chronicle.path))
        print(f"{plan}\n{done.stderr}")
        assert done.returncode == 0, done.stderr
        assert self.chronicle.read("finished")

    def judge(self, may_fail: Callable[[str], bool] = lambda reason: False) -> dict[int, str]:
        """Hold all snapshots against what was there at the calls; the state in which each step ended."""
        states = judge(self.chronicle, self.url, self.home, self.reader_home, may_fail)
        print(dict(Counter(states.values())))
        return states

    @contextmanager
    def recording(self, rung: str = "") -> Iterator[replicate.Experiment]:
        """An experiment of this process, whose captures take a rung."""
        with using(self.home, REPLICATE_CAPTURE_RUNG=rung):
            project = replicate.Project(repository=self.url, directory=str(self.project))
            with project.experiments.create(quiet=True) as experiment:
                yield experiment

    def differences(self, checkpoint: replicate.Checkpoint, expected: Description) -> list[str]:
        """How a checkpoint of `files`, which must be stored, differs from what was there."""
        checkpoint.wait(DEADLINE_S)
        with using(self.reader_home):
            return list(differences(expected, checkpoint, ["files"]))

    def show(self, *command: str) -> object:
        """What a command prints as JSON."""
        return json.loads(self.run("-m", "replicate.cli", *command, "--json").stdout)


def make_site(place: Path | None, name: str, reader_home: Path, chronicle: Path) -> Site:
    """A new site below a directory, None for where temporary files lie, of a known file system or `here`."""
    directory = Path(tempfile.mkdtemp(prefix="rpl-", dir=place))
    (directory / "project").mkdir()
    return Site(
        home=directory / "home",
        project=directory / "project",
        repository=directory / "repository",
        reader_home=reader_home,
        chronicle=Chronicle(chronicle),
        impossible=("reflink",) if name in NAMES and name not in CAN_REFLINK else (),
    )
