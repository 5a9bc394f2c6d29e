"""Blocks of `Label:  value` lines under a heading, as `show`, `status` and `doctor` print them."""

from __future__ import annotations

from collections.abc import Sequence

from replicate.cli.text import display_width, pad
from replicate.cli.view import View

_MAX_LABEL_WIDTH = 30


def render_fields(fields: Sequence[tuple[str, str]], *, empty: str = "(none)") -> str:
    """The fields with their values aligned; safe text is expected. Fields without a value are left out."""
    shown = [(label, value) for label, value in fields if value]
    if not shown:
        return f"{empty}\n" if empty else ""
    width = min(_MAX_LABEL_WIDTH, max(display_width(label) for label, _ in shown)) + 1
    return "".join(f"{pad(label + ':', width)}  {value}\n" for label, value in shown)


def render_section(title: str, body: str, view: View) -> str:
    """A heading with what belongs to it, after a blank line."""
    return f"\n{view.heading(title)}\n{body}"
