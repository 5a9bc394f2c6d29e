"""The memory of the daemon and its store process: for files of more and more bytes, and for a sparse one."""

import os
import shutil
from pathlib import Path

from measuring.figures import TIMES, Figure, format_megabytes
from measuring.peers import Peers
from measuring.workspace import Workspace, progress

from storing.comparing import compare_costs, memory_figures
from storing.scale import GB, Scale
from storing.tools import DATA, OURS, RESTIC, begin, save_by_turns, stop

_BLOCK = 1 << 20
#: The largest against the smallest file.
_FLAT = 1.25
_OF_DATA = 1.03
#: The file and its copy in the repository, and something for whatever else happens on the disk.
_COPIES = 2
_SPARE_BYTES = 2 * GB
_SPARSE_PIECES = 20


def measure(workspace: Workspace, scale: Scale, peers: Peers) -> list[Figure]:
    """Incompressible files, as far as the disk has room for them, then a sparse one."""
    figures: list[Figure] = []
    peaks = []
    for size in scale.memory_bytes:
        case = f"one file of {format_megabytes(size)}"
        needed = _COPIES * size + _SPARE_BYTES
        free = shutil.disk_usage(workspace.root).free
        if free < needed:
            needs, has = format_megabytes(needed), format_megabytes(free)
            print(f"not measured: {case}: it needs {needs} of disk, and {has} are free", flush=True)
            continue
        progress(case)
        path = _new_file(workspace)
        with path.open("wb") as file:
            for offset in range(0, size, _BLOCK):
                file.write(os.urandom(min(_BLOCK, size - offset)))
        tools = begin(workspace, peers, (OURS, RESTIC) if not peaks else (OURS,))
        costs = save_by_turns(tools)
        figures += [
            *compare_costs(case, [costs]),
            *memory_figures(case, tools),
        ]
        peaks.append(tools[OURS].peak_bytes())
        stop(tools)
        path.unlink()
    if len(peaks) > 1:
        case = "peak memory, the largest against the smallest"
        figures.append(Figure(case, peaks[-1:], TIMES, "", peaks[:1], _FLAT, format_megabytes))
    return figures + _measure_sparse(workspace, scale, peers)


def _measure_sparse(workspace: Workspace, scale: Scale, peers: Peers) -> list[Figure]:
    size, data = scale.sparse_bytes
    case = f"sparse file of {format_megabytes(size)}"
    progress(case)
    path = _new_file(workspace)
    piece = data // _SPARSE_PIECES
    with path.open("wb") as file:
        file.truncate(size)
        for number in range(_SPARSE_PIECES):
            file.seek(size // _SPARSE_PIECES * number)
            file.write(os.urandom(piece))
    os.sync()
    tools = begin(workspace, peers, (OURS,))
    [cost] = save_by_turns(tools).values()
    stored = tools[OURS].stored_bytes()
    directory = workspace.root / "restored"
    restored = tools[OURS].restore(0, directory)
    [copy] = [path for path in directory.rglob("*") if path.is_file()]
    occupied = copy.stat().st_blocks * 512
    if copy.stat().st_size != size:
        raise SystemExit("error: a sparse file has another size after checkout")
    figures = [
        Figure(f"{case}: stored", [stored], TIMES, "its data", [data], _OF_DATA, format_megabytes),
        Figure(f"{case}: checked out", [occupied], TIMES, "its data", [data], _OF_DATA, format_megabytes),
        Figure("… saved: wall", [cost.wall_s]),
        Figure("… saved: CPU", [cost.cpu_s]),
        Figure("… checked out: wall", [restored.wall_s]),
        *memory_figures(case, tools),
    ]
    stop(tools)
    shutil.rmtree(directory)
    path.unlink()
    return figures


def _new_file(workspace: Workspace) -> Path:
    directory = workspace.project / DATA
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory / "file.bin"
