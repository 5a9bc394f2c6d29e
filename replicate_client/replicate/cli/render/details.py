"""Everything about one experiment or checkpoint: the text of `show`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from replicate.cli.damage import is_damaged
from replicate.cli.render.fields import render_fields, render_section
from replicate.cli.table import Cell, Column, column_width, render_table, table_width
from replicate.cli.text import (
    count_equal,
    format_age,
    format_duration,
    format_moment,
    format_name,
    format_value,
    format_value_short,
)
from replicate.cli.view import View, state_note, status_style
from replicate.ids import short
from replicate.phrases import escape, format_size, plural
from replicate.records import CheckpointRecord, ExperimentSummary, GitState, Gpu, System, Value

#: Up to this many packages are all shown.
_MAX_PACKAGES = 5
#: Of more, these are: what people look for when a result cannot be reproduced.
_TELLING_PACKAGES = frozenset(
    {
        *("jax", "jaxlib", "keras", "lightgbm", "lightning", "mxnet", "numpy", "pandas"),
        *("pytorch-lightning", "scikit-learn", "scipy", "tensorflow", "torch", "torchvision"),
        *("transformers", "xgboost"),
    }
)


def render_experiment(
    summary: ExperimentSummary, checkpoints: Sequence[CheckpointRecord], view: View, *, everything: bool
) -> str:
    """An experiment with the table of its checkpoints."""
    return (
        f"{view.heading('Experiment')} {view.paint(summary.record.id, 'cyan')}\n\n"
        + _render_experiment_body(summary, view, everything=everything)
        + render_section("Checkpoints", _render_checkpoints(summary, checkpoints, view, everything), view)
        + _render_git_diff(summary.record.git, view, everything=everything)
    )


def render_checkpoint(
    checkpoint: CheckpointRecord, summary: ExperimentSummary, view: View, *, everything: bool
) -> str:
    """A checkpoint, and the experiment that it belongs to."""
    if is_damaged(checkpoint):
        about = render_fields(_damage_fields(checkpoint, view))
    else:
        about = _render_checkpoint_body(checkpoint, view)
    best = " (best)" if summary.best is not None and summary.best.id == checkpoint.id else ""
    return (
        f"{view.heading('Checkpoint')} {view.paint(checkpoint.id, 'cyan')}{best}\n\n"
        + about
        + f"\n{view.heading('Experiment')} {view.paint(summary.record.id, 'cyan')}\n\n"
        + _render_experiment_body(summary, view, everything=everything)
        + _render_git_diff(summary.record.git, view, everything=everything)
    )


def _render_checkpoint_body(checkpoint: CheckpointRecord, view: View) -> str:
    fields = [
        ("Created", _moment_and_age(checkpoint, view)),
        ("Step", str(checkpoint.step)),
        ("Path", _render_paths(checkpoint.paths)),
        (
            "Files",
            _render_state(checkpoint.state, checkpoint.error, checkpoint.paths, checkpoint.waits_for),
        ),
        ("Processes", str(checkpoint.world_size) if checkpoint.world_size > 1 else ""),
    ]
    primary = checkpoint.primary_metric
    metrics = [
        (
            format_name(name),
            format_value(value)
            + (f" (primary, {primary.goal})" if primary is not None and primary.name == name else ""),
        )
        for name, value in sorted(checkpoint.metrics.items())
    ]
    return render_fields(fields) + render_section("Metrics", render_fields(metrics), view)


def _damage_fields(damaged: ExperimentSummary | CheckpointRecord, view: View) -> list[tuple[str, str]]:
    """What can be said of what could not be read."""
    return [
        ("Record", view.paint("damaged, so that what it says is not known", "red")),
        ("Reason", escape(damaged.error)),
    ]


def _render_experiment_body(summary: ExperimentSummary, view: View, *, everything: bool) -> str:
    if is_damaged(summary):
        ended = format_moment(summary.ended, view.zone) if summary.ended else ""
        return render_fields([*_damage_fields(summary, view), ("Ended", ended)])
    record = summary.record
    status = view.paint(summary.status, status_style(summary.status))
    if summary.duration_s is not None:
        word = "for" if summary.status == "running" else "after"
        status += f" {word} {format_duration(summary.duration_s)}"
    fields = [
        ("Name", escape(record.name)),
        ("Tags", escape(", ".join(record.tags))),
        ("Created", f"{format_moment(record.created, view.zone)}"),
        ("Status", status),
        ("Waited", _render_stall(summary)),
        ("Host", escape(record.host)),
        ("User", escape(record.user)),
        ("Command", escape(record.command)),
        ("Path", _render_paths(record.paths)),
        ("Files", _render_state(summary.state, summary.error, record.paths)),
    ]
    params = [(format_name(name), format_value(value)) for name, value in sorted(record.params.items())]
    parts = [
        render_fields(fields),
        render_section("Params", render_fields(params), view),
        render_section("System", render_fields(_system_fields(summary)), view),
    ]
    if record.git is not None:
        parts.append(render_section("Git", render_fields(_git_fields(record.git, everything)), view))
    packages = _render_packages(record.python_packages, everything=everything)
    parts.append(render_section("Python packages", packages, view))
    return "".join(parts)


def _render_stall(summary: ExperimentSummary) -> str:
    """For how long of its time the training was held up by us."""
    if summary.stall_s is None:
        return ""
    whole = "" if summary.duration_s is None else f" of {format_duration(summary.duration_s)}"
    return f"{format_duration(summary.stall_s)}{whole} for calls of replicate"


def _moment_and_age(checkpoint: CheckpointRecord, view: View) -> str:
    moment = format_moment(checkpoint.created, view.zone)
    return f"{moment} ({format_age(checkpoint.created, view.now, view.zone)})"


def _render_paths(paths: Sequence[str]) -> str:
    return escape(", ".join(paths))


def _render_state(state: str, error: str, paths: Sequence[str], waits_for: str = "") -> str:
    if not paths and not waits_for:
        return "(none saved)"
    if state == "captured":
        return escape(f"captured, {waits_for}") if waits_for else "captured, being stored…"
    return escape(f"failed: {error}") if state == "failed" else "stored"


def _system_fields(summary: ExperimentSummary) -> list[tuple[str, str]]:
    record, system = summary.record, summary.record.system
    return [
        ("Python", escape(record.python_version)),
        ("OS", escape(system.os)),
        ("CPU", _render_cpu(system)),
        ("Memory", format_size(system.memory_bytes) if system.memory_bytes else ""),
        ("GPU", _render_gpus(system.gpus)),
        ("Driver", escape(system.driver)),
        ("Replicate", escape(record.replicate_version)),
    ]


def _render_cpu(system: System) -> str:
    cores = plural(system.cpu_count, "core") if system.cpu_count else ""
    return f"{escape(system.cpu)} ({cores})" if system.cpu and cores else escape(system.cpu) or cores


def _render_gpus(gpus: Sequence[Gpu]) -> str:
    return escape(
        count_equal(
            gpu.name + (f" ({format_size(gpu.memory_bytes)})" if gpu.memory_bytes else "") for gpu in gpus
        )
    )


def _git_fields(git: GitState, everything: bool) -> list[tuple[str, str]]:
    changes = ""
    if git.dirty:
        lines = len(git.diff.splitlines())
        where = "below" if everything else "`--all` shows it"
        changes = f"yes (a diff of {plural(lines, 'line')}, {where})" if lines else "yes"
    return [
        ("Commit", escape(git.commit)),
        ("Branch", escape(git.branch)),
        ("Uncommitted changes", changes or "none"),
    ]


def _render_git_diff(git: GitState | None, view: View, *, everything: bool) -> str:
    if git is None or not git.diff or not everything:
        return ""
    lines = "".join(f"{escape(line.expandtabs())}\n" for line in git.diff.split("\n"))
    return render_section("Git diff", lines.rstrip("\n") + "\n", view)


def _render_packages(packages: Mapping[str, str], *, everything: bool) -> str:
    names = sorted(packages, key=str.lower)
    shown = names
    if len(names) > _MAX_PACKAGES and not everything:
        telling = [name for name in names if name.lower().replace("_", "-") in _TELLING_PACKAGES]
        shown = telling or names[:_MAX_PACKAGES]
    body = render_fields([(escape(name), escape(packages[name])) for name in shown])
    hidden = len(names) - len(shown)
    return body + (f"… and {hidden} more; `--all` shows them\n" if hidden else "")


def _render_checkpoints(
    summary: ExperimentSummary, checkpoints: Sequence[CheckpointRecord], view: View, everything: bool
) -> str:
    if not checkpoints:
        return "(none)\n"
    best = summary.best.id if summary.best else ""
    fixed: list[tuple[Column, list[Cell]]] = [
        (Column("ID"), [Cell(short(c.id), "cyan") for c in checkpoints]),
        (Column("STEP", right=True), [Cell("" if is_damaged(c) else str(c.step)) for c in checkpoints]),
        (Column("CREATED"), [_age_cell(c, view) for c in checkpoints]),
    ]
    notes = [state_note(c) for c in checkpoints]
    if any(notes):
        fixed.append((Column("NOTE", shrinks_to=12), [Cell(note, "yellow") for note in notes]))
    names = _metrics_in_order(checkpoints)
    metrics = [_metric_column(name, checkpoints, best) for name in names]
    shown = metrics if everything else metrics[: _count_that_fit(fixed, metrics, view)]
    columns = [*fixed, *shown]
    table = render_table(
        [column for column, _ in columns], list(zip(*(cells for _, cells in columns), strict=True)), view
    )
    hidden = len(metrics) - len(shown)
    more = f"… and {plural(hidden, 'more metric', 'more metrics')}; `--all` shows them\n" if hidden else ""
    example = short((summary.best or summary.latest or checkpoints[-1]).id)
    return f"{table}{more}\nFor a checkpoint: `replicate show {example}`, `replicate files {example}`\n"


def _age_cell(checkpoint: CheckpointRecord, view: View) -> Cell:
    if is_damaged(checkpoint):
        return Cell("unknown")
    return Cell(format_age(checkpoint.created, view.now, view.zone))


def _metrics_in_order(checkpoints: Sequence[CheckpointRecord]) -> list[str]:
    """Every metric that any checkpoint has: the primary ones, then the others by name."""
    primary = {c.primary_metric.name for c in checkpoints if c.primary_metric}
    names = {name for checkpoint in checkpoints for name in checkpoint.metrics}
    return sorted(names, key=lambda name: (name not in primary, name))


def _metric_column(
    name: str, checkpoints: Sequence[CheckpointRecord], best: str
) -> tuple[Column, list[Cell]]:
    return Column(format_name(name)), [_metric_cell(c, name, is_best=c.id == best) for c in checkpoints]


def _metric_cell(checkpoint: CheckpointRecord, name: str, *, is_best: bool) -> Cell:
    if name not in checkpoint.metrics:
        return Cell("")
    value: Value = checkpoint.metrics[name]
    primary = checkpoint.primary_metric
    marked = is_best and primary is not None and primary.name == name
    return Cell(format_value_short(value) + (" (best)" if marked else ""), "green" if marked else "")


def _count_that_fit(
    fixed: Sequence[tuple[Column, Sequence[Cell]]],
    metrics: Sequence[tuple[Column, Sequence[Cell]]],
    view: View,
) -> int:
    """How many metrics the terminal has room for, at least one."""
    if view.width is None:
        return len(metrics)
    widths = [column_width(column, cells) for column, cells in fixed]
    for count, (column, cells) in enumerate(metrics):
        widths.append(column_width(column, cells))
        if table_width(widths) > view.width:
            return max(1, count)
    return len(metrics)
