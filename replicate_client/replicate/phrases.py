"""Numbers and names as short, safe text for the lines that people read. Pure functions."""

from __future__ import annotations

import re

# C0, DEL and C1 controls, line and paragraph separators, marks that reverse the direction of text, and
# surrogates (bytes of a file name that are not UTF-8).
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_SIZE_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def escape(text: str) -> str:
    """The text on one line, with whatever could act on a terminal written as `\\n`, `\\x1b` and the like.

    A byte that is not UTF-8 (in a path) is written as that byte, `\\xff`.
    """
    return _UNSAFE.sub(lambda match: _escape_character(match[0]), text)


def is_text(text: str) -> bool:
    """Whether the text can be written as UTF-8; a path with bytes that are not cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escape_character(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # how Python carries an undecodable byte
        return f"\\x{number - 0xDC00:02x}"
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def plural(count: int, singular: str, many: str | None = None) -> str:
    """A count with its noun: `1 file`, `1,200 files`."""
    return f"{count:,} {singular if count == 1 else many or singular + 's'}"


def format_size(size_bytes: float) -> str:
    """A size in the unit in which it has one to three digits before the point: `12 B`, `1.5 MiB`."""
    if abs(size_bytes) < 1024:
        return f"{size_bytes:.0f} B"
    exponent = 1
    while abs(size_bytes) / 1024**exponent >= 1023.95 and exponent < len(_SIZE_UNITS):
        exponent += 1
    return f"{size_bytes / 1024**exponent:.1f} {_SIZE_UNITS[exponent - 1]}"
