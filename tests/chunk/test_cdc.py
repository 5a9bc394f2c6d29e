"""Cut points: the same for ever, the same however a file is looked at."""

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyfastcdc import FastCDC

from replicated.chunk.cdc import (
    TEXT_SAMPLE_BYTES,
    ChunkerParameters,
    ChunkSizes,
    Cutter,
    is_text,
)

PARAMETERS = ChunkerParameters()
SMALL = ChunkSizes(64, 256, 1024)

# Number of chunks, the first lengths, and the hash of all lengths.
TEXT_GOLDEN = (
    228,
    [80557, 51618, 104086, 68478, 82514],
    "378bb22466473cebbb21175089930226fef87868e98c3eeb800e2253921ce8b3",
)
BINARY_GOLDEN = (
    55,
    [318298, 375826, 340596, 626476, 407464],
    "f4df9b301be17cb3c851e31795d2104b091c5ae8fafeafbda1f9658fe0e4cfc7",
)


def cut(data: bytes, sizes: ChunkSizes, window_bytes: int = 8 << 20) -> list[int]:
    cutter = Cutter(sizes)
    found: list[int] = []
    start = 0
    while start < len(data):
        window = memoryview(data)[start : start + window_bytes]
        lengths = cutter.cut(window, is_last=start + len(window) == len(data))
        assert lengths, "it would never end"
        start += sum(lengths)
        found += lengths
    return found


def fingerprint(lengths: list[int]) -> str:
    return hashlib.sha256(",".join(map(str, lengths)).encode()).hexdigest()


def test_cut_points_never_change() -> None:
    """Other cut points would make every repository store its files anew."""
    data = hashlib.shake_128(b"replicate").digest(16 << 20)
    text, binary = cut(data, PARAMETERS.text), cut(data, PARAMETERS.binary)
    assert (len(text), text[:5]) == TEXT_GOLDEN[:2]
    assert (len(binary), binary[:5]) == BINARY_GOLDEN[:2]
    assert fingerprint(text) == TEXT_GOLDEN[2]
    assert fingerprint(binary) == BINARY_GOLDEN[2]


def test_default_parameters_never_change() -> None:
    assert (
        ChunkerParameters(
            whole_below=262144,
            text=ChunkSizes(16384, 65536, 262144),
            binary=ChunkSizes(65536, 262144, 1048576),
        )
        == ChunkerParameters()
    )
    assert PARAMETERS.is_valid()


@given(
    st.integers(0, 40000),
    st.integers(0, 2**32),
    st.sampled_from([1, 2, 256]),
    st.integers(SMALL.maximum + 1, 10 * SMALL.maximum),
)
def test_windows_of_any_size_cut_as_one_pass_over_the_whole_does(
    length: int, seed: int, variety: int, window_bytes: int
) -> None:
    data = bytes(random.Random(seed).choices(range(variety), k=length))
    lengths = cut(data, SMALL, window_bytes)
    assert sum(lengths) == length
    assert all(SMALL.minimum <= part <= SMALL.maximum for part in lengths[:-1])
    assert lengths == _one_pass(data)


def _one_pass(data: bytes) -> list[int]:
    cutter = FastCDC(256, min_size=64, max_size=1024, normalized_chunking=2, seed=0)
    return [chunk.length for chunk in cutter.cut_buf(data)]


def test_insertion_changes_few_chunks() -> None:
    data = random.Random(1).randbytes(4 << 20)
    changed = data[: 1 << 20] + b"inserted" + data[1 << 20 :]

    def chunks(content: bytes) -> set[bytes]:
        position, found = 0, set()
        for length in cut(content, PARAMETERS.text):
            found.add(content[position : position + length])
            position += length
        return found

    assert len(chunks(changed) - chunks(data)) <= 3


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"", True),
        (b'{"a": 1}\n' * 100, True),
        ("Grüße, 世界\n".encode() * 50, True),
        (b"a\tb\r\n\x1b[0m\x0c" * 10, True),
        (b"text but \0 one zero byte" + b"x" * 8000, False),
        (bytes(range(1, 32)) * 10, False),
        (b"x" * 990 + b"\x01" * 9, True),
        (b"x" * 890 + b"\x01" * 10, False),
        (b"\x80\x02}q\x00", False),
        (bytes(TEXT_SAMPLE_BYTES), False),
    ],
)
def test_text_is_told_from_binary_data(head: bytes, expected: bool) -> None:
    assert is_text(head) is expected
    assert PARAMETERS.sizes_for(head) == (PARAMETERS.text if expected else PARAMETERS.binary)


@pytest.mark.parametrize(
    "sizes",
    [ChunkSizes(63, 256, 1024), ChunkSizes(64, 255, 1024), ChunkSizes(64, 256, 1023),
     ChunkSizes(512, 256, 1024), ChunkSizes(64, 4096, 1024), ChunkSizes(64, 256, (16 << 20) + 1)],
)  # fmt: skip
def test_impossible_sizes_are_invalid(sizes: ChunkSizes) -> None:
    assert not sizes.is_valid()
    assert not ChunkerParameters(text=sizes).is_valid()
