"""A call that its client has given up while its files were captured has no effect."""

import os

import pytest

from replicate.errors import CallAbandoned
from replicate.ids import CheckpointId, ExperimentId, new_id
from replicate.records import CheckpointRecord, ExperimentRecord, utc_now
from replicated.admission import Admission
from replicated.intake import Intake, Terms
from replicated.journal import Journal
from replicated.repositories import OpenRepositories
from replicated.snapshot.capture import Capturer, CaptureRequest
from replicated.snapshot.held import HeldFiles
from replicated.snapshot.spool import Spool
from replicated.snapshot.tree_caches import TreeCaches
from replicated.snapshot.watch import TreeWatches


def ignore(*arguments):
    """What nobody is told here."""


@pytest.fixture
def journal(tmp_path):
    opened = Journal(tmp_path / "journal.db")
    yield opened
    opened.close()


@pytest.fixture
def intake(tmp_path, journal):
    (tmp_path / "spool").mkdir()
    spool = Spool(tmp_path / "spool")
    repositories = OpenRepositories(tmp_path / "cache")
    held = HeldFiles(spool.path)
    watches = TreeWatches()
    capturer = Capturer(spool, held, watches, ())
    tree_caches = TreeCaches(tmp_path / "cache" / "trees", repositories)
    yield Intake(
        journal,
        capturer,
        repositories,
        tree_caches,
        Admission(journal, ignore, lambda _: ""),
        wake=ignore,
        watch=ignore,
        forget=ignore,
    )
    capturer.stop()
    watches.stop()
    tree_caches.close()
    repositories.close()


def test_call_that_was_given_up_during_its_capture_is_not_recorded(tmp_path, intake, journal):
    project = tmp_path / "project"
    project.mkdir()
    (project / "model.pt").write_bytes(os.urandom(5000))
    url = f"file://{project}/.replicate"
    experiment = ExperimentRecord(ExperimentId(new_id()), utc_now())
    intake.create_experiment(url, experiment, None)
    record = CheckpointRecord(CheckpointId(new_id()), experiment.id, utc_now(), 0, ("model.pt",))
    request = CaptureRequest(record.id, os.fsencode(project), (b"model.pt",))
    with pytest.raises(CallAbandoned):
        intake.create_checkpoint(url, record, request, Terms(is_wanted=lambda: False))
    assert journal.find(record.id) is None
    assert list((tmp_path / "spool").iterdir()) == []
    # The same request again, from somebody who waits.
    assert intake.create_checkpoint(url, record, request).state == "captured"
