"""The journal: rows survive, sums are right, and a journal of the first version is taken over."""

import errno
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from replicate.errors import QueueFull, StateUnwritable
from replicate.ids import ExperimentId, new_id
from replicated.admission import Admission, Bounds
from replicated.journal import APPLICATION_ID, Job, Journal

FIRST_SCHEMA = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL CHECK (kind IN ('experiment', 'checkpoint', 'edit')),
    experiment_id TEXT NOT NULL, repository TEXT NOT NULL, record BLOB NOT NULL, has_files INTEGER NOT NULL,
    file_count INTEGER NOT NULL, size_bytes INTEGER NOT NULL, is_durable INTEGER NOT NULL,
    boot_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('captured', 'stored', 'failed', 'removed')),
    error TEXT NOT NULL DEFAULT '', created_ns INTEGER NOT NULL, finished_ns INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX jobs_by_state ON jobs (state, repository, seq);
CREATE INDEX jobs_by_experiment ON jobs (experiment_id);
CREATE TABLE runs (
    experiment_id TEXT PRIMARY KEY, repository TEXT NOT NULL, pid INTEGER NOT NULL,
    start_ticks INTEGER NOT NULL, boot_id TEXT NOT NULL
) WITHOUT ROWID;
"""
EXPERIMENT = ExperimentId(new_id())


def make_job(**members) -> Job:
    values = {"id": new_id(), "kind": "checkpoint", "experiment_id": EXPERIMENT, "repository": "file:///r"}
    return Job(**{**values, "record": b"", "created_ns": 1, **members})


@pytest.fixture
def journal(tmp_path: Path):
    opened = Journal(tmp_path / "journal.db")
    yield opened
    opened.close()


def test_journal_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "journal.db")) as old:
        old.executescript(FIRST_SCHEMA)
        old.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        old.execute("PRAGMA user_version = 1")
        old.execute(
            "INSERT INTO jobs (id, kind, experiment_id, repository, record, has_files, file_count, "
            "size_bytes, is_durable, boot_id, state, created_ns) "
            "VALUES ('a', 'checkpoint', 'e', 'file:///r', x'01', 1, 2, 3, 1, 'boot', 'captured', 4)"
        )
        old.commit()
    for _ in range(2):
        journal = Journal(tmp_path / "journal.db")
        job = journal.find("a")
        assert (job.size_bytes, job.is_durable, job.frozen_bytes, job.record) == (3, True, 0, b"\x01")
        assert journal.entries("a") == b""
        assert journal.stalls() == {}
        journal.close()


def test_entries_are_kept_until_the_job_is_finished(journal: Journal) -> None:
    job = make_job(has_files=True)
    journal.add(job, b"what was captured")
    assert journal.entries(job.id) == b"what was captured"
    journal.finish(job.id, "stored", 2)
    assert journal.entries(job.id) == b""
    assert journal.entries("unknown") == b""


def test_stalls_add_up_once_a_request_and_go_into_the_edit(journal: Journal) -> None:
    first, second = make_job(), make_job()
    for _ in range(2):  # a repeated request
        journal.add(first, stall_ns=5)
    journal.add(second, stall_ns=7)
    assert journal.stalls() == {EXPERIMENT: 12}
    journal.add(make_job(kind="edit"), stall_ns=-12)
    assert journal.stalls() == {EXPERIMENT: 0}


def test_frozen_bytes_are_those_of_captured_jobs(journal: Journal) -> None:
    jobs = [make_job(has_files=True, frozen_bytes=10, spooled_bytes=n) for n in (1, 2, 4)]
    for job in jobs:
        journal.add(job)
    assert journal.frozen() == {"file:///r": (30, 7)}
    journal.finish(jobs[0].id, "stored", 2)
    journal.remove([jobs[1].id], 2)
    assert journal.frozen() == {"file:///r": (10, 4)}


class Clock:
    """Time that passes only by waiting."""

    def __init__(self) -> None:
        self.now = 0.0
        self.on_wait = lambda: None

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.on_wait()


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        (Bounds(queue_bytes=3 * 10**9), "3.0 GB wait to be stored, and `queue_limit` is 3.0 GB"),
        (Bounds(spool_bytes=10**9), "the spool holds 2.0 GB, and `spool_limit` is 1.0 GB"),
    ],
)
def test_above_a_bound_the_call_is_sent_back_with_the_reason(
    journal: Journal, bounds: Bounds, says: str
) -> None:
    journal.add(make_job(has_files=True, frozen_bytes=3 * 10**9, spooled_bytes=2 * 10**9))
    clock = Clock()
    admission = Admission(journal, clock.wait, lambda _: "no route to host", lambda: clock.now)
    with pytest.raises(QueueFull) as caught:
        admission.wait("file:///r", bounds)
    assert caught.value.message == says + "; nothing moves at present: no route to host"
    assert "replicate.yaml" in caught.value.hint
    assert clock.now > 0


def test_a_waiting_call_goes_on_when_a_job_is_stored(journal: Journal) -> None:
    job = make_job(has_files=True, frozen_bytes=100)
    journal.add(job)
    clock = Clock()
    clock.on_wait = lambda: journal.finish(job.id, "stored", 2)
    Admission(journal, clock.wait, lambda _: "", lambda: clock.now).wait("file:///r", Bounds(queue_bytes=100))
    assert journal.frozen() == {}


def test_nothing_waits_while_nothing_is_pending(journal: Journal) -> None:
    Admission(journal, Clock().wait, lambda _: "").wait("file:///r", Bounds(queue_bytes=1, spool_bytes=1))


@pytest.fixture
def syncs(monkeypatch):
    """Counts the syncs of journals."""
    done = []
    sync = os.fdatasync

    def count(descriptor: int) -> None:
        sync(descriptor)
        done.append(descriptor)

    monkeypatch.setattr(os, "fdatasync", count)
    return done


def test_durable_commit_is_synced_on_return(tmp_path: Path, syncs, monkeypatch) -> None:
    monkeypatch.setattr("replicated.journal._WriteAheadLog.sync_soon", lambda log: None)
    journal = Journal(tmp_path / "journal.db")
    job = make_job(is_durable=True)
    journal.add(make_job())
    assert len(syncs) == 0
    journal.add(job)
    assert len(syncs) == 1
    journal.remove([job.id], 2)
    assert len(syncs) == 2
    journal.close()


def test_other_commits_are_synced_behind_the_call(journal: Journal, syncs) -> None:
    journal.add(make_job())
    deadline = time.monotonic() + 30
    while not syncs:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_commit_that_must_be_durable_and_cannot_be_synced_is_an_error(journal: Journal, monkeypatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(StateUnwritable, match="Input/output error"):
        journal.add(make_job(is_durable=True))


def test_log_does_not_grow_for_ever(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("replicated.journal._COMMITS_IN_LOG", 1)
    journal = Journal(tmp_path / "journal.db")
    size = 0
    for _ in range(50):
        for _ in range(20):
            journal.add(make_job(record=bytes(1000)))
        wait_for_log_to_be_taken_in(journal)
        size = max(size, (tmp_path / "journal.db-wal").stat().st_size)
    assert size < (tmp_path / "journal.db").stat().st_size
    journal.close()


def wait_for_log_to_be_taken_in(journal: Journal) -> None:
    deadline = time.monotonic() + 30
    while journal._log._wanted.is_set() or journal._log._commits:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_waits_for_another_repository_that_is_stuck_holds_up_nobody(journal: Journal) -> None:
    journal.add(make_job(has_files=True, frozen_bytes=100, spooled_bytes=100))
    bounds = Bounds(queue_bytes=100, spool_bytes=100)
    stuck = {"file:///r": "it is away", "file:///other": ""}
    clock = Clock()
    Admission(journal, clock.wait, stuck.__getitem__, lambda: clock.now).wait("file:///other", bounds)
    assert clock.now == 0
    # Of one that moves, the spool is shared.
    stuck["file:///r"] = ""
    with pytest.raises(QueueFull, match="spool"):
        Admission(journal, clock.wait, stuck.__getitem__, lambda: clock.now).wait("file:///other", bounds)
