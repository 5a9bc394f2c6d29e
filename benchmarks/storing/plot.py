"""A drawing of seconds by number of files, as SVG; both axes are logarithmic: linear growth has slope one."""

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 640, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 120, 40, 50
#: Readable for those who see no red and green as well; ours first.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def draw_growth(lines: Mapping[str, Sequence[tuple[int, float]]], title: str) -> str:
    """The text of an SVG file; each line is points of (files, seconds)."""
    counts = [count for points in lines.values() for count, _ in points]
    seconds = [value for points in lines.values() for _, value in points]
    axis_x = _Axis(min(counts), max(counts), _LEFT, _WIDTH - _RIGHT)
    axis_y = _Axis(min(seconds), max(seconds), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, _TOP - 16, title, size=14),
    ]
    for count in sorted(set(counts)):
        x = axis_x.place(count)
        parts += [
            _line([(x, _TOP), (x, _HEIGHT - _BOTTOM)], "#dddddd", 1),
            _text(x, _HEIGHT - _BOTTOM + 18, f"{count:,}", anchor="middle"),
        ]
    for value in axis_y.decades():
        y = axis_y.place(value)
        parts += [
            _line([(_LEFT, y), (_WIDTH - _RIGHT, y)], "#dddddd", 1),
            _text(_LEFT - 8, y + 4, f"{value:g} s", anchor="end"),
        ]
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, "files", anchor="middle"))
    labels: list[float] = []
    for (name, points), colour in zip(lines.items(), _COLOURS, strict=False):
        placed = [(axis_x.place(count), axis_y.place(value)) for count, value in points]
        parts.append(_line(placed, colour, 2.5))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in placed]
        x, y = placed[-1]
        while any(abs(y - label) < 14 for label in labels):
            y += 14  # names of lines that end close to each other stand below each other
        labels.append(y)
        parts.append(_text(x + 10, y + 4, f"{name}, {points[-1][1]:.3g} s", colour=colour))
    return "\n".join((*parts, "</svg>", ""))


class _Axis:
    """A logarithmic axis over whole decades, from one coordinate to another."""

    def __init__(self, smallest: float, largest: float, begin: float, end: float) -> None:
        self._low = math.floor(math.log10(smallest))
        self._high = max(math.ceil(math.log10(largest)), self._low + 1)
        self._begin, self._end = begin, end

    def decades(self) -> list[float]:
        return [10.0**power for power in range(self._low, self._high + 1)]

    def place(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return self._begin + share * (self._end - self._begin)


def _line(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, colour: str = "#222222"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">'
        f"{escape(text)}</text>"
    )
