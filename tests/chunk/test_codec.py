"""Encoding chunks, and not believing what claims to be an encoding."""

import os
import threading
import tracemalloc

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from replicated.chunk.codec import (
    MAX_CHUNK_BYTES,
    RAW,
    ZSTD,
    ChunkDamaged,
    UnknownCodec,
    decode,
    encode,
    hash_chunk,
)


@given(st.binary(max_size=300) | st.binary(max_size=50).map(lambda part: part * 100))
@example(b"")
@example(bytes(MAX_CHUNK_BYTES))
def test_decoded_is_what_was_encoded(plain: bytes) -> None:
    codec, stored, _ = encode(memoryview(plain))
    assert len(stored) <= len(plain)
    assert decode(codec, bytes(stored), len(plain)) == plain


def test_compressible_chunks_are_compressed_and_others_are_not() -> None:
    assert encode(b"abc" * 1000)[0] == ZSTD
    incompressible = os.urandom(100_000)
    codec, stored, _ = encode(incompressible)
    assert codec == RAW
    assert stored is incompressible


def test_gain_of_less_than_three_percent_is_not_worth_it() -> None:
    plain = os.urandom(98_000) + bytes(2000)
    assert len(zstandard.ZstdCompressor(level=1).compress(plain)) < 0.99 * len(plain)
    assert encode(plain)[0] == RAW
    assert encode(os.urandom(90_000) + bytes(10_000))[0] == ZSTD


def test_hash_is_blake3() -> None:
    assert hash_chunk(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


@pytest.mark.parametrize("tail", [b"x", zstandard.compress(b"more"), b"\x50\x2a\x4d\x18\x01\0\0\0x"])
def test_bytes_after_the_frame_are_damage(tail: bytes) -> None:
    frame = zstandard.compress(b"a" * 1000, 1)
    assert decode(ZSTD, frame, 1000) == b"a" * 1000
    with pytest.raises(ChunkDamaged):
        decode(ZSTD, frame + tail, 1000)


def test_cut_frame_is_damage() -> None:
    frame = zstandard.compress(os.urandom(500) + b"a" * 500, 1)
    for length in range(len(frame)):
        with pytest.raises(ChunkDamaged):
            decode(ZSTD, frame[:length], 1000)


@pytest.mark.parametrize("claimed", [0, 999, 1001, MAX_CHUNK_BYTES])
def test_frame_of_another_length_is_damage(claimed: int) -> None:
    with pytest.raises(ChunkDamaged):
        decode(ZSTD, zstandard.compress(b"a" * 1000, 1), claimed)
    with pytest.raises(ChunkDamaged):
        decode(RAW, b"a" * 1000, claimed)


def test_larger_chunks_than_allowed_are_damage() -> None:
    with pytest.raises(ChunkDamaged, match="larger than allowed"):
        decode(RAW, bytes(MAX_CHUNK_BYTES + 1), MAX_CHUNK_BYTES + 1)


def bombs() -> dict[str, bytes]:
    """Frames of 1 GiB in a few kilobytes: with its size declared, without, with a lie, in huge windows."""
    size = 1 << 30
    block = bytes(1 << 20)

    def compress(declared: int = -1, **options: object) -> bytes:
        compressor = zstandard.ZstdCompressor(**options).compressobj(size=declared)  # type: ignore[arg-type]
        return b"".join(compressor.compress(block) for _ in range(size >> 20)) + compressor.flush()

    undeclared = compress(level=1)
    # Frame header descriptor 0xE0: single segment, 8 bytes of size, so the lie goes where the window was.
    lying = undeclared[:4] + b"\xe0" + (1000).to_bytes(8, "little") + undeclared[6:]
    window = zstandard.ZstdCompressionParameters.from_level(1, window_log=27)
    return {
        "declared": compress(declared=size, level=1),
        "undeclared": undeclared,
        "lying": lying,
        "huge window": compress(compression_params=window),
    }


def test_bombs_are_refused_without_allocating_what_they_claim() -> None:
    for name, bomb in bombs().items():
        for claimed in (1000, MAX_CHUNK_BYTES):
            tracemalloc.start()
            with pytest.raises(ChunkDamaged):
                decode(ZSTD, bomb, claimed)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < MAX_CHUNK_BYTES + (1 << 20), name


def test_dictionary_is_refused() -> None:
    samples = [os.urandom(10) + b"common text in all samples " * 3 + bytes([i % 256]) for i in range(2000)]
    dictionary = zstandard.train_dictionary(4096, samples)
    frame = zstandard.ZstdCompressor(dict_data=dictionary).compress(samples[0] * 5)
    with pytest.raises(ChunkDamaged):
        decode(ZSTD, frame, len(samples[0] * 5))


@pytest.mark.parametrize("codec", [4, 255])
def test_unknown_codec_is_told_apart_from_damage(codec: int) -> None:
    with pytest.raises(UnknownCodec):
        decode(codec, b"x", 1)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_garbage_is_damage_or_has_the_length(stored: bytes, claimed: int) -> None:
    for data in (stored, b"\x28\xb5\x2f\xfd" + stored):
        try:
            assert len(decode(ZSTD, data, claimed)) == claimed
        except ChunkDamaged:
            pass


def test_threads_do_not_disturb_each_other() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        plain = bytes([seed]) * 5000 + os.urandom(1000)
        for _ in range(200):
            codec, stored, _ = encode(plain)
            if decode(codec, bytes(stored), len(plain)) != plain:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
