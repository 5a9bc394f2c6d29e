"""The text and the JSON of `status`, `flush` and `du`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from replicate.cli.json_output import Json, time_json
from replicate.cli.render.fields import render_fields, render_section
from replicate.cli.table import Cell, Column, render_table
from replicate.cli.text import format_age, format_duration, format_share
from replicate.cli.view import View
from replicate.ids import short
from replicate.phrases import escape, format_size, plural
from replicate.records import paths_argument

if TYPE_CHECKING:
    from replicate.query import DaemonStatus, Failure, RepositoryStanding
    from replicate.usage import DiskUsage, DiskUsageReport, UnreadableSnapshot


def render_status(status: DaemonStatus, view: View) -> str:
    """The daemon, its queue, and what failed with what to do about it."""
    daemon = status.daemon
    started = format_age(daemon.started, view.now, view.zone)
    held_up = [standing for standing in status.repositories if standing.waiting_because]
    fields = [
        ("Daemon", f"running (pid {daemon.pid}, version {escape(daemon.version)}, started {started})"),
        ("Queue", describe_queue(status)),
        ("Storing", _describe_active(status)),
        # Where it is known which repository it is, that is said below.
        ("Held up", "" if held_up else view.paint(escape(status.waiting_because), "yellow")),
        ("Spool", format_size(status.spool_bytes)),
        ("Leased", _describe_leased(status)),
        ("Mounts", _describe_mounts(status, view)),
    ]
    text = render_fields(fields)
    if held_up:
        body = "".join(_render_standing(standing, view) for standing in held_up)
        text += render_section("Held up", body, view)
    if status.waiting_parts:
        waits = [
            f"{view.paint(short(part.id), 'cyan')}  {escape(part.waits_for)}" for part in status.waiting_parts
        ]
        text += render_section("Waiting for other processes", "\n".join(waits) + "\n", view)
    if status.failures:
        text += render_section("Failed", render_failures(status.failures, view), view)
    return text


def _render_standing(standing: RepositoryStanding, view: View) -> str:
    """Since when and why nothing moves, how much waits, and when it is tried again."""
    waiting = standing.pending + standing.active
    parts = []
    if standing.waiting_since is not None:
        parts.append(f"since {format_age(standing.waiting_since, view.now, view.zone)}")
    parts.append(f"{plural(waiting, 'item')} ({format_size(standing.bytes_pending)}) to store")
    if standing.retry_at is not None and standing.retry_at > view.now:
        parts.append(f"tried again in {format_duration((standing.retry_at - view.now).total_seconds())}")
    elif waiting:
        parts.append("being tried now")
    lines = [
        f"{view.paint(escape(standing.repository), 'cyan')}  {', '.join(parts)}",
        f"    {view.paint(escape(standing.waiting_because), 'yellow')}",
    ]
    if standing.hint:
        lines.append(f"    {escape(standing.hint)}")
    return "\n".join(lines) + "\n"


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
        "repositories": [_standing_json(standing) for standing in status.repositories],
        "spool_bytes": status.spool_bytes,
        "leased": {"files": status.leased_files, "bytes": status.leased_bytes},
        "mounts": status.mounts,
        "failed_mounts": status.failed_mounts,
        "waiting_parts": [
            {"id": part.id, "experiment_id": part.experiment_id, "waits_for": part.waits_for}
            for part in status.waiting_parts
        ],
        "failures": [_failure_json(failure) for failure in status.failures],
    }


def render_disk_usage(report: DiskUsageReport, view: View, *, chosen: bool = False) -> str:
    """A row an experiment, the whole repository, how that is stored, and what saved the difference.

    Without snapshots only what the repository takes, if it takes anything. `chosen`: the rows are not all
    experiments, so that they do not add up to the last.
    """
    if not report.experiments and not report.total.snapshots:
        return f"{_describe_repository(report)}\n" if report.repository_bytes else ""
    headings = ("SNAPSHOTS", "LOGICAL", "UNIQUE", "STORED", "DEDUP", "COMPRESSION")
    columns = [Column("EXPERIMENT"), *(Column(heading, right=True) for heading in headings)]
    rows = [_usage_row(Cell(short(usage.id), "cyan"), usage) for usage in report.experiments]
    rows.append(_usage_row(Cell("repository" if chosen else "total", "bold"), report.total))
    parts = [
        render_table(columns, rows, view),
        _render_encodings(report.total, view),
        f"{_describe_saved(report.total)}\n{_describe_repository(report)}\n",
    ]
    return "\n".join(part for part in parts if part)


def describe_unreadable(snapshot: UnreadableSnapshot) -> str:
    """Whose files are not counted."""
    if not snapshot.experiment_id:
        return f"snapshot {short(snapshot.id)}"
    if snapshot.id == snapshot.experiment_id:
        return f"experiment {short(snapshot.id)}, what `init` saved,"
    return f"checkpoint {short(snapshot.id)} of {short(snapshot.experiment_id)}"


def disk_usage_json(report: DiskUsageReport) -> dict[str, Json]:
    """The total at the top, and the experiments."""
    return {
        **_usage_json(report.total),
        "unreferenced_bytes": report.unreferenced_bytes,
        "repository_bytes": report.repository_bytes,
        "experiments": [{"id": usage.id, **_usage_json(usage)} for usage in report.experiments],
        "unreadable": [
            {"id": snapshot.id, "experiment_id": snapshot.experiment_id or None, "error": snapshot.error}
            for snapshot in report.unreadable
        ],
    }


def _describe_active(status: DaemonStatus) -> str:
    if not status.active_id:
        return ""
    done, total = format_size(status.active_bytes_done), format_size(status.active_bytes_total)
    return f"{short(status.active_id)}, {done} of {total}"


def _describe_mounts(status: DaemonStatus, view: View) -> str:
    if not status.failed_mounts:
        return str(status.mounts)
    failed = view.paint(f"{status.failed_mounts} given up", "red")
    return f"{status.mounts}, and {failed} (`replicate mounts` says why)"


def _describe_leased(status: DaemonStatus) -> str:
    if not status.leased_files:
        return ""
    return f"{plural(status.leased_files, 'file')} ({format_size(status.leased_bytes)}) where they are"


def _standing_json(standing: RepositoryStanding) -> dict[str, Json]:
    return {
        "repository": standing.repository,
        "pending": standing.pending,
        "active": standing.active,
        "bytes_pending": standing.bytes_pending,
        "waiting_because": standing.waiting_because or None,
        "waiting_since": time_json(standing.waiting_since),
        "retry_at": time_json(standing.retry_at),
        "hint": standing.hint or None,
    }


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
    return [
        name,
        Cell(f"{usage.snapshots:,}"),
        *(Cell(format_size(size)) for size in sizes),
        Cell(format_share(usage.saved_by_deduplication, usage.logical_bytes)),
        Cell(format_share(usage.saved_by_compression, usage.unique_bytes)),
    ]


def _render_encodings(usage: DiskUsage, view: View) -> str:
    """A row for each encoding that is used."""
    columns = [
        Column("ENCODING"),
        *(Column(heading, right=True) for heading in ("UNIQUE", "STORED", "SAVED")),
    ]
    rows = [
        [
            Cell(escape(name)),
            Cell(format_size(plain)),
            Cell(format_size(stored)),
            Cell(format_share(plain - stored, plain)),
        ]
        for name, (plain, stored) in usage.encodings.items()
        if plain
    ]
    if usage.base_bytes:
        rows.append([Cell("bases only"), Cell("-"), Cell(format_size(usage.base_bytes)), Cell("-")])
    return render_table(columns, rows, view) if rows else ""


def _describe_saved(usage: DiskUsage) -> str:
    deduplicated = _describe_part(usage.saved_by_deduplication, usage.logical_bytes)
    if usage.saved_by_compression < 0:
        more = format_size(-usage.saved_by_compression)
        return f"Deduplication saved {deduplicated}; what is left takes {more} more, with the bases of deltas"
    compressed = _describe_part(usage.saved_by_compression, usage.unique_bytes)
    return f"Deduplication saved {deduplicated}; compression saved {compressed}"


def _describe_part(saved: int, whole: int) -> str:
    return f"{format_size(saved)} ({format_share(saved, whole)})" if saved else "nothing"


def _describe_repository(report: DiskUsageReport) -> str:
    parts = [
        f"{format_size(report.total.stored_bytes)} of contents",
        f"{format_size(report.total.metadata_bytes)} of metadata",
    ]
    if report.unreferenced_bytes:
        who = "nothing readable" if report.unreadable else "nothing"
        parts.append(f"{format_size(report.unreferenced_bytes)} that {who} refers to")
    return f"The repository takes {format_size(report.repository_bytes)}: {', '.join(parts)}"


def _usage_json(usage: DiskUsage) -> dict[str, Json]:
    return {
        "logical_bytes": usage.logical_bytes,
        "unique_bytes": usage.unique_bytes,
        "stored_bytes": usage.stored_bytes,
        "saved_by_deduplication_bytes": usage.saved_by_deduplication,
        "saved_by_compression_bytes": usage.saved_by_compression,
        "encodings": {
            name: {"plain_bytes": plain, "stored_bytes": stored}
            for name, (plain, stored) in usage.encodings.items()
        },
        "base_bytes": usage.base_bytes,
        "metadata_bytes": usage.metadata_bytes,
        "snapshots": usage.snapshots,
    }
