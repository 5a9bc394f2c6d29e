"""The two streams of the command line: data on stdout, everything else on stderr.

The only module that knows whether a terminal is there. It chooses colours and width, asks questions, shows
progress; commands hand it finished text. Nothing here depends on the daemon.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO

from replicate.cli.json_output import Json, to_json
from replicate.cli.text import shorten
from replicate.cli.view import View
from replicate.errors import ReplicateError
from replicate.phrases import escape, format_size
from replicate.records import utc_now

_PROGRESS_INTERVAL_S = 0.1
_BAR_WIDTH = 24


class Console:
    """stdout and stderr as they are now; made once a command."""

    def __init__(self) -> None:
        self._out = _usable(sys.stdout)
        self._err = _usable(sys.stderr)
        self._err_colors = _wants_color(self._err)
        #: How to render for stdout.
        self.view = View(
            now=utc_now(),
            width=shutil.get_terminal_size().columns if self._out.isatty() else None,
            color=_wants_color(self._out),
            zone=None,
        )

    def write(self, text: str) -> None:
        """Print rendered data, lines and all, on stdout."""
        with self._writing():
            self._out.write(text)

    def write_bytes(self, data: bytes) -> None:
        """Pass bytes on to stdout as they are."""
        with self._writing():
            self._out.flush()
            self._out.buffer.write(data)

    def write_json(self, data: Json) -> None:
        """Print one JSON document on stdout."""
        self.write(to_json(data) + "\n")

    def write_json_array(self, items: Iterable[Json]) -> None:
        """Print a JSON array on stdout item by item, however many there are.

        Nothing is printed if the first item raises, so that a failed command leaves stdout empty.
        """
        opening = "[\n"
        for item in items:
            self.write(opening + textwrap.indent(to_json(item), "  "))
            opening = ",\n"
        self.write("[]\n" if opening == "[\n" else "\n]\n")

    def note(self, text: str) -> None:
        """Say something on stderr that is not an error."""
        try:
            self._err.write(text + "\n")
            self._err.flush()
        except BrokenPipeError:
            raise
        except OSError:  # a full disk: there is nobody to tell
            _forget(self._err)

    def warn(self, text: str) -> None:
        """Say something on stderr that the user should look at."""
        self.note(self._paint("warning:", "33") + f" {escape(text)}")

    def fail(self, message: str, hint: str = "") -> None:
        """Say on stderr what went wrong, and what to do next."""
        self._flush_out()
        self.note(self._paint("error:", "31") + f" {escape(message)}")
        if hint:
            self.note(self._paint("hint:", "36") + f" {escape(hint)}")

    @property
    def can_ask(self) -> bool:
        """Whether somebody is there to answer."""
        return sys.stdin is not None and sys.stdin.isatty() and self._err.isatty()

    def confirm(self, question: str) -> bool:
        """Ask until the answer is yes or no (or empty: no); a closed stdin is an error naming `--force`."""
        self._flush_out()
        while True:
            self._err.write(f"{question} [y/N] ")
            self._err.flush()
            answer = sys.stdin.readline()
            if not answer:
                self.note("")
                raise ReplicateError("no answer: stdin is closed", hint="give -f/--force to go on unasked")
            word = answer.strip().lower()
            if word in ("y", "yes"):
                return True
            if word in ("", "n", "no"):
                return False
            self.note("Please answer y or n.")

    @contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        """A line that shows how far something is, gone when it is over; nothing unless on a terminal."""
        progress = Progress(self._err if _is_smart_terminal(self._err) else None, what)
        try:
            yield progress
        finally:
            progress.clear()

    def flush(self) -> None:
        """Write out what is buffered; raises `BrokenPipeError` when nobody reads any more."""
        self._flush_out()

    def forget_output(self) -> None:
        """Let the interpreter's last flush go nowhere, so that it has nothing to complain about."""
        _forget(self._out)

    def _flush_out(self) -> None:
        with self._writing():
            self._out.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Makes the system's refusal of output one that names stdout."""
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            self.forget_output()
            raise ReplicateError(f"cannot write to stdout: {error.strerror}") from error

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._err_colors else text


class Progress:
    """One line that is written over and over."""

    def __init__(self, stream: TextIO | None, what: str) -> None:
        self._stream = stream
        self._what = what
        self._begin = time.monotonic()
        self._last = 0.0
        self._shown = False

    def show_bytes(self, done: int, total: int, note: str = "") -> None:
        """Show a bar for `done` of `total` bytes, and the rest in words."""
        elapsed = time.monotonic() - self._begin
        share = min(1.0, done / total) if total else 1.0
        filled = int(share * _BAR_WIDTH)
        bar = "#" * filled + "-" * (_BAR_WIDTH - filled)
        rate = f"  {format_size(done / elapsed)}/s" if elapsed > 1 else ""
        size = f"{format_size(done)} of {format_size(total)}"
        self.show(f"{self._what} [{bar}] {share:4.0%}  {size}{rate}{'  ' + note if note else ''}")

    def show(self, text: str) -> None:
        """Show a text in place of the one before."""
        now = time.monotonic()
        if self._stream is None or (self._shown and now - self._last < _PROGRESS_INTERVAL_S):
            return
        width = shutil.get_terminal_size().columns
        self._stream.write("\r" + shorten(escape(text), width - 1) + "\x1b[K")
        self._stream.flush()
        self._last, self._shown = now, True

    def clear(self) -> None:
        """Remove the line, so that whatever follows begins on a clean one."""
        if self._stream is not None and self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown = False


def _usable(stream: TextIO | None) -> TextIO:
    """The stream, made to write any text; a stand-in when the shell has closed it (`>&-`)."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        # A locale without UTF-8 must not turn a name into a traceback.
        reconfigure(errors="backslashreplace")
    return stream


def _forget(stream: TextIO) -> None:
    """Send to nowhere what the stream holds and all that will be written to it."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, stream.fileno())
    os.close(sink)


def _is_smart_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _wants_color(stream: TextIO) -> bool:
    return _is_smart_terminal(stream) and not os.environ.get("NO_COLOR")
