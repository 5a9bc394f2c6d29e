"""`status`, `flush`, `du`: what is still to be stored, and what storage holds."""

from __future__ import annotations

import click
from click.exceptions import Exit

from replicate.cli.arguments import check_number, id_argument, ids_argument, json_option
from replicate.cli.grammar import Command
from replicate.cli.render.storing import (
    describe_queue,
    describe_unreadable,
    disk_usage_json,
    render_disk_usage,
    render_failures,
    render_status,
    status_json,
)
from replicate.cli.session import Session
from replicate.errors import ReplicateError, RepositoryMissing
from replicate.ids import parse_reference, short
from replicate.phrases import escape, plural

#: Of the snapshots that `du` leaves out.
_MAX_NAMED = 5


@click.command(cls=Command)
@json_option
@click.pass_obj
def status(session: Session, as_json: bool) -> None:
    """Show the daemon, its queue and what failed.

    Exits with 1 if anything failed to be stored, or a mount was given up.

    \b
    Examples:
      replicate status
      replicate status --json | jq .queue.pending
    """
    from replicate import query

    console = session.console
    now = query.status(_bucket(session))
    if as_json:
        console.write_json(status_json(now))
    else:
        console.write(render_status(now, console.view))
    if now.failures or now.failed or now.failed_mounts:
        raise Exit(1)


@click.command(cls=Command)
@id_argument(required=False)
@click.option(
    "--timeout",
    "timeout_s",
    metavar="S",
    type=click.FloatRange(min=0),
    callback=check_number,
    help="Give up after S seconds (default: wait as long as it takes).",
)
@json_option
@click.pass_obj
def flush(session: Session, reference: str | None, timeout_s: float | None, as_json: bool) -> None:
    """Wait until everything captured is stored.

    With an ID, until that experiment (with its checkpoints) or that checkpoint is. Interrupting loses
    nothing: the daemon goes on. Exits with 1 if anything failed or the time is over.

    \b
    Examples:
      replicate flush
      replicate flush latest --timeout 60
    """
    from replicate import query

    console = session.console
    ids = [_find_id(session, reference)] if reference else []
    last = None
    with console.progress("Storing") as progress:

        def show(now: query.DaemonStatus) -> None:
            nonlocal last
            last = now
            held_up = f"; held up: {now.waiting_because}" if now.waiting_because else ""
            progress.show(f"Storing: {describe_queue(now)}{held_up}")

        try:
            end = query.wait_stored(ids, timeout_s, show, _bucket(session))
        except TimeoutError:
            left = f": {describe_queue(last)}" if last else ""
            if last and last.waiting_parts:
                part = last.waiting_parts[0]
                left += f"; {short(part.id)} {part.waits_for}"
            raise ReplicateError(
                f"not everything is stored after {timeout_s:g} s{left}",
                hint="nothing is lost, the daemon goes on; `replicate status` shows how far it is",
            ) from None
    failures = [f for f in end.failures if not ids or f.id in ids or f.experiment_id in ids]
    if as_json:
        console.write_json(status_json(end))
    elif failures:
        console.note(render_failures(failures, console.view).rstrip("\n"))
    else:
        console.note("Everything is stored")
    if failures:
        console.fail(f"{plural(len(failures), 'item')} failed to be stored")
        raise Exit(1)


@click.command(cls=Command)
@ids_argument(required=False)
@json_option
@click.pass_obj
def du(session: Session, references: tuple[str, ...], as_json: bool) -> None:
    """Show how much space experiments take, and what saved it.

    LOGICAL is what was saved, UNIQUE what is left when equal pieces are counted once, STORED what these
    take in the repository, with what is needed to read them. DEDUP is how much of LOGICAL was saved by
    counting once, COMPRESSION how much of UNIQUE by how it is stored. What experiments share is counted for
    each, but once in the last row, which is the whole repository.

    The second table says how the pieces are stored: as they are (raw), compressed (zstd), as planes of
    bytes of numbers (planes), or as the difference from an earlier checkpoint (delta). "Bases only" are
    pieces that deltas need and no snapshot has any more. (An experiment's STORED counts those that it needs
    also when another experiment has them.)

    Exits with 1 if a snapshot is damaged, which is then left out. docs/concepts.md defines every figure.

    \b
    Examples:
      replicate du
      replicate du 3f9c2a1 9ab12cd
      replicate du --json | jq .stored_bytes
    """
    from replicate import usage

    console, project = session.console, session.project
    try:
        report = usage.disk_usage(project.repository, references)
    except RepositoryMissing:
        if references or project.repository_origin != "default":
            raise
        report = usage.DiskUsageReport()
    if as_json:
        console.write_json(disk_usage_json(report))
    else:
        if not report.experiments:
            console.note(f"There are no experiments in {escape(project.repository)}")
        console.write(render_disk_usage(report, console.view, chosen=bool(references)))
    for snapshot in report.unreadable[:_MAX_NAMED]:
        console.fail(f"{describe_unreadable(snapshot)} is left out: {snapshot.error}")
    if more := len(report.unreadable[_MAX_NAMED:]):
        console.fail(f"{plural(more, 'more snapshot')} left out", hint="`replicate du --json` names them all")
    if report.unreadable:
        raise Exit(1)


def _bucket(session: Session) -> str:
    """The project's repository if it is in a bucket: how that is reached then goes with the call.

    The commands are not about a project, and work where there is none, or one whose file is wrong.
    """
    from replicate.access import scheme_of

    try:
        repository = session.project.repository
    except ReplicateError:
        return ""
    return repository if scheme_of(repository) is not None else ""


def _find_id(session: Session, reference: str) -> str:
    """The complete id of the experiment or checkpoint to wait for."""
    from replicate import query

    meant = query.resolve(session.project.repository, reference)
    whole_experiment = meant.named_experiment and not parse_reference(reference).selector
    if meant.checkpoint is None or whole_experiment:
        return meant.summary.record.id
    return meant.checkpoint.id
