"""How the bytes of one chunk are stored: as they are, compressed with zstd, as planes, or as a difference.

The chunk's id is the hash of its plain bytes, so the choice of a codec never matters for deduplication.
What is encoded how is decided from a sample, and checked against what came out. Nothing here is trusted when
decoding: sizes are bounded by what the caller expects, and the caller compares the hash.
"""

from __future__ import annotations

import mmap
import struct
import threading
from typing import Final, NamedTuple

import zstandard
from blake3 import blake3

from replicated.chunk.estimate import Estimate, find_width, judge, judge_numbers, take_sample
from replicated.chunk.frames import Plain, compress, compress_entropy

RAW: Final = 0
ZSTD: Final = 1
PLANES: Final = 2
DELTA: Final = 3

#: Larger chunks are neither written nor read; it bounds the memory that one chunk can cost.
MAX_CHUNK_BYTES: Final = 16 << 20
HASH_BYTES: Final = 32

#: Width of the numbers, and which of their planes are compressed; the lengths of these follow.
_PLANES_HEADER = struct.Struct("<BB")
_WIDTHS = (2, 4, 8)
#: Differences of bytes that belong to no numbers are one plane.
_DELTA_WIDTHS = (1, *_WIDTHS)
#: The most that comes before the planes, rounded up to where memory is fastest.
_HEADROOM_BYTES = 128

# Stored bytes must be at most 97 % of the plain ones: reading raw chunks is cheaper.
_WORTH_NUMERATOR, _WORTH_DENOMINATOR = 97, 100
# Shorter chunks are stored raw: frame headers eat what little there is to gain.
_MIN_COMPRESSED_BYTES = 64
# Shorter chunks of anything but tensors are compressed without asking what they are.
_MIN_JUDGED_BYTES = 16 << 10
# The base's id, in the chunk and in a list of bases.
_DELTA_OVERHEAD_BYTES = 2 * HASH_BYTES
# A level 1 frame needs at most 512 KiB, or the chunk when that is all in one segment.
_MAX_WINDOW_BYTES = MAX_CHUNK_BYTES


class ChunkDamaged(Exception):
    """Stored bytes that are not an encoding of a chunk of the expected length."""


class UnknownCodec(Exception):
    """A codec that this version cannot decode."""


class Encoded(NamedTuple):
    """What to store for a chunk."""

    codec: int
    #: The chunk's plain bytes themselves, or borrowed until the next call in the same thread.
    stored: Plain
    #: The id of the chunk that is needed for decoding; empty if there is none.
    base: bytes = b""


class _Scratch(threading.local):
    """Memory to encode in: a page-aligned buffer for each purpose and thread, as large as was ever needed."""

    def __init__(self) -> None:
        self._buffers: dict[str, memoryview] = {}

    def take(self, purpose: str, size: int) -> memoryview:
        """`size` bytes with anything in them, the same memory as the last time."""
        buffer = self._buffers.get(purpose)
        if buffer is None or len(buffer) < size:
            pages = max(size, (1 << 20) + mmap.PAGESIZE)
            # Not shared with a child after a fork, as mmap would have it.
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            buffer = self._buffers[purpose] = memoryview(mmap.mmap(-1, pages, flags=private))
        return buffer[:size]


_scratch = _Scratch()


