"""From the command to the first byte of one small file: in a small snapshot, and in a very large one."""

import resource
import time
from collections.abc import Sequence
from pathlib import Path

from measuring.figures import MEGABYTES, SECONDS, TIMES, Figure, format_megabytes
from measuring.workspace import Workspace, progress
from storing.tools import DATA

from mounting import page_cache
from mounting.comparing import (
    MEMORY,
    MEMORY_BYTES,
    Measured,
    by_turns,
    compare,
    compare_alone,
    memory_figures,
)
from mounting.reading import find
from mounting.scale import Scale
from mounting.servers import Saved, Server, Variant

_FILES_A_DIRECTORY = 1000
_TARGET_S = 0.3
#: For the larger snapshot against the smaller one.
_NOT_GROWING = 1.15
_START, _CPU = "start", "CPU"


def make(workspace: Workspace, count: int) -> None:
    """Files of some bytes, all of them different, in directories of a thousand."""
    progress(f"making {count:,} files")
    for number in range(count):
        if number % _FILES_A_DIRECTORY == 0:
            folder = workspace.project / DATA / f"{number // _FILES_A_DIRECTORY:04d}"
            folder.mkdir(parents=True)
        with (folder / f"{number:07d}.txt").open("wb", buffering=0) as file:
            file.write(b"%d\n" % number)


def measure_few(scale: Scale, saved: Saved) -> tuple[list[Figure], Sequence[float]]:
    """The small snapshot, beside the peers; also the seconds of ours."""
    ours = saved.ours(Variant("replicate"))
    measured = _measure(scale, scale.few_files, [ours, *saved.peers])
    times = measured.of(_START)
    case = f"mount to first byte, {scale.few_files:,} files"
    mine = [ours.name]
    figures = [
        Figure(case, times[ours.name], SECONDS, target=_TARGET_S),
        *(compare(case, times, mine) if saved.peers else ()),
        *compare_alone("… CPU of command and process", measured.of(_CPU), mine, SECONDS),
        *memory_figures(case, measured, mine),
    ]
    return figures, times[ours.name]


def measure_many(scale: Scale, saved: Saved, few: Sequence[float]) -> list[Figure]:
    """The large snapshot; then the memory of a mount of it, in which all names were asked for."""
    ours = saved.ours(Variant("replicate"))
    measured = _measure(scale, scale.many_files, [ours])
    times = measured.of(_START)[ours.name]
    case = f"mount to first byte, {scale.many_files:,} files"
    figures = [Figure(case, times, SECONDS, target=_TARGET_S)]
    if few:
        beside = f"{scale.few_files:,} files"
        figures.append(Figure(case, times, TIMES, beside, few, _NOT_GROWING))
    figures += compare_alone("… CPU of command and process", measured.of(_CPU), [ours.name], SECONDS)
    figures += memory_figures(case, measured, [ours.name])
    progress("finding all of them")
    with ours.mounted() as mount:
        before = mount.cpu_seconds()
        elapsed = find(mount.directory, scale.many_files)
        used = mount.cpu_seconds() - before
        peak = mount.peak_bytes()
    native = find(saved.native.backing()[0], scale.many_files)
    return [
        *figures,
        Figure("… find of all of them", [elapsed], TIMES, "native", [native]),
        Figure("… CPU of it", [used]),
        Figure(
            "… peak memory after it",
            [peak],
            TIMES,
            "before it",
            measured.of(MEMORY)[ours.name],
            unit=format_megabytes,
        ),
        Figure("… peak memory after it", [peak], MEGABYTES, target=MEMORY_BYTES),
    ]


def _measure(scale: Scale, count: int, servers: Sequence[Server]) -> Measured:
    number = count // 2
    wanted = Path(f"{number // _FILES_A_DIRECTORY:04d}", f"{number:07d}.txt")
    measured = Measured()
    for server in by_turns(f"start with {count:,} files", servers, scale.rounds):
        page_cache.warm(server.backing())
        commands_s = _commands_cpu_s()
        begin = time.perf_counter()
        with server.mounted() as mount:
            with (mount.directory / wanted).open("rb", buffering=0) as file:
                first = file.read(1)
            measured.add(server.name, _START, time.perf_counter() - begin)
            measured.add(server.name, _CPU, _commands_cpu_s() - commands_s + mount.cpu_seconds())
            measured.add(server.name, MEMORY, mount.peak_bytes())
        if first != str(number).encode()[:1]:
            raise SystemExit(f"error: {server.name} has read {first!r} from file {number}")
    return measured


def _commands_cpu_s() -> float:
    """Processor time of the commands that have ended so far; not that of the daemon."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
