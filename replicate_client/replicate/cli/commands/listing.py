"""`ls` and `ps`: the experiments of a repository."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

from replicate.cli.arguments import MAX_COUNT, check_text, check_texts, json_option
from replicate.cli.grammar import Command
from replicate.cli.json_output import summary_json
from replicate.cli.render.experiments import render_csv, render_experiments
from replicate.cli.session import Session
from replicate.errors import RepositoryMissing
from replicate.phrases import escape

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")


def _list_options(command: _F) -> _F:
    options = (
        click.option(
            "-f",
            "--filter",
            "filters",
            metavar="EXPR",
            multiple=True,
            callback=check_texts,
            help="Only experiments for which EXPR is true, such as `lr >= 0.01`. Repeatable: all must be.",
        ),
        click.option(
            "-s",
            "--sort",
            metavar="KEY[-desc]",
            default="",
            callback=check_text,
            help="Order by a param, metric or built-in name; `-desc` for the largest first.",
        ),
        click.option(
            "-n",
            "--limit",
            metavar="N",
            type=click.IntRange(1, MAX_COUNT),
            help="At most N experiments: the newest, or with --sort the first.",
        ),
        click.option(
            "--all", "everything", is_flag=True, help="All params and metrics, not only the telling ones."
        ),
        click.option("-q", "--quiet", is_flag=True, help="Print only the complete ids, one a line."),
        json_option,
        click.option("--csv", "as_csv", is_flag=True, help="Print CSV with exact values."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(cls=Command)
@_list_options
@click.pass_obj
def ls(session: Session, /, filters: tuple[str, ...], **options: Any) -> None:
    """List experiments.

    Only the params that differ between them are shown, and the metrics by which checkpoints are ranked;
    --all shows all of them.

    \b
    Examples:
      replicate ls
      replicate ls -f 'status = running or created > 2026-11-01'
      replicate ls -f 'optimizer = adam' -f 'lr >= 0.01' --sort val/loss
      replicate ls -q -f 'step < 10' | xargs -r replicate rm -f

    A filter is NAME OPERATOR VALUE with one of = != < <= > >= ~ (regular expression), where NAME is a param,
    a metric of the best checkpoint, or created, step, status, user, host, command, name or tag. `and`, `or`,
    `not` and parentheses combine them.
    """
    found_none = "No experiment matches" if filters else "There are no experiments"
    _list(session, filters, found_none, **options)


@click.command(cls=Command)
@_list_options
@click.pass_obj
def ps(session: Session, /, filters: tuple[str, ...], **options: Any) -> None:
    """List running experiments.

    The same as `replicate ls --filter 'status = running'`, with the same options.

    \b
    Examples:
      replicate ps
      replicate ps -f 'host = gpu1' --json
    """
    found_none = "No running experiment matches" if filters else "There are no running experiments"
    _list(session, ("status = running", *filters), found_none, **options)


def _list(
    session: Session,
    filters: Sequence[str],
    found_none: str,
    *,
    sort: str,
    limit: int | None,
    everything: bool,
    quiet: bool,
    as_json: bool,
    as_csv: bool,
) -> None:
    for name, given in (("--json", as_json), ("--csv", as_csv), ("--all", everything)):
        if quiet and given:
            raise click.UsageError(f"-q/--quiet prints only ids and cannot go with {name}")
    if as_json and as_csv:
        raise click.UsageError("--json and --csv cannot go together")
    console = session.console
    from replicate import query

    if quiet:
        ids = _query(session, query.list_ids, filters, sort, limit)
        console.write("".join(f"{identifier}\n" for identifier in ids))
        return
    summaries = _query(session, query.list_summaries, filters, sort, limit)
    if as_json:
        console.write_json([summary_json(summary) for summary in summaries])
    elif as_csv:
        console.write(render_csv(summaries))
    elif summaries:
        console.write(render_experiments(summaries, console.view, everything=everything))
    else:
        console.note(f"{found_none} in {escape(session.project.repository)}")


def _query(
    session: Session,
    ask: Callable[[str, Sequence[str], str, int], Iterable[_T]],
    filters: Sequence[str],
    sort: str,
    limit: int | None,
) -> list[_T]:
    project = session.project
    # A list runs from old to new; of a long one people want the new end.
    newest = limit is not None and not sort
    try:
        found = list(ask(project.repository, filters, "created-desc" if newest else sort, limit or 0))
    except RepositoryMissing:
        if project.repository_origin == "default":
            return []  # nothing was recorded here yet
        raise
    return found[::-1] if newest else found
