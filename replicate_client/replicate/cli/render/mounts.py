"""The table of `mounts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from replicate.cli.table import Cell, Column, render_table
from replicate.cli.view import View
from replicate.ids import short
from replicate.phrases import escape

if TYPE_CHECKING:
    from replicate.query import MountInfo


def render_mounts(mounts: Sequence[MountInfo], view: View) -> str:
    """What is mounted where, and by which process."""
    columns = [
        Column("ID"),
        Column("DIRECTORY"),
        Column("PID", right=True),
        Column("REPOSITORY", shrinks_to=12),
    ]
    rows = [
        [
            Cell(short(mount.id) if mount.id else "(all)", "cyan"),
            Cell(escape(mount.directory)),
            Cell(str(mount.pid)),
            Cell(escape(mount.repository)),
        ]
        for mount in mounts
    ]
    return render_table(columns, rows, view)
