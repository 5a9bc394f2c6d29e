"""One big file: the kernel's page cache has nothing of it at first, and our cache all of it, or nothing.

What is served from (the file, the repositories, our cache) is in the page cache for everybody, or for nobody.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from measuring.figures import RATE, SPEED, TIMES, Figure, format_megabytes, format_rate
from measuring.workspace import Workspace, progress
from storing.tools import BORG, DATA, RESTIC

from mounting import page_cache
from mounting.comparing import (
    CPU_A_GB,
    MEMORY,
    Measured,
    by_turns,
    compare_alone,
    compare_rates,
    memory_figures,
    using_cpu,
)
from mounting.reading import read_at_random, read_in_order, read_mapped
from mounting.scale import Scale
from mounting.servers import Mount, Ours, Saved, Server, Variant, can_prefetch, forget_cache
from replicate.home import find_home

_FILE = "big.bin"
_WITH_PASSTHROUGH = "passthrough"
_CACHED_TIMEOUT_S = 120.0
_LOOK_S = 0.2
#: Who has not copied all of the mapping by then is known well enough: it is minutes for some.
_MAPPED_LIMIT_S = 5.0
#: Of the speed of the better of restic and borg, which was 176 MB/s at most when the target was set.
_OF_PEERS = 5.0
_BYTES_PER_S = _OF_PEERS * 176e6
#: Of the memory after a quarter of the file.
_FLAT = 1.1


def make(workspace: Workspace, scale: Scale) -> None:
    """The file, with content that is nowhere else."""
    directory = workspace.project / DATA
    directory.mkdir()
    workspace.write_file(directory / _FILE, scale.file_bytes)


def measure_cached(scale: Scale, saved: Saved, variants: Sequence[Variant]) -> list[Figure]:
    """The file lies in our cache as a whole before the mount begins."""
    is_cached = _bring_into_cache(saved.ours(variants[-1]), scale.file_bytes)
    if not is_cached:
        print("not so: the file does not lie in our cache as a whole; it is read from its chunks", flush=True)
    measured = Measured()
    servers = [saved.native, *(saved.ours(variant) for variant in variants), *saved.peers]
    for server in by_turns("cached file", servers, scale.rounds):
        page_cache.warm(server.backing())
        _measure_file(server, measured, scale)
    ours = [variant.name for variant in variants]
    case = f"{format_megabytes(scale.file_bytes)}, cached"

    def targets(passthrough: float, other: float | None) -> dict[str, float]:
        wanted = {name: passthrough if name == _WITH_PASSTHROUGH else other for name in ours}
        return {name: target for name, target in wanted.items() if target is not None}

    rates = (
        ("first read", targets(0.9, 0.25)),
        ("second read", targets(0.95, 0.95)),
        ("first mmap read", targets(0.95, None)),
        ("second mmap read", targets(0.95, 0.95)),
    )
    figures = []
    for metric, wanted in rates:
        figures += compare_rates(f"{case}: {metric}", measured.of(metric), ours, format_rate, wanted)
        if metric == "first read":
            cpu = measured.of("CPU")
            figures += compare_alone("… CPU of it", cpu, ours, CPU_A_GB, targets(0.45, 0.45))
    at_random = measured.of("random")
    figures += compare_rates(f"{case}: random 4 KiB", at_random, ours, _format_reads, targets(0.9, None))
    return figures + memory_figures(case, measured, ours)


def measure_chunks(scale: Scale, saved: Saved) -> list[Figure]:
    """The first read of the file when nothing is cached by us, as a mount without options does it."""
    server = saved.ours(Variant("replicate"))
    servers = [saved.native, server, *saved.peers]
    figures: list[Figure] = []
    for state in ("page cache", "disk"):
        measured = Measured()
        for reader in by_turns(f"chunks, {state}", servers, scale.rounds):
            forget_cache()
            prepare = page_cache.drop if state == "disk" else page_cache.warm
            # Mounted first: what a mount reads to begin with is the same for both states.
            with reader.mounted() as mount:
                prepare(reader.backing())
                _read_first(reader.name, mount.directory / _FILE, mount, measured)
                measured.add(reader.name, MEMORY, mount.peak_bytes())
        case = f"chunks, {state}"
        rates = measured.of("first read")
        figures += compare_rates(f"{case}: first read", rates, [server.name], format_rate)
        found = [rates[name] for name in (RESTIC, BORG) if name in rates]
        better = [max(pair) for pair in zip(*found, strict=True)]
        is_judged = state == "page cache"
        if better:
            target = _OF_PEERS if is_judged else None
            beside = "the better of them"
            figures.append(
                Figure("… first read", rates[server.name], SPEED, beside, better, target, format_rate)
            )
        target = _BYTES_PER_S if is_judged else None
        figures.append(Figure("… first read, by itself", rates[server.name], RATE, target=target))
        figures += compare_alone("… CPU of it", measured.of("CPU"), [server.name], CPU_A_GB)
        figures += memory_figures(case, measured, [server.name])
    return [*figures, _measure_growth(server, scale)]


def _measure_growth(server: Ours, scale: Scale) -> Figure:
    """What reading more of the same file, and all of it again, does to the memory of the process."""
    forget_cache()
    page_cache.warm(server.backing())
    with server.mounted() as mount:
        path = mount.directory / _FILE
        read_in_order(path, scale.file_bytes // 4)
        quarter = mount.peak_bytes()
        for _ in range(2):
            read_in_order(path)
        return Figure(
            "chunks: peak memory after all of it twice",
            [mount.peak_bytes()],
            TIMES,
            "after a quarter",
            [quarter],
            _FLAT,
            format_megabytes,
        )


def _measure_file(server: Server, measured: Measured, scale: Scale) -> None:
    with server.mounted() as mount:
        if mount.details:
            progress(mount.details)
        path = mount.directory / _FILE
        _read_first(server.name, path, mount, measured)
        measured.add(server.name, "second read", read_in_order(path))
        measured.add(server.name, "second mmap read", read_mapped(path, _MAPPED_LIMIT_S))
        peak = mount.peak_bytes()
    with server.mounted() as mount:
        measured.add(server.name, "first mmap read", read_mapped(mount.directory / _FILE, _MAPPED_LIMIT_S))
        peak = max(peak, mount.peak_bytes())
    with server.mounted() as mount:
        rate = read_at_random(mount.directory / _FILE, scale.random_s)
        measured.add(server.name, "random", rate)
        measured.add(server.name, MEMORY, max(peak, mount.peak_bytes()))


def _read_first(server_name: str, path: Path, mount: Mount, measured: Measured) -> None:
    with using_cpu(mount, path.stat().st_size, lambda value: measured.add(server_name, "CPU", value)):
        measured.add(server_name, "first read", read_in_order(path))


def _bring_into_cache(server: Ours, size_bytes: int) -> bool:
    """Make our cache hold the file as a whole; whether it does.

    By what users are told to do: `--prefetch`, or reading it twice.
    """
    progress("bringing the file into our cache")
    # The command returns when everything was read.
    with server.mounted(*(["--prefetch=**"] if can_prefetch() else [])) as mount:
        deadline = time.monotonic() + _CACHED_TIMEOUT_S
        if not _is_cached(size_bytes):
            for _ in range(2):
                read_in_order(mount.directory / _FILE)
            while not _is_cached(size_bytes) and (find_home().cache / "content").exists():
                if time.monotonic() > deadline:
                    return False
                time.sleep(_LOOK_S)
        return _is_cached(size_bytes)


def _is_cached(size_bytes: int) -> bool:
    """Whether a file of this size is below our cache: it is named there when it has been verified."""
    folders = os.walk(find_home().cache)
    paths = (os.path.join(folder, name) for folder, _, names in folders for name in names)
    return any(os.path.getsize(path) == size_bytes for path in paths if os.path.exists(path))


def _format_reads(reads_per_s: float) -> str:
    return f"{reads_per_s:,.0f}/s"
