"""Identifiers of experiments, checkpoints and snapshots, and how users refer to them.

An id is 64 lower-case hexadecimal characters from the system's random source, chosen by the client
(so that a retried request names the same object) and independent of any seeded generator.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal, NewType

from replicate.errors import InvalidArgument

ExperimentId = NewType("ExperimentId", str)
CheckpointId = NewType("CheckpointId", str)
#: A snapshot carries the id of the experiment or checkpoint whose files it holds.
SnapshotId = NewType("SnapshotId", str)

ID_LENGTH = 64
SHORT_LENGTH = 7
#: Shorter prefixes are refused: they are typing mistakes more often than ids.
MIN_PREFIX_LENGTH = 4

_ID = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{1,64}")
_LATEST = "latest"

Selector = Literal["", "best", "latest", "code", "step"]


def new_id() -> str:
    """A new random id."""
    return os.urandom(ID_LENGTH // 2).hex()


def short(identifier: str) -> str:
    """The 7-character form shown to people."""
    return identifier[:SHORT_LENGTH]


def is_id(text: str) -> bool:
    """Whether `text` is a complete id."""
    return _ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Reference:
    """What a user wrote where an id is expected, parsed.

    `prefix` is a hexadecimal id prefix, or empty for `latest`. `selector` chooses among the checkpoints
    of an experiment: best, latest, the newest with `step`, or none of them (`code`: only what `init`
    saved); empty when nothing was chosen.
    """

    prefix: str
    selector: Selector = ""
    step: int | None = None

    @property
    def is_latest(self) -> bool:
        """Whether the newest experiment is meant."""
        return self.prefix == ""


def parse_reference(text: str) -> Reference:
    """Parse `EXP`, `CKPT`, `latest`, `EXP:best`, `EXP:latest`, `EXP:step=N` or `EXP:code`.

    Raises `InvalidArgument` naming the text and the accepted forms.
    """
    base, colon, selection = text.strip().partition(":")
    if base == _LATEST:
        prefix = ""
    else:
        prefix = base.lower()
        if not _PREFIX.fullmatch(prefix):
            raise InvalidArgument(
                f"invalid id: {text!r}",
                hint="an id is hexadecimal, `latest`, or EXP:best, EXP:latest, EXP:step=N, EXP:code",
            )
        if len(prefix) < MIN_PREFIX_LENGTH:
            raise InvalidArgument(
                f"id is too short: {text!r}", hint=f"give at least {MIN_PREFIX_LENGTH} characters"
            )
    if not colon:
        return Reference(prefix)
    if selection in ("best", "latest", "code"):
        return Reference(prefix, selection)  # type: ignore[arg-type]
    step = re.fullmatch(r"step=(\d{1,18})", selection)
    if step:
        return Reference(prefix, "step", int(step.group(1)))
    raise InvalidArgument(
        f"unknown selection {selection!r} in {text!r}", hint="use :best, :latest, :step=N or :code"
    )
