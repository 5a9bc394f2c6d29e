"""How much is measured: the sizes of the issue that set the targets, and small ones to try the script."""

from dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Scale:
    """What each part measures, and how often."""

    rounds: int
    #: Size of a checkpoint → how often it is made in a round.
    checkpoints: dict[int, int]
    #: The one of them that is held against reading it.
    judged_checkpoint: int
    #: Size of a file that each tool saves alone → how many more are saved without a pause then.
    peer_files: dict[int, int]
    #: How many checkpoints there are already when those without files are measured, how many are, and how
    #: many Keepsake makes.
    earlier: tuple[int, int]
    records: int
    keepsake_records: int
    #: Files, smallest and largest size.
    trees: tuple[tuple[int, int, int], ...]
    unchanged_tree: tuple[int, int, int]
    #: Of about 10 ms each.
    training_iterations: int
    training_bytes: int


FULL = Scale(
    rounds=3,
    checkpoints={10 * MIB: 5, GIB: 2, 4 * GIB: 1},
    judged_checkpoint=GIB,
    peer_files={200_000_000: 4, 1_000_000_000: 0},
    earlier=(10, 5_000),
    records=200,
    keepsake_records=500,
    trees=((20_000, 4 << 10, 36 << 10), (50_000, 2_000, 8_000)),
    unchanged_tree=(100_000, 500, 4_100),
    training_iterations=1_500,
    training_bytes=4 * GIB,
)

QUICK = Scale(
    rounds=1,
    checkpoints={MIB: 2, 16 * MIB: 1, 64 * MIB: 1},
    judged_checkpoint=16 * MIB,
    peer_files={20_000_000: 2},
    earlier=(10, 100),
    records=20,
    keepsake_records=20,
    trees=((500, 4 << 10, 36 << 10), (1_000, 2_000, 8_000)),
    unchanged_tree=(2_000, 500, 4_100),
    training_iterations=100,
    training_bytes=64 * MIB,
)
