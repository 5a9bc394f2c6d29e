"""`daemon start|stop|status|logs`: the background process that stores and mounts."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import click
from click.exceptions import Exit

from replicate.cli.arguments import MAX_COUNT, check_rate, json_option
from replicate.cli.grammar import Group
from replicate.cli.json_output import time_json
from replicate.cli.session import Session
from replicate.cli.text import format_age
from replicate.errors import DaemonUnavailable, ReplicateError
from replicate.home import find_home
from replicate.phrases import escape, plural

_FOLLOW_INTERVAL_S = 0.25


@click.group(cls=Group)
def daemon() -> None:
    """Control the daemon.

    There is one daemon a user. Every command and the library start it when they need it, and it leaves by
    itself when it has nothing to do, so none of this is needed in daily life.

    \b
    Examples:
      replicate daemon status
      replicate daemon logs -f
    """


@daemon.command()
@click.option(
    "--limit",
    "upload_limit",
    metavar="RATE",
    callback=check_rate,
    help="Send at most so much to repositories, such as 50MB/s, until this daemon ends.",
)
@click.pass_obj
def start(session: Session, upload_limit: int) -> None:
    """Start the daemon, unless it runs.

    A limit for one project, and for good, is `upload_limit` in its replicate.yaml.

    \b
    Examples:
      replicate daemon start --limit 50MB/s
    """
    from replicate import connection

    console = session.console
    before = connection.probe()
    info = connection.start_daemon(upload_limit)
    if before is None or before.pid != info.pid:
        console.note(f"The daemon started (pid {info.pid}, version {escape(info.version)})")
        return
    console.note(f"The daemon already runs (pid {info.pid}, version {escape(info.version)})")
    if upload_limit:
        raise ReplicateError(
            "the limit was not set: it is chosen when the daemon starts",
            hint="`replicate daemon stop`, then start it again",
        )


@daemon.command()
@click.pass_obj
def stop(session: Session) -> None:
    """Stop the daemon.

    What it has captured stays on disk, and the next daemon goes on with it.
    """
    from replicate import connection, query

    console = session.console
    info = connection.probe()
    if info is None:
        console.note("The daemon does not run")
        return
    try:
        status = query.status()
    except DaemonUnavailable:
        waiting = 0  # of another version: it can be stopped, but not asked
    else:
        waiting = status.pending + status.active
    connection.stop_daemon()
    console.note(f"The daemon stopped (pid {info.pid})")
    if waiting:
        console.note(f"Not stored yet: {plural(waiting, 'item')}; the next daemon goes on with that")


@daemon.command("status")
@json_option
@click.pass_obj
def status_(session: Session, as_json: bool) -> None:
    """Tell whether the daemon runs, without starting it; exits with 3 if it does not.

    `replicate status` shows what it is doing.
    """
    from replicate import connection

    console, home = session.console, find_home()
    info = connection.probe()
    if as_json:
        console.write_json(
            {
                "running": info is not None,
                "pid": info.pid if info else None,
                "version": info.version if info else None,
                "protocol": info.protocol if info else None,
                "started": time_json(info.started) if info else None,
                "socket": str(home.socket),
                "log": str(home.log_file),
            }
        )
    elif info is None:
        console.write("not running (it is started when it is needed)\n")
    else:
        started = format_age(info.started, console.view.now, console.view.zone)
        console.write(f"running (pid {info.pid}, version {escape(info.version)}, started {started})\n")
    if info is None:
        raise Exit(DaemonUnavailable.exit_status)


@daemon.command()
@click.option("-f", "--follow", is_flag=True, help="Go on printing as the log grows.")
@click.option(
    "-n",
    "--lines",
    metavar="N",
    type=click.IntRange(0, MAX_COUNT),
    default=100,
    show_default=True,
    help="How many lines to begin with.",
)
@click.pass_obj
def logs(session: Session, follow: bool, lines: int) -> None:
    """Print the daemon's log.

    \b
    Examples:
      replicate daemon logs -n 20
      replicate daemon logs -f
    """
    console, log = session.console, find_home().log_file
    try:
        for line in follow_lines(log, lines) if follow else last_lines(log, lines):
            console.write(escape(line) + "\n")
            if follow:
                console.flush()
    except FileNotFoundError:
        raise ReplicateError(
            f"there is no log yet: {log}", hint="the daemon writes it when it runs"
        ) from None


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a file, without line ends; raises `FileNotFoundError`."""
    with log.open(encoding="utf-8", errors="surrogateescape") as file:
        return [line.rstrip("\n") for line in deque(file, maxlen=count)]


def follow_lines(log: Path, count: int) -> Iterator[str]:
    """The last lines of a file, and then those that are appended, also after it is rotated; endless."""
    file = log.open(encoding="utf-8", errors="surrogateescape")
    try:
        yield from (line.rstrip("\n") for line in deque(file, maxlen=count))
        partial = ""
        while True:
            partial += file.readline()
            if partial.endswith("\n"):
                yield partial.rstrip("\n")
                partial = ""
            elif not _is_still(log, file.fileno()):
                file.close()
                file = log.open(encoding="utf-8", errors="surrogateescape")
            else:
                time.sleep(_FOLLOW_INTERVAL_S)
    finally:
        file.close()


def _is_still(log: Path, descriptor: int) -> bool:
    """Whether the open file is the one of that name; also while there is none, in the midst of a rotation."""
    try:
        return os.path.samestat(log.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return True
