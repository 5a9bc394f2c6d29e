"""What a signal means for a request whose sender waits: whether it is to be given up.

The kernel says that a signal came, once a request, and not which. Only an error can be answered then, and
programs do not expect one of files: profilers, timers and children that end send signals all the time, and
with `SA_RESTART` a program asks that nobody see them. So a request goes on unless the signal ends the
program, or is one by which people ask it to end. Used by `loop`, which asks again as long as the request
takes, because the kernel does not tell of a second signal.
"""

from __future__ import annotations

import signal
from enum import Enum, auto
from typing import Final


class Verdict(Enum):
    """What is to become of a request."""

    #: It is worked on.
    GO_ON = auto()
    #: It is given up when it takes longer; the program does something about it then.
    SOON = auto()
    #: It is given up now: the program ends with it.
    NOW = auto()


def _mask(*numbers: int) -> int:
    return sum(1 << (number - 1) for number in numbers)


#: By these people and schedulers ask a program to end.
_REQUESTS_TO_END: Final = _mask(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
#: What does not end a program that has said nothing about them: they stop it, or are ignored.
_HARMLESS: Final = _mask(
    signal.SIGCHLD,
    signal.SIGCONT,
    signal.SIGSTOP,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGURG,
    signal.SIGWINCH,
)
_FIELDS: Final = (b"SigPnd:", b"ShdPnd:", b"SigBlk:", b"SigIgn:", b"SigCgt:")


def judge(pid: int) -> Verdict:
    """What the signals that wait for a thread mean for its request.

    `SOON` when that cannot be said: the thread may be in a namespace that we do not see into.
    """
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return judge_status(file.read())
    except (OSError, ValueError):
        return Verdict.SOON


def judge_status(status: bytes) -> Verdict:
    """The same for what /proc says of the thread. Raises `ValueError` when it says nothing of signals."""
    masks = {}
    for line in status.splitlines():
        name, _, value = line.partition(b"\t")
        if name in _FIELDS:
            masks[name] = int(value, 16)
    if len(masks) != len(_FIELDS):
        raise ValueError("no signals")
    own, shared, blocked, ignored, caught = (masks[name] for name in _FIELDS)
    waiting = (own | shared) & ~blocked & ~ignored
    if waiting & ~caught & ~_HARMLESS:
        return Verdict.NOW
    return Verdict.SOON if waiting & caught & _REQUESTS_TO_END else Verdict.GO_ON
