"""Directories of training data: incompressible, tables with inserted rows, small files, and more and more."""

import json
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from measuring.figures import TIMES, Figure, format_megabytes
from measuring.peers import Peers
from measuring.workspace import Workspace, progress

from storing.comparing import compare, compare_costs, compare_stored, memory_figures
from storing.scale import Scale
from storing.tools import BORG, DATA, DVC, OURS, RESTIC, Cost, begin, save_by_turns, stop

_OF_BORGS_CPU = 0.5
_CHANGED_SHARE = 0.01
_INSERTED_ROWS = 20
_SMALLEST, _LARGEST = 2_000, 8_000
_FILES_A_DIRECTORY = 100
#: Seconds a file, at the most files against ten times fewer.
_LINEAR = 1.25
_MANY = 100_000


def measure_dataset(workspace: Workspace, scale: Scale, peers: Peers) -> list[Figure]:
    """Incompressible files and one table: the first time, unchanged, and with some of them changed."""
    size = scale.dataset_files * scale.dataset_file_bytes
    case = f"{format_megabytes(size)} in {scale.dataset_files} files"
    directory = _new_data(workspace)
    progress(f"{case}: making them")
    for number in range(scale.dataset_files - 1):
        _write_random(directory / f"{number:03d}.bin", scale.dataset_file_bytes)
    table = directory / "table.csv"
    table.write_text("".join(_csv_rows(scale.dataset_file_bytes)))
    saves: dict[str, list[dict[str, Cost]]] = defaultdict(list)
    stored: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    memory: list[Figure] = []
    for round_number in range(scale.rounds):
        tools = begin(workspace, peers, (OURS, RESTIC, BORG, DVC))
        for state in ("first", "unchanged", "changed"):
            progress(f"{case}, {state}: round {round_number + 1} of {scale.rounds}")
            if state == "changed":
                for number in range(max(1, int(scale.dataset_files * _CHANGED_SHARE))):
                    _write_random(directory / f"{number:03d}.bin", scale.dataset_file_bytes)
                _insert_rows(table, places=1, make=_csv_rows)
            saves[state].append(save_by_turns(tools, is_reversed=round_number % 2 == 1))
            for name, tool in tools.items():
                stored[state][name].append(tool.stored_bytes())
        memory = memory_figures("… of all", tools)
        stop(tools)
    return [
        *compare_costs(f"{case}, first", saves["first"], cpu_targets={BORG: _OF_BORGS_CPU}),
        *compare_stored("… first", stored["first"]),
        *compare_costs(f"{case}, unchanged", saves["unchanged"], wall_targets={DVC: 1.0}),
        *compare_costs(f"{case}, 1 % changed", saves["changed"], wall_targets={DVC: 1.0}),
        *compare_stored("… all three", stored["changed"], {RESTIC: 1.0}),
        *memory,
    ]


def measure_rows(workspace: Workspace, scale: Scale, peers: Peers) -> list[Figure]:
    """What rows that are inserted into a long table add."""
    figures = []
    kinds: dict[str, Callable[[int], list[str]]] = {"csv": _csv_rows, "jsonl": _json_rows}
    for kind, make in kinds.items():
        for places in (1, _INSERTED_ROWS):
            case = (
                f"{kind.upper()} of {format_megabytes(scale.table_bytes)}, {_INSERTED_ROWS} rows inserted"
                f" in {places} place{'s' if places > 1 else ''}"
            )
            progress(case)
            table = _new_data(workspace) / f"table.{kind}"
            table.write_text("".join(make(scale.table_bytes)))
            tools = begin(workspace, peers, (OURS, RESTIC, BORG))
            save_by_turns(tools)
            before = {name: tool.stored_bytes() for name, tool in tools.items()}
            _insert_rows(table, places=places, make=make)
            save_by_turns(tools, is_reversed=True)
            grown = {name: [tool.stored_bytes() - before[name]] for name, tool in tools.items()}
            targets = {RESTIC: 1.0, BORG: 1.0}
            figures += compare(f"{case}: new bytes", grown, targets=targets, unit=format_megabytes)
            stop(tools)
    return figures


