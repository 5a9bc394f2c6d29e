"""The tree of commands. `main` runs it; `reference` documents it.

A command's module is imported when the command is asked for: all of them together take longer than most
commands.
"""

from __future__ import annotations

from typing import ClassVar

import click

from replicate.cli.grammar import Group

_PACKAGE = "replicate.cli.commands"


class _Program(Group):
    modules: ClassVar = {
        "ls": (f"{_PACKAGE}.listing", "ls"),
        "ps": (f"{_PACKAGE}.listing", "ps"),
        "show": (f"{_PACKAGE}.showing", "show"),
        "diff": (f"{_PACKAGE}.diffing", "diff"),
        "files": (f"{_PACKAGE}.files", "files"),
        "cat": (f"{_PACKAGE}.files", "cat"),
        "checkout": (f"{_PACKAGE}.checking_out", "checkout"),
        "mount": (f"{_PACKAGE}.mounting", "mount"),
        "mounts": (f"{_PACKAGE}.mounting", "list_mounts"),
        "umount": (f"{_PACKAGE}.mounting", "umount"),
        "status": (f"{_PACKAGE}.storing", "status"),
        "flush": (f"{_PACKAGE}.storing", "flush"),
        "rm": (f"{_PACKAGE}.removing", "rm"),
        "du": (f"{_PACKAGE}.storing", "du"),
        "gc": (f"{_PACKAGE}.collecting", "gc"),
        "doctor": (f"{_PACKAGE}.doctor", "doctor"),
        "daemon": (f"{_PACKAGE}.daemon", "daemon"),
        "completion": (f"{_PACKAGE}.completion", "completion"),
    }
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
