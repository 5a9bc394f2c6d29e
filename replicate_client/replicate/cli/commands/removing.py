"""`rm`: experiments and checkpoints, gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from replicate.cli.arguments import ids_argument
from replicate.cli.grammar import Command
from replicate.cli.session import Session
from replicate.errors import InvalidArgument, ReplicateError
from replicate.ids import parse_reference, short
from replicate.phrases import plural

if TYPE_CHECKING:
    from replicate.query import RemovedItem


@click.command(cls=Command)
@ids_argument(required=True)
@click.option("-f", "--force", is_flag=True, help="Do not ask; also remove experiments that are running.")
@click.pass_obj
def rm(session: Session, references: tuple[str, ...], force: bool) -> None:
    """Remove experiments or checkpoints.

    An experiment goes with all its checkpoints; a checkpoint goes alone. All IDs are looked up before
    anything is removed. On a terminal you are asked first; elsewhere -f is needed.

    \b
    Examples:
      replicate rm 3f9c2a1
      replicate rm 3f9c2a1:step=0 9ab12cd
      replicate ls -q -f 'step < 10' | xargs -r replicate rm -f
    """
    from replicate import query

    for reference in references:
        if parse_reference(reference).selector == "code":
            raise InvalidArgument(
                f"the files that an experiment began with cannot be removed alone: {reference}",
                hint="without :code, the whole experiment is removed",
            )
    console, repository = session.console, session.project.repository
    items = query.remove(repository, references, dry_run=True, force=force)
    if not force:
        for item in items:
            console.note(f"  {describe_item(item)}")
        if not console.can_ask:
            raise ReplicateError(
                "nothing was removed: there is no terminal to ask on",
                hint="-f/--force removes without asking",
            )
        if not console.confirm(f"Remove {'this' if len(items) == 1 else 'these'}?"):
            raise ReplicateError("nothing was removed")
    # By complete id: `latest` may mean another one by now.
    for item in query.remove(repository, [item.id for item in items], force=force):
        console.note(f"Removed {describe_item(item)}")


def describe_item(item: RemovedItem) -> str:
    """What goes: a checkpoint as a checkpoint, an experiment with what goes with it."""
    if item.kind == "checkpoint":
        return f"checkpoint {short(item.id)} (step {item.step}) of experiment {short(item.experiment_id)}"
    return f"experiment {short(item.id)} ({plural(item.checkpoint_count, 'checkpoint')})"
