"""What a reference was taken to mean, in words and as a reference that means the same for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

from replicate.cli.damage import is_damaged, name_checkpoint
from replicate.ids import short

if TYPE_CHECKING:
    from replicate.query import Resolution


def exact_reference(meant: Resolution) -> str:
    """A reference to exactly this, which a checkpoint made in the meantime does not change."""
    if meant.checkpoint is not None:
        return meant.checkpoint.id
    return f"{meant.summary.record.id}:code"


def explain_choice(meant: Resolution) -> str:
    """`9ab12cd (step 4), the best checkpoint of 3f9c2a1`; empty when the user named it himself."""
    experiment = short(meant.summary.record.id)
    if meant.checkpoint is None:
        if meant.chosen == "code":
            return f"the files that {experiment} began with"
        return f"{experiment}, which has no checkpoints"
    if meant.chosen == "step":
        return f"{name_checkpoint(meant.checkpoint)}, the newest checkpoint of {experiment} with that step"
    if meant.chosen in ("best", "latest"):
        return f"{name_checkpoint(meant.checkpoint)}, the {meant.chosen} checkpoint of {experiment}"
    return ""


def explain_damage(meant: Resolution) -> str:
    """What cannot be relied on because a record is damaged; empty when none is."""
    if meant.checkpoint is not None and is_damaged(meant.checkpoint):
        return f"the record of checkpoint {short(meant.checkpoint.id)} is damaged, its files may be missing"
    if is_damaged(meant.summary):
        experiment = short(meant.summary.record.id)
        return f"the record of experiment {experiment} is damaged, files that it began with may be missing"
    return ""


def name_snapshot(meant: Resolution) -> str:
    """What is meant, with or without a choice."""
    if meant.checkpoint is not None and not meant.chosen:
        experiment = short(meant.summary.record.id)
        return f"{name_checkpoint(meant.checkpoint)}, a checkpoint of {experiment}"
    return explain_choice(meant)
