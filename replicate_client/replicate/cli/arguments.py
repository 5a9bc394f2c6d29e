"""Arguments and options that several commands share, checked before anything is asked of the daemon."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from typing import Any, TypeVar

import click

from replicate.errors import InvalidArgument
from replicate.ids import parse_reference

_F = TypeVar("_F", bound=Callable[..., Any])

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


def check_snapshot_path(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """A path inside a snapshot in its normal form, empty for all of it; raises `InvalidArgument`."""
    path = posixpath.normpath(value) if value else "."
    if path.startswith(("/", "../")) or path == ".." or "\0" in path:
        raise InvalidArgument(
            f"not a path in a snapshot: {value}",
            hint="give it relative to the project directory, as `replicate files ID` lists it",
        )
    return "" if path == "." else path


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
