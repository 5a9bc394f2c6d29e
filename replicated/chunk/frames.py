"""The ways of making zstd frames: one for anything, one for bytes that only entropy coding helps.

And one that finds repetitions and does nothing else. Used by `codec` and by `estimate`, which must agree on
what compressing gives. Opening frames, where nothing may be trusted, is `codec`'s.
"""

from __future__ import annotations

import threading
from typing import TypeAlias

import zstandard

#: Borrowed for a call, never changed.
Plain: TypeAlias = bytes | bytearray | memoryview

# Higher levels gain next to nothing on what fills repositories, at half the speed.
_LEVEL = 1
# A plane of floats has no matches worth their cost: the exponents of weights take 34 % of their bytes at
# 0.9 GB/s, where level 1, which looks for matches, takes 39 % at 0.27 (zstd 1.5.7, Zen 3). The smallest hash
# table and the longest shortest match still find the runs of zeros that differences have.
_ENTROPY = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=18,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    write_checksum=False,
)
# A target length other than zero leaves out entropy coding, which takes most of the time: 13 GB/s where there
# are no repetitions.
_REPETITIONS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=18,
    hash_log=12,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=1,
    write_checksum=False,
)


class _Compressors(threading.local):
    """One of each a thread: they cannot be shared, and making one costs 40 µs."""

    def __init__(self) -> None:
        self.general = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
        self.entropy = zstandard.ZstdCompressor(compression_params=_ENTROPY)
        self.repetitions = zstandard.ZstdCompressor(compression_params=_REPETITIONS)


_compressors = _Compressors()


def compress(plain: Plain) -> bytes:
    """One frame that declares its size, made quickly."""
    return _compressors.general.compress(plain)


def compress_entropy(plain: Plain) -> bytes:
    """The same without looking for repetitions, but for long runs: better and faster where there are none."""
    return _compressors.entropy.compress(plain)


def compress_repetitions(plain: Plain) -> bytes:
    """The same with repetitions of 7 bytes and more left out, and nothing else: to see how many there are."""
    return _compressors.repetitions.compress(plain)
