"""Moving the bytes of numbers into planes and back."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicated.chunk.planes import differ, merge, split

WIDTHS = st.sampled_from([1, 2, 4, 8])


def planes_of(plain: bytes, width: int) -> list[bytes]:
    count = len(plain) // width
    room = memoryview(bytearray(count * width))
    split(plain, width, room)
    return [bytes(room[plane * count : (plane + 1) * count]) for plane in range(width)]


@given(st.binary(max_size=200), WIDTHS)
def test_plane_is_every_byte_of_one_significance(plain: bytes, width: int) -> None:
    whole = plain[: len(plain) // width * width]
    assert planes_of(plain, width) == [whole[plane::width] for plane in range(width)]


@given(st.binary(max_size=200), WIDTHS, st.integers(0, 7))
def test_merging_undoes_splitting_at_any_address(plain: bytes, width: int, offset: int) -> None:
    shifted = memoryview(b"x" * offset + plain)[offset:]
    room = memoryview(bytearray(len(plain) // width * width + offset))[offset:]
    split(shifted, width, room)
    count = len(plain) // width
    planes = [room[plane * count : (plane + 1) * count] for plane in range(width)]
    assert merge(planes, plain[count * width :]) == plain


@given(st.binary(min_size=1, max_size=200), WIDTHS, st.randoms(use_true_random=False))
def test_merging_with_a_base_undoes_splitting_a_difference(plain: bytes, width: int, numbers: Random) -> None:
    base = numbers.randbytes(len(plain))
    difference = bytearray(len(plain))
    differ(plain, base, width, memoryview(difference))
    tail = bytes(difference)[len(plain) // width * width :]
    assert merge(planes_of(bytes(difference), width), tail, base) == plain


def test_nothing_but_a_tail_is_left_as_it_is() -> None:
    assert merge([b""] * 8, b"abc") == b"abc"
    assert merge([b""] * 8, b"\0\1\2", b"abc") == b"aad"
    assert merge([b""], b"", b"") == b""


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_small_differences_are_small_numbers(width: int) -> None:
    def join(*numbers: int) -> bytes:
        return b"".join((number % 256**width).to_bytes(width, "little") for number in numbers)

    half = 256**width // 2
    base = join(5, 5, 5, 0, half - 1, 7)
    plain = join(5, 4, 6, -1, half, 5)
    out = bytearray(len(base))
    differ(plain, base, width, memoryview(out))
    assert out == join(0, 1, 2, 1, 2, 3)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_largest_chunks_are_split_and_merged(width: int) -> None:
    plain = bytes(range(256)) * (1 << 16)
    assert merge(planes_of(plain, width), b"") == plain
