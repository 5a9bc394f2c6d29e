"""What a worker makes of a record that is in the repository already."""

from dataclasses import replace
from datetime import timedelta

import pytest

from replicate import wire
from replicate.ids import ExperimentId, new_id
from replicate.records import ExperimentRecord, utc_now
from replicated.job_records import find_recorded
from replicated.journal import Job
from replicated.parts import Settled
from replicated.repository import Repository
from replicated.store.memory import MemoryStore


@pytest.fixture
def repository(tmp_path):
    opened = Repository.open_on(MemoryStore(), cache=tmp_path, create=True)
    yield opened
    opened.close()


def job_of(record):
    encoded = wire.encode_experiment(record).SerializeToString()
    return Job(record.id, "experiment", record.id, "memory:test", encoded, created_ns=0, is_durable=True)


def test_an_experiment_that_another_process_has_begun_is_that_of_both(repository):
    mine = ExperimentRecord(ExperimentId(new_id()), utc_now(), params={"lr": 1})
    assert find_recorded(repository, job_of(mine)) is None
    repository.put_experiment(replace(mine, created=mine.created - timedelta(seconds=1)))
    assert find_recorded(repository, job_of(mine)) == Settled("stored")


def test_what_an_earlier_try_recorded_counts(repository):
    mine = ExperimentRecord(ExperimentId(new_id()), utc_now())
    repository.put_experiment(mine)
    assert find_recorded(repository, job_of(mine)) == Settled("stored")
    found = find_recorded(repository, replace(job_of(mine), has_files=True))
    assert (found.state, found.error) == ("failed", "it was recorded without its files")
