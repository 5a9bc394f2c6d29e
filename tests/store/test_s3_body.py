"""Bodies on their way out: whole, in pieces, again and again."""

import base64
import zlib

from hypothesis import given
from hypothesis import strategies as st

from replicated.store.s3 import body as body_module
from replicated.store.s3.body import PIECE_BYTES, Body


def read_all(body):
    pieces = []
    while piece := body.read(16384):
        pieces.append(bytes(piece))
    return b"".join(pieces)


@given(st.lists(st.binary(max_size=40)), st.integers(1, 30), st.data())
def test_what_is_read_is_what_the_parts_hold_from_any_place(parts, piece_bytes, data):
    whole = b"".join(parts)
    saved, body_module.PIECE_BYTES = body_module.PIECE_BYTES, piece_bytes
    try:
        body = Body([bytearray(part) for part in parts])
        assert len(body) == body.size == len(whole)
        assert read_all(body) == whole
        assert body.tell() == len(whole)
        start = data.draw(st.integers(0, len(whole)))
        assert body.seek(start) == start
        assert read_all(body) == whole[start:]
        assert body.seek(0, 2) == len(whole)
        body.seek(start)
        assert body.read() == whole[start:]
        assert body.whole() == whole
        assert base64.b64decode(body.crc32()) == zlib.crc32(whole).to_bytes(4, "big")
        end = data.draw(st.integers(start, len(whole)))
        assert body.is_at(start, whole[start:end])
        if end > start:
            other = bytearray(whole[start:end])
            other[data.draw(st.integers(0, len(other) - 1))] ^= 0xFF
            assert not body.is_at(start, bytes(other))
        assert not body.is_at(start, whole[start:] + b"x")
    finally:
        body_module.PIECE_BYTES = saved


def test_large_parts_are_not_copied():
    part = bytearray(3 * PIECE_BYTES + 1)
    body = Body([part])
    pieces = []
    while piece := body.read(1):
        pieces.append(piece)
    assert [len(piece) for piece in pieces] == [PIECE_BYTES] * 3 + [1]
    assert all(isinstance(piece, memoryview) and piece.obj is part for piece in pieces)
