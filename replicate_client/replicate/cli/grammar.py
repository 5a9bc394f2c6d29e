"""How command lines are understood: options that every command has, other names, and the nearest name.

`-D`, `-R`, `-v` and `--version` may stand before or after the name of a command; the later one wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, ClassVar

import click

from replicate._version import __version__
from replicate.cli.arguments import check_not_empty
from replicate.cli.session import Session


class GlobalOption(click.Option):
    """An option that every command has."""


class Command(click.Command):
    """A command that also takes the global options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params = [*self.params, *_make_global_options()]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options first, those of every command after them."""
        _write_options(self, ctx, formatter)


class NoSuchCommand(click.UsageError):
    """A word that is no command, and the nearest that is (or empty)."""

    def __init__(self, word: str, nearest: str, context: click.Context) -> None:
        super().__init__(f"no such command: {word}", context)
        self.nearest = nearest


class Group(click.Group):
    """A group of commands that takes the global options as well.

    `aliases` maps other names that a command answers to, `other_words` what people may type who know a
    command by another name: they are only told. `modules` names, in the order of help, the module and the
    function of commands that are imported only when they are asked for.
    """

    command_class = Command
    modules: ClassVar[Mapping[str, tuple[str, str]]] = MappingProxyType({})
    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({})
    other_words: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Without a command: wrong usage, like everything else that is missing.
        super().__init__(*args, **{**kwargs, "no_args_is_help": False})
        self.params = [*self.params, *_make_global_options()]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, then the commands."""
        _write_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order in which they were added, which is that of a day's work."""
        return [*self.modules, *(name for name in self.commands if name not in self.modules)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name or alias."""
        name = self.aliases.get(cmd_name, cmd_name)
        if name in self.modules and name not in self.commands:
            module, function = self.modules[name]
            self.add_command(getattr(import_module(module), function), name)
        return super().get_command(ctx, name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments begin with; raises `NoSuchCommand`."""
        word = args[0]
        if self.get_command(ctx, word) is None and not word.startswith("-"):
            import difflib  # here, because mistakes are rare

            near = difflib.get_close_matches(word, [*self.list_commands(ctx), *self.aliases], n=1)
            raise NoSuchCommand(word, self.other_words.get(word, near[0] if near else ""), ctx)
        return super().resolve_command(ctx, args)


def _write_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the options of a command's help in two sections."""
    for title, is_global in (("Options", False), ("Global options", True)):
        records = [
            record
            for parameter in command.get_params(ctx)
            if isinstance(parameter, GlobalOption) is is_global
            and (record := parameter.get_help_record(ctx)) is not None
        ]
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


def _make_global_options() -> list[click.Option]:
    return [
        GlobalOption(
            ["-D", "--project-directory"],
            metavar="DIR",
            type=click.Path(),
            expose_value=False,
            callback=_remember("project_directory"),
            help="Project directory (default: the nearest with a replicate.yaml, else this one).",
        ),
        GlobalOption(
            ["-R", "--repository"],
            metavar="URL",
            expose_value=False,
            callback=_remember("repository"),
            help="Repository, for example file:///data/runs (default: that of the project).",
        ),
        GlobalOption(
            ["-v", "--verbose"],
            is_flag=True,
            expose_value=False,
            callback=_remember("verbose"),
            help="Say more; show the traceback of a bug.",
        ),
        GlobalOption(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Print the version.",
        ),
    ]


def _remember(attribute: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        check_not_empty(context, parameter, value)
        session = context.ensure_object(Session)
        if value:
            setattr(session, attribute, value)

    return callback


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        context.ensure_object(Session).console.write(f"replicate {__version__}\n")
        context.exit()
