"""The text and the JSON of `diff`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from replicate.cli.comparison import ABSENT, Compared, Comparison, Difference, Side
from replicate.cli.json_output import Json, file_json, path_json, value_json
from replicate.cli.text import (
    count_equal,
    display_width,
    format_moment,
    format_name,
    format_value,
    pad,
    shorten,
)
from replicate.cli.view import View
from replicate.ids import short
from replicate.phrases import escape, format_size, plural
from replicate.records import FileChange, FileEntry, parse_time

_GAP = "  "
_MIN_VALUE_WIDTH = 12
_NOTHING = "(no difference)"
_NOT_COMPARED = "(not compared)"
_LABELS = {
    "python_version": "Python version",
    "os": "OS",
    "cpu": "CPU",
    "cpu_count": "CPU cores",
    "memory_bytes": "Memory",
    "gpus": "GPUs",
    "dirty": "Uncommitted changes",
    "diff": "Diff",
    "primary_metric": "Primary metric",
}

_Row = tuple[str, str, str]


def render_comparison(comparison: Comparison, view: View) -> str:
    """All sections, always in the same order, in three columns: name, left, right."""
    left, right = comparison.left, comparison.right
    sections: list[tuple[str, list[_Row | None]]] = [
        ("Experiment", [_experiment_ids(left, right), *_labelled_rows(comparison.experiment, view)]),
        ("Params", _rows(comparison.params)),
        ("Python packages", _rows(comparison.python_packages)),
        ("Git", _labelled_rows(comparison.git, view)),
    ]
    if left.checkpoint or right.checkpoint:
        ids = _checkpoint_ids(left, right)
        sections += [
            ("Checkpoint", [ids, *_labelled_rows(comparison.checkpoint, view)]),
            ("Metrics", _rows(comparison.metrics)),
        ]
    widths = _column_widths([row for _, rows in sections for row in rows if row], view)
    parts = [
        _render_section(title, "".join(_render_row(row, widths, view) for row in rows), view)
        for title, rows in sections
    ]
    files = _NOT_COMPARED if comparison.files is None else render_file_changes(comparison.files, view)
    return "\n".join([*parts, _render_section("Files", files, view)])


def render_file_changes(changes: Sequence[FileChange], view: View) -> str:
    """A line a file: `+` added, `-` removed, `~` changed; and how many of each. Empty without changes."""
    if not changes:
        return ""
    kinds = [describe_change(change) for change in changes]
    lines = []
    for change, kind in zip(changes, kinds, strict=True):
        sign, style = {"added": ("+", "green"), "removed": ("-", "red"), "changed": ("~", "yellow")}[kind]
        text = f"{sign} {escape(change.path)}{_slash(change)}  {_render_what_changed(change)}"
        lines.append(view.paint(text.rstrip(), style))
    counts = ", ".join(
        f"{count:,} {kind}" for kind in ("added", "removed", "changed") if (count := kinds.count(kind))
    )
    return "\n".join([*lines, f"({plural(len(changes), 'file')}: {counts})"]) + "\n"


def comparison_json(comparison: Comparison) -> dict[str, Json]:
    """Only what differs; a side that lacks a value has no such key. Null is what cannot be compared."""
    return {
        "left": _side_json(comparison.left),
        "right": _side_json(comparison.right),
        "experiment": _differences_json(comparison.experiment),
        "params": _differences_json(comparison.params),
        "python_packages": _differences_json(comparison.python_packages),
        "git": _differences_json(comparison.git),
        "checkpoint": _differences_json(comparison.checkpoint),
        "metrics": _differences_json(comparison.metrics),
        "files": None if comparison.files is None else [_change_json(change) for change in comparison.files],
    }


def describe_change(change: FileChange) -> str:
    """`added`, `removed` or `changed`."""
    if change.left is None:
        return "added"
    return "removed" if change.right is None else "changed"


def _render_section(title: str, body: str, view: View) -> str:
    return f"{view.heading(title)}\n{body or _NOTHING}".rstrip("\n") + "\n"


def _side_json(side: Compared) -> dict[str, Json]:
    return {
        "experiment": side.summary.record.id,
        "checkpoint": side.checkpoint.id if side.checkpoint else None,
    }


def _change_json(change: FileChange) -> dict[str, Json]:
    return {
        **path_json("path", change.path),
        "change": describe_change(change),
        "left": file_json(change.left) if change.left else None,
        "right": file_json(change.right) if change.right else None,
    }


def _differences_json(differences: Sequence[Difference] | None) -> Mapping[str, Json] | None:
    if differences is None:
        return None
    return {
        difference.name: {
            name: value_json(value)
            for name, value in (("left", difference.left), ("right", difference.right))
            if value is not ABSENT
        }
        for difference in differences
    }


def _experiment_ids(left: Compared, right: Compared) -> _Row:
    return "ID", short(left.summary.record.id), short(right.summary.record.id)


def _checkpoint_ids(left: Compared, right: Compared) -> _Row:
    one, other = (short(side.checkpoint.id) if side.checkpoint else "(none)" for side in (left, right))
    return "ID", one, other


def _rows(differences: Sequence[Difference] | None) -> list[_Row | None]:
    """Rows of names that users chose; None stands for those that are not known."""
    if differences is None:
        return [None]
    return [(format_name(d.name), _render_side(d.left), _render_side(d.right)) for d in differences]


def _labelled_rows(differences: Sequence[Difference] | None, view: View) -> list[_Row | None]:
    """Rows of names that we chose, as words; None stands for those that are not known."""
    if differences is None:
        return [None]
    return [
        (
            _LABELS.get(d.name, d.name.capitalize()),
            _render_field(d.name, d.left, view),
            _render_field(d.name, d.right, view),
        )
        for d in differences
    ]


def _render_side(value: Side) -> str:
    return "(not set)" if value is ABSENT else format_value(value)


def _render_field(name: str, value: Side, view: View) -> str:
    if name == "dirty" and value is not ABSENT:
        return "yes" if value else "no"
    unknown = (None, "", 0) if name in ("cpu_count", "memory_bytes") else (None, "")
    if value is ABSENT or value in unknown:
        return "(not set)"
    if name == "created" and isinstance(value, str):
        return format_moment(parse_time(value), view.zone)
    if name == "memory_bytes" and isinstance(value, int):
        return format_size(value)
    if name == "diff" and isinstance(value, str):
        return plural(len(value.splitlines()), "line")
    if name in ("path", "tags", "gpus") and isinstance(value, list):
        return escape(count_equal(str(item) for item in value)) or "(none)"
    return format_value(value)


def _column_widths(rows: Sequence[_Row], view: View) -> tuple[int, int, int]:
    """Widths of name, left and right; on a terminal what is too wide is cut, evenly on both sides."""
    name, left, right = (max(display_width(row[i]) for row in rows) for i in range(3))
    name += 1  # the colon
    if view.width is None:
        return name, left, right
    name = min(name, max(_MIN_VALUE_WIDTH, view.width // 3))
    room = max(2 * _MIN_VALUE_WIDTH, view.width - name - 2 * len(_GAP))
    if left + right > room:
        half = room // 2
        left, right = (min(left, max(half, room - right)), min(right, max(room - half, room - left)))
    return name, left, right


def _render_row(row: _Row | None, widths: tuple[int, int, int], view: View) -> str:
    if row is None:
        return f"{_NOT_COMPARED}\n"
    name, left, right = row
    label = pad(shorten(name, widths[0] - 1) + ":", widths[0])
    values = [pad(shorten(left, widths[1]), widths[1]), shorten(right, widths[2])]
    return _GAP.join([label, *values]).rstrip() + "\n"


def _slash(change: FileChange) -> str:
    present = change.right or change.left
    return "/" if present is not None and present.type == "directory" else ""


def _render_what_changed(change: FileChange) -> str:
    left, right = change.left, change.right
    if left is None or right is None:
        present = left or right
        assert present is not None, "a change has a side"
        return _render_content(present)
    parts = []
    if left.type != right.type:
        parts.append(f"{left.type} → {right.type}")
    elif left.target != right.target:
        parts.append(f"-> {escape(left.target)} → {escape(right.target)}")
    elif left.hash != right.hash:
        sizes = dict.fromkeys((format_size(left.size), format_size(right.size)))
        parts.append(" → ".join(sizes))
    if left.mode != right.mode:
        parts.append(f"mode {left.mode:04o} → {right.mode:04o}")
    return ", ".join(parts)


def _render_content(entry: FileEntry) -> str:
    if entry.type == "symlink":
        return f"-> {escape(entry.target)}"
    return format_size(entry.size) if entry.type == "file" else ""
