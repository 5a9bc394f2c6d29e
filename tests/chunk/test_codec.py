"""Encoding chunks, and not believing what claims to be an encoding."""

import os
import random
import re
import struct
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from replicated.chunk.codec import (
    DELTA,
    MAX_CHUNK_BYTES,
    PLANES,
    RAW,
    ZSTD,
    ChunkDamaged,
    Encoded,
    UnknownCodec,
    base_of,
    decode,
    encode,
    encode_delta,
    hash_chunk,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
BASE_ID = bytes(range(32))
KINDS = {2: "e", 4: "f", 8: "d"}


def floats(width: int, count: int, seed: int = 1, spread: float = 0.02, center: float = 0.0) -> bytes:
    numbers = random.Random(seed)
    return struct.pack(f"<{count}{KINDS[width]}", *(numbers.gauss(center, spread) for _ in range(count)))


def flip_low_bits(plain: bytes, width: int) -> bytes:
    """The numbers after a little training: the lowest byte of each is another one."""
    changed = bytearray(plain)
    changed[::width] = random.Random(2).randbytes(len(changed[::width]))
    return bytes(changed)


def numbers_and_tails() -> st.SearchStrategy[tuple[bytes, int]]:
    """Chunks of numbers that may begin and end within a number, and how wide they are said to be."""

    def cut(width: int, count: int, seed: int, skipped: int, said: int) -> tuple[bytes, int]:
        return floats(width, count, seed)[skipped:], said

    small = st.integers(0, 7)
    counts = st.integers(2, 400) | st.integers(5000, 6000)
    return st.builds(cut, st.sampled_from([2, 4, 8]), counts, small, small, st.sampled_from([0, 1, 2, 4, 8]))


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


@given(numbers_and_tails(), st.booleans())
def test_numbers_come_back_whatever_is_said_of_them(chunk: tuple[bytes, int], is_tensor: bool) -> None:
    plain, width = chunk
    # At an odd address, as chunks are that were cut by their content.
    codec, stored, base = encode(memoryview(b"x" + plain)[1:], width if is_tensor else None)
    assert codec in (RAW, ZSTD, PLANES)
    assert base == b""
    assert len(stored) <= len(plain)
    assert decode(codec, stored, len(plain)) == plain


@given(numbers_and_tails(), st.integers(1, 8))
def test_differences_come_back(chunk: tuple[bytes, int], every: int) -> None:
    base, width = chunk
    plain = flip_low_bits(base, every)
    encoded = encode_delta(memoryview(b"x" + plain)[1:], BASE_ID, memoryview(b"xyz" + base)[3:], width)
    if encoded is not None:
        assert encoded.codec == DELTA
        assert encoded.base == base_of(encoded.stored) == BASE_ID
        assert len(encoded.stored) <= len(plain)
        assert decode(DELTA, encoded.stored, len(plain), base) == plain


@given(st.binary(max_size=200), st.binary(max_size=200), st.sampled_from([0, 1, 2, 4, 8]))
def test_differences_of_anything_come_back(first: bytes, second: bytes, width: int) -> None:
    length = min(len(first), len(second))
    plain, base = first[:length], second[:length]
    encoded = encode_delta(plain, BASE_ID, base, width)
    assert encoded is None or decode(DELTA, encoded.stored, length, base) == plain


def undo_planes(body: bytes, length: int) -> bytes:
    """What docs/format.md says of planes, byte by byte."""
    width, flags = body[:2]
    position = 2 + 4 * sum(flags >> plane & 1 for plane in range(width))
    sizes = iter(struct.unpack(f"<{(position - 2) // 4}I", body[2:position]))
    plain = bytearray(length)
    for plane in range(width):
        size = next(sizes) if flags >> plane & 1 else length // width
        stored = body[position : position + size]
        position += size
        for number, byte in enumerate(zstandard.decompress(stored) if flags >> plane & 1 else stored):
            plain[number * width + plane] = byte
    plain[length // width * width :] = body[position:]
    return bytes(plain)


def add_differences(changes: bytes, base: bytes, width: int) -> bytes:
    """What docs/format.md says of differences, number by number."""
    plain = b""
    whole = len(base) // width * width
    for start, size in [(n, width) for n in range(0, whole, width)] + [
        (n, 1) for n in range(whole, len(base))
    ]:
        change = int.from_bytes(changes[start : start + size], "little")
        signed = change // 2 if change % 2 == 0 else -(change + 1) // 2
        number = int.from_bytes(base[start : start + size], "little", signed=True) + signed
        plain += (number % 256**size).to_bytes(size, "little")
    return plain


@pytest.mark.parametrize("width", [2, 4, 8])
def test_planes_are_laid_out_as_documented(width: int) -> None:
    plain = floats(width, 3000) + b"ta"[: width - 1]
    codec, stored, _ = encode(plain, width)
    assert codec == PLANES
    assert stored[0] == width
    assert stored[1] & 1 == 0
    assert undo_planes(bytes(stored), len(plain)) == plain
    changed = flip_low_bits(plain, width)
    delta = encode_delta(changed, BASE_ID, plain, width)
    assert delta is not None
    assert delta.stored[32] == width
    assert add_differences(undo_planes(bytes(delta.stored[32:]), len(plain)), plain, width) == changed


def test_documented_planes_are_decoded() -> None:
    dump = DOCUMENT.read_text().split("<!-- planes dump")[1].split("<!-- end of planes dump")[0]
    rows = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)", dump, re.MULTILINE)
    body = b""
    for offset, row in rows:
        assert int(offset, 16) == len(body)
        body += bytes.fromhex(row)
    plain = b"".join(bytes([number, 0x3F]) for number in range(20)) + b"\xff"
    assert decode(PLANES, body, len(plain)) == undo_planes(body, len(plain)) == plain
    base = os.urandom(len(plain))
    assert decode(DELTA, BASE_ID + body, len(plain), base) == add_differences(plain, base, 2)


@pytest.mark.parametrize(
    ("plain", "item_bytes", "codec", "percent"),
    [
        pytest.param(floats(4, 1 << 14), 4, PLANES, 86, id="fp32"),
        pytest.param(floats(4, 1 << 14), 0, PLANES, 86, id="fp32, unknown width"),
        pytest.param(floats(4, 1 << 14), None, PLANES, 86, id="fp32, unknown to be a tensor"),
        pytest.param(floats(4, 1 << 14)[3:], None, PLANES, 86, id="fp32 cut anywhere"),
        pytest.param(floats(2, 1 << 15), 2, PLANES, 90, id="fp16"),
        pytest.param(floats(2, 1 << 15), 0, PLANES, 90, id="fp16, unknown width"),
        pytest.param(floats(8, 1 << 13), 8, PLANES, 90, id="fp64"),
        pytest.param(floats(8, 1 << 13), None, PLANES, 90, id="fp64, unknown to be a tensor"),
        pytest.param(floats(4, 2000), 4, PLANES, 90, id="small tensor"),
        pytest.param(floats(4, 4096) * 16, 4, ZSTD, 7, id="equal rows"),
        pytest.param(bytes(1 << 16), 4, ZSTD, 1, id="zeros"),
        pytest.param(bytes(1 << 16), None, ZSTD, 1, id="zeros, unknown to be a tensor"),
        pytest.param(b"a line of text\n" * 5000, None, ZSTD, 5, id="text"),
        pytest.param(random.Random(1).randbytes(1 << 16), None, RAW, 100, id="random"),
        pytest.param(random.Random(1).randbytes(1 << 16), 0, RAW, 100, id="random tensor"),
        pytest.param(random.Random(1).randbytes(1 << 16), 4, RAW, 100, id="random numbers"),
        pytest.param(floats(4, 20), 4, RAW, 100, id="too few numbers to gain"),
    ],
)
def test_each_kind_of_data_is_encoded_in_the_way_that_fits(
    plain: bytes, item_bytes: int | None, codec: int, percent: int
) -> None:
    encoded = encode(plain, item_bytes)
    assert encoded.codec == codec
    assert len(encoded.stored) * 100 <= len(plain) * percent
    assert decode(codec, encoded.stored, len(plain)) == plain


@pytest.mark.parametrize("item_bytes", [0, 2, 4, 8])
def test_difference_is_taken_where_it_gains_clearly(item_bytes: int) -> None:
    base = floats(item_bytes or 4, 10_000)
    changed = flip_low_bits(base, item_bytes or 4)
    alone = len(encode(changed, item_bytes).stored)
    encoded = encode_delta(changed, BASE_ID, base, item_bytes)
    assert encoded is not None
    assert len(encoded.stored) < alone * 0.97
    assert encode_delta(floats(item_bytes or 4, 10_000, seed=5), BASE_ID, base, item_bytes) is None
    assert encode_delta(os.urandom(len(base)), BASE_ID, base, item_bytes) is None


def test_difference_in_a_few_bytes_takes_next_to_nothing() -> None:
    base = os.urandom(100_000)
    changed = base[:500] + b"x" + base[501:]
    encoded = encode_delta(changed, BASE_ID, base)
    assert encoded is not None
    assert len(encoded.stored) < 200
    assert decode(DELTA, encoded.stored, len(base), base) == changed


def test_difference_of_few_bytes_is_not_worth_naming_a_base() -> None:
    assert encode_delta(bytes(99) + b"x", BASE_ID, bytes(100)) is None
    assert encode_delta(b"", BASE_ID, b"") is None


def encoded_floats() -> list[tuple[Encoded, bytes, bytes | None]]:
    """Planes and differences, what they are of, and the base."""
    plain = floats(4, 1000) + b"xyz"
    changed = flip_low_bits(plain, 4)
    planes = encode(plain, 4)
    kept = planes._replace(stored=bytes(planes.stored))
    delta = encode_delta(changed, BASE_ID, plain, 4)
    assert delta is not None
    return [(kept, plain, None), (delta._replace(stored=bytes(delta.stored)), changed, plain)]


def test_planes_of_another_length_are_damage() -> None:
    for (codec, stored, _), plain, base in encoded_floats():
        assert decode(codec, stored, len(plain), base) == plain
        for damaged in (bytes(stored) + b"x", bytes(stored[:-1]), bytes(stored[:1]), b""):
            with pytest.raises(ChunkDamaged):
                decode(codec, damaged, len(plain), base)
        for length in range(40):
            with pytest.raises(ChunkDamaged):
                decode(codec, stored[:length], len(plain), base)
        for claimed in (0, 1, len(plain) - 1, len(plain) + 1, len(plain) - 4, MAX_CHUNK_BYTES):
            with pytest.raises(ChunkDamaged):
                decode(codec, stored, claimed, base and base[:claimed].ljust(claimed))


def test_every_flipped_byte_is_damage_or_gives_as_many_bytes() -> None:
    for (codec, stored, _), plain, base in encoded_floats():
        for position in [*range(100), *range(100, len(stored), 7)]:
            damaged = bytearray(stored)
            damaged[position] ^= 0x81
            try:
                assert len(decode(codec, damaged, len(plain), base)) == len(plain)
            except ChunkDamaged:
                pass


@pytest.mark.parametrize("header", ["0000", "0100", "0300", "1000", "ff00", "0204", "0410", "0480"])
def test_impossible_planes_are_damage(header: str) -> None:
    with pytest.raises(ChunkDamaged):
        decode(PLANES, bytes.fromhex(header) + bytes(100), 100)


def test_only_differences_may_be_one_plane() -> None:
    assert decode(DELTA, BASE_ID + b"\x01\x00" + b"\2\0\1", 3, b"abc") == b"bbb"
    with pytest.raises(ChunkDamaged):
        decode(PLANES, b"\x01\x00" + b"abc", 3)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 255), st.binary(max_size=100), st.integers(0, 100))