class _Decompressors(threading.local):
    """One a thread: it cannot be shared."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()


_decompressors = _Decompressors()


def hash_chunk(plain: Plain) -> bytes:
    """The id of a chunk: BLAKE3 of its plain bytes."""
    return blake3(plain).digest()


def encode(plain: Plain, item_bytes: int | None = None) -> Encoded:
    """What to store; the stored bytes are `plain` itself when nothing pays.

    `item_bytes` is the size of the numbers in a piece of a tensor (1, 2, 4 or 8), 0 for a tensor of unknown
    numbers, and None for what is not known to be a tensor.
    """
    if len(plain) < _MIN_COMPRESSED_BYTES:
        return Encoded(RAW, plain)
    if item_bytes is None and len(plain) < _MIN_JUDGED_BYTES:
        return _if_worth(plain, Encoded(ZSTD, compress(plain)))
    sample = take_sample(plain)
    estimate = judge(plain, sample, item_bytes)
    if estimate.is_hopeless:
        return Encoded(RAW, plain)
    if estimate.width == 0:
        return _if_worth(plain, Encoded(ZSTD, compress(plain)))
    if estimate.width == 1:
        return _if_worth(plain, Encoded(ZSTD, compress_entropy(plain)))
    return _if_worth(plain, Encoded(PLANES, _encode_planes(plain, estimate)))


def encode_delta(plain: Plain, base_id: bytes, base: Plain, item_bytes: int = 0) -> Encoded | None:
    """What to store to get `plain` out of `base`, of the same length; None if that is no clear gain.

    The base must be stored without a base itself. `item_bytes` as for `encode`.
    """
    assert len(plain) == len(base), "a difference needs chunks of one length"
    if len(plain) < _MIN_COMPRESSED_BYTES:
        return None
    sample, base_sample = take_sample(plain), take_sample(base)
    width = item_bytes or find_width(sample)[0]
    # Only here: a repository without tensors needs no numpy.
    from replicated.chunk.planes import differ

    difference = bytearray(len(sample))
    differ(sample, base_sample, width, memoryview(difference))
    estimate = judge_numbers(bytes(difference), width)
    alone = min(judge(plain, sample, item_bytes).ratio, 1.0)
    if not _is_worth(len(plain) * (estimate.ratio + 1 - alone) + _DELTA_OVERHEAD_BYTES, len(plain)):
        return None
    changes = _scratch.take("changes", len(plain))
    differ(plain, base, width, changes)
    stored = _encode_planes(changes, estimate, base_id)
    return Encoded(DELTA, stored, base_id) if _is_worth(len(stored), len(plain)) else None


def decode(codec: int, stored: Plain, plain_length: int, base: Plain | None = None) -> bytes:
    """The plain bytes, `plain_length` of them; raises `ChunkDamaged` or `UnknownCodec`.

    `base` are the plain bytes of the chunk that `base_of` names. Never allocates more than twice
    `plain_length` bytes and a small constant, whatever `stored` claims.
    """
    if plain_length > MAX_CHUNK_BYTES:
        raise ChunkDamaged(f"a chunk of {plain_length} bytes is larger than allowed")
    if codec == RAW:
        if len(stored) != plain_length:
            raise ChunkDamaged(f"{len(stored)} bytes are stored instead of {plain_length}")
        return bytes(stored)
    if codec == ZSTD:
        return _decompress(stored, plain_length)
    if codec == PLANES:
        return _decode_planes(memoryview(stored), plain_length, None)
    if codec == DELTA:
        if base is None or len(base) != plain_length:
            raise ChunkDamaged("a difference from a chunk that is missing or of another length")
        return _decode_planes(memoryview(stored)[HASH_BYTES:], plain_length, base)
    raise UnknownCodec(f"codec {codec}")


def base_of(stored: Plain) -> bytes:
    """The id of the chunk that is needed to decode a chunk with the codec `DELTA`; raises `ChunkDamaged`."""
    if len(stored) < HASH_BYTES:
        raise ChunkDamaged(f"{len(stored)} bytes hold no id of a base")
    return bytes(stored[:HASH_BYTES])


def _is_worth(stored_length: float, plain_length: int) -> bool:
    return stored_length * _WORTH_DENOMINATOR <= plain_length * _WORTH_NUMERATOR


def _if_worth(plain: Plain, encoded: Encoded) -> Encoded:
    return encoded if _is_worth(len(encoded.stored), len(plain)) else Encoded(RAW, plain)


def _encode_planes(plain: Plain, estimate: Estimate, prefix: bytes = b"") -> memoryview:
    """The body of a chunk made of planes, after `prefix`, in memory of this thread."""
    # Only here: a repository without tensors needs no numpy.
    from replicated.chunk.planes import split

    width = estimate.width
    count = len(plain) // width
    body = _scratch.take("planes", _HEADROOM_BYTES + len(plain))
    split(plain, width, body[_HEADROOM_BYTES : _HEADROOM_BYTES + count * width])
    # Planes that shrink make room for those after them: everything stays in one place.
    end, flags, lengths = _HEADROOM_BYTES, 0, []
    for plane in range(width):
        start = _HEADROOM_BYTES + plane * count
        stored: Plain = body[start : start + count]
        if estimate.compressible >> plane & 1:
            frame = compress_entropy(stored)
            if _is_worth(len(frame), count):
                flags |= 1 << plane
                lengths.append(len(frame))
                stored = frame
        if flags:
            body[end : end + len(stored)] = stored
        end += len(stored)
    tail = memoryview(plain)[count * width :]
    body[end : end + len(tail)] = tail
    end += len(tail)
    header = prefix + _PLANES_HEADER.pack(width, flags) + struct.pack(f"<{len(lengths)}I", *lengths)
    body[_HEADROOM_BYTES - len(header) : _HEADROOM_BYTES] = header
    return body[_HEADROOM_BYTES - len(header) : end]


def _decode_planes(body: memoryview, plain_length: int, base: Plain | None) -> bytes:
    if len(body) < _PLANES_HEADER.size:
        raise ChunkDamaged("a chunk of planes without its header")
    width, flags = _PLANES_HEADER.unpack_from(body)
    if width not in (_WIDTHS if base is None else _DELTA_WIDTHS) or flags >> width:
        raise ChunkDamaged(f"planes {flags:#x} of numbers of {width} bytes")
    position = _PLANES_HEADER.size + 4 * flags.bit_count()
    if len(body) < position:
        raise ChunkDamaged("a chunk of planes without their lengths")
    compressed = iter(struct.unpack_from(f"<{flags.bit_count()}I", body, _PLANES_HEADER.size))
    count, rest = divmod(plain_length, width)
    lengths = [next(compressed) if flags >> plane & 1 else count for plane in range(width)]
    if position + sum(lengths) + rest != len(body):
        raise ChunkDamaged(f"{len(body)} bytes instead of planes of {lengths}")
    planes: list[Plain] = []
    for plane, length in enumerate(lengths):
        stored = body[position : position + length]
        planes.append(_decompress(stored, count) if flags >> plane & 1 else stored)
        position += length
    # Only here: a repository without tensors needs no numpy.
    from replicated.chunk.planes import merge

    return merge(planes, body[position:], base)


def _decompress(stored: Plain, plain_length: int) -> bytes:
    try:
        frame = zstandard.get_frame_parameters(stored)
        # `max_output_size` does not hold for frames that declare their size (tried: 32 KB became 1 GiB),
        # so the declared size has to be the expected one; then the output buffer is the limit.
        if frame.content_size != plain_length:
            raise ChunkDamaged(f"a frame of {frame.content_size} bytes instead of {plain_length}")
        if frame.window_size > _MAX_WINDOW_BYTES or frame.dict_id != 0:
            raise ChunkDamaged("a frame that needs a huge window or a dictionary")
        plain = _decompressors.decompressor.decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ChunkDamaged(str(error)) from error
    if len(plain) != plain_length:
        raise ChunkDamaged(f"{len(plain)} bytes instead of {plain_length}")
    return plain
