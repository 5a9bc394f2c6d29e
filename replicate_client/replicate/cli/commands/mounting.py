"""`mount`, `mounts`, `umount`: snapshots as directories."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.exceptions import Exit

from replicate.cli.arguments import check_not_empty, check_number, json_option
from replicate.cli.grammar import Command
from replicate.cli.render.mounts import mount_json, render_mounts
from replicate.cli.session import Session
from replicate.cli.text import format_shell_word
from replicate.errors import InvalidArgument, MountFailed, NotFound
from replicate.ids import parse_reference, short
from replicate.phrases import escape, format_size, plural

if TYPE_CHECKING:
    from types import FrameType

    from replicate.mounts import MountInfo
    from replicate.records import ProcessIdentity


_INTERRUPTED = 130
_TERMINATED = 143
#: What `--prefetch` alone means.
_EVERYTHING = "**"
#: A day: the daemon takes no more.
_MAX_TIMEOUT_S = 86400.0
_PROGRESS_INTERVAL_S = 0.2


class _Terminated(KeyboardInterrupt):
    """Raised by SIGTERM, so that it ends a mount as Ctrl-C does."""


@click.command(cls=Command)
@click.argument("where", metavar="[ID] DIR", nargs=-1, required=True, type=click.Path())
@click.option(
    "--engine",
    type=click.Choice(["auto", "native", "mfusepy", "fusepy"]),
    default="auto",
    help="What serves the mount (default: the best that can; `replicate doctor` lists them).",
)
@click.option(
    "--passthrough/--no-passthrough",
    default=None,
    help="Let the kernel itself read files that are cached whole, or never (default: where it is faster).",
)
@click.option("--allow-other", is_flag=True, help="Let other users look as well, root among them.")
@click.option(
    "--timeout",
    "timeout_s",
    metavar="S",
    type=click.FloatRange(min=0, min_open=True, max=_MAX_TIMEOUT_S),
    callback=check_number,
    help="Let a read fail that the repository has not answered after S seconds (default: 60).",
)
@click.option(
    "--prefetch",
    metavar="[PATTERN|trace]",
    is_flag=False,
    flag_value=_EVERYTHING,
    callback=check_not_empty,
    help="Read files in advance and wait for that: all, those that match, or those of the last time.",
)
@click.option("--persist", is_flag=True, help="Mount it again after a restart of the machine.")
@click.option(
    "--foreground", is_flag=True, help="Stay, and unmount on Ctrl-C (then exit with 130) or SIGTERM (143)."
)
@json_option
@click.pass_obj
def mount(
    session: Session,
    where: tuple[str, ...],
    engine: str,
    passthrough: bool | None,
    allow_other: bool,
    timeout_s: float | None,
    prefetch: str | None,
    persist: bool,
    foreground: bool,
    as_json: bool,
) -> None:
    """Mount a snapshot, or the whole repository, read-only.

    Files are fetched when they are read, so a mount of any size is there at once. Returns when the mount
    can be used. Of an experiment, the best checkpoint is mounted, else the latest, laid over the files that
    it began with, as `replicate checkout` does. Without an ID, the whole repository is mounted, with
    directories by experiment, name and tag.

    A mount whose process dies is mounted again at once by the daemon. With --persist it comes back after a
    restart of the machine as well, when the daemon is started; `replicate umount` ends that.

    --prefetch comes last, or with `=`: alone it reads all files, --prefetch='*.safetensors' those that match
    a pattern as in .gitignore, --prefetch=trace what was read in the last mount of the same files, in the
    same order. Interrupting the wait leaves the mount, and the reading, as they are.

    \b
    Examples:
      mkdir /tmp/best && replicate mount 3f9c2a1:best /tmp/best
      replicate mount /mnt/runs && ls /mnt/runs/experiments
      replicate mount latest /mnt --foreground
      replicate mount 3f9c2a1 /mnt/data --persist --prefetch='train/**'
    """
    reference, directory = _split_arguments(where, prefetch)
    from replicate import mounts

    if foreground and persist:
        raise click.UsageError("a mount in the foreground ends with this command: leave out --persist")
    choices = mounts.MountChoices(
        engine="" if engine == "auto" else engine,
        passthrough=passthrough,
        allow_other=allow_other,
        timeout_s=timeout_s or 0.0,
        cache_bytes=session.project.cache_size,
        prefetch=prefetch or "",
        persist=persist,
        owner=_identify() if foreground else None,
    )
    mounted: MountInfo | None = None
    is_warming = False
    with _Interrupts() as interrupts:
        try:
            with interrupts.deferred():  # or the daemon would finish a mount that nobody knows of
                mounted = mounts.mount(session.project.repository, reference, directory, choices)
            if not as_json:
                _announce(session, mounted, foreground=foreground)
            if prefetch:
                is_warming = True
                mounted = _wait_until_warm(session, mounted)
                is_warming = False
            if as_json:
                session.console.write_json(mount_json(mounted))
                session.console.flush()
            if foreground:
                _wait_for_end(mounted)
                session.console.note(f"{escape(mounted.directory)} was unmounted")
        except KeyboardInterrupt as interrupt:
            if mounted is None:
                session.console.note("interrupted")
            elif is_warming and not foreground:
                session.console.note("interrupted; it stays mounted, and reading goes on")
            else:
                _unmount(session, mounted)
            raise Exit(_TERMINATED if isinstance(interrupt, _Terminated) else _INTERRUPTED) from None


@click.command("mounts", cls=Command)
@json_option
@click.pass_obj
def list_mounts(session: Session, as_json: bool) -> None:
    """List what is mounted, and what should be but is not, with the reason.

    \b
    Examples:
      replicate mounts
      replicate mounts --json | jq -r '.[].directory'
    """
    from replicate import mounts

    console = session.console
    found = mounts.list_mounts()
    if as_json:
        console.write_json([mount_json(mounted) for mounted in found])
    elif found:
        console.write(render_mounts(found, console.view))
    else:
        console.note("Nothing is mounted")


@click.command(cls=Command)
# Not as a path: click looks at those, and would wait for a mount whose process does not answer.
@click.argument(
    "target", metavar="[DIR|ID]", required=False, type=click.UNPROCESSED, callback=check_not_empty
)
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
    from replicate import mounts

    if target is None:
        gone = mounts.unmount(all=True)
    elif _is_id_of(target, mounts.list_mounts()):
        gone = mounts.unmount(id=_find_id(session, target))
    else:
        gone = mounts.unmount(directory=target)
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


def _split_arguments(where: tuple[str, ...], prefetch: str | None) -> tuple[str, str]:
    """The reference (or empty) and the directory that were given; raises `UsageError`."""
    if len(where) > 2:
        raise click.UsageError("expected [ID] DIR: an id and a directory, or only a directory")
    directory = where[-1]
    if not directory:
        raise InvalidArgument("the value of DIR is empty", hint="was a variable of the shell not set?")
    if len(where) == 2:
        parse_reference(where[0])
        return where[0], directory
    if prefetch is not None and _reads_as_id(prefetch):
        # `--prefetch ID DIR`, where the option has taken the id away.
        raise click.UsageError(
            f"is {prefetch} an id or a pattern? write --prefetch last, or --prefetch=PATTERN"
        )
    if _reads_as_id(directory) and not os.path.lexists(directory):
        raise click.UsageError(
            f"no directory to mount {directory} on (or ./{directory}, to mount the repository there)"
        )
    return "", directory


def _identify() -> ProcessIdentity:
    from replicate.environment import identify_process  # takes 15 ms to import

    return identify_process()


def _announce(session: Session, mounted: MountInfo, *, foreground: bool) -> None:
    """Say that the mount can be used."""
    command = f"replicate umount {format_shell_word(mounted.directory)}"
    end = "Ctrl-C ends it" if foreground else f"`{command}` ends it"
    session.console.note(f"Mounted {_describe(mounted)} on {escape(mounted.directory)} ({end})")


def _wait_until_warm(session: Session, mounted: MountInfo) -> MountInfo:
    """Show how far reading in advance is until it has ended; the mount as it is then."""
    console = session.console
    with console.progress("Reading") as progress:
        while (state := mounted.prefetch) is None or not state.is_finished:
            if mounted.error:
                return mounted
            if state is not None:
                files = f"{state.files_done:,} of {plural(state.files_total, 'file')}"
                progress.show_bytes(state.bytes_done, state.bytes_total, files)
            time.sleep(_PROGRESS_INTERVAL_S)
            current = _find(mounted.directory)
            if current is None:
                return mounted
            mounted = current
    if state.error:
        console.warn(f"not everything was read in advance: {state.error}")
    console.note(f"Read {plural(state.files_done, 'file')} ({format_size(state.bytes_done)}) in advance")
    return mounted


def _find(directory: str) -> MountInfo | None:
    from replicate import mounts

    return next((found for found in mounts.list_mounts() if found.directory == directory), None)


def _unmount(session: Session, mounted: MountInfo) -> None:
    """End a mount that was made here."""
    from replicate import mounts

    try:
        mounts.unmount(directory=mounted.directory)
    except NotFound:
        pass  # unmounted elsewhere at the same moment
    session.console.note(f"Unmounted {escape(mounted.directory)}")


def _wait_for_end(mounted: MountInfo) -> None:
    """Return when the mount was ended; while its process is replaced by another, it was not.

    Raises `MountFailed` when it was given up.
    """
    current: MountInfo | None = mounted
    while current is not None:
        if current.is_given_up:
            raise MountFailed(f"{current.directory} is not mounted any more: {current.error}")
        if current.pid:
            _wait_for_exit(current.pid)
        else:
            time.sleep(_PROGRESS_INTERVAL_S)
        current = _find(mounted.directory)


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
