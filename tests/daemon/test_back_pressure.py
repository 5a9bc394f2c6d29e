"""Bounds on what waits to be stored, the limit on uploads, and how long calls held up the training."""

import dataclasses
import os
import threading

import grpc
import pytest

from replicate import wire
from replicate._pb import daemon_pb2 as pb
from replicate.errors import QueueFull
from replicate.ids import CheckpointId, new_id
from replicate.records import utc_now

BIG = 5 << 20
NEVER = ("--limit", "1")


def send(project, record, *, queue_limit=0, spool_limit=0, stall_ns=0, missed_because="", mode="auto"):
    capture = project.capture(record.paths, mode)
    capture.queue_limit_bytes = queue_limit
    capture.spool_limit_bytes = spool_limit
    return project.daemon.stub.CreateCheckpoint(
        pb.CreateCheckpointRequest(
            repository=project.repository,
            checkpoint=wire.encode_checkpoint(record),
            capture=capture,
            stall_ns=stall_ns,
            missed_because=missed_because,
        )
    )


def checkpoint_of(experiment, project, **changes):
    """A record like those of `Project.checkpoint`, not sent yet."""
    sent = project.checkpoint(experiment)
    return dataclasses.replace(sent, id=CheckpointId(new_id()), **changes)


@pytest.fixture
def full_project(project):
    """A project with one pending checkpoint of BIG bytes that is never stored; its experiment is stored."""
    experiment = project.init()
    project.flush()
    project.daemon.stop()
    project.daemon.start(*NEVER)
    project.write("model.pt", os.urandom(BIG))
    project.checkpoint(experiment, "model.pt")
    return project, experiment


def test_above_the_bound_a_call_is_sent_back_and_nothing_is_recorded(full_project, error_of):
    project, experiment = full_project
    project.write("next.pt", os.urandom(BIG))
    record = checkpoint_of(experiment, project, paths=("next.pt",))
    error = error_of(lambda: send(project, record, queue_limit=BIG))
    assert isinstance(error, QueueFull)
    assert "5.2 MB wait to be stored, and `queue_limit` is 5.2 MB" in error.message
    assert record.id not in {c.id for c in project.checkpoints(experiment.id)}
    # The same request again, when there is room: nothing was half done.
    assert send(project, record, queue_limit=BIG + 1).state == "captured"


def test_spool_is_bounded_by_itself(full_project, error_of):
    project, experiment = full_project
    project.write("next.pt", os.urandom(BIG))
    # What is leased is not in the spool.
    record = checkpoint_of(experiment, project, paths=("next.pt",))
    assert send(project, record, spool_limit=1, mode="copy").state == "captured"
    again = dataclasses.replace(record, id=CheckpointId(new_id()))
    assert isinstance(error_of(lambda: send(project, again, spool_limit=1)), QueueFull)


def test_checkpoints_without_files_never_wait(full_project):
    project, experiment = full_project
    assert send(project, checkpoint_of(experiment, project), queue_limit=1).state == "captured"


def test_waiting_call_goes_on_when_something_is_stored(project):
    experiment = project.init()
    project.flush()
    project.daemon.stop()
    project.daemon.start("--limit", str(BIG))  # about a second
    project.write("model.pt", os.urandom(2 * BIG))
    project.checkpoint(experiment, "model.pt")
    project.write("next.pt", os.urandom(BIG))
    record = checkpoint_of(experiment, project, paths=("next.pt",))
    states = []

    def insist():
        while not states:
            try:
                states.append(send(project, record, queue_limit=BIG).state)
            except grpc.RpcError as error:
                assert "queue_limit" in error.details()

    caller = threading.Thread(target=insist)
    caller.start()
    caller.join(timeout=60)
    assert states == ["captured"]
    assert project.flush().failed == 0


def test_second_capture_of_a_pending_file_costs_nothing_more(full_project):
    project, experiment = full_project
    record = checkpoint_of(experiment, project, paths=("model.pt",))
    assert send(project, record).state == "captured"
    status = project.daemon.stub.GetStatus(pb.GetStatusRequest())
    assert (status.leased_files, status.leased_bytes, status.spool_bytes) == (1, BIG, 0)
    project.daemon.stop()
    project.daemon.start()
    assert project.flush().failed == 0
    assert project.read(record.id, "model.pt") == (project.directory / "model.pt").read_bytes()


def test_missed_checkpoint_is_recorded_as_failed_with_its_metrics(project):
    experiment = project.init()
    record = checkpoint_of(experiment, project, paths=("gone.pt",), metrics={"loss": 0.5}, step=7)
    assert send(project, record, missed_because="the daemon could not be reached").state == "failed"
    project.flush()
    found = next(c for c in project.checkpoints(experiment.id) if c.id == record.id)
    assert (found.state, found.error) == ("failed", "the daemon could not be reached")
    assert (found.metrics, found.step, found.paths) == ({"loss": 0.5}, 7, ("gone.pt",))


def test_stalls_of_all_calls_add_up_while_running_and_after_the_end(project, wait_until):
    experiment = project.init()
    assert project.list()[0].stall_s is None
    for seconds in (1, 2):
        send(project, checkpoint_of(experiment, project), stall_ns=seconds * 10**9)
    repeated = checkpoint_of(experiment, project)
    for _ in range(2):
        send(project, repeated, stall_ns=4 * 10**9)
    assert project.list()[0].stall_s == 7.0
    request = pb.EndExperimentRequest(
        repository=project.repository,
        experiment_id=experiment.id,
        status="stopped",
        ended_ns=wire.encode_time(utc_now()),
        stall_ns=10**9,
    )
    for _ in range(2):
        project.daemon.stub.EndExperiment(request)
    assert project.list()[0].stall_s == 8.0
    project.flush()
    assert project.list()[0].stall_s == 8.0
    # In the repository, for whoever looks at it from elsewhere.
    project.daemon.stop()
    os.unlink(project.daemon.home / "state" / "journal.db")
    project.daemon.start()
    assert project.list()[0].stall_s == 8.0
