"""Bytes of numbers regrouped by what they mean: all first bytes, then all second ones, and so on.

Of a float, the byte with the exponent compresses and the others do not; side by side they hide that. Plane p
of numbers of `width` bytes consists of the bytes p, p + width, p + 2·width… Pure moving of bytes; what is
done with the planes is decided in `codec`, which imports this module only when there are some: nobody else
needs numpy. The interpreter's lock is released in every step.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from replicated.chunk.frames import Plain


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
    """The bytes that have these planes, all of one length, and end with `tail`, XORed with `base`."""
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
            xor(plain, base, plain)
    return whole.getvalue()


def xor(first: Plain, second: Plain, out: memoryview) -> None:
    """Write the XOR of two buffers of the same length, at least one byte, into a third, or one of them."""
    if len(out):
        np.bitwise_xor(_bytes(first), _bytes(second), out=_bytes(out))


def _bytes(buffer: Plain) -> npt.NDArray[np.uint8]:
    return np.frombuffer(buffer, np.uint8)
