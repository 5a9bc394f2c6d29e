"""The text and the JSON of `status`, `flush` and `du`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from replicate.cli.json_output import Json, time_json
from replicate.cli.render.fields import render_fields, render_section
from replicate.cli.table import Cell, Column, render_table
from replicate.cli.text import format_age, format_duration
from replicate.cli.view import View
from replicate.ids import short
from replicate.phrases import escape, format_size, plural
from replicate.records import paths_argument

if TYPE_CHECKING:
    from replicate.query import DaemonStatus, DiskUsage, DiskUsageReport, Failure


def render_status(status: DaemonStatus, view: View) -> str:
    """The daemon, its queue, and what failed with what to do about it."""
    daemon = status.daemon
    started = format_age(daemon.started, view.now, view.zone)
    fields = [
        ("Daemon", f"running (pid {daemon.pid}, version {escape(daemon.version)}, started {started})"),
        ("Queue", describe_queue(status)),
        ("Storing", _describe_active(status)),
        ("Held up", view.paint(escape(status.waiting_because), "yellow")),
        ("Spool", format_size(status.spool_bytes)),
        ("Leased", _describe_leased(status)),
        ("Mounts", str(status.mounts)),
    ]
    text = render_fields(fields)
    if status.failures:
        text += render_section("Failed", render_failures(status.failures, view), view)
    return text


def render_failures(failures: Sequence[Failure], view: View) -> str:
    """What will not be stored, and how to forget them."""
    lines = []
    for failure in failures:
        paths = escape(", ".join(failure.paths)) or "no files"
        when = format_age(failure.at, view.now, view.zone)
        lines += [
            f"{view.paint(short(failure.id), 'cyan')}  {paths} ({when})",
            f"    {view.paint(escape(failure.error), 'red')}",
        ]
    forget = " ".join(short(failure.id) for failure in failures[:3]) + (" …" if len(failures) > 3 else "")
    return "\n".join([*lines, f"`replicate rm {forget}` forgets what failed"]) + "\n"


def describe_queue(status: DaemonStatus) -> str:
    """How much is left to be stored, and how long that may take."""
    waiting = status.pending + status.active
    if not waiting:
        return "empty, everything is stored" if not status.failures else "empty"
    text = f"{plural(waiting, 'item')} to store ({format_size(status.bytes_pending)})"
    rate = status.bytes_per_second
    if rate > 0:
        text += f", {format_size(rate)}/s, about {format_duration(status.bytes_pending / rate)} left"
    return text


def status_json(status: DaemonStatus) -> dict[str, Json]:
    """The public form of a status."""
    daemon = status.daemon
    rate = status.bytes_per_second
    waiting = status.pending + status.active
    return {
        "daemon": {
            "pid": daemon.pid,
            "version": daemon.version,
            "protocol": daemon.protocol,
            "started": time_json(daemon.started),
        },
        "queue": {
            "pending": status.pending,
            "active": status.active,
            "failed": status.failed,
            "bytes_pending": status.bytes_pending,
            "bytes_per_second": rate,
            "eta_s": status.bytes_pending / rate if waiting and rate > 0 else None,
        },
        "active": {
            "id": status.active_id,
            "bytes_done": status.active_bytes_done,
            "bytes_total": status.active_bytes_total,
        }
        if status.active_id
        else None,
        "waiting_because": status.waiting_because or None,
        "spool_bytes": status.spool_bytes,
        "leased": {"files": status.leased_files, "bytes": status.leased_bytes},
        "mounts": status.mounts,
        "failures": [_failure_json(failure) for failure in status.failures],
    }


def render_disk_usage(report: DiskUsageReport, view: View, *, chosen: bool = False) -> str:
    """A row an experiment, the whole repository, and what saved the difference.

    `chosen`: the rows are not all experiments, so that they do not add up to the last.
    """
    columns = [
        Column("EXPERIMENT"),
        *(Column(heading, right=True) for heading in ("SNAPSHOTS", "LOGICAL", "UNIQUE", "STORED")),
    ]
    rows = [_usage_row(Cell(short(usage.id), "cyan"), usage) for usage in report.experiments]
    total = report.total
    rows.append(_usage_row(Cell("repository" if chosen else "total", "bold"), total))
    saved = [
        f"{words} saved {format_size(before - after)} ({(before - after) / before:.0%})"
        for words, before, after in (
            ("deduplication", total.logical_bytes, total.unique_bytes),
            ("compression", total.unique_bytes, total.stored_bytes),
        )
        if before > after
    ]
    text = render_table(columns, rows, view)
    return text + (f"\n{'; '.join(saved)[:1].upper()}{'; '.join(saved)[1:]}\n" if saved else "")


def disk_usage_json(report: DiskUsageReport) -> dict[str, Json]:
    """The total at the top, and the experiments."""
    return {
        **_usage_json(report.total),
        "experiments": [{"id": usage.id, **_usage_json(usage)} for usage in report.experiments],
    }


def _describe_active(status: DaemonStatus) -> str:
    if not status.active_id:
        return ""
    done, total = format_size(status.active_bytes_done), format_size(status.active_bytes_total)
    return f"{short(status.active_id)}, {done} of {total}"


def _describe_leased(status: DaemonStatus) -> str:
    if not status.leased_files:
        return ""
    return f"{plural(status.leased_files, 'file')} ({format_size(status.leased_bytes)}) where they are"


def _failure_json(failure: Failure) -> dict[str, Json]:
    return {
        "id": failure.id,
        "experiment_id": failure.experiment_id,
        "path": paths_argument(failure.paths),
        "error": failure.error,
        "at": time_json(failure.at),
    }


def _usage_row(name: Cell, usage: DiskUsage) -> list[Cell]:
    sizes = (usage.logical_bytes, usage.unique_bytes, usage.stored_bytes)
    return [name, Cell(f"{usage.snapshots:,}"), *(Cell(format_size(size)) for size in sizes)]


def _usage_json(usage: DiskUsage) -> dict[str, Json]:
    return {
        "logical_bytes": usage.logical_bytes,
        "unique_bytes": usage.unique_bytes,
        "stored_bytes": usage.stored_bytes,
        "snapshots": usage.snapshots,
    }
