"""Arguments and options that several commands share, checked before anything is asked of the daemon."""

from __future__ import annotations

import math
import os
import posixpath
from collections.abc import Callable
from typing import Any, TypeVar

import click

from replicate.errors import InvalidArgument
from replicate.ids import parse_reference
from replicate.sizes import parse_rate

_F = TypeVar("_F", bound=Callable[..., Any])

#: Counts up to here fit into every type that they are handed to.
MAX_COUNT = 2**31 - 1

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def id_argument(name: str = "reference", *, required: bool = True) -> Callable[[_F], _F]:
    """The argument `ID`: an id in any of the forms that users may write; raises `InvalidArgument`."""
    metavar = "ID" if required else "[ID]"
    return click.argument(name, metavar=metavar, required=required, callback=_check_reference)


def ids_argument(*, required: bool) -> Callable[[_F], _F]:
    """The arguments `ID…`, a tuple; raises `InvalidArgument`."""
    metavar = "ID..." if required else "[ID]..."
    return click.argument(
        "references", metavar=metavar, nargs=-1, required=required, callback=_check_references
    )


def check_not_empty(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The value as it is; raises `InvalidArgument` when it is empty, as that of an unset `$VARIABLE`."""
    if value == "":
        raise InvalidArgument(
            f"the value of {_name(parameter)} is empty", hint="was a variable of the shell not set?"
        )
    return value


def check_text(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Text that was typed as UTF-8, whatever the locale; raises `InvalidArgument` for other bytes."""
    try:
        return os.fsencode(value).decode("utf-8")
    except UnicodeError:
        raise InvalidArgument(f"the value of {_name(parameter)} is not UTF-8: {value}") from None


def check_texts(
    context: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> tuple[str, ...]:
    """The same for an option that may be repeated."""
    return tuple(check_text(context, parameter, text) for text in value)


def check_snapshot_path(context: click.Context, parameter: click.Parameter, value: str | None) -> str:
    """A path inside a snapshot in its normal form, empty for all of it; raises `InvalidArgument`."""
    check_not_empty(context, parameter, value)
    path = "." if value is None else posixpath.normpath(value)
    if path.startswith(("/", "../")) or path == ".." or "\0" in path:
        raise InvalidArgument(
            f"not a path in a snapshot: {value}",
            hint="give it relative to the project directory, as `replicate files ID` lists it",
        )
    return "" if path == "." else path


def check_file_path(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """A path inside a snapshot that may be a file; raises `InvalidArgument`."""
    path = check_snapshot_path(context, parameter, value)
    if not path:
        raise InvalidArgument(
            f"not a file but the whole snapshot: {value}", hint="`replicate files ID` lists its files"
        )
    return path


def check_number(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """The value as it is; raises `click.BadParameter` for NaN, which is in every range for click."""
    if value is not None and math.isnan(value):
        raise click.BadParameter(f"{value} is not a number", context, parameter)
    return value


def check_rate(context: click.Context, parameter: click.Parameter, value: str | None) -> int:
    """Bytes a second, 0 when it is not given; raises `InvalidArgument`."""
    if value is None:
        return 0
    try:
        return parse_rate(value)
    except ValueError as error:
        raise InvalidArgument(f"{_name(parameter)}: {error}") from None


def _name(parameter: click.Parameter) -> str:
    """An option or argument as its usage writes it: `-f/--filter`, `PATH`."""
    if isinstance(parameter, click.Option):
        return "/".join(parameter.opts)
    return (parameter.metavar or parameter.name or "").strip("[]")


def _check_reference(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        parse_reference(value)
    return value


def _check_references(
    context: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> tuple[str, ...]:
    for reference in value:
        parse_reference(reference)
    return value
