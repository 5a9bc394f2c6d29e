"""Words for people: durations, times, values and names as short, safe, one-line text.

Pure functions without I/O, used by everything that renders for a terminal. What comes from outside (names,
params, paths, commands) goes through `escape` or `format_value` before it is printed, so that it cannot
move the cursor, forge a line or break a table. `--json` never uses this module.
"""

from __future__ import annotations

import json
import math
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, tzinfo

from replicate.phrases import escape, plural
from replicate.records import FileEntry, Value

ELLIPSIS = "…"
#: Significant digits of a float in a table.
SHORT_DIGITS = 5
#: Floats of 100,000 and more keep this many digits before they turn to an exponent.
LONG_DIGITS = 10
#: Longest text of a param in a table on a terminal.
MAX_CELL_VALUE = 20


def display_width(text: str) -> int:
    """How many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    return sum(_character_width(character) for character in text)


def _character_width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shorten(text: str, width: int) -> str:
    """The text in at most `width` columns, its end cut and marked with an ellipsis if need be."""
    if display_width(text) <= width:
        return text
    kept, used = "", 0
    for character in text:
        used += _character_width(character)
        if used > width - 1:
            break
        kept += character
    return kept.rstrip() + ELLIPSIS


def pad(text: str, width: int, *, right: bool = False) -> str:
    """The text filled with spaces to `width` columns, at its left side if it is aligned to the right."""
    filling = " " * max(0, width - display_width(text))
    return filling + text if right else text + filling


def count_equal(texts: Iterable[str]) -> str:
    """The texts in a row, equal ones counted: `8 × H100, A100`."""
    counts = Counter(texts)
    return ", ".join(f"{count} × {text}" if count > 1 else text for text, count in counts.items())


def format_duration(duration_s: float) -> str:
    """A duration in its two largest units: `0.4s`, `45s`, `2m 10s`, `3h 5m`, `2d 4h`."""
    if duration_s < 9.95:
        return f"{max(0.0, duration_s):.1f}s"
    seconds = round(duration_s)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}m {seconds}s" if seconds else f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h {minutes}m" if minutes else f"{hours}h"
    days, hours = divmod(hours, 24)
    return f"{days}d {hours}h" if hours else f"{days}d"


def format_age(time: datetime, now: datetime, zone: tzinfo | None, *, brief: bool = False) -> str:
    """How long ago a time was (`2 minutes ago`, brief: `2m ago`), or its date if older than 30 days."""
    elapsed = now - time
    if elapsed < -timedelta(minutes=1) or elapsed >= timedelta(days=30):
        return time.astimezone(zone).strftime("%Y-%m-%d")
    seconds = int(elapsed.total_seconds())
    if seconds < 5:  # also a clock of another machine that is a little fast
        return "now" if brief else "just now"
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    unit, unit_s = next(pair for pair in units if seconds >= pair[1])
    return f"{seconds // unit_s}{unit[0]} ago" if brief else f"{plural(seconds // unit_s, unit)} ago"


def format_moment(time: datetime, zone: tzinfo | None) -> str:
    """A time with its zone: `Mon, 23 Nov 2026 05:30:00 UTC`, in English whatever the locale."""
    local = time.astimezone(zone)
    day = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[local.weekday()]
    months = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
    return f"{day}, {local:%d} {months[local.month - 1]} {local:%Y %H:%M:%S %Z}".rstrip()


def format_value(value: Value) -> str:
    """A param or metric in full, on one line: text bare, floats in the shortest exact form, else as JSON."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, float):
        return _format_float(value, repr)
    return escape(_to_json(value))


def format_value_short(value: Value, *, cut: bool = True) -> str:
    """A param or metric for a cell of a table: floats with five digits, long text cut if `cut`."""
    if isinstance(value, float):
        digits = LONG_DIGITS if 10**SHORT_DIGITS <= abs(value) < 10**LONG_DIGITS else SHORT_DIGITS
        return _format_float(value, lambda number: f"{number:.{digits}g}")
    text = format_value(value)
    if cut and not isinstance(value, (int, type(None))):
        return shorten(text, MAX_CELL_VALUE)
    return text


def format_name(name: str) -> str:
    """The name of a param or metric, in quotes when it is empty."""
    return escape(name) or '""'


def format_shell_word(text: str) -> str:
    """A word to be pasted into a shell: quoted if need be, and as `$'…'` if it holds unsafe characters."""
    if escape(text) == text:
        return shlex.quote(text)
    return "$'" + "".join(_shell_character(character) for character in text) + "'"


def _shell_character(character: str) -> str:
    if character in "\\'":
        return "\\" + character
    if escape(character) == character:
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode(errors="surrogateescape"))


def format_share(part: float, whole: float) -> str:
    """A part of a whole in percent, never rounded to nothing or all: `0%`, `<1%`, `42%`, `>99%`, or `-`."""
    if not whole:
        return "-"
    share = part / whole
    if 0 < share < 0.01:
        return "<1%"
    if 0.99 < share < 1:
        return ">99%"
    return f"{min(share, -0.01) if share < 0 else share:.0%}"


def format_mode(entry: FileEntry) -> str:
    """Type and permissions as `ls -l` writes them, for example `-rw-r--r--`."""
    kind = {"file": "-", "directory": "d", "symlink": "l"}[entry.type]
    letters = "".join(
        letter if entry.mode >> (8 - position) & 1 else "-" for position, letter in enumerate("rwxrwxrwx")
    )
    return kind + letters


def _format_float(number: float, write: Callable[[float], str]) -> str:
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "inf" if number > 0 else "-inf"
    return write(number)


def _to_json(value: Value) -> str:
    # NaN and Infinity are left as Python writes them: this text is for people.
    return json.dumps(value, ensure_ascii=False)
