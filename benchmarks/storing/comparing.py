"""How the figures of a part are made from what each tool needed."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from measuring.figures import (
    MEGABYTES,
    SECONDS,
    TIMES,
    Figure,
    Relation,
    format_megabytes,
    format_seconds,
)

from storing.tools import OURS, Cost, Tool

#: Of the daemon and its store process; restic needs 181 MB for a data set of 2 GB.
MEMORY_BYTES = 250e6


def compare(
    case: str,
    values: Mapping[str, Sequence[float]],
    *,
    targets: Mapping[str, float] | None = None,
    unit: Callable[[float], str] = format_seconds,
) -> list[Figure]:
    """Ours beside each of the others, or alone when there are none; `targets` by the names of the others."""
    wanted = targets or {}
    if len(values) == 1:
        return [Figure(case, values[OURS], SECONDS if unit is format_seconds else MEGABYTES)]
    return [
        Figure(case, values[OURS], TIMES, name, others, wanted.get(name), unit)
        for name, others in values.items()
        if name != OURS
    ]


def compare_alone(
    case: str, values: Mapping[str, Sequence[float]], relation: Relation, target: float
) -> list[Figure]:
    """Ours, which is judged once and by itself, and what it is for each of the others."""
    others = [name for name in values if name != OURS] or [""]
    return [
        Figure(
            case, values[OURS], relation, name, values.get(name, ()), target if name == others[0] else None
        )
        for name in others
    ]


def compare_costs(
    case: str,
    costs: Iterable[Mapping[str, Cost]],
    *,
    wall_targets: Mapping[str, float] | None = None,
    cpu_targets: Mapping[str, float] | None = None,
) -> list[Figure]:
    """Wall time and processor time of the same saves by each of the tools."""
    saves = list(costs)
    wall = {name: [save[name].wall_s for save in saves] for name in saves[0]}
    cpu = {name: [save[name].cpu_s for save in saves] for name in saves[0]}
    return [
        *compare(f"{case}: wall", wall, targets=wall_targets),
        *compare(f"{case}: CPU", cpu, targets=cpu_targets),
    ]


def compare_stored(
    case: str, stored: Mapping[str, Sequence[float]], targets: Mapping[str, float] | None = None
) -> list[Figure]:
    """Bytes of the repositories."""
    return compare(f"{case}: stored", stored, targets=targets, unit=format_megabytes)


def memory_figures(case: str, tools: Mapping[str, Tool]) -> list[Figure]:
    """The most memory that each tool had at one moment, as far as that is known."""
    peaks = {name: [tool.peak_bytes()] for name, tool in tools.items() if tool.peak_bytes()}
    return compare_alone(f"{case}: peak memory", peaks, MEGABYTES, MEMORY_BYTES)
