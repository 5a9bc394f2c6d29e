"""The tree of commands. `main` runs it; `reference` documents it."""

from __future__ import annotations

from typing import ClassVar

import click

from replicate.cli.commands.checking_out import checkout
from replicate.cli.commands.completion import completion
from replicate.cli.commands.daemon import daemon
from replicate.cli.commands.diffing import diff
from replicate.cli.commands.doctor import doctor
from replicate.cli.commands.files import cat, files
from replicate.cli.commands.listing import ls, ps
from replicate.cli.commands.mounting import mount, mounts, umount
from replicate.cli.commands.removing import rm
from replicate.cli.commands.showing import show
from replicate.cli.commands.storing import du, flush, status
from replicate.cli.grammar import Group


class _Program(Group):
    aliases: ClassVar = {"list": "ls", "processes": "ps", "delete": "rm", "unmount": "umount"}
    other_words: ClassVar = {
        "remove": "rm",
        "restore": "checkout",
        "wait": "flush",
        "log": "ls",
        "history": "ls",
        "start": "daemon start",
        "stop": "daemon stop",
        "logs": "daemon logs",
    }


@click.group(
    cls=_Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
)
@click.pass_context
def program(context: click.Context) -> None:
    """Version control for machine learning.

    A training script records its runs with `replicate.init()` and `experiment.checkpoint()`; this command
    lists, compares, mounts and restores them.

    \b
    Examples:
      replicate ls                       all experiments
      replicate show latest              everything about the newest
      replicate diff 3f9c2a1 9ab12cd     what was different
      replicate mount 3f9c2a1:best /mnt  look at the best checkpoint's files
      replicate checkout 3f9c2a1         bring its files back

    An ID is the start of the id of an experiment or a checkpoint (4 characters or more), `latest` for the
    newest experiment, or a choice within an experiment: EXP:best, EXP:latest, EXP:step=N, EXP:code.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in (
    *(ls, ps, show, diff, files, cat, checkout, mount, mounts, umount),
    *(status, flush, rm, du, doctor, daemon, completion),
):
    program.add_command(_command)
