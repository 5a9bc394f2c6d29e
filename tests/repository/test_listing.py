"""Lists that the catalog has ready say the same as the records themselves, and cost as good as nothing."""

import dataclasses
import os
import random
from datetime import datetime, timedelta, timezone

import pytest

from replicate import wire
from replicate._pb import daemon_pb2 as pb
from replicate.ids import CheckpointId, ExperimentId
from replicate.records import (
    CheckpointRecord,
    ExperimentRecord,
    GitState,
    PrimaryMetric,
    ProcessIdentity,
    System,
    utc_now,
)
from replicated.catalog import Catalog
from replicated.experiments import Experiments
from replicated.filters import parse_filter, sort_summaries
from replicated.format.metadata import EndEdit, ResumeEdit
from replicated.journal import Journal
from replicated.messages import encode_list
from replicated.processes import current_boot_id
from replicated.record_merging import merge_announced
from replicated.repository import Repository
from replicated.store.local import LocalStore
from replicated.store.memory import MemoryStore

TIME = datetime(2026, 5, 1, tzinfo=timezone.utc)
FILTERS = (
    "lr > 0.5",
    "loss < 0.5 or accuracy >= 0.5",
    "optimizer.name = adam and not status = stopped",
    "status = unknown",
    "status = running or status = killed",
    "step >= 1",
    "tag = b",
    "tags ~ '^a'",
    "name ~ '1$' or host = h1",
    "command = 'train 3'",
    "created > 2026-05-01T00:05Z",
    "loss = null",
    "user != me",
)
SORTS = ("", "created-desc", "lr", "loss-desc", "step", "status", "tag-desc", "name", "optimizer.name")


class FarStore(MemoryStore):
    """A store whose requests to read are counted, and said to be costly."""

    def __init__(self):
        super().__init__()
        self.requests = []

    @property
    def capabilities(self):
        return dataclasses.replace(super().capabilities, has_costly_requests=True, is_near=False)

    def get(self, key, offset=0, length=None):
        self.requests.append(("get", key))
        return super().get(key, offset, length)

    def list(self, prefix):
        self.requests.append(("list", prefix))
        return super().list(prefix)


class Repositories:
    """The one repository, as `Experiments` asks for it."""

    def __init__(self, repository):
        self._repository = repository

    def get(self, _url):
        return self._repository

    def patiently(self, _url, _what, act):
        act()


@pytest.fixture(params=["near", "far"])
def store(request, tmp_path):
    return FarStore() if request.param == "far" else LocalStore(tmp_path / "repository")


@pytest.fixture
def repository(store, tmp_path):
    opened = Repository.open_on(store, cache=tmp_path / "cache", create=True)
    yield opened
    opened.close()


@pytest.fixture
def experiments(repository, tmp_path):
    journal = Journal(tmp_path / "journal.db")
    made = Experiments(journal, Repositories(repository), tmp_path / "catalogs")
    yield made
    made.close()
    journal.close()


def an_id(source):
    return source.randbytes(32).hex()


def put_checkpoint(repository, experiment_id, source, step):
    metrics = {"accuracy": source.random(), "name": "text"}
    if source.random() < 0.8:
        metrics["loss"] = source.choice([source.random(), float("nan"), 1, "none"])
    goal = source.choice(["minimize", "maximize"])
    repository.put_checkpoint(
        CheckpointRecord(
            CheckpointId(an_id(source)),
            experiment_id,
            TIME + timedelta(seconds=source.randrange(1000)),
            step,
            metrics=metrics,
            primary_metric=PrimaryMetric("loss", goal) if source.random() < 0.7 else None,
            state=source.choice(["stored", "stored", "failed"]),
            error="it failed",
            world_size=source.choice([1, 1, 4]),
        )
    )


def put_experiment(repository, source, number):
    process = source.choice(
        [
            None,
            ProcessIdentity(os.getpid(), 0, "another boot"),
            ProcessIdentity(2**22 + number, 1, current_boot_id()),
        ]
    )
    record = ExperimentRecord(
        ExperimentId(an_id(source)),
        TIME + timedelta(minutes=source.randrange(10)),
        name=source.choice(["", f"run {number}"]),
        tags=tuple(source.sample(["a", "b", "c"], source.randrange(3))),
        user=source.choice(["me", "you"]),
        host=f"h{number % 3}",
        command=f"train {number}",
        params={"lr": source.random(), "optimizer": {"name": source.choice(["adam", "sgd"])}, "none": None},
        python_packages={"numpy": "2.0"},
        python_version="3.12",
        system=System(os="an os"),
        git=GitState("0" * 40, "main", True, "diff"),
        process=process,
        paths=("lost",) if source.random() < 0.1 else (),
    )
    repository.put_experiment(record)
    for step in range(source.randrange(5)):
        put_checkpoint(repository, record.id, source, step)
    for edit in range(source.randrange(3)):
        time = TIME + timedelta(hours=1 + edit)
        ended = EndEdit(source.choice(["stopped", "failed", "killed"]), time, source.choice([0, 10**9]))
        repository.put_edit(record.id, an_id(source), ended if source.random() < 0.7 else ResumeEdit(time))
    return record.id


