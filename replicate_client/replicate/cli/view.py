"""For whom something is rendered: the width, the colours, the clock and the time zone.

Renderers are pure functions of records and a `View`; only `Console` makes one from the real terminal.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone, tzinfo

from replicate.cli.damage import is_damaged
from replicate.cli.text import shorten
from replicate.phrases import escape
from replicate.records import CheckpointRecord, ExperimentSummary, Status

#: Longest reason of a failure in a table.
MAX_REASON = 40

_CODES = {"bold": "1", "faint": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_STATUS_STYLES = {"running": "green", "failed": "red", "killed": "red", "unknown": "yellow"}


@dataclass(frozen=True, slots=True)
class View:
    """How to render."""

    now: datetime
    #: Columns of the terminal; None when the output is no terminal: then nothing is cut.
    width: int | None = None
    color: bool = False
    #: None: the local one.
    zone: tzinfo | None = timezone.utc

    @property
    def is_terminal(self) -> bool:
        """Whether somebody is looking, so that long things are shortened."""
        return self.width is not None

    def paint(self, text: str, style: str) -> str:
        """The text in a style (a name, or empty), when colours are wanted; the words must do without."""
        if not self.color or not style or not text:
            return text
        return f"\x1b[{_CODES[style]}m{text}\x1b[0m"

    def heading(self, text: str) -> str:
        """The title of a section."""
        return self.paint(text, "bold")


def status_style(status: Status) -> str:
    """The colour of an experiment's status."""
    return _STATUS_STYLES.get(status, "")


def state_note(listed: ExperimentSummary | CheckpointRecord) -> str:
    """What to add in a table to what is not in the repository, as safe text; empty when it is.

    A long reason is cut, whoever looks: it would make every row of the table as long. `show` has it whole.
    """
    if listed.state == "stored":
        return ""
    if listed.state == "captured":
        return "storing…"
    if is_damaged(listed):
        return "damaged"
    return f"failed: {shorten(escape(listed.error), MAX_REASON)}" if listed.error else "failed"