def measure_small(workspace: Workspace, scale: Scale, peers: Peers) -> list[Figure]:
    """Many small files: the first time, and unchanged."""
    case = f"{scale.small_files:,} files of 2–8 kB"
    _make_small(workspace, scale.small_files)
    saves: dict[str, list[dict[str, Cost]]] = defaultdict(list)
    figures: list[Figure] = []
    for round_number in range(scale.rounds):
        tools = begin(workspace, peers, (OURS, RESTIC, BORG, DVC))
        for state in ("first", "unchanged"):
            progress(f"{case}, {state}: round {round_number + 1} of {scale.rounds}")
            saves[state].append(save_by_turns(tools, is_reversed=round_number % 2 == 1))
        stored = {name: [tool.stored_bytes()] for name, tool in tools.items()}
        figures = [*compare_stored("… both", stored), *memory_figures("… of all", tools)]
        stop(tools)
    faster = {RESTIC: 1.0, BORG: 1.0, DVC: 1.0}
    return [
        *compare_costs(f"{case}, first", saves["first"], wall_targets=faster),
        *compare_costs(f"{case}, unchanged", saves["unchanged"], wall_targets=faster),
        *figures,
    ]


def measure_growth(
    workspace: Workspace, scale: Scale, peers: Peers
) -> tuple[list[Figure], dict[str, list[tuple[int, float]]]]:
    """The first save of ten times more small files each time; also (files, seconds) of each tool."""
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    each: list[list[float]] = []
    figures: list[Figure] = []
    for count in scale.growth_files:
        case = f"{count:,} files of 2–8 kB, first"
        _make_small(workspace, count)
        saves = []
        for round_number in range(1 if count >= _MANY else scale.rounds):
            progress(f"{case}: round {round_number + 1}")
            tools = begin(workspace, peers, (OURS, RESTIC, BORG))
            saves.append(save_by_turns(tools, is_reversed=round_number % 2 == 1))
            memory = memory_figures("… of all", tools)
            stop(tools)
        for name in saves[0]:
            lines[name].append((count, min(save[name].wall_s for save in saves)))
        each.append([save[OURS].wall_s / count for save in saves])
        figures += [*compare_costs(case, saves), *memory]
    few, many = scale.growth_files[-2:]
    beside = f"for {few:,}"
    figures.append(Figure(f"seconds a file, for {many:,}", each[-1], TIMES, beside, each[-2], _LINEAR))
    return figures, dict(lines)


def _new_data(workspace: Workspace) -> Path:
    directory = workspace.project / DATA
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


def _write_random(path: Path, size: int) -> None:
    path.write_bytes(os.urandom(size))


def _make_small(workspace: Workspace, count: int) -> None:
    """Of even sizes, in directories of a hundred; half of each is random, half digits."""
    progress(f"making {count:,} small files")
    root = _new_data(workspace)
    sizes = random.Random(count)
    for number in range(count):
        if number % _FILES_A_DIRECTORY == 0:
            folder = root / f"{number // _FILES_A_DIRECTORY:04d}"
            folder.mkdir()
        quarter = os.urandom(sizes.randint(_SMALLEST, _LARGEST) // 4)
        (folder / f"{number:06d}.txt").write_bytes(os.urandom(2 * len(quarter)) + quarter.hex().encode())
    os.sync()


def _csv_rows(size: int) -> list[str]:
    """Rows of random numbers, about so many bytes."""
    rows = []
    while size > 0:
        rows.append(
            f"{random.randrange(10**6)},{random.gauss(0, 1):.6f},{random.gauss(5, 2):.6f},"
            f"{random.choice(('red', 'green', 'blue'))},{random.random():.8f}\n"
        )
        size -= len(rows[-1])
    return rows


def _json_rows(size: int) -> list[str]:
    """Rows of words and a number, about so many bytes."""
    rows = []
    while size > 0:
        words = " ".join(f"word{random.randrange(5000)}" for _ in range(12))
        row = {"id": random.randrange(10**9), "text": words, "score": round(random.random(), 6)}
        rows.append(json.dumps(row) + "\n")
        size -= len(rows[-1])
    return rows


def _insert_rows(table: Path, *, places: int, make: Callable[[int], list[str]]) -> None:
    """Insert twenty rows at evenly spread places; the middle when it is one."""
    rows = table.read_text().splitlines(keepends=True)
    inserted = [make(1)[0] for _ in range(_INSERTED_ROWS)]
    here = _INSERTED_ROWS // places
    for place in range(places, 0, -1):
        at = len(rows) * place // (places + 1)
        rows[at:at] = inserted[(place - 1) * here : place * here]
    table.write_text("".join(rows))
