"""What `checkpoint()` costs the script: by the size of the file, and by how many there are already."""

import os
import shutil
import time
from collections import defaultdict
from pathlib import Path

from measuring.figures import FASTER, SECONDS, SHARE, TIMES, Figure, format_bytes
from measuring.peers import Peer, Peers
from measuring.workspace import Workspace, progress, timed

from capturing.scale import Scale

#: Against the page-cache read, and the slowest size against the fastest.
_SHARE_OF_READ = 0.05
_BETWEEN_SIZES = 2.0
_RECORD_S = 0.003
_TIMES_FASTER = 20.0
_OURS = "checkpoint()"
#: Keepsake's calls become slower and slower; what is known then is enough.
_KEEPSAKE_PATIENCE_S = 60.0


def measure_files(workspace: Workspace, scale: Scale) -> list[Figure]:
    """A file under a new name, and one that is written beside and renamed over a captured one.

    Each is read from the page cache before it is saved; the daemon has nothing to do then.
    """
    calls: dict[tuple[str, int], list[float]] = defaultdict(list)
    reads: dict[tuple[str, int], list[float]] = defaultdict(list)
    stored: dict[int, list[float]] = defaultdict(list)
    number = 0
    for round_number in range(scale.rounds):
        progress(f"checkpoints of files: round {round_number + 1} of {scale.rounds}")
        workspace.renew()
        sizes = [size for size, repeats in scale.checkpoints.items() for _ in range(repeats)]
        with workspace.begin() as experiment:
            for size in sizes if round_number % 2 == 0 else reversed(sizes):
                workspace.memory.label(f"a file of {format_bytes(size)}")
                number += 1
                path = workspace.project / f"model-{number}.pt"
                for kind in ("new file", "renamed over"):
                    written = path if kind == "new file" else path.with_suffix(".tmp")
                    workspace.write_file(written, size)
                    written.rename(path)
                    reads[kind, size].append(workspace.read_cached(path))
                    begin = time.perf_counter()
                    experiment.checkpoint(path=path.name, quiet=True)
                    calls[kind, size].append(time.perf_counter() - begin)
                    workspace.settle()
                    stored[size].append(time.perf_counter() - begin)
                path.unlink()
                os.sync()
    workspace.memory.label("")
    figures = []
    for (kind, size), seconds in sorted(calls.items()):
        target = _SHARE_OF_READ if size == scale.judged_checkpoint else None
        case = f"checkpoint(), {format_bytes(size)}, {kind}"
        figures.append(Figure(case, seconds, SHARE, "page-cache read", reads[kind, size], target))
    smallest, largest = min(scale.checkpoints), max(scale.checkpoints)
    for kind in ("new file", "renamed over"):
        case = f"… {format_bytes(largest)} against {format_bytes(smallest)}, {kind}"
        beside = f"checkpoint(), {format_bytes(smallest)}"
        values, others = calls[kind, largest], calls[kind, smallest]
        figures.append(Figure(case, values, TIMES, beside, others, _BETWEEN_SIZES))
    figures += [
        Figure(f"stored and on the disk, {format_bytes(size)}", seconds)
        for size, seconds in sorted(stored.items())
    ]
    return figures


def measure_records(workspace: Workspace, scale: Scale, peers: Peers) -> list[Figure]:
    """Checkpoints without files in two experiments by turns, one of them with a long past."""
    workspace.renew()
    few, many = scale.earlier
    progress(f"checkpoints without files: after {few} and after {many:,} of them")
    workspace.memory.label("checkpoints without files")
    young, old = workspace.begin(), workspace.begin()
    with young, old:
        for experiment, count in ((young, few), (old, many)):
            for step in range(count):
                experiment.checkpoint(step=step, metrics={"loss": 1.0 / (step + 1)}, quiet=True)
        workspace.settle()
        seconds: dict[int, list[float]] = {few: [], many: []}
        for _ in range(scale.records):
            for experiment, count in ((young, few), (old, many)):
                seconds[count].append(
                    timed(lambda e=experiment: e.checkpoint(metrics={"loss": 0.5}, quiet=True))
                )
        workspace.settle()
    workspace.memory.label("")
    figures = [
        Figure("checkpoint() without files, " + f"after {count:,}", seconds[count], SECONDS, target=_RECORD_S)
        for count in (few, many)
    ]
    case = f"… after {many:,} against after {few}"
    figures.append(Figure(case, seconds[many], TIMES, f"after {few}", seconds[few]))
    return figures + _measure_keepsake_records(workspace, scale, peers)


