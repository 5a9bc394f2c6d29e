"""Where the content of a file is cut into chunks.

Pure functions over buffers: the same bytes with the same parameters are cut alike for ever, on every
machine, or deduplication stops working (it would still be right). A golden test pins the cut points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from replicated.chunk.codec import MAX_CHUNK_BYTES

ALGORITHM: Final = "fastcdc2020"
#: Normalized chunking of level 2 keeps sizes near the average (standard deviation 356 K against 581 K).
NORMALIZATION: Final = 2

#: A file is judged by so many bytes at its beginning.
TEXT_SAMPLE_BYTES: Final = 8192
#: Control characters other than these make a file binary: \t \n \v \f \r and escape.
_TEXT_CONTROLS = b"\t\n\x0b\x0c\r\x1b"
_BINARY_BYTES = bytes(byte for byte in [*range(32), 127] if byte not in _TEXT_CONTROLS)


@dataclass(frozen=True, slots=True)
class ChunkSizes:
    """Sizes of chunks in bytes; `average` is that of FastCDC, the real mean is `average + minimum`."""

    minimum: int
    average: int
    maximum: int

    def is_valid(self) -> bool:
        """Whether chunks of these sizes can be made and read."""
        return (
            64 <= self.minimum <= 1 << 20
            and 256 <= self.average <= 4 << 20
            and 1024 <= self.maximum <= MAX_CHUNK_BYTES
            and self.minimum <= self.average <= self.maximum
        )


@dataclass(frozen=True, slots=True)
class ChunkerParameters:
    """How a repository cuts; written into it when it is made and never changed."""

    #: Shorter files are one chunk.
    whole_below: int = 256 << 10
    #: Text is edited in the middle and compresses well: small chunks.
    text: ChunkSizes = ChunkSizes(16 << 10, 64 << 10, 256 << 10)
    binary: ChunkSizes = ChunkSizes(64 << 10, 256 << 10, 1 << 20)

    def is_valid(self) -> bool:
        """Whether files can be cut in this way."""
        return 0 < self.whole_below <= MAX_CHUNK_BYTES and self.text.is_valid() and self.binary.is_valid()

    def sizes_for(self, head: bytes) -> ChunkSizes:
        """The sizes for a file that begins with `head` (`TEXT_SAMPLE_BYTES` of it)."""
        return self.text if is_text(head) else self.binary


def is_text(head: bytes) -> bool:
    """Whether a file that begins with `head` looks like text: at most 1 % binary bytes, no zero byte."""
    binary = len(head) - len(head.translate(None, _BINARY_BYTES))
    return b"\0" not in head and binary * 100 <= len(head)


class Cutter:
    """Cuts one file that is looked at window by window; the cuts are those of one pass over the whole."""

    def __init__(self, sizes: ChunkSizes) -> None:
        # Imported here: who only reads begins without it.
        from pyfastcdc import FastCDC

        self._sizes = sizes
        self._cutter = FastCDC(
            sizes.average,
            min_size=sizes.minimum,
            max_size=sizes.maximum,
            normalized_chunking=NORMALIZATION,
            seed=0,
        )

    def cut(self, window: memoryview, *, is_last: bool) -> list[int]:
        """Lengths of the chunks at the beginning of a window; the next window begins with what is left.

        Every window but the last must be longer than the longest chunk. A cut depends only on the bytes
        since the cut before it, so all chunks are certain but the last one, which the window's end may
        have cut, unless the file ends there too.
        """
        assert is_last or len(window) > self._sizes.maximum, "the window may hold no certain chunk"
        lengths = [chunk.length for chunk in self._cutter.cut_buf(window)]
        if not is_last:
            lengths.pop()
        return lengths

    def cut_zeros(self, length: int) -> list[int]:
        """What `cut` would say of a window of zeros that is not the last one: nothing ends a chunk early."""
        return [self._sizes.maximum] * ((length - 1) // self._sizes.maximum)
