"""The table and the CSV of `ls` and `ps`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from replicate.cli.comparison import same_value
from replicate.cli.damage import is_damaged, leave_out_damaged, name_checkpoint
from replicate.cli.json_output import Json, mapping_json, time_json, to_json_line
from replicate.cli.table import Cell, Column, column_width, render_table, table_width
from replicate.cli.text import (
    MAX_CELL_VALUE,
    display_width,
    format_age,
    format_name,
    format_value_short,
    shorten,
)
from replicate.cli.view import View, state_note, status_style
from replicate.ids import short
from replicate.phrases import escape
from replicate.records import CheckpointRecord, ExperimentSummary, Value

#: Metrics shown of each checkpoint when no experiment has a primary metric.
_MAX_METRICS = 5


def render_experiments(summaries: Sequence[ExperimentSummary], view: View, *, everything: bool) -> str:
    """A row an experiment; a column only where it says something, unless `everything` is asked for.

    Params are those that differ between the experiments (or are absent from some); metrics are the primary
    ones.
    """
    readable = leave_out_damaged(summaries)
    params = _all_keys(s.record.params for s in readable) if everything else _differing_params(readable)
    metrics = _metrics_shown(summaries, everything=everything)
    table: list[tuple[Column, list[Cell]]] = [
        (Column("EXPERIMENT"), [Cell(short(s.record.id), "cyan") for s in summaries]),
        (Column("STARTED"), _age_cells(summaries, view)),
        (Column("STATUS", shrinks_to=8), [_status_cell(s) for s in summaries]),
    ]
    for name in ("name", "host", "user"):
        values = {getattr(s.record, name) for s in readable}
        if len(values) > 1 or (any(values) and (everything or name == "name")):
            cells = [Cell(escape(getattr(s.record, name))) for s in summaries]
            table.append((Column(name.upper(), shrinks_to=8), cells))
    assignments = [_assignments(s.record.params, params, view) for s in summaries]
    table.append((Column("PARAMS", shrinks_to=12), [Cell("\n".join(lines)) for lines in assignments]))
    for heading, checkpoints in (
        ("BEST CHECKPOINT", [s.best for s in summaries]),
        ("LATEST CHECKPOINT", [s.latest for s in summaries]),
    ):
        if any(checkpoints) or heading.startswith("LATEST"):
            cells = [_checkpoint_cell(checkpoint, metrics, view) for checkpoint in checkpoints]
            labels = max((display_width(name_checkpoint(c)) for c in checkpoints if c), default=0)
            table.append((Column(heading, shrinks_to=labels), cells))
    if view.width is not None and table_width([column_width(*part) for part in table]) > view.width:
        table[1] = (Column("STARTED"), _age_cells(summaries, view, brief=True))
    rows = list(zip(*(cells for _, cells in table), strict=True))
    return render_table([column for column, _ in table], rows, view)


def render_csv(summaries: Sequence[ExperimentSummary]) -> str:
    """One line an experiment with full values: `params.NAME`, `best.metrics.NAME` and so on are columns.

    Numbers are exact, missing values empty, lists and dicts JSON.
    """
    rows = [_csv_row(summary) for summary in summaries]
    params = [f"params.{key}" for key in _all_keys(s.record.params for s in summaries)]
    metrics = _all_keys(c.metrics for s in summaries for c in (s.best, s.latest) if c)
    headings = [
        *("id", "created", "name", "tags", "status", "user", "host", "command", "duration_s"),
        *("num_checkpoints", *params),
        *(f"best.{part}" for part in ("id", "step", *(f"metrics.{key}" for key in metrics))),
        *(f"latest.{part}" for part in ("id", "step", *(f"metrics.{key}" for key in metrics))),
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    for row in rows:
        writer.writerow([_csv_value(row.get(heading)) for heading in headings])
    return text.getvalue()


def _csv_row(summary: ExperimentSummary) -> dict[str, Json]:
    record = summary.record
    row: dict[str, Json] = {
        "id": record.id,
        "created": time_json(record.created),
        "name": record.name,
        "tags": " ".join(record.tags),
        "status": summary.status,
        "user": record.user,
        "host": record.host,
        "command": record.command,
        "duration_s": None if is_damaged(summary) else summary.duration_s,
        "num_checkpoints": summary.checkpoint_count,
    }
    row |= {f"params.{key}": value for key, value in mapping_json(record.params).items()}
    for name, checkpoint in (("best", summary.best), ("latest", summary.latest)):
        if checkpoint is not None:
            row |= {f"{name}.id": checkpoint.id, f"{name}.step": checkpoint.step}
            metrics = mapping_json(checkpoint.metrics)
            row |= {f"{name}.metrics.{key}": value for key, value in metrics.items()}
    return row


def _csv_value(value: Json) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return to_json_line(value)


def _all_keys(mappings: Iterable[Mapping[str, Value]]) -> list[str]:
    return sorted({key for mapping in mappings for key in mapping})


def _differing_params(summaries: Sequence[ExperimentSummary]) -> list[str]:
    """Names of the params that tell the experiments apart; all of them when there is only one."""
    mappings = [summary.record.params for summary in summaries]
    names = _all_keys(mappings)
    if len(mappings) < 2:
        return names
    first = mappings[0]
    return [
        name
        for name in names
        if any(
            (name in mapping) != (name in first) or not same_value(mapping.get(name), first.get(name))
            for mapping in mappings[1:]
        )
    ]


def _metrics_shown(summaries: Sequence[ExperimentSummary], *, everything: bool) -> list[str]:
    """The primary metrics, by which people choose; without any, the first few that there are."""
    checkpoints = [c for s in summaries for c in (s.best, s.latest) if c]
    if everything:
        return _all_keys(checkpoint.metrics for checkpoint in checkpoints)
    primary = {c.primary_metric.name for c in checkpoints if c.primary_metric}
    if primary:
        return sorted(primary)
    return _all_keys(checkpoint.metrics for checkpoint in checkpoints)[:_MAX_METRICS]


def _age_cells(summaries: Sequence[ExperimentSummary], view: View, *, brief: bool = False) -> list[Cell]:
    return [
        Cell("unknown" if is_damaged(s) else format_age(s.record.created, view.now, view.zone, brief=brief))
        for s in summaries
    ]


def _status_cell(summary: ExperimentSummary) -> Cell:
    note = state_note(summary)
    if is_damaged(summary):
        return Cell(note, "red")
    if summary.state == "failed":
        note = f"files {note}"  # the run itself may have ended well
    lines = [summary.status, *([note] if note else [])]
    return Cell("\n".join(lines), status_style(summary.status))


def _checkpoint_cell(checkpoint: CheckpointRecord | None, metrics: Sequence[str], view: View) -> Cell:
    if checkpoint is None:
        return Cell("")
    note = state_note(checkpoint)
    lines = [name_checkpoint(checkpoint), *([note] if note else [])]
    return Cell("\n".join([*lines, *_assignments(checkpoint.metrics, metrics, view)]))


def _assignments(values: Mapping[str, Value], names: Sequence[str], view: View) -> list[str]:
    """`name=value` of those that are there; long texts are cut only where somebody is looking."""
    cut = view.is_terminal
    return [
        f"{shorten(format_name(name), 2 * MAX_CELL_VALUE) if cut else format_name(name)}"
        f"={format_value_short(values[name], cut=cut)}"
        for name in names
        if name in values
    ]
