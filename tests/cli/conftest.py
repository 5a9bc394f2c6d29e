"""Records as the daemon would send them, and a view without a terminal."""

from datetime import datetime, timedelta, timezone

import pytest

from replicate.cli.view import View
from replicate.records import (
    CheckpointRecord,
    ExperimentRecord,
    ExperimentSummary,
    PrimaryMetric,
    best_checkpoint,
    latest_checkpoint,
)

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=timezone.utc)


def full_id(start):
    return start + "0" * (64 - len(start))


@pytest.fixture
def now():
    return NOW


@pytest.fixture
def view():
    return View(now=NOW)


@pytest.fixture
def make_checkpoint():
    def make(start, step=0, *, minutes_ago=0, metrics=None, primary=None, state="stored", **fields):
        return CheckpointRecord(
            id=full_id(start),
            experiment_id=fields.pop("experiment_id", full_id("ee")),
            created=NOW - timedelta(minutes=minutes_ago),
            step=step,
            metrics=metrics or {},
            primary_metric=PrimaryMetric(*primary) if primary else None,
            state=state,
            **fields,
        )

    return make


@pytest.fixture
def make_summary():
    def make(start, checkpoints=(), *, minutes_ago=0, status="stopped", state="stored", error="", **fields):
        return ExperimentSummary(
            record=ExperimentRecord(
                id=full_id(start), created=NOW - timedelta(minutes=minutes_ago), **fields
            ),
            status=status,
            state=state,
            error=error,
            checkpoint_count=len(checkpoints),
            latest=latest_checkpoint(checkpoints),
            best=best_checkpoint(checkpoints),
        )

    return make
