"""What a training loop loses while the daemon stores what was captured, against the same loop without it."""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from measuring.figures import BYTES, SECONDS, SLOWER, Figure, format_bytes
from measuring.workspace import Workspace, progress

from capturing.scale import Scale
from replicate import query

_LOOPS = 2
_SLOWER = 0.05
_RECORD_S = 0.003
#: Between the checkpoints that a third process makes meanwhile: rare enough to be no load.
_PAUSE_S = 1.0


def measure(workspace: Workspace, scale: Scale) -> list[Figure]:
    """Two loops of the same work, by turns without a daemon and while it stores one big file."""
    alone: list[float] = []
    beside: list[float] = []
    longest: list[float] = []
    big: list[float] = []
    small: list[float] = []
    stored: list[float] = []
    for round_number in range(scale.rounds):
        progress(f"training: round {round_number + 1} of {scale.rounds}")
        workspace.stop_daemon()
        loops = _Loops(workspace.root, scale.training_iterations)
        alone.append(statistics.mean(seconds for _, seconds in loops.iterations()))

        workspace.renew()
        path = workspace.project / "model.pt"
        workspace.write_file(path, scale.training_bytes)
        os.sync()
        workspace.memory.label(f"{format_bytes(scale.training_bytes)} beside a training loop")
        with workspace.begin() as experiment, workspace.begin() as other:
            loops = _Loops(workspace.root, scale.training_iterations)
            begin = time.monotonic()
            checkpoint = experiment.checkpoint(path=path.name, quiet=True)
            big.append(time.monotonic() - begin)
            drained = _Drained(checkpoint)
            while loops.are_running:
                asked = time.monotonic()
                other.checkpoint(metrics={"loss": 0.5}, quiet=True)
                small.append(time.monotonic() - asked)
                time.sleep(_PAUSE_S)
            stored.append(scale.training_bytes - query.status().bytes_pending)
            end = drained.wait()
            during = [seconds for at, seconds in loops.iterations() if begin <= at <= end]
            beside.append(statistics.mean(during))
            longest.append(max(during))
            workspace.settle()
        workspace.memory.label("")
        workspace.empty_project()
    size = format_bytes(scale.training_bytes)
    return [
        Figure(f"iteration of 2 loops, {size} being stored", beside, SLOWER, "no daemon", alone, _SLOWER),
        Figure("… the longest iteration", longest),
        Figure(f"… checkpoint() of {size}", big),
        Figure("… checkpoint() without files", small, SECONDS, target=_RECORD_S),
        Figure("… stored while the loops ran", stored, BYTES),
    ]


class _Loops:
    """Training processes, which begin together as soon as this is made."""

    def __init__(self, directory: Path, iterations: int) -> None:
        self._results = [directory / f"loop-{number}.json" for number in range(_LOOPS)]
        self._processes = [
            subprocess.Popen(
                [sys.executable, Path(__file__).with_name("loop.py"), str(iterations), result],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for result in self._results
        ]
        for process in self._processes:
            process.stdout.readline()  # it is ready
        for process in self._processes:
            process.stdin.close()

    @property
    def are_running(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def iterations(self) -> list[tuple[float, float]]:
        """When each began, on the monotonic clock, and its seconds; waits for the end."""
        for process in self._processes:
            process.wait()
            process.stdout.close()
        return [(at, seconds) for result in self._results for at, seconds in json.loads(result.read_text())]


class _Drained:
    """Notes when a checkpoint is stored."""

    def __init__(self, checkpoint: object) -> None:
        self._ended = 0.0
        self._thread = threading.Thread(target=self._wait, args=(checkpoint,))
        self._thread.start()

    def _wait(self, checkpoint) -> None:
        checkpoint.wait()
        self._ended = time.monotonic()

    def wait(self) -> float:
        self._thread.join()
        return self._ended
