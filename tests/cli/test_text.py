import os
import subprocess
from datetime import datetime, timedelta, timezone

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from replicate.cli.text import (
    count_equal,
    display_width,
    format_age,
    format_duration,
    format_mode,
    format_moment,
    format_name,
    format_share,
    format_shell_word,
    format_value,
    format_value_short,
    pad,
    shorten,
)
from replicate.phrases import escape, format_size, plural
from replicate.records import FileEntry


@given(st.text(st.characters(codec=None)))
@example("\x1b[2J\x9b31m\r\n\t\x7f\u2028\u202e")
def test_escaped_text_is_printable_on_one_line(text):
    escaped = escape(text)
    assert len(escaped.splitlines()) <= 1
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in escaped)
    escaped.encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("résumé 実験", "résumé 実験"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x1b[31mred", "\\x1b[31mred"),
        (b"\xff\xfe".decode(errors="surrogateescape"), "\\xff\\xfe"),
        ("\u202etxt", "\\u202etxt"),
        ("C:\\n", "C:\\n"),
    ],
)
def test_escape(text, expected):
    assert escape(text) == expected


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])), st.integers(1, 30))
def test_shortened_text_fits(text, width):
    assert display_width(shorten(text, width)) <= width


def test_text_that_fits_is_not_shortened():
    assert shorten("12345", 5) == "12345"
    assert shorten("123456", 5) == "1234…"


def test_wide_characters_take_two_columns():
    assert display_width("実験") == 4
    assert pad("実験", 6) + "|" == "実験  |"
    assert pad("7", 3, right=True) == "  7"


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (3 * 1024**3, "3.0 GiB"),
        (1024**7, "1024.0 EiB"),
    ],
)
def test_format_size(size, expected):
    assert format_size(size) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-1, "0.0s"),
        (0.44, "0.4s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (60, "1m"),
        (131, "2m 11s"),
        (3600, "1h"),
        (11100, "3h 5m"),
        (187200, "2d 4h"),
    ],
)
def test_format_duration(seconds, expected):
    assert format_duration(seconds) == expected


@pytest.mark.parametrize(
    ("ago", "expected", "brief"),
    [
        (timedelta(seconds=-30), "just now", "now"),
        (timedelta(seconds=4), "just now", "now"),
        (timedelta(seconds=5), "5 seconds ago", "5s ago"),
        (timedelta(seconds=60), "1 minute ago", "1m ago"),
        (timedelta(minutes=59, seconds=59), "59 minutes ago", "59m ago"),
        (timedelta(hours=1), "1 hour ago", "1h ago"),
        (timedelta(days=29), "29 days ago", "29d ago"),
        (timedelta(days=30), "2026-10-24", "2026-10-24"),
        (timedelta(hours=-2), "2026-11-23", "2026-11-23"),
    ],
)
def test_format_age(now, ago, expected, brief):
    assert format_age(now - ago, now, timezone.utc) == expected
    assert format_age(now - ago, now, timezone.utc, brief=True) == brief


def test_an_empty_name_is_visible():
    assert [format_name(name) for name in ("lr", "", "\x1b[2J")] == ["lr", '""', "\\x1b[2J"]


def test_a_shell_word_is_read_by_a_shell_as_the_text_and_cannot_act_on_the_terminal():
    names = [b"plain", b"a b", b"it's \\ $x", b"\xff'\\", "重み\n\x1b[2J\u0085\u202e'".encode(), b"~", b""]
    texts = [os.fsdecode(name) for name in names]
    words = [format_shell_word(text) for text in texts]
    assert words[0] == "plain" and all(escape(word) == word for word in words)
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {' '.join(words)}"], capture_output=True, check=True
    ).stdout
    assert printed.split(b"\0")[:-1] == names


def test_a_moment_has_its_zone():
    time = datetime(2026, 11, 3, 4, 5, 6, tzinfo=timezone.utc)
    assert format_moment(time, timezone.utc) == "Tue, 03 Nov 2026 04:05:06 UTC"
    assert format_moment(time, timezone(timedelta(hours=9), "JST")) == "Tue, 03 Nov 2026 13:05:06 JST"


@pytest.mark.parametrize(
    ("value", "full", "short"),
    [
        (None, "null", "null"),
        (True, "true", "true"),
        (12345678, "12345678", "12345678"),
        (10**30, "1" + "0" * 30, "1" + "0" * 30),
        (0.1, "0.1", "0.1"),
        (1 / 3, "0.3333333333333333", "0.33333"),
        (1e-9, "1e-09", "1e-09"),
        (123456.789, "123456.789", "123456.789"),
        (1e300, "1e+300", "1e+300"),
        (float("nan"), "NaN", "NaN"),
        (float("inf"), "inf", "inf"),
        (float("-inf"), "-inf", "-inf"),
        ("adam", "adam", "adam"),
        ("x" * 30, "x" * 30, "x" * 19 + "…"),
        ("a\nb", "a\\nb", "a\\nb"),
        ([1, 2.5, {"a": None}], '[1, 2.5, {"a": null}]', '[1, 2.5, {"a": null…'),
        ([], "[]", "[]"),
    ],
)
def test_format_value(value, full, short):
    assert format_value(value) == full
    assert format_value_short(value) == short


def test_values_are_cut_only_on_request():
    assert format_value_short("x" * 30, cut=False) == "x" * 30


@pytest.mark.parametrize(
    ("kind", "mode", "expected"),
    [("file", 0o644, "-rw-r--r--"), ("directory", 0o755, "drwxr-xr-x"), ("symlink", 0o777, "lrwxrwxrwx")],
)
def test_format_mode(kind, mode, expected):
    assert format_mode(FileEntry("x", kind, mode, 0, 0, "")) == expected


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [
        (0, 0, "-"),
        (0, 5, "0%"),
        (1, 10**6, "<1%"),
        (1, 100, "1%"),
        (42, 100, "42%"),
        (99, 100, "99%"),
        (999, 1000, ">99%"),
        (5, 5, "100%"),
        (-1, 10**6, "-1%"),
        (-7, 5, "-140%"),
    ],
)
def test_a_share_is_never_rounded_to_nothing_or_all(part, whole, expected):
    assert format_share(part, whole) == expected


def test_counting_words():
    assert plural(1, "file") == "1 file"
    assert plural(1200, "file") == "1,200 files"
    assert count_equal(["H100", "H100", "A100"]) == "2 × H100, A100"
