"""`checkout`: the files of a snapshot, written into a directory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from replicate.cli.arguments import check_not_empty, check_snapshot_path, id_argument, json_option
from replicate.cli.grammar import Command
from replicate.cli.json_output import Json, path_json
from replicate.cli.render.resolutions import exact_reference, explain_damage, name_snapshot
from replicate.cli.session import Session
from replicate.errors import CheckoutConflict, ReplicateError
from replicate.phrases import escape, format_size, plural

if TYPE_CHECKING:
    from replicate.query import CheckoutAction, CheckoutEvent, Resolution


@click.command(cls=Command)
@id_argument()
@click.option(
    "-o",
    "--output-directory",
    metavar="DIR",
    type=click.Path(),
    callback=check_not_empty,
    help="Where to write (default: the project directory); made if it is missing.",
)
@click.option("--path", metavar="P", callback=check_snapshot_path, help="Only this file or directory.")
@click.option("-f", "--force", is_flag=True, help="Replace files that are in the way without asking.")
@click.option("--delete", is_flag=True, help="Also remove files that are not in the snapshot.")
@click.option("--dry-run", is_flag=True, help="Only print what would be done.")
@json_option
@click.pass_obj
def checkout(
    session: Session,
    reference: str,
    output_directory: str | None,
    path: str,
    force: bool,
    delete: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the files of a snapshot into a directory.

    A checkpoint's files are laid over those that its experiment began with. Of an experiment, the best
    checkpoint is taken, else the latest. Modes, times, links and empty directories come back as they were;
    nothing outside the directory is touched, and other files in it stay unless --delete is given.

    \b
    Examples:
      replicate checkout 3f9c2a1 -o /tmp/best
      replicate checkout 3f9c2a1:step=3 --path model.pt
      replicate checkout latest --dry-run --delete
    """
    console, project = session.console, session.project
    directory = os.path.abspath(output_directory or project.directory)
    from replicate import query

    meant = query.resolve(project.repository, reference)
    snapshot = exact_reference(meant)
    console.note(f"Checking out {name_snapshot(meant)}")
    if damage := explain_damage(meant):
        console.warn(damage)

    def write(*, force: bool) -> tuple[CheckoutEvent | None, list[CheckoutAction]]:
        events = query.checkout(
            project.repository,
            snapshot,
            directory,
            path=path,
            force=force,
            delete=delete,
            dry_run=dry_run,
            cache_bytes=project.cache_size,
        )
        last: CheckoutEvent | None = None
        actions: list[CheckoutAction] = []
        bytes_total = 0
        with console.progress("Writing") as progress:
            for event in events:
                if last is None:
                    bytes_total = event.bytes_total  # later events only say how far it is
                last = event
                actions += event.actions
                progress.show_bytes(event.bytes_done, bytes_total)
        return last, actions

    try:
        last, actions = write(force=force)
    except CheckoutConflict as conflict:
        if not console.can_ask or not os.path.isdir(directory):
            raise
        console.warn(conflict.message)
        also = ", and remove those that are not in the snapshot" if delete else ""
        if not console.confirm(f"Replace files of the same names{also}?"):
            raise ReplicateError("nothing was checked out") from None
        last, actions = write(force=True)

    if as_json:
        console.write_json(_result_json(meant, directory, last, actions if dry_run else None))
        return
    if dry_run:
        _print_actions(session, actions)
        return
    files, size = (last.files_done, last.bytes_done) if last else (0, 0)
    console.note(f"Wrote {plural(files, 'file')} ({format_size(size)}) into {escape(directory)}")
    if meant.summary.record.command:
        console.note("The experiment was started with:")
        console.write(f"{escape(meant.summary.record.command)}\n")


def _print_actions(session: Session, actions: list[CheckoutAction]) -> None:
    """What a dry run found; files that are already as wanted are only counted."""
    counts = dict.fromkeys(("create", "replace", "delete", "keep"), 0)
    for action in actions:
        counts[action.verb] += 1
        if action.verb != "keep" or session.verbose:
            session.console.write(f"{action.verb:7}  {escape(action.path)}\n")
    summary = ", ".join(f"{verb} {count:,}" for verb, count in counts.items() if count) or "nothing to do"
    session.console.note(f"Nothing was written (dry run): {summary}")


def _result_json(
    meant: Resolution, directory: str, last: CheckoutEvent | None, actions: list[CheckoutAction] | None
) -> dict[str, Json]:
    result: dict[str, Json] = {
        "experiment": meant.summary.record.id,
        "checkpoint": meant.checkpoint.id if meant.checkpoint else None,
        **path_json("directory", directory),
        "files": last.files_done if last else 0,
        "bytes": last.bytes_done if last else 0,
        "command": meant.summary.record.command,
    }
    if actions is not None:
        result["actions"] = [{"verb": action.verb, **path_json("path", action.path)} for action in actions]
    return result
