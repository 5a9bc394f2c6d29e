"""Which experiments and checkpoints are listed although their records cannot be read.

The daemon lists them under their ids, as failed, with the reason, and with the epoch as the time of their
creation. All else that their records would say is not known, and must not be shown as if it were.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

from replicate.ids import short
from replicate.records import CheckpointRecord, ExperimentSummary, checkpoint_label

_UNREADABLE_CREATED = datetime(1970, 1, 1, tzinfo=timezone.utc)


def is_damaged(listed: ExperimentSummary | CheckpointRecord) -> bool:
    """Whether the record could not be read; `error` says why."""
    created = listed.created if isinstance(listed, CheckpointRecord) else listed.record.created
    return listed.state == "failed" and created == _UNREADABLE_CREATED


def name_checkpoint(checkpoint: CheckpointRecord) -> str:
    """Its short id, with the step if that is known."""
    return short(checkpoint.id) if is_damaged(checkpoint) else checkpoint_label(checkpoint)


def leave_out_damaged(summaries: Sequence[ExperimentSummary]) -> list[ExperimentSummary]:
    """The experiments of which more is known than their ids."""
    return [summary for summary in summaries if not is_damaged(summary)]
