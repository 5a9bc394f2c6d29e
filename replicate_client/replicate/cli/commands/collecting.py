"""`gc`: give space back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from replicate.cli.arguments import json_option
from replicate.cli.grammar import Command
from replicate.cli.render.collecting import collect_json, describe_step, render_collect
from replicate.cli.session import Session
from replicate.errors import DaemonUnavailable, RepositoryMissing

if TYPE_CHECKING:
    from replicate.usage import CollectReport


@click.command(cls=Command)
@click.option("--dry-run", is_flag=True, help="Say how much would be deleted, and delete nothing.")
@json_option
@click.pass_obj
def gc(session: Session, dry_run: bool, as_json: bool) -> None:
    """Delete data that no experiment and no checkpoint needs any more.

    `replicate rm` takes experiments and checkpoints away, but not the data, of which others may need a part.
    This deletes packs of which nothing is needed. It is safe at any time: while others store, read or collect
    in the same repository, on this machine or elsewhere, and when it is interrupted; the next one goes on.

    Nothing is deleted when a record or a tree cannot be read: the message says which.

    \b
    Examples:
      replicate gc --dry-run
      replicate gc
      replicate gc --json | jq .deleted_bytes
    """
    console, project = session.console, session.project
    try:
        report = _collect(session, dry_run=dry_run)
    except RepositoryMissing:
        if project.repository_origin != "default":
            raise
        report = None
    if as_json:
        console.write_json(collect_json(report, dry_run=dry_run))
    else:
        console.write(render_collect(report, dry_run=dry_run))


def _collect(session: Session, *, dry_run: bool) -> CollectReport:
    from replicate import usage

    with session.console.progress("Collecting") as progress:
        for event in usage.collect(session.project.repository, dry_run=dry_run):
            if isinstance(event, usage.CollectReport):
                return event
            progress.show(describe_step(event))
    raise DaemonUnavailable("the daemon has ended in the middle of it", hint="run `replicate gc` again")