def test_garbage_of_planes_is_damage_or_has_the_length(
    width: int, flags: int, rest: bytes, claimed: int
) -> None:
    body = bytes([width, flags]) + rest
    for codec, stored, base in ((PLANES, body, None), (DELTA, BASE_ID + body, bytes(claimed))):
        try:
            assert len(decode(codec, stored, claimed, base)) == claimed
        except ChunkDamaged:
            pass


def test_base_is_needed_and_has_the_same_length() -> None:
    (codec, stored, _), plain, base = encoded_floats()[1]
    assert base is not None
    for wrong in (None, b"", base[:-1], base + b"x"):
        with pytest.raises(ChunkDamaged):
            decode(codec, stored, len(plain), wrong)
    assert decode(codec, stored, len(plain), bytes(len(base))) != plain


def test_base_of_a_chunk_without_room_for_one_is_damage() -> None:
    assert base_of(memoryview(BASE_ID + b"more")) == BASE_ID
    with pytest.raises(ChunkDamaged):
        base_of(BASE_ID[:-1])


def test_bombs_in_planes_are_refused_without_allocating_what_they_claim() -> None:
    for name, bomb in bombs().items():
        body = b"\x02\x02" + len(bomb).to_bytes(4, "little") + bytes(1 << 20) + bomb
        tracemalloc.start()
        with pytest.raises(ChunkDamaged):
            decode(PLANES, body, 2 << 20)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 5 << 20, name


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_decoding_takes_twice_the_plain_bytes_at_most(width: int) -> None:
    length = MAX_CHUNK_BYTES
    frame = zstandard.compress(bytes(length // width))
    flags = (1 << width) - 1
    body = bytes([width, flags]) + len(frame).to_bytes(4, "little") * width + frame * width
    base = bytes(length)
    decode(DELTA, BASE_ID + b"\x02\x00ab", 2, b"ab")
    tracemalloc.start()
    decode(DELTA, BASE_ID + body, length, base)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * length + (1 << 20)


def test_threads_encode_planes_in_memory_of_their_own() -> None:
    wrong: list[int] = []
    barrier = threading.Barrier(4)

    def work(seed: int) -> None:
        plain = floats(4, 20_000, seed)
        barrier.wait()
        for _ in range(20):
            encoded = encode(plain, 4)
            if encoded.codec != PLANES or decode(PLANES, encoded.stored, len(plain)) != plain:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_child_of_a_fork_encodes_in_memory_of_its_own() -> None:
    encoded = encode(floats(4, 5000), 4)
    before = bytes(encoded.stored)
    child = os.fork()
    if not child:
        encode(floats(4, 5000, seed=2), 4)
        os._exit(0)
    os.waitpid(child, 0)
    assert bytes(encoded.stored) == before


def test_numpy_is_imported_for_planes_only() -> None:
    program = """
import os, sys
from replicated.chunk.codec import ZSTD, RAW, decode, encode
for plain in (b"text and more of it " * 5000, os.urandom(100_000), bytes(100_000), b"x"):
    codec, stored, _ = encode(plain)
    assert codec in (ZSTD, RAW)
    assert decode(codec, stored, len(plain)) == plain
assert "numpy" not in sys.modules
encode(b"".join(bytes([n % 256, n * 7 % 256, n * 13 % 256, 60 + n % 3]) for n in range(5000)), 4)
assert "numpy" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
