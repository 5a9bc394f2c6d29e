"""The few lines that the library says of its own accord, on stderr and to the logger `replicate`.

Only what a person who trains a model should know and no exception tells. Called by the write side; never
raises, because saying something must not stop a training run.
"""

from __future__ import annotations

import logging
import sys

from replicate.phrases import escape

logger = logging.getLogger("replicate")
# Without it, Python itself would print warnings of a logger that nobody configured, beside our line.
logger.addHandler(logging.NullHandler())

#: Lines, and subjects of lines, that are not said again.
_said: set[str] = set()


def say(line: str) -> None:
    """Tell people one line."""
    logger.info("%s", line)
    _print(line)


def warn_once(line: str, *, about: str = "") -> None:
    """Tell people of trouble, once in this process; the logger is told every time.

    Of lines with the same `about` only the first is told: those whose numbers differ each time.
    """
    logger.warning("%s", line)
    subject = about or line
    if subject not in _said:
        _said.add(subject)
        _print(line)


def forget(about: str) -> None:
    """That trouble is over: warn of the next of its kind."""
    _said.discard(about)


def _print(line: str) -> None:
    try:
        print(f"replicate: {escape(line)}", file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        pass  # no stderr, or a closed one
