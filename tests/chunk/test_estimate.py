"""What a few kilobytes tell of a chunk."""

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicated.chunk.codec import MAX_CHUNK_BYTES
from replicated.chunk.estimate import SAMPLE_BYTES, find_width, judge, judge_numbers, plane_sizes, take_sample


def gauss(kind: str, count: int) -> bytes:
    numbers = random.Random(1)
    return struct.pack(f"<{count}{kind}", *(numbers.gauss(0, 0.02) for _ in range(count)))


@given(st.integers(0, SAMPLE_BYTES) | st.integers(SAMPLE_BYTES, 1 << 20))
def test_sample_has_a_fixed_size_and_keeps_planes_apart(size: int) -> None:
    sample = take_sample((bytes(range(8)) * (size // 8 + 1))[:size])
    assert len(sample) == min(size, SAMPLE_BYTES)
    assert all(byte == position % 8 for position, byte in enumerate(sample))


@pytest.mark.parametrize("size", [SAMPLE_BYTES + 1, 100_000, 1 << 20, MAX_CHUNK_BYTES])
def test_sample_reaches_from_the_beginning_to_the_end(size: int) -> None:
    plain = bytearray(size)
    plain[:8] = b"begins  "
    plain[-64:] = b"e" * 64
    sample = take_sample(plain)
    assert sample.startswith(b"begins  ")
    assert sample.endswith(b"e" * 8)


@pytest.mark.parametrize(("kind", "width"), [("e", 2), ("f", 4), ("d", 8)])
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_width_of_numbers_is_found_wherever_they_begin(kind: str, width: int, cut: int) -> None:
    found, sizes = find_width(take_sample(gauss(kind, 10_000)[cut:]))
    assert found == width
    assert len(sizes) == width


@pytest.mark.parametrize(
    "plain",
    [b"some text with no numbers in it, \n" * 1000, random.Random(1).randbytes(50_000), bytes(50_000)],
)
def test_what_has_no_numbers_has_width_one(plain: bytes) -> None:
    assert find_width(take_sample(plain))[0] == 1


def test_planes_of_integers_are_told_apart() -> None:
    numbers = random.Random(1)
    small = struct.pack("<10000q", *(numbers.randrange(50_000) for _ in range(10_000)))
    estimate = judge_numbers(take_sample(small), 0)
    assert estimate.width == 8
    assert estimate.compressible & 0b11111101 == 0b11111100
    assert estimate.ratio == pytest.approx(0.25, abs=0.06)


def test_plane_that_does_not_compress_takes_what_it_has() -> None:
    sample = take_sample(gauss("f", 10_000))
    assert plane_sizes(sample, 4)[:2] == [SAMPLE_BYTES // 4] * 2
    assert judge_numbers(sample, 4).compressible & 0b11 == 0


def test_repetitions_too_far_apart_for_a_sample_are_seen() -> None:
    row = gauss("f", 8192)
    plain = row * 8
    assert judge(plain, take_sample(plain), 4).width == 0
    plain = gauss("f", 8 * 8192)
    assert judge(plain, take_sample(plain), 4).width == 4


def test_random_chunks_are_hopeless() -> None:
    plain = random.Random(1).randbytes(100_000)
    for item_bytes in (None, 0, 1, 2, 4, 8):
        assert judge(plain, take_sample(plain), item_bytes).is_hopeless