def _measure_keepsake_records(workspace: Workspace, scale: Scale, peers: Peers) -> list[Figure]:
    directory = workspace.root / "keepsake-records"
    keepsake = peers.start_keepsake(directory)
    if keepsake is None:
        return []
    seconds: list[float] = []
    with keepsake:
        while len(seconds) < scale.keepsake_records and sum(seconds) < _KEEPSAKE_PATIENCE_S:
            seconds.append(keepsake.save(None))
    beginning, end = seconds[10:20], seconds[-10:]
    case = f"Keepsake's, after {len(seconds) - 10}"
    return [Figure(case, end, TIMES, "Keepsake's, after 10", beginning)]


def measure_peers(workspace: Workspace, scale: Scale, peers: Peers) -> list[Figure]:
    """A file saved by each tool in turn: once alone, then some without a pause, each written anew before.

    A tool has finished with what it does in the background before the next one has its turn.
    """
    directory = workspace.root / "peers"
    started = {
        "Keepsake": peers.start_keepsake(directory / "keepsake"),
        "W&B offline": peers.start_wandb(directory / "wandb"),
    }
    savers: dict[str, _Copying | _Replicate | Peer] = {
        "copyfile": _Copying(directory / "copyfile"),
        _OURS: _Replicate(workspace),
        **{name: peer for name, peer in started.items() if peer is not None},
    }
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    try:
        for round_number in range(scale.rounds):
            progress(f"peers: round {round_number + 1} of {scale.rounds}")
            names = list(savers)
            for size, row in scale.peer_files.items():
                workspace.memory.label(f"a file of {size / 1e6:.0f} MB")
                for name in names if round_number % 2 == 0 else reversed(names):
                    for case, count in (
                        (f"{size / 1e6:.0f} MB, alone", 1),
                        (f"{size / 1e6:.0f} MB, {row} in a row", row),
                    ):
                        seconds[case, name] += _save_row(workspace, savers[name], size, count)
    finally:
        for saver in savers.values():
            saver.stop()
    workspace.memory.label("")
    return [
        Figure(f"{_OURS}, {case}", seconds[case, _OURS], FASTER, name, others, _TIMES_FASTER)
        for (case, name), others in seconds.items()
        if name != _OURS and others
    ]


def _save_row(
    workspace: Workspace, saver: "_Copying | _Replicate | Peer", size_bytes: int, count: int
) -> list[float]:
    """Seconds of each save; returns when the tool has finished with all of them."""
    path = saver.directory / "model.pt"
    seconds = []
    for _ in range(count):
        workspace.write_file(path, size_bytes)
        seconds.append(saver.save(path.name))
    saver.settle()
    os.sync()
    return seconds


class _Copying:
    """`shutil.copyfile`, as simple scripts save their best model."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory = directory

    def save(self, name: str) -> float:
        return timed(lambda: shutil.copyfile(self.directory / name, self.directory / "copy"))

    def settle(self) -> None:
        pass

    def stop(self) -> None:
        pass


class _Replicate:
    """Ours, in this process."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        workspace.renew()
        self.directory = workspace.project
        self._experiment = workspace.begin()

    def save(self, name: str) -> float:
        return timed(lambda: self._experiment.checkpoint(path=name, quiet=True))

    def settle(self) -> None:
        self._workspace.settle()

    def stop(self) -> None:
        self._experiment.stop()
        self._workspace.empty_project()
