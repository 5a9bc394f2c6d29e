"""What compressing a chunk would give, told from a few of its kilobytes.

Pure functions. An estimate decides only what is tried, never what is kept: that is compared byte by byte.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from replicated.chunk.frames import Plain, compress, compress_entropy, compress_repetitions

#: Eight windows of 1 KiB tell sizes of planes to 1 % of the chunk, for 40 µs (a chunk of 1 MiB takes 600).
SAMPLE_BYTES: Final = 8 << 10
_WINDOWS: Final = 8
#: The widest numbers; also the windows' alignment, so that bytes of a kind stay together.
MAX_WIDTH: Final = 8

# Repetitions are looked for in so many bytes at a chunk's beginning, in 10 µs if there are none.
_RUN_BYTES = 128 << 10
_REPETITIVE = 0.97
# Looking for repetitions takes three times as long as planes do, so it has to be so much better.
_CLEARLY = 0.95
# Planes whose samples differ by less are taken for the same: noise is about 3 %.
_ALIKE_FRACTION = 16


class Estimate(NamedTuple):
    """How a sample was compressed best, and what part of its bytes that took."""

    ratio: float
    #: Width of the numbers; 0 says that repetitions are worth looking for, which is done without planes.
    width: int
    #: Bit p is set if plane p compresses.
    compressible: int = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether the chunk looks random, so that nothing need be tried."""
        return self.ratio > 0.985


def take_sample(plain: Plain) -> bytes:
    """Windows spread over the whole chunk, or all of a short one; byte n of it is of plane n mod 8."""
    view = memoryview(plain)
    if len(view) <= SAMPLE_BYTES:
        return bytes(view)
    window = SAMPLE_BYTES // _WINDOWS
    step = (len(view) - window) // (_WINDOWS - 1) // MAX_WIDTH * MAX_WIDTH
    return b"".join([view[n * step : n * step + window] for n in range(_WINDOWS)])


def plane_sizes(sample: bytes, width: int) -> list[int]:
    """What each of the planes of a sample takes; as much as it has bytes where compressing gains nothing."""
    sizes = []
    for plane in range(width):
        part = sample[plane::width]
        sizes.append(min(len(compress_entropy(part)), len(part)))
    return sizes


def find_width(sample: bytes) -> tuple[int, list[int]]:
    """The width of the numbers in a sample, 1 if there is no sign of any, and the sizes of its planes.

    Numbers of 8 bytes whose planes come in two equal groups are numbers of 4, and so on.
    """
    width, sizes = MAX_WIDTH, plane_sizes(sample, MAX_WIDTH)
    tolerance = len(sample) // MAX_WIDTH // _ALIKE_FRACTION
    while width > 1:
        half = width // 2
        pairs = list(zip(sizes[:half], sizes[half:], strict=True))
        if any(abs(first - second) > tolerance for first, second in pairs):
            break
        tolerance *= 2
        width, sizes = half, [first + second for first, second in pairs]
    return width, sizes


def judge(plain: Plain, sample: bytes, item_bytes: int | None) -> Estimate:
    """The best that is to be expected for a chunk with this sample; `item_bytes` as in `codec.encode`."""
    general = Estimate(len(compress(sample)) / len(sample), 0)
    if item_bytes is None and (general.is_hopeless or b"\0" not in sample):
        # Numbers have zeros, text has none.
        return general
    # The sample shows but few of the repetitions that there are, such as equal rows of a matrix.
    run = bytes(memoryview(plain)[:_RUN_BYTES])
    if len(compress_repetitions(run)) < len(run) * _REPETITIVE:
        if item_bytes is None:
            return general
        sample, general = run, Estimate(len(compress(run)) / len(run), 0)
    planes = judge_numbers(sample, item_bytes or 0)
    if item_bytes is None and planes.width == 1:
        return general
    return general if general.ratio < planes.ratio * _CLEARLY else planes


def judge_numbers(sample: bytes, item_bytes: int) -> Estimate:
    """What the sample's planes give, for numbers of so many bytes, or 0 if that has to be found out."""
    width, sizes = (item_bytes, plane_sizes(sample, item_bytes)) if item_bytes else find_width(sample)
    compressible = sum(1 << plane for plane, size in enumerate(sizes) if size < len(sample) // width)
    return Estimate(sum(sizes) / len(sample), width, compressible)
