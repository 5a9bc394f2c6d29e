"""The console script `replicate`: runs one command line and turns whatever happens into an exit status.

0 done, 1 failed, 2 wrong usage, 3 daemon or repository unreachable, 130 interrupted, 141 nobody reads our
output any more, 143 a foreground mount ended by SIGTERM. Errors are one line on stderr (and a hint); a
traceback is shown only for a bug of ours, and only with `--verbose`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import click

    from replicate.cli.session import Session

_INTERRUPTED = 130
_PIPE_CLOSED = 141
_USAGE = 2


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    try:
        status = run(sys.argv[1:])
    except KeyboardInterrupt:  # while modules are being imported
        status = _INTERRUPTED
    # What was written is flushed, and taking down all that was imported takes longer than many commands.
    os._exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns its exit status and raises nothing but an interrupt while importing."""
    from replicate.cli.program import program
    from replicate.cli.session import Session

    if "_REPLICATE_COMPLETE" in os.environ:
        program.main(prog_name="replicate")  # answers the shell and exits
    session = Session()

    def invoke() -> None:
        with program.make_context("replicate", list(arguments), obj=session) as context:
            program.invoke(context)

    try:
        status = _attempt(invoke, session)
        status = _attempt(session.console.flush, session) or status
    except BrokenPipeError:
        session.console.forget_output()
        status = _PIPE_CLOSED
    return status


def _attempt(action: Callable[[], None], session: Session) -> int:
    """Do it and report what it raises; returns the exit status. A `BrokenPipeError` is passed on."""
    try:
        action()
    except BrokenPipeError:
        raise
    except BaseException as error:
        return _report(error, session)
    return 0


def _report(error: BaseException, session: Session) -> int:
    """Say what went wrong; returns the exit status for it."""
    import click

    from replicate.cli.refusals import describe_refusal
    from replicate.errors import ReplicateError

    console = session.console
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        console.note("interrupted")
        return _INTERRUPTED
    if isinstance(error, click.ClickException):
        console.fail(*_explain_usage(error))
        return _USAGE
    if isinstance(error, ReplicateError):
        console.fail(error.message, error.hint or _bug_hint(error))
        return error.exit_status
    if not isinstance(error, Exception):
        raise error
    if session.verbose:
        import traceback

        console.note("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, OSError):
        # The system's refusal, not our mistake: a directory we may not enter, for example.
        console.fail(*describe_refusal(error))
    else:
        console.fail(f"this is a bug in replicate: {type(error).__name__}: {error}", _bug_hint(None))
    return 1


def _bug_hint(error: Exception | None) -> str:
    """Where to look after a bug of ours; empty for an error that is none."""
    from replicate.errors import InternalError
    from replicate.home import find_home

    if error is not None and not isinstance(error, InternalError):
        return ""
    more = "" if error else " and the traceback that -v shows"
    return f"please report it, with the daemon's log{more}; the log is {find_home().log_file}"


def _explain_usage(error: click.ClickException) -> tuple[str, str]:
    """Message and hint for a command line that cannot be understood."""
    import click

    from replicate.cli.grammar import NoSuchCommand

    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f"see `{context.command_path} --help`" if context else ""
    if isinstance(error, NoSuchCommand):
        return error.message, f"did you mean `{error.nearest}`?" if error.nearest else hint
    if isinstance(error, click.NoSuchOption):
        near = error.possibilities[0] if error.possibilities else ""
        return f"no such option: {error.option_name}", f"did you mean `{near}`?" if near else hint
    message = error.format_message().strip().rstrip(".")
    # How click lists the values of an argument that is missing.
    message = message.replace(". Choose from:\n\t", ", one of ").replace(",\n\t", ", ")
    return message[:1].lower() + message[1:], hint
