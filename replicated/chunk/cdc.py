"""Where the content of a file is cut into chunks.

Pure functions over buffers: the same bytes with the same parameters are cut alike for ever, on every
machine, or deduplication stops working (it would still be right). A golden test pins the cut points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pyfastcdc import FastCDC

from replicated.chunk.codec import MAX_CHUNK_BYTES

ALGORITHM: Final = "fastcdc2020"
#: Normalized chunking of level 2 keeps sizes near the average (standard deviation 356 K against 581 K).
NORMALIZATION: Final = 2

#: A file is judged by so many bytes at its beginning.
TEXT_SAMPLE_BYTES: Final = 8192
#: Control characters other than these make a file binary: \t \n \v \f \r and escape.
_TEXT_CONTROLS = b"\t\n\x0b\x0c\r\x1b"
_BINARY_BYTES = bytes(byte for byte in [*range(32), 127] if byte not in _TEXT_CONTROLS)

# Cutting restarts at the last certain cut of a window, so a window is many chunks long.
_WINDOW_IN_CHUNKS = 8


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


def window_bytes(sizes: ChunkSizes) -> int:
    """How much of a file `cut_windows` looks at in one step."""
    return _WINDOW_IN_CHUNKS * sizes.maximum


def cut_windows(data: memoryview, sizes: ChunkSizes) -> Iterator[tuple[int, list[int]]]:
    """(offset, lengths of the chunks from there) window by window; together they cover `data`.

    The cuts are those of one pass over the whole: a cut depends only on the bytes since the cut before
    it, so all chunks of a window are certain but the last, which the window's end may have cut.
    """
    cutter = FastCDC(
        sizes.average,
        min_size=sizes.minimum,
        max_size=sizes.maximum,
        normalized_chunking=NORMALIZATION,
        seed=0,
    )
    window = window_bytes(sizes)
    offset = 0
    while offset < len(data):
        end = min(offset + window, len(data))
        lengths = [chunk.length for chunk in cutter.cut_buf(data[offset:end])]
        if end < len(data):
            lengths.pop()
        yield offset, lengths
        offset += sum(lengths)
