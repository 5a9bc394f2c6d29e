"""Measured values beside their limit or peer, and how they are shown: medians, spreads, ratios, verdicts."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """How a value is judged: what is computed from it and its limit or peer, and how that is written."""

    of: Callable[[float, float], float]
    write: Callable[[float], str]
    is_at_most: bool = True
    #: Of the value itself, whatever is beside it; the value is written so as well.
    is_alone: bool = False


def _times(ratio: float) -> str:
    return f"{ratio:.2f} ×" if ratio < 10 else f"{ratio:,.0f} ×"


SHARE = Relation(
    lambda value, other: value / other, lambda ratio: f"{ratio:.1%}" if ratio < 1 else f"{ratio:,.0%}"
)
TIMES = Relation(lambda value, other: value / other, _times)
FASTER = Relation(lambda value, other: other / value, _times, is_at_most=False)
#: Of rates: more is better.
SPEED = Relation(lambda value, other: value / other, _times, is_at_most=False)
SLOWER = Relation(lambda value, other: value / other - 1, lambda ratio: f"{ratio:+.1%}")


def format_seconds(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s"


def format_bytes(size: float) -> str:
    return f"{size / (1 << 20):.0f} MiB" if size < 1 << 30 else f"{size / (1 << 30):.3g} GiB"


def format_megabytes(size: float) -> str:
    """For sizes that are told in powers of ten, as those of data sets and of other tools are."""
    digits = 2 if size < 1e7 else 1 if size < 1e8 else 0
    return f"{size / 1e6:,.{digits}f} MB"


def format_rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def format_count(count: float) -> str:
    return f"{count:,.0f}"


def _itself(value: float, _: float) -> float:
    return value


SECONDS = Relation(_itself, format_seconds, is_alone=True)
BYTES = Relation(_itself, format_bytes, is_alone=True)
MEGABYTES = Relation(_itself, format_megabytes, is_alone=True)
COUNT = Relation(_itself, format_count, is_alone=True)
RATE = Relation(_itself, format_rate, is_at_most=False, is_alone=True)


@dataclass(frozen=True)
class Figure:
    """One line of the table. Values and others that are as many were taken in the same rounds."""

    case: str
    values: Sequence[float]
    relation: Relation = SECONDS
    #: What it is held against: the limit, or a peer.
    beside: str = ""
    others: Sequence[float] = ()
    #: What the relation is to be at most (or at least); None: nothing is demanded.
    target: float | None = None
    #: How values are written that are related to others.
    unit: Callable[[float], str] = format_seconds

    @property
    def ratio(self) -> float:
        """The relation in the middle of the rounds; that of the medians when they were not taken in pairs."""
        if len(self.values) == len(self.others):
            pairs = zip(self.values, self.others, strict=True)
            return statistics.median(self.relation.of(value, other) for value, other in pairs)
        other = statistics.median(self.others) if self.others else 0.0
        return self.relation.of(statistics.median(self.values), other)

    @property
    def verdict(self) -> str:
        """Whether the target is met; empty when there is none."""
        if self.target is None:
            return ""
        is_met = self.ratio <= self.target if self.relation.is_at_most else self.ratio >= self.target
        return "meets" if is_met else "misses"

    def cells(self) -> tuple[str, ...]:
        """As `HEADER` has them."""
        sign = "≤" if self.relation.is_at_most else "≥"
        return (
            self.case,
            *self._written(self.values),
            self.beside,
            *self._written(self.others),
            "" if self.relation.is_alone else self.relation.write(self.ratio),
            "" if self.target is None else f"{sign} {self.relation.write(self.target)}",
            self.verdict,
        )

    def raw(self) -> dict[str, object]:
        """Everything about it, for JSON."""
        return {
            "case": self.case,
            "values": list(self.values),
            "beside": self.beside,
            "others": list(self.others),
            "ratio": self.ratio,
            "target": self.target,
            "verdict": self.verdict,
        }

    def _written(self, values: Sequence[float]) -> tuple[str, str]:
        if not values:
            return "", ""
        write = self.relation.write if self.relation.is_alone else self.unit
        spread = f"{write(min(values))} – {write(max(values))}" if len(values) > 1 else ""
        return write(statistics.median(values)), spread


HEADER = ("case", "median", "min – max", "beside", "median", "min – max", "ratio", "target", "")
#: Of the columns; the text is to the left, the numbers to the right.
_WIDTHS = (54, 9, 21, 21, 9, 21, 8, 11, 6)
_IS_TEXT = (True, False, False, True, False, False, False, False, True)


def format_table(figures: Iterable[Figure], *, with_header: bool) -> str:
    rows = [HEADER] if with_header else []
    rows += [figure.cells() for figure in figures]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if is_text else cell.rjust(width)
            for cell, width, is_text in zip(row, _WIDTHS, _IS_TEXT, strict=True)
        ).rstrip()
        for row in rows
    )
