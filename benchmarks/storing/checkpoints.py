"""Checkpoints of one training: only the end changes, nothing changes but the name, or everything does."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import zstandard
from blake3 import blake3
from measuring.figures import RATE, SHARE, TIMES, Figure, format_megabytes
from measuring.peers import Peers
from measuring.workspace import Workspace, progress, timed

from storing.comparing import compare, compare_alone, compare_costs, compare_stored, memory_figures
from storing.scale import Scale
from storing.tools import (
    BORG,
    DATA,
    DVC,
    KEEPSAKE,
    OURS,
    RESTIC,
    Cost,
    Restoring,
    Tool,
    begin,
    save_by_turns,
    stop,
)

_CHANGING_SHARE = 0.05
_OF_UNIQUE = 1.03
_NEW_SHARE = 0.02
_SAVED_RATE = 0.3e9
_RESTORED_RATE = 1e9
_STEPS_BETWEEN = 10
_BLOCK = 1 << 20
_MEMORY_DIRECTORY = Path("/dev/shm")


def measure_tail(workspace: Workspace, scale: Scale, peers: Peers) -> list[Figure]:
    """The last 5 % change from one checkpoint to the next: raw bytes, and what `torch.save` writes."""
    size, steps = scale.checkpoint_bytes, scale.steps
    figures: list[Figure] = []
    for kind in ("raw bytes", "torch.save"):
        case = f"{steps} × {format_megabytes(size)}, 5 % change, {kind}"
        if kind == "raw bytes":
            changing = int(size * _CHANGING_SHARE)
            unique = size + (steps - 1) * changing
            files = _write_raw(workspace.root / "states", size, changing, steps)
        else:
            told = _write_states(workspace, peers, "head", size, steps)
            unique = sum(one["new"] for one in told)
            files = (workspace.root / "states" / one["name"] for one in told)
        tools = begin(workspace, peers, (OURS, RESTIC, BORG, DVC, KEEPSAKE))
        costs = _save_steps(workspace, tools, files, case, steps)
        stored = {name: [tool.stored_bytes()] for name, tool in tools.items()}
        unit = format_megabytes
        figures += [
            Figure(f"{case}: stored", stored[OURS], TIMES, "unique bytes", [unique], _OF_UNIQUE, unit),
            *compare_stored(case, stored),
            *compare_costs("… one of them", [_without_keepsake(cost) for cost in costs]),
            *memory_figures("… of all", tools),
        ]
        stop(tools)
        shutil.rmtree(workspace.root / "states")
    return figures


def measure_tensors(workspace: Workspace, scale: Scale, peers: Peers) -> list[Figure]:
    """What a second file of the same tensors costs: under another name; with other adapters beside a base."""
    directory = workspace.root / "states"
    _write_states(workspace, peers, "pairs")
    figures = []
    for kind, case in ("same", "same state under another name"), ("lora", "other adapters, same base"):
        tools = begin(workspace, peers, (OURS, RESTIC, BORG))
        files = sorted((directory / kind).iterdir())
        sizes = [file.stat().st_size for file in files]
        stored: list[dict[str, int]] = []
        for file in files:
            _place(workspace, file)
            save_by_turns(tools)
            stored.append({name: tool.stored_bytes() for name, tool in tools.items()})
        grown = {name: [stored[1][name] - stored[0][name]] for name in tools}
        new = f"{case}: new bytes"
        figures += [
            Figure(new, grown[OURS], SHARE, "size of the file", sizes[1:], _NEW_SHARE, format_megabytes),
            *compare(new, grown, unit=format_megabytes),
        ]
        stop(tools)
    shutil.rmtree(directory)
    return figures


def measure_adam(
    workspace: Workspace, scale: Scale, peers: Peers, trained: Path | None = None
) -> list[Figure]:
    """A transformer that is trained with Adam, so that every weight changes: fp32 with moments, and bf16.

    `trained` has the checkpoints of an earlier training by `train_model.py`, which are measured instead.
    """
    directory = workspace.root / "states"
    if trained is not None:
        shutil.copytree(trained, directory, ignore=shutil.ignore_patterns("[!cw]*"))
    elif not _train(directory, scale, peers):
        print("not measured: adam: a model is trained for it, and there is no torch", flush=True)
        return []
    figures = [
        *_measure_training(workspace, peers, scale.rounds, "checkpoint_*", "model + Adam, fp32", 0.75),
        *_measure_training(workspace, peers, scale.rounds, "weights_*", "weights, bf16", 0.40),
    ]
    shutil.rmtree(directory)
    return figures


def _train(directory: Path, scale: Scale, peers: Peers) -> bool:
    """Train a model from its first step on; False when there is nothing to do it with."""
    python = peers.find_torch()
    if python is None:
        return False
    width, layers = scale.model
    progress(f"training a transformer of width {width} with {layers} layers")
    program = Path(__file__).with_name("train_model.py")
    options = {"checkpoints": scale.steps, "steps-between": _STEPS_BETWEEN, "width": width, "layers": layers}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run([python, program, directory, *arguments, "--bf16"], check=True, stdout=sys.stderr)
    return True


def _measure_training(
    workspace: Workspace, peers: Peers, rounds: int, pattern: str, what: str, target: float
) -> list[Figure]:
    files = sorted(
        (workspace.root / "states").glob(pattern), key=lambda file: int(file.stem.partition("_")[2])
    )
    sizes = [file.stat().st_size for file in files]
    digests = [_digest(file) for file in files]
    zstd_alone = sum(map(_compressed_bytes, files))
    case = f"{len(files)} × {format_megabytes(sizes[-1])}, {what}"
    tools = begin(workspace, peers, (OURS, RESTIC, BORG))
    costs = _save_steps(workspace, tools, iter(files), case, len(files))
    stored = {name: [tool.stored_bytes()] for name, tool in tools.items()}
    restored = _restore(workspace, tools, sizes, digests, rounds)
    rates = {
        name: [size / cost[name].cpu_s for size, cost in zip(sizes, costs, strict=True)] for name in tools
    }
    unit = format_megabytes
    figures = [
        Figure(f"{case}: stored", stored[OURS], SHARE, "their size", [sum(sizes)], target, unit),
        *compare_stored(case, {**stored, "zstd 1 alone": [zstd_alone]}),
        *compare_alone("… saved by a processor", rates, RATE, _SAVED_RATE),
        *compare_costs("… one of them", costs),
        *(
            figure
            for place, measured in restored.items()
            for figure in compare_alone(f"… restored to {place}", measured, RATE, _RESTORED_RATE)
        ),
        *memory_figures("… of all", tools),
    ]
    stop(tools)
    return figures


def _restore(
    workspace: Workspace,
    tools: dict[str, Restoring],
    sizes: Sequence[int],
    digests: Sequence[str],
    rounds: int,
) -> dict[str, dict[str, list[float]]]:
    """Bytes a second of restoring the last checkpoints, each once: to the disk, and to memory where it fits.

    Beside the tools, a copy of the last one from the page cache to the same place.
    """
    places = {"the disk": workspace.root}
    if _MEMORY_DIRECTORY.is_dir() and shutil.disk_usage(_MEMORY_DIRECTORY).free > 3 * max(sizes):
        places["memory"] = _MEMORY_DIRECTORY
    rates: dict[str, dict[str, list[float]]] = {place: {} for place in places}
    last = next((workspace.project / DATA).iterdir())
    for place, root in places.items():
        for turn in range(min(rounds, len(sizes))):
            number = len(sizes) - 1 - turn
            for name, tool in tools.items():
                with tempfile.TemporaryDirectory(dir=root) as temporary:
                    os.sync()
                    cost = tool.restore(number, Path(temporary, "restored"))
                    [file] = [path for path in Path(temporary).rglob("*") if path.is_file()]
                    if _digest(file) != digests[number]:
                        raise SystemExit(f"error: {name} restored something else: {file.name}")
                rates[place].setdefault(name, []).append(sizes[number] / cost.wall_s)
            with tempfile.TemporaryDirectory(dir=root) as temporary:
                os.sync()
                wall_s = timed(partial(shutil.copyfile, last, Path(temporary, "copy")))
            rates[place].setdefault("copyfile", []).append(last.stat().st_size / wall_s)
    return rates


def _save_steps(
    workspace: Workspace, tools: dict[str, Tool], files: Iterator[Path], case: str, count: int
) -> list[dict[str, Cost]]:
    """What each checkpoint costs each tool; a file takes the place of the one before."""
    costs = []
    for number, file in enumerate(files):
        progress(f"{case}: {number + 1} of {count}")
        _place(workspace, file)
        costs.append(save_by_turns(tools, is_reversed=number % 2 == 1))
    return costs


def _place(workspace: Workspace, file: Path) -> None:
    """Make the file the only one that is saved."""
    directory = workspace.project / DATA
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    file.rename(directory / file.name)


def _write_raw(directory: Path, size: int, changing: int, steps: int) -> Iterator[Path]:
    directory.mkdir()
    frozen = directory / "frozen"
    with frozen.open("wb") as file:
        _append_random(file, size - changing)
    for _ in range(steps):
        path = directory / "model.bin"
        shutil.copyfile(frozen, path)
        with path.open("ab") as file:
            _append_random(file, changing)
        yield path


def _append_random(file, size: int) -> None:
    for offset in range(0, size, _BLOCK):
        file.write(os.urandom(min(_BLOCK, size - offset)))


def _write_states(workspace: Workspace, peers: Peers, kind: str, *numbers: int) -> list[dict]:
    """What `save_states.py` says of the files that it wrote."""
    progress(f"writing checkpoints ({kind})")
    program = Path(__file__).with_name("save_states.py")
    ran = subprocess.run(
        [peers.find_torch() or sys.executable, program, kind, workspace.root / "states", *map(str, numbers)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    *told, writer = map(json.loads, ran.stdout.splitlines())
    print(f"the checkpoints are written by {writer}", flush=True)
    return told


def _without_keepsake(cost: dict[str, Cost]) -> dict[str, Cost]:
    """Its call returns before anything is stored: `capture.py` measures it."""
    return {name: one for name, one in cost.items() if name != KEEPSAKE}


def _compressed_bytes(file: Path) -> int:
    """With zstd 1 in pieces of 1 MiB, raw where that gains nothing."""
    compressor = zstandard.ZstdCompressor(level=1)
    total = 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            total += min(len(block), len(compressor.compress(block)))
    return total


def _digest(file: Path) -> str:
    return blake3(file.read_bytes()).hexdigest()
