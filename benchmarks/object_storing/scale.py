"""How much is measured: the sizes of the issue that set the targets, multiplied by a factor."""

from dataclasses import dataclass

MIB = 1 << 20
_GB = 10**9


@dataclass(frozen=True)
class Scale:
    """What each case measures, and how often."""

    rounds: int
    #: What is uploaded, and the file that is read in order.
    upload_bytes: int
    read_bytes: int
    #: A tree of small files.
    small_files: int
    smallest: int
    largest: int
    #: What `ls` finds.
    experiments: int
    checkpoints: int
    #: What the snapshot claims to hold out of which one file is opened.
    claimed_bytes: int
    #: Live runs, and for how long their signs of life are counted.
    runs: int
    beating_s: float


def scaled(factor: float, rounds: int, beating_s: float) -> Scale:
    """Everything at `factor` of its size, and never so little that a case loses its sense."""
    return Scale(
        rounds=rounds,
        upload_bytes=max(64 * MIB, int(2 * _GB * factor)),
        read_bytes=max(64 * MIB, int(_GB * factor)),
        small_files=max(500, int(50_000 * factor)),
        smallest=2_000,
        largest=6_000,
        experiments=max(20, int(10_000 * factor)),
        checkpoints=50,
        claimed_bytes=max(_GB, int(100 * _GB * factor)),
        runs=5,
        beating_s=beating_s,
    )
