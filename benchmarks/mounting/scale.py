"""How much is measured: the sizes of the issue that set the targets, multiplied by a factor."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Scale:
    """What each case measures, and how often."""

    rounds: int
    file_bytes: int
    #: Files that are listed, and files of a data set that a loader reads again and again.
    listed_files: int
    epoch_files: int
    #: Of the two snapshots whose mounts are begun.
    few_files: int
    many_files: int
    #: Seconds of reading at random; who has read everything by then is done.
    random_s: float
    #: For the store that is far away: every request takes a while.
    far_files: int
    far_file_bytes: int


def scaled(factor: float, rounds: int) -> Scale:
    """Everything at `factor` of its size, and never so little that a case loses its sense."""
    return Scale(
        rounds=rounds,
        file_bytes=max(16, int(1024 * factor)) * MIB,
        listed_files=max(500, int(20_000 * factor)),
        epoch_files=max(500, int(50_000 * factor)),
        few_files=100,
        many_files=max(1000, int(1_000_000 * factor)),
        random_s=2.0 if factor >= 0.5 else 0.5,
        far_files=max(200, int(2_000 * factor)),
        far_file_bytes=max(16, int(256 * factor)) * MIB,
    )
