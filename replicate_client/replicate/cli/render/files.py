"""One line a file, much as `ls -l` writes it."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from replicate.cli.text import format_mode
from replicate.cli.view import View
from replicate.phrases import escape, format_size
from replicate.records import FileEntry

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_HASH_SHOWN = 10


def render_file(entry: FileEntry, view: View) -> str:
    """Mode, size, time, the beginning of the hash, and the path; directories end in `/`."""
    size = "" if entry.type == "directory" else format_size(entry.size)
    path = escape(entry.path)
    if entry.type == "directory":
        path = view.paint(path + "/", "cyan")
    elif entry.type == "symlink":
        path += f" -> {escape(entry.target)}"
    hash_shown = view.paint(f"{entry.hash[:_HASH_SHOWN]:{_HASH_SHOWN}}", "faint")
    return f"{format_mode(entry)}  {size:>10}  {_format_mtime(entry.mtime_ns, view)}  {hash_shown}  {path}\n"


def _format_mtime(mtime_ns: int, view: View) -> str:
    try:
        time = (_EPOCH + timedelta(seconds=mtime_ns // 10**9)).astimezone(view.zone)
    except OverflowError:
        return f"{'?':16}"
    return f"{time:%Y-%m-%d %H:%M}"
