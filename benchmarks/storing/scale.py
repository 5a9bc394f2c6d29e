"""How much is measured: the sizes of the issue that set the targets, multiplied by a factor."""

from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class Scale:
    """What each part measures, and how often."""

    rounds: int
    #: Checkpoints of one training, and the size of each.
    steps: int
    checkpoint_bytes: int
    #: Width and layers of the transformer that is trained: a checkpoint has 144 × width² × layers bytes.
    model: tuple[int, int]
    dataset_files: int
    dataset_file_bytes: int
    table_bytes: int
    small_files: int
    growth_files: tuple[int, ...]
    #: Sizes of single files, for the memory; those for which the disk has no room are left out.
    memory_bytes: tuple[int, ...]
    #: Size of a sparse file, and how much of it is data.
    sparse_bytes: tuple[int, int]


def scaled(factor: float, rounds: int) -> Scale:
    """Everything at `factor` of its size; fewer checkpoints of a smaller model when that is below a half."""
    is_full = factor >= 0.5
    return Scale(
        rounds=rounds,
        steps=20 if is_full else 5,
        checkpoint_bytes=int(200e6 * factor),
        model=(512, 6) if is_full else (128, 4),
        dataset_files=max(20, int(200 * factor)),
        dataset_file_bytes=int(10e6 * min(1.0, factor * 10)),
        table_bytes=int(50e6 * factor),
        small_files=int(50_000 * factor),
        growth_files=tuple(int(count * factor) for count in (5_000, 50_000, 500_000)),
        memory_bytes=tuple(int(size * GB * factor) for size in (1, 4, 10, 50)),
        sparse_bytes=(int(50 * GB * factor), int(2 * GB * factor)),
    )
