"""`docs/cli.md`, written from the commands themselves: `python -m replicate.cli.reference > docs/cli.md`.

Renders what click knows of each command, with words of our own around it, so that the text does not change
with the version of click. A test compares the file with this module's output.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

import click

from replicate.cli.grammar import GlobalOption
from replicate.cli.program import program

_INTRODUCTION = """\
# The command line

<!-- Written by `python -m replicate.cli.reference`; change the commands, not this file. -->

Data goes to stdout, everything else (questions, progress, warnings, errors) to stderr. Tables are for
people: on a terminal they are fitted to its width, elsewhere nothing is cut. `--json` is for programs: its
keys stay, times are RFC 3339 in UTC, sizes are bytes, floats that JSON has not are the strings `"NaN"`,
`"Infinity"` and `"-Infinity"`, and a path that is not UTF-8 has its bytes in base64 in a key ending in
`_bytes`. Colours are used on a terminal only, and never with `NO_COLOR`.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | the command line is wrong |
| 3 | the daemon or the repository cannot be reached |
| 130 | interrupted |
| 141 | whoever read the output has gone (as in `replicate ls \\| head -1`) |
| 143 | ended by SIGTERM, after unmounting (`replicate mount --foreground`) |
"""


def render_reference() -> str:
    """The whole document."""
    sections = [_INTRODUCTION, _render_global_options()]
    sections += [_render_command(path, command) for path, command in _walk("replicate", program)]
    return "\n".join(sections)


def _walk(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None, "it is listed"
            yield from _walk(f"{path} {name}", child)


def _render_global_options() -> str:
    options = [option for option in program.params if isinstance(option, GlobalOption)]
    return (
        "## Options of every command\n\nBefore or after the name of the command; `-h`, `--help` prints its"
        f" help.\n\n{_render_options(options)}"
    )


def _render_command(path: str, command: click.Command) -> str:
    name = path.split()[-1]
    aliases = [alias for alias, target in program.aliases.items() if target == name and path.count(" ") == 1]
    also = f"\nAlso called {', '.join(f'`{alias}`' for alias in aliases)}.\n" if aliases else ""
    arguments = [p.metavar or "" for p in command.params if isinstance(p, click.Argument)]
    options = [p for p in command.params if isinstance(p, click.Option) and not isinstance(p, GlobalOption)]
    rest = ["COMMAND"] if isinstance(command, click.Group) else arguments
    usage = " ".join([path, "[OPTIONS]", *rest])
    table = f"\n{_render_options(options)}" if options else ""
    return f"## {path}\n\n```\n{usage}\n```\n\n{_render_help(command.help or '')}{also}{table}"


def _render_help(text: str) -> str:
    """The help as Markdown: paragraphs, and what click prints as it stands as a block of code."""
    paragraphs = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if not paragraph.startswith("\b\n"):
            paragraphs.append(paragraph)
            continue
        title, _, block = paragraph.removeprefix("\b\n").partition("\n")
        paragraphs.append(f"{title}\n\n```\n{inspect.cleandoc(block)}\n```")
    return "\n\n".join(paragraphs) + "\n"


def _render_options(options: list[click.Option] | list[GlobalOption]) -> str:
    rows = ["| option | meaning |", "|---|---|"]
    for option in options:
        names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
        value = "" if option.is_flag else f" `{option.metavar}`"
        default = f" Default: {option.default}." if option.show_default else ""
        rows.append(f"| {names}{value} | {option.help}{default} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render_reference())
