"""Bytes of numbers regrouped by what they mean: all first bytes, then all second ones, and so on.

Of a float, the byte with the exponent compresses and the others do not; side by side they hide that. Plane p
of numbers of `width` bytes consists of the bytes p, p + width, p + 2·width… Pure moving of bytes; what is
done with the planes is decided in `codec`, which imports this module only when there are some: nobody else
needs numpy. The interpreter's lock is released in every step.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np

from replicated.chunk.frames import Plain

# Differences are made of so many bytes at a time, which stay in the processor's cache.
_PIECE_BYTES = 64 << 10


def split(plain: Plain, width: int, planes: memoryview) -> None:
    """Write the planes one after the other; `planes` has `width` times as many bytes as each is to have.

    Bytes of `plain` that fill no number are left out.
    """
    count = len(planes) // width
    if not count:
        return
    # Twice as fast as copying every fourth byte. Of what is shifted, the lowest byte is kept.
    numbers = np.frombuffer(plain, f"<u{width}", count)
    for plane, out in enumerate(np.frombuffer(planes, np.uint8).reshape(width, count)):
        np.right_shift(numbers, 8 * plane, out=out, casting="unsafe")


def merge(planes: Sequence[Plain], tail: Plain, base: Plain | None = None) -> bytes:
    """The bytes that have these planes, all of one length, and end with `tail`.

    With `base`, the planes are those of what `differ` has written.
    """
    width, count = len(planes), len(planes[0])
    # Bytes cannot be written to, but BytesIO gives away those that it was filled with, without a copy.
    whole = io.BytesIO(bytes(width * count + len(tail)))
    with whole.getbuffer() as plain:
        if count:
            numbers = np.frombuffer(plain, f"<u{width}", count)
            numbers[:] = np.frombuffer(planes[-1], np.uint8)
            for plane in reversed(planes[:-1]):
                numbers <<= 8
                numbers |= np.frombuffer(plane, np.uint8)
            del numbers
        plain[width * count :] = tail
        if base is not None:
            _apply(plain, base, width)
    return whole.getvalue()


def differ(plain: Plain, base: Plain, width: int, out: memoryview) -> None:
    """Write how numbers of `width` bytes differ from those of a base, small differences as small numbers.

    Of what fills no number, bytes are compared. All three have the same length.
    """
    for kind, start, count in _parts(len(plain), width):
        difference = np.frombuffer(out, kind, count, start)
        np.subtract(
            np.frombuffer(plain, kind, count, start), np.frombuffer(base, kind, count, start), out=difference
        )
        # 0, -1, 1, -2, 2, … become 0, 1, 2, 3, 4, …: the high bytes of small differences are zeros.
        signs = difference >> (8 * difference.itemsize - 1)
        np.left_shift(difference, 1, out=difference)
        np.bitwise_xor(difference, signs, out=difference)


def _apply(changes: memoryview, base: Plain, width: int) -> None:
    """Turn what `differ` wrote into the numbers themselves."""
    for kind, start, count in _parts(len(changes), width):
        numbers = np.frombuffer(changes, kind, count, start)
        unsigned = numbers.view(numbers.dtype.str.replace("i", "u"))
        signs = -(numbers & 1)
        np.right_shift(unsigned, 1, out=unsigned)
        np.bitwise_xor(numbers, signs, out=numbers)
        np.add(numbers, np.frombuffer(base, kind, count, start), out=numbers)


def _parts(length: int, width: int) -> Iterator[tuple[str, int, int]]:
    """Kind, first byte and count of the numbers, piece by piece, and of the bytes after them."""
    whole = length // width * width
    for start in range(0, whole, _PIECE_BYTES):
        yield f"<i{width}", start, min(_PIECE_BYTES, whole - start) // width
    if whole < length:
        yield "|i1", whole, length - whole
