"""How the bytes of one chunk are stored: as they are, or compressed with zstd.

The chunk's id is the hash of its plain bytes, so the choice of a codec never matters for deduplication.
Nothing here is trusted when decoding: sizes are bounded by what the caller expects, and the caller
compares the hash.
"""

from __future__ import annotations

import threading
from typing import Final

import zstandard
from blake3 import blake3

RAW: Final = 0
ZSTD: Final = 1
#: Of another chunk, its base.
DELTA: Final = 3

#: Larger chunks are neither written nor read; it bounds the memory that one chunk can cost.
MAX_CHUNK_BYTES: Final = 16 << 20
HASH_BYTES: Final = 32

# Higher levels gain next to nothing on the data that fills repositories (weights), at half the speed.
_LEVEL = 1
# Compressed bytes must be at most 97 % of the plain ones: reading raw chunks is cheaper.
_WORTH_NUMERATOR, _WORTH_DENOMINATOR = 97, 100
# Shorter chunks are stored raw: frame headers eat what little there is to gain.
_MIN_COMPRESSED_BYTES = 64
# A level 1 frame needs at most 512 KiB, or the chunk when that is all in one segment.
_MAX_WINDOW_BYTES = MAX_CHUNK_BYTES


class ChunkDamaged(Exception):
    """Stored bytes that are not an encoding of a chunk of the expected length."""


class UnknownCodec(Exception):
    """A codec that this version cannot decode."""


class _Contexts(threading.local):
    """One compressor and decompressor a thread: they cannot be shared, and making one costs 40 µs."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def hash_chunk(plain: bytes | bytearray | memoryview) -> bytes:
    """The id of a chunk: BLAKE3 of its plain bytes."""
    return blake3(plain).digest()


def encode(plain: bytes | bytearray | memoryview) -> tuple[int, bytes | bytearray | memoryview]:
    """(codec, stored bytes); the stored bytes are `plain` itself when compressing does not pay."""
    if len(plain) < _MIN_COMPRESSED_BYTES:
        return RAW, plain
    compressed = _contexts.compressor.compress(plain)
    if len(compressed) * _WORTH_DENOMINATOR > len(plain) * _WORTH_NUMERATOR:
        return RAW, plain
    return ZSTD, compressed


def decode(codec: int, stored: bytes, plain_length: int) -> bytes:
    """The plain bytes, `plain_length` of them; raises `ChunkDamaged` or `UnknownCodec`.

    Never allocates more than `plain_length` bytes and a small constant, whatever `stored` claims.
    """
    if plain_length > MAX_CHUNK_BYTES:
        raise ChunkDamaged(f"a chunk of {plain_length} bytes is larger than allowed")
    if codec == RAW:
        if len(stored) != plain_length:
            raise ChunkDamaged(f"{len(stored)} bytes are stored instead of {plain_length}")
        return stored
    if codec == ZSTD:
        return _decompress(stored, plain_length)
    raise UnknownCodec(f"codec {codec}")


def _decompress(stored: bytes, plain_length: int) -> bytes:
    try:
        frame = zstandard.get_frame_parameters(stored)
        # `max_output_size` does not hold for frames that declare their size (tried: 32 KB became 1 GiB),
        # so the declared size has to be the expected one; then the output buffer is the limit.
        if frame.content_size != plain_length:
            raise ChunkDamaged(f"a frame of {frame.content_size} bytes instead of {plain_length}")
        if frame.window_size > _MAX_WINDOW_BYTES or frame.dict_id != 0:
            raise ChunkDamaged("a frame that needs a huge window or a dictionary")
        plain = _contexts.decompressor.decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ChunkDamaged(str(error)) from error
    if len(plain) != plain_length:
        raise ChunkDamaged(f"{len(plain)} bytes instead of {plain_length}")
    return plain
