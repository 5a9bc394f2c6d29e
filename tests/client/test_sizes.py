"""Sizes and rates as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate.phrases import format_size
from replicate.sizes import MAX_BYTES, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("1000000", 10**6),
        ("20GB", 20 * 10**9),
        ("20 GB", 20 * 10**9),
        ("20g", 20 * 10**9),
        ("512MiB", 512 << 20),
        ("512Mi", 512 << 20),
        ("1.5 kb", 1500),
        (".5k", 500),
        ("0.1TB", 10**11),
        ("64 b", 64),
        (" 7 ", 7),
    ],
)
def test_sizes_are_understood(text, size_bytes):
    assert parse_size(text) == size_bytes
    assert parse_rate(text) == parse_rate(text + "/s") == parse_rate(text + " /s") == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "1e9", "0x10", "1 GBB", "1i", "iB", "20GB/h", "1,5GB", "٣GB", "∞", "1 1"]
)
def test_other_words_are_refused_by_what_would_do(text):
    with pytest.raises(ValueError, match=r"not a size such as 20GB, 512MiB or 1000000: ") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
    with pytest.raises(ValueError, match=r"not a rate such as 50MB/s or 1000000: ") as caught:
        parse_rate(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["0", "0.0GB", "0.4", "9999EB"])
def test_sizes_out_of_range_are_refused(text):
    with pytest.raises(ValueError, match="must be from 1 byte to"):
        parse_size(text)
    with pytest.raises(ValueError, match="must be from 1 byte to"):
        parse_rate(text + "/s")


@given(st.integers(1, MAX_BYTES))
def test_every_size_is_its_own_text(size_bytes):
    assert parse_size(str(size_bytes)) == size_bytes


@given(st.integers(0, 2**50))
def test_sizes_that_we_write_are_understood(size_bytes):
    text = format_size(size_bytes + 1)
    assert abs(parse_size(text) - size_bytes) <= size_bytes * 0.06 + 1


@given(st.text())
def test_any_text_is_a_size_or_refused(text):
    try:
        assert 1 <= parse_size(text) <= MAX_BYTES
    except ValueError:
        pass
