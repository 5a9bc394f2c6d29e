"""Where the tensors of a file lie, so that it is cut at their beginnings and ends.

Files of tensors are cut where tensors begin and end, because their writers change what lies between them:
`torch.save` puts the name of the archive before each tensor and a checksum behind it, so two checkpoints
of the same weights agree in no chunk of a size worth having when they are cut by content, and in all but
one when they are cut here. A layout is a hint and never trusted with more: whatever it says, the pieces
and the gaps make up the file. The writer calls this; it reads headers only, through a function that the
caller gives, and never all of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from blake3 import blake3

from replicated.chunk.containers import hdf5, npy, safetensors, zip_archive
from replicated.chunk.containers.source import MAX_REGIONS, MIN_EXTENT_BYTES, Extent, Malformed, Source

#: (offset, length) → those bytes, fewer only at the end of the file; what it raises passes through.
ReadAt: TypeAlias = Callable[[int, int], bytes]

#: Shorter tensors stay in the gaps between the longer ones: a chunk of their own costs more than it saves.
MIN_REGION_BYTES: Final = MIN_EXTENT_BYTES
#: Regions are cut into pieces of this length, counted from their starts.
PIECE_BYTES: Final = 1 << 20
#: All gaps of a file together; they are stored anew with nearly every checkpoint.
MAX_GAP_BYTES: Final = 4 << 20
# Files of shorter regions (archives of source files, say) would be cut into more chunks than they are worth.
_MIN_MEAN_REGION_BYTES = 16 << 10

_CONTAINERS: Final = (
    ("zip", zip_archive.begins, zip_archive.find_extents),
    ("hdf5", hdf5.begins, hdf5.find_extents),
    ("npy", npy.begins, npy.find_extents),
    ("safetensors", safetensors.begins, safetensors.find_extents),
)


class Region(NamedTuple):
    """The data of one tensor, or a piece of it; both positions are those in the file."""

    start: int
    size: int
    #: Bytes of one number: 1, 2, 4 or 8; 0 when it is not known.
    item_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file is made of: regions and, between them, gaps (headers, checksums, short tensors).

    The regions are sorted and disjoint, lie in the file and have at least `MIN_REGION_BYTES` each. There
    is at least one region and at least one gap.
    """

    kind: str
    size: int
    regions: tuple[Region, ...]

    @property
    def lengths(self) -> list[int]:
        """Gap, region, gap, region, …, as in a layout node: only the first may be 0.

        Regions that touch are one here: a node says where bytes go, not what they are.
        """
        lengths: list[int] = []
        end = 0
        for start, size, _ in self.regions:
            if start > end or not lengths:
                lengths += (start - end, size)
            else:
                lengths[-1] += size
            end = start + size
        if end < self.size:
            lengths.append(self.size - end)
        return lengths

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """Start and length of each gap in the order of the file; none is empty."""
        gaps: list[tuple[int, int]] = []
        position = 0
        for number, length in enumerate(self.lengths):
            if number % 2 == 0 and length > 0:
                gaps.append((position, length))
            position += length
        return gaps

    @property
    def pieces(self) -> Iterator[Region]:
        """All regions in order, those longer than `PIECE_BYTES` in pieces of that length and a rest."""
        for start, size, item_bytes in self.regions:
            for offset in range(0, size, PIECE_BYTES):
                yield Region(start + offset, min(PIECE_BYTES, size - offset), item_bytes)

    @property
    def signature(self) -> bytes:
        """32 bytes that are the same for files of the same tensors, wherever they lie and are called."""
        sizes = ",".join(f"{region.size}:{region.item_bytes}" for region in self.regions)
        return blake3(f"{self.kind},{sizes}".encode()).digest()


def find_layout(size: int, head: bytes, read_at: ReadAt) -> Layout | None:
    """The layout of a file of `size` bytes that begins with `head` (8 KiB of it, or all).

    None for a file that holds no tensors, none that is understood, or too few to be worth it: regions are
    long, and gaps short and less than regions. What a file is, its content says, never its name. Reads
    headers only, mostly 2 KiB for each region, within the budget of `Source`.
    """
    for kind, begins, find_extents in _CONTAINERS:
        if begins(head):
            try:
                regions = _find_regions(find_extents(Source(size, head, read_at), 0, size), size)
            except Malformed:
                return None
            region_bytes = sum(region.size for region in regions)
            is_worth_it = 0 < size - region_bytes <= min(MAX_GAP_BYTES, region_bytes)
            return Layout(kind, size, regions) if is_worth_it else None
    return None


def _find_regions(extents: Iterable[Extent], size: int) -> tuple[Region, ...]:
    """Those extents that are worth it, sorted; raises `Malformed` for what cannot be."""
    regions: list[Region] = []
    for extent in extents:
        if extent.size >= MIN_REGION_BYTES:
            regions.append(Region(*extent))
        if len(regions) > MAX_REGIONS:
            raise Malformed("too many regions")
    regions.sort()
    end = region_bytes = 0
    for region in regions:
        if region.start < end:
            raise Malformed("regions overlap")
        end = region.start + region.size
        region_bytes += region.size
    if end > size:
        raise Malformed("a region ends behind the end of the file")
    if region_bytes < max(1, len(regions)) * _MIN_MEAN_REGION_BYTES:
        raise Malformed("too short regions")
    return tuple(regions)
