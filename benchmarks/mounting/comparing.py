"""How the figures of a case are made from what was measured of each server."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from measuring.figures import MEGABYTES, SPEED, TIMES, Figure, Relation, format_seconds
from measuring.workspace import progress

from mounting.servers import NATIVE, Mount, Server

AnyServer = TypeVar("AnyServer", bound=Server)

MEMORY_BYTES = 60e6


def _itself(value: float, _: float) -> float:
    return value


CPU_A_GB = Relation(_itself, lambda seconds: f"{seconds:.2f} s/GB", is_alone=True)
MEMORY = "peak memory"


@dataclass
class Measured:
    """Every value of each metric of each server, in the order of the rounds."""

    values: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def add(self, server: str, metric: str, value: float) -> None:
        """One more value."""
        self.values[metric][server].append(value)

    def of(self, metric: str) -> Mapping[str, Sequence[float]]:
        """The values of a metric by the names of the servers."""
        return self.values[metric]


@contextmanager
def using_cpu(mount: Mount, per_bytes: float, keep: Callable[[float], None]) -> Iterator[None]:
    """Give `keep` the processor time of the serving processes during the block, for each GB."""
    before = mount.cpu_seconds()
    yield
    if mount.pid:
        keep((mount.cpu_seconds() - before) / per_bytes * 1e9)


def compare(
    case: str,
    values: Mapping[str, Sequence[float]],
    ours: Sequence[str],
    relation: Relation = TIMES,
    *,
    targets: Mapping[str, float] | None = None,
    peer_target: float | None = None,
    unit: Callable[[float], str] = format_seconds,
) -> list[Figure]:
    """Each of our variants beside native reading, and the first of them beside each of the peers.

    `targets` are those beside native reading, by the names of our variants; ours by itself when there is
    nothing to hold it against.
    """
    wanted = targets or {}
    names = [name for name in ours if name in values]
    if not names:
        return []
    figures = [
        Figure(f"{case}, {name}", values[name], relation, NATIVE, values[NATIVE], wanted.get(name), unit)
        for name in names
        if NATIVE in values
    ]
    first = names[0]
    figures += [
        Figure(f"{case}, {first}", values[first], relation, peer, others, peer_target, unit)
        for peer, others in values.items()
        if peer not in (*ours, NATIVE)
    ]
    return figures or [Figure(case, values[first], Relation(_itself, unit, is_alone=True))]


def compare_rates(
    case: str,
    values: Mapping[str, Sequence[float]],
    ours: Sequence[str],
    unit: Callable[[float], str],
    targets: Mapping[str, float] | None = None,
    peer_target: float | None = None,
) -> list[Figure]:
    """As `compare`, of values of which more is better."""
    return compare(case, values, ours, SPEED, targets=targets, peer_target=peer_target, unit=unit)


def compare_alone(
    case: str,
    values: Mapping[str, Sequence[float]],
    ours: Sequence[str],
    relation: Relation,
    targets: Mapping[str, float] | None = None,
) -> list[Figure]:
    """Each of our variants by itself, the first of them shown beside each of the peers."""
    wanted = targets or {}
    names = [name for name in ours if name in values]
    peers = [name for name in values if name not in (*ours, NATIVE)]
    figures = []
    for position, name in enumerate(names):
        for number, peer in enumerate(peers if peers and position == 0 else [""]):
            target = wanted.get(name) if number == 0 else None
            others = values.get(peer, ())
            figures.append(Figure(f"{case}, {name}", values[name], relation, peer, others, target))
    return figures


def memory_figures(case: str, measured: Measured, ours: Sequence[str]) -> list[Figure]:
    """The most memory that the process of a mount had."""
    targets = dict.fromkeys(ours, MEMORY_BYTES)
    return compare_alone(f"{case}: {MEMORY}", measured.of(MEMORY), ours, MEGABYTES, targets)


def by_turns(case: str, servers: Sequence[AnyServer], rounds: int) -> Iterator[AnyServer]:
    """Each of the servers in each round: the other way round in every second one."""
    for number in range(rounds):
        for server in servers[::-1] if number % 2 else servers:
            progress(f"{case}, {server.name}: round {number + 1} of {rounds}")
            yield server
