"""Tables of aligned columns, in which a cell may have several lines.

Pure layout: cells hold safe text (see `phrases.escape`). With a width, the widest columns that may shrink
give way until the table fits; without one nothing is ever cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from replicate.cli.text import display_width, pad, shorten
from replicate.cli.view import View

_GAP = "  "


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, and how the column is laid out."""

    heading: str
    right: bool = False
    #: To which width its text may be cut when the table is too wide; None: not at all.
    shrinks_to: int | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """Text of one or more lines (separated by newlines), all in one style."""

    text: str
    style: str = ""

    @property
    def lines(self) -> list[str]:
        """The lines of the cell, at least one."""
        return self.text.split("\n")


def render_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], view: View) -> str:
    """The table, each line ended by a newline; rows of several lines are set apart by blank lines."""
    natural = [column_width(column, [row[i] for row in rows]) for i, column in enumerate(columns)]
    widths = _fit(columns, natural, view.width)
    blocks = [[_render_line(columns, [Cell(column.heading, "bold") for column in columns], widths, 0, view)]]
    for row in rows:
        height = max(len(cell.lines) for cell in row)
        blocks.append([_render_line(columns, row, widths, line, view) for line in range(height)])
    if any(len(block) > 1 for block in blocks):
        blocks = [[*block, ""] for block in blocks[:-1]] + blocks[-1:]
        blocks[0].pop()  # no blank line below the heading
    return "".join(f"{line}\n" for block in blocks for line in block)


def column_width(column: Column, cells: Sequence[Cell]) -> int:
    """How wide a column is when nothing is cut."""
    lines = (display_width(line) for cell in cells for line in cell.lines)
    return max(display_width(column.heading), max(lines, default=0))


def table_width(widths: Sequence[int]) -> int:
    """How wide a table of columns of these widths is."""
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _render_line(
    columns: Sequence[Column], row: Sequence[Cell], widths: Sequence[int], line: int, view: View
) -> str:
    """One line of a row; cells that have no such line are blank."""
    parts = []
    for column, cell, width in zip(columns, row, widths, strict=True):
        text = shorten(cell.lines[line], width) if line < len(cell.lines) else ""
        blank = pad("", width - display_width(text))
        painted = view.paint(text, cell.style)
        parts.append(blank + painted if column.right else painted + blank)
    return _GAP.join(parts).rstrip()


def _fit(columns: Sequence[Column], natural: Sequence[int], width: int | None) -> list[int]:
    """Widths of the columns, taken one by one from the widest shrinkable column until all fit."""
    widths = list(natural)
    if width is None:
        return widths
    floors = [
        own if column.shrinks_to is None else min(own, max(column.shrinks_to, display_width(column.heading)))
        for column, own in zip(columns, natural, strict=True)
    ]
    for _ in range(table_width(widths) - width):
        index = max(range(len(widths)), key=lambda i: widths[i] if widths[i] > floors[i] else -1)
        if widths[index] <= floors[index]:
            break  # a very narrow terminal: better a long line than no content
        widths[index] -= 1
    return widths
