"""The text and the JSON of `gc`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from replicate.cli.json_output import Json
from replicate.cli.text import format_duration
from replicate.phrases import escape, format_size, plural

if TYPE_CHECKING:
    from replicate.usage import CollectProgress, CollectReport

_STEPS = {
    "listing": "Listing packs",
    "marking": "Looking at what is needed",
    "indexing": "Writing the index anew",
    "deleting": "Deleting packs",
}


def describe_step(progress: CollectProgress) -> str:
    """How far it is, as one line."""
    step = _STEPS.get(progress.step, escape(progress.step))
    return f"{step}: {progress.done:,}" + (f" of {progress.total:,}" if progress.total else "")


def render_collect(report: CollectReport | None, *, dry_run: bool) -> str:
    """What was deleted, and why what is left is left."""
    if report is None or not (report.packs or report.kept_packs):
        return "There is nothing to delete\n"
    verb = "Would delete" if dry_run else "Deleted"
    lines = [
        f"{verb} {format_size(report.size_bytes)} in {plural(report.packs, 'pack')}"
        if report.packs
        else "There is nothing to delete",
        f"{format_size(report.kept_bytes)} in {plural(report.kept_packs, 'pack')} "
        + ("would stay" if dry_run else "stay"),
    ]
    if report.unneeded_bytes:
        lines.append(
            f"{format_size(report.unneeded_bytes)} of these are not needed, but are in packs that are"
        )
    if report.spared_bytes:
        lines.append(
            f"{format_size(report.spared_bytes)} of these may belong to what is being stored at the moment"
        )
    if report.announced:
        age = f", the oldest for {format_duration(report.announced_age_s)}" if report.announced_age_s else ""
        lines.append(f"{plural(report.announced, 'snapshot')} being stored{age}")
    return "\n".join([*lines, ""])


def collect_json(report: CollectReport | None, *, dry_run: bool) -> dict[str, Json]:
    """The figures, in bytes."""
    return {
        "dry_run": dry_run,
        "deleted_packs": report.packs if report else 0,
        "deleted_bytes": report.size_bytes if report else 0,
        "kept_packs": report.kept_packs if report else 0,
        "kept_bytes": report.kept_bytes if report else 0,
        "unneeded_bytes": report.unneeded_bytes if report else 0,
        "spared_bytes": report.spared_bytes if report else 0,
        "being_stored": report.announced if report else 0,
        "being_stored_age_s": report.announced_age_s if report else 0.0,
    }
