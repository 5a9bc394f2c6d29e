"""The text and the JSON of mounts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from replicate.cli.json_output import Json, path_json
from replicate.cli.table import Cell, Column, render_table
from replicate.cli.view import View
from replicate.ids import short
from replicate.phrases import escape, format_size

if TYPE_CHECKING:
    from replicate.mounts import MountInfo, PrefetchProgress


def render_mounts(mounts: Sequence[MountInfo], view: View) -> str:
    """What is mounted where, by what; below it what is wrong with those that cannot be used, or are slow."""
    columns = [
        Column("ID"),
        Column("DIRECTORY"),
        Column("PID", right=True),
        Column("ENGINE"),
        Column("STATE"),
        Column("REPOSITORY", shrinks_to=12),
    ]
    rows = [
        [
            Cell(short(mount.id) if mount.id else "(all)", "cyan"),
            Cell(escape(mount.directory)),
            Cell(str(mount.pid) if mount.pid else "-"),
            Cell(_describe_engine(mount)),
            Cell(*_describe_state(mount)),
            Cell(escape(mount.repository)),
        ]
        for mount in mounts
    ]
    remarks = [
        f"{escape(mount.directory)}: {escape(remark)}\n" for mount in mounts for remark in _remarks(mount)
    ]
    return render_table(columns, rows, view) + ("\n" + "".join(remarks) if remarks else "")


def mount_json(mount: MountInfo) -> dict[str, Json]:
    """The public form of a mount."""
    progress = mount.prefetch
    return {
        "id": mount.id or None,
        **path_json("directory", mount.directory),
        "pid": mount.pid or None,
        "experiment_id": mount.experiment_id or None,
        "repository": mount.repository,
        "engine": mount.engine or None,
        "passthrough": mount.passthrough,
        "reason": mount.engine_reason or None,
        "persist": mount.persist,
        "restarts": mount.restarts,
        "error": mount.error or None,
        "given_up": mount.is_given_up,
        "prefetch": {
            "files_done": progress.files_done,
            "files_total": progress.files_total,
            "bytes_done": progress.bytes_done,
            "bytes_total": progress.bytes_total,
            "finished": progress.is_finished,
            "error": progress.error or None,
        }
        if progress is not None
        else None,
    }


def _describe_engine(mount: MountInfo) -> str:
    return f"{mount.engine}+passthrough" if mount.passthrough else mount.engine or "-"


def _describe_state(mount: MountInfo) -> tuple[str, str]:
    """In a few words, and their colour."""
    if mount.error:
        return ("given up", "red") if mount.is_given_up else ("not mounted", "yellow")
    words = []
    if mount.prefetch is not None:
        words.append(_describe_progress(mount.prefetch))
    if mount.restarts:
        words.append(f"restarted {mount.restarts}x")
    if mount.persist:
        words.append("persistent")
    return ", ".join(words) or "ready", ""


def _describe_progress(progress: PrefetchProgress) -> str:
    if progress.is_finished:
        return "warm" if not progress.error else f"warm up to {format_size(progress.bytes_done)}"
    if not progress.bytes_total:
        return "warming"
    return f"warming {progress.bytes_done / progress.bytes_total:.0%}"


def _remarks(mount: MountInfo) -> list[str]:
    progress = mount.prefetch
    remarks = [mount.error, progress.error if progress is not None else ""]
    return [remark for remark in remarks if remark]
