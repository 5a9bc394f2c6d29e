"""Twenty thousand small files: listing them, and reading all of them in the order of their names."""

from collections.abc import Sequence

from measuring.figures import SECONDS, Figure
from measuring.workspace import Workspace
from storing.tools import DATA

from mounting import page_cache
from mounting.comparing import MEMORY, Measured, by_turns, compare, compare_alone, memory_figures
from mounting.reading import find, tar
from mounting.scale import Scale
from mounting.servers import Saved, Variant, forget_cache

_SMALLEST, _LARGEST = 2_000, 8_000
_COLD, _WARM, _TAR, _CPU = "cold", "warm", "tar", "CPU"
_COLD_TARGET, _WARM_TARGET = 3.5, 1.2


def make(workspace: Workspace, scale: Scale) -> None:
    """The files, in directories of a hundred."""
    workspace.make_tree(workspace.project / DATA, scale.listed_files, _SMALLEST, _LARGEST)


def measure(scale: Scale, saved: Saved, variants: Sequence[Variant]) -> list[Figure]:
    """`find` in a new mount and again, then `tar`, nothing cached by us."""
    measured = Measured()
    servers = [saved.native, *(saved.ours(variant) for variant in variants), *saved.peers]
    for server in by_turns("tree", servers, scale.rounds):
        forget_cache()
        page_cache.warm(server.backing())
        with server.mounted() as mount:
            for metric in (_COLD, _WARM):
                before = mount.cpu_seconds()
                measured.add(server.name, metric, find(mount.directory, scale.listed_files))
                if mount.pid:
                    measured.add(server.name, f"{_CPU}, {metric}", mount.cpu_seconds() - before)
            before = mount.cpu_seconds()
            measured.add(server.name, _TAR, tar(mount.directory))
            if mount.pid:
                measured.add(server.name, f"{_CPU}, {_TAR}", mount.cpu_seconds() - before)
                measured.add(server.name, MEMORY, mount.peak_bytes())
    ours = [variant.name for variant in variants]
    case = f"{scale.listed_files:,} files"
    wanted = {_COLD: dict.fromkeys(ours, _COLD_TARGET), _WARM: dict.fromkeys(ours, _WARM_TARGET)}
    titles = {_COLD: "find, cold", _WARM: "find, warm", _TAR: "tar, nothing cached"}
    figures = []
    for metric, title in titles.items():
        figures += compare(f"{case}: {title}", measured.of(metric), ours, targets=wanted.get(metric))
        figures += compare_alone("… CPU of it", measured.of(f"{_CPU}, {metric}"), ours, SECONDS)
    return figures + memory_figures(case, measured, ours)
