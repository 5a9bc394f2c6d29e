"""`completion`: what makes a shell complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from replicate.cli.grammar import Command
from replicate.cli.session import Session


@click.command(cls=Command)
@click.argument("shell", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for bash, zsh or fish.

    \b
    Examples:
      eval "$(replicate completion bash)"        in ~/.bashrc
      eval "$(replicate completion zsh)"         in ~/.zshrc
      replicate completion fish > ~/.config/fish/completions/replicate.fish
    """
    script_class = get_completion_class(shell)
    assert script_class is not None, "the choices are those that click has"
    root = context.find_root().command
    script = script_class(root, {}, "replicate", "_REPLICATE_COMPLETE").source()
    context.ensure_object(Session).console.write(script + "\n")
