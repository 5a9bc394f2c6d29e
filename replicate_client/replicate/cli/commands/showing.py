"""`show`: everything about an experiment or a checkpoint."""

from __future__ import annotations

import click

from replicate.cli.arguments import id_argument, json_option
from replicate.cli.grammar import Command
from replicate.cli.json_output import checkpoint_json, experiment_json
from replicate.cli.render.details import render_checkpoint, render_experiment
from replicate.cli.session import Session
from replicate.ids import parse_reference


@click.command(cls=Command)
@id_argument()
@click.option("--all", "everything", is_flag=True, help="All packages and metrics, and the Git diff.")
@json_option
@click.pass_obj
def show(session: Session, reference: str, everything: bool, as_json: bool) -> None:
    """Show an experiment or a checkpoint.

    \b
    Examples:
      replicate show latest
      replicate show 3f9c2a1 --all
      replicate show 3f9c2a1:best
      replicate show 3f9c2a1 --json | jq .params
    """
    from replicate import query

    console, repository = session.console, session.project.repository
    meant = query.resolve(repository, reference)
    chosen = parse_reference(reference).selector in ("best", "latest", "step")
    if meant.checkpoint is not None and (chosen or not meant.named_experiment):
        if as_json:
            experiment = experiment_json(meant.summary, None)
            console.write_json({**checkpoint_json(meant.checkpoint), "experiment": experiment})
        else:
            console.write(
                render_checkpoint(meant.checkpoint, meant.summary, console.view, everything=everything)
            )
        return
    checkpoints = query.list_checkpoints(repository, meant.summary.record.id)
    if as_json:
        console.write_json(experiment_json(meant.summary, checkpoints))
    else:
        console.write(render_experiment(meant.summary, checkpoints, console.view, everything=everything))
