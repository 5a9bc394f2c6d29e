"""Buffers: page-aligned, used again, and given back to the system at once."""

import ctypes
import mmap

import pytest

from replicated.buffers import Buffers


def test_buffers_are_aligned_to_pages_and_used_again() -> None:
    buffers = Buffers(1, 5000)
    first = buffers.take()
    address = ctypes.addressof(ctypes.c_char.from_buffer(first))
    assert address % mmap.PAGESIZE == 0
    assert len(first) == 5000
    buffers.give_back(first)
    assert buffers.take() is first


def test_memory_goes_back_when_they_are_closed() -> None:
    buffers = Buffers(2, 1 << 20)
    returned, kept = buffers.take(), buffers.take()
    buffers.give_back(returned)
    buffers.close()
    with pytest.raises(ValueError, match="released"):
        len(returned)
    kept[0] = 1  # whoever did not give it back can still use it
    buffers.close()
