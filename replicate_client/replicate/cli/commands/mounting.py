"""`mount`, `mounts`, `umount`: snapshots as directories."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.exceptions import Exit

from replicate.cli.arguments import check_not_empty, json_option
from replicate.cli.grammar import Command
from replicate.cli.json_output import Json, path_json
from replicate.cli.render.mounts import render_mounts
from replicate.cli.session import Session
from replicate.cli.text import format_shell_word
from replicate.errors import InvalidArgument, NotFound
from replicate.ids import parse_reference, short
from replicate.phrases import escape

if TYPE_CHECKING:
    from types import FrameType

    from replicate.query import MountInfo


_INTERRUPTED = 130
_TERMINATED = 143


class _Terminated(KeyboardInterrupt):
    """Raised by SIGTERM, so that it ends a mount as Ctrl-C does."""


@click.command(cls=Command)
@click.argument("where", metavar="[ID] DIR", nargs=-1, required=True, type=click.Path())
@click.option(
    "--foreground", is_flag=True, help="Stay, and unmount on Ctrl-C (then exit with 130) or SIGTERM (143)."
)
@json_option
@click.pass_obj
def mount(session: Session, where: tuple[str, ...], foreground: bool, as_json: bool) -> None:
    """Mount a snapshot, or the whole repository, read-only.

    Files are fetched when they are read, so a mount of any size is there at once. Returns when the mount
    can be used. Of an experiment, the best checkpoint is mounted, else the latest, laid over the files that
    it began with, as `replicate checkout` does. Without an ID, the whole repository is mounted, with
    directories by experiment, name and tag.

    \b
    Examples:
      mkdir /tmp/best && replicate mount 3f9c2a1:best /tmp/best
      replicate mount /mnt/runs && ls /mnt/runs/experiments
      replicate mount latest /mnt --foreground
    """
    if len(where) > 2:
        raise click.UsageError("expected [ID] DIR: an id and a directory, or only a directory")
    directory = where[-1]
    if not directory:
        raise InvalidArgument("the value of DIR is empty", hint="was a variable of the shell not set?")
    reference = ""
    if len(where) == 2:
        reference = where[0]
        parse_reference(reference)
    elif _reads_as_id(directory) and not os.path.lexists(directory):
        raise click.UsageError(
            f"no directory to mount {directory} on (or ./{directory}, to mount the repository there)"
        )
    from replicate import query

    mounted: MountInfo | None = None
    with _Interrupts() as interrupts:
        try:
            with interrupts.deferred():  # or the daemon would finish a mount that nobody knows of
                mounted = query.mount(session.project.repository, reference, directory)
            _announce(session, mounted, foreground=foreground, as_json=as_json)
            if foreground:
                _wait_for_exit(mounted.pid)
                session.console.note(f"{escape(mounted.directory)} was unmounted")
        except KeyboardInterrupt as interrupt:
            if mounted is None:
                session.console.note("interrupted")
            else:
                _unmount(session, mounted)
            raise Exit(_TERMINATED if isinstance(interrupt, _Terminated) else _INTERRUPTED) from None


@click.command(cls=Command)
@json_option
@click.pass_obj
def mounts(session: Session, as_json: bool) -> None:
    """List what is mounted.

    \b
    Examples:
      replicate mounts
      replicate mounts --json | jq -r '.[].directory'
    """
    from replicate import query

    console = session.console
    found = query.list_mounts()
    if as_json:
        console.write_json([_mount_json(mounted) for mounted in found])
    elif found:
        console.write(render_mounts(found, console.view))
    else:
        console.note("Nothing is mounted")


@click.command(cls=Command)
@click.argument("target", metavar="[DIR|ID]", required=False, type=click.Path(), callback=check_not_empty)
@click.option("--all", "everything", is_flag=True, help="Unmount everything.")
@click.pass_obj
def umount(session: Session, target: str | None, everything: bool) -> None:
    """Unmount a directory, a snapshot, or everything.

    \b
    Examples:
      replicate umount /tmp/best
      replicate umount 3f9c2a1
      replicate umount --all
    """
    if everything == (target is not None):
        raise click.UsageError("give a directory, an id, or --all")
    from replicate import query

    if target is None:
        gone = query.unmount(all=True)
    elif _is_id_of(target, query.list_mounts()):
        gone = query.unmount(id=_find_id(session, target))
    else:
        gone = query.unmount(directory=target)
    for mounted in gone:
        session.console.note(f"Unmounted {escape(mounted.directory)}")
    if not gone:
        session.console.note("Nothing was mounted")


def _is_id_of(target: str, mounted: list[MountInfo]) -> bool:
    """Whether the user means an id and not a directory, which goes first where both are possible."""
    directory = os.path.abspath(target)
    if any(os.path.abspath(found.directory) == directory for found in mounted):
        return False
    return _reads_as_id(target)


def _reads_as_id(word: str) -> bool:
    try:
        parse_reference(word)
    except InvalidArgument:
        return False
    return True


def _find_id(session: Session, reference: str) -> str:
    """The id, or the beginning of it, of what a reference means."""
    from replicate import query

    parsed = parse_reference(reference)
    if parsed.prefix and not parsed.selector:
        return reference  # the daemon knows what is mounted, also of other repositories
    meant = query.resolve(session.project.repository, reference)
    if meant.checkpoint is not None and parsed.selector:
        return meant.checkpoint.id
    return meant.summary.record.id


def _announce(session: Session, mounted: MountInfo, *, foreground: bool, as_json: bool) -> None:
    """Say that the mount can be used."""
    console = session.console
    if as_json:
        console.write_json(_mount_json(mounted))
        console.flush()
        return
    command = f"replicate umount {format_shell_word(mounted.directory)}"
    end = "Ctrl-C ends it" if foreground else f"`{command}` ends it"
    console.note(f"Mounted {_describe(mounted)} on {escape(mounted.directory)} ({end})")


def _unmount(session: Session, mounted: MountInfo) -> None:
    """End a mount that was made here."""
    from replicate import query

    try:
        query.unmount(directory=mounted.directory)
    except NotFound:
        pass  # unmounted elsewhere at the same moment
    session.console.note(f"Unmounted {escape(mounted.directory)}")


def _wait_for_exit(pid: int) -> None:
    """Return when the process is gone; it is no child of ours."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([descriptor], [], [])
    finally:
        os.close(descriptor)


class _Interrupts:
    """Makes SIGTERM interrupt the block as Ctrl-C does, so that a mount is not left behind."""

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._is_deferring = False
        self._deferred: int | None = None

    def __enter__(self) -> _Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a script
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block finish before it is interrupted, unless the user insists."""
        self._is_deferring = True
        try:
            yield
        finally:
            self._is_deferring = False
        if self._deferred is not None:
            _raise_interrupt(self._deferred)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._is_deferring or self._deferred is not None:
            _raise_interrupt(number)
        self._deferred = number


def _raise_interrupt(number: int) -> NoReturn:
    raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _describe(mounted: MountInfo) -> str:
    if not mounted.id:
        return "the repository"
    if mounted.id == mounted.experiment_id:
        return f"experiment {short(mounted.id)}"
    return f"checkpoint {short(mounted.id)}"


def _mount_json(mounted: MountInfo) -> dict[str, Json]:
    return {
        "id": mounted.id or None,
        **path_json("directory", mounted.directory),
        "pid": mounted.pid,
        "experiment_id": mounted.experiment_id or None,
        "repository": mounted.repository,
    }