def lean(summary):
    """A summary without what lists do not show."""
    record = dataclasses.replace(
        summary.record,
        python_packages={},
        python_version="",
        system=System(),
        git=None,
        process=None,
        replicate_version="",
    )
    return dataclasses.replace(summary, record=record)


def listed(experiments, *question):
    found = experiments.list_summaries("url", *question)
    batches = list(encode_list(found, only_ids=False))
    ids = [name for batch in encode_list(found, only_ids=True) for name in batch.ids]
    summaries = [
        wire.decode_summary(pb.ExperimentSummary.FromString(data))
        for batch in batches
        for data in batch.summaries
    ]
    assert ids == [summary.record.id for summary in summaries]
    return summaries


def from_records(experiments):
    """Every experiment, made of the decoded records one by one."""
    return experiments._summaries(experiments._view("url"))


@pytest.mark.parametrize("seed", range(3))
def test_what_is_ready_is_what_the_records_say(experiments, repository, seed):
    source = random.Random(seed)
    known = []
    for _ in range(3):
        known += [put_experiment(repository, source, len(known)) for _ in range(8)]
        if source.random() < 0.5 and repository.store.capabilities.has_costly_requests:
            merge_announced(repository, repository.log.list())
        for experiment_id in source.sample(known, 3):
            put_checkpoint(repository, experiment_id, source, 9)
        expected = from_records(experiments)
        # Text, because NaN is not equal to itself.
        assert repr(listed(experiments)) == repr([lean(summary) for summary in expected])
        assert len(expected) == len(known)
        for text in FILTERS:
            for sort in SORTS:
                accept = parse_filter(text, utc_now())
                wanted = sort_summaries([summary for summary in expected if accept(summary)], sort)
                found = experiments.list_summaries("url", [text], sort)
                assert [one.id for one in found] == [summary.record.id for summary in wanted], (text, sort)
            whole = experiments.list_experiments("url", [text], sort, 2)
            assert repr(whole) == repr(wanted[:2])


def test_a_list_shows_what_was_written_since(experiments, repository):
    source = random.Random(7)
    first = put_experiment(repository, source, 1)
    count = listed(experiments)[0].checkpoint_count
    put_checkpoint(repository, first, source, 20)
    assert listed(experiments)[0].checkpoint_count == count + 1
    repository.put_edit(first, an_id(source), EndEdit("failed", TIME + timedelta(days=1)))
    (shown,) = listed(experiments)
    assert (shown.status, shown.ended) == ("failed", TIME + timedelta(days=1))


def test_a_warm_list_of_runs_without_end_is_one_listing_of_the_log_and_one_of_signs_of_life(tmp_path):
    store = FarStore()
    repository = Repository.open_on(store, cache=tmp_path / "cache", create=True)
    journal = Journal(tmp_path / "journal.db")
    experiments = Experiments(journal, Repositories(repository), tmp_path / "catalogs")
    for number in range(300):
        repository.put_experiment(
            ExperimentRecord(
                ExperimentId(f"{number:064x}"), TIME, process=ProcessIdentity(number, 1, "another boot")
            )
        )
    assert len(listed(experiments)) == 300
    store.requests.clear()
    assert {summary.status for summary in listed(experiments)} == {"unknown"}
    assert store.requests == [("list", "log/"), ("list", "heartbeats/")]
    store.requests.clear()
    assert len(experiments.list_summaries("url", (), "", 10)) == 10
    assert store.requests == [("list", "log/")]
    experiments.close()
    journal.close()
    repository.close()


def test_a_warm_list_of_a_directory_lists_no_experiment_again(tmp_path, monkeypatch):
    repository = Repository.open_on(
        LocalStore(tmp_path / "repository"), cache=tmp_path / "cache", create=True
    )
    catalog = Catalog(repository, tmp_path / "catalogs")
    source = random.Random(3)
    known = [put_experiment(repository, source, number) for number in range(20)]
    settled = TIME.timestamp()
    for directory in (tmp_path / "repository").glob("*/*"):
        os.utime(directory, (settled, settled))
    catalog.refresh()
    compared = []
    compare = catalog._compare_details
    monkeypatch.setattr(catalog, "_compare_details", lambda one: (compared.append(one), compare(one))[1])
    catalog.refresh()
    assert compared == []
    put_checkpoint(repository, known[4], source, 30)
    catalog.refresh()
    assert compared == [known[4]]
    assert max(checkpoint.step for checkpoint in catalog.checkpoints(known[4])) == 30
    catalog.close()
    repository.close()


def test_a_list_goes_in_messages_that_are_not_large(experiments, repository):
    for number in range(6):
        repository.put_experiment(
            ExperimentRecord(ExperimentId(f"{number:064x}"), TIME, params={"text": "x" * 200_000})
        )
    batches = list(encode_list(experiments.list_summaries("url"), only_ids=False))
    assert [len(batch.summaries) for batch in batches] == [1] * 6
