"""The daemon over its socket: record, list, read back, survive."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys

import grpc
import pytest

from replicate import errors
from replicate._pb import daemon_pb2 as pb
from replicate.ids import new_id
from replicate.records import ProcessIdentity
from replicated.processes import current_boot_id, exit_status, identify


def kernel_tells_exit_status() -> bool:
    with subprocess.Popen(["true"]) as process:
        descriptor = os.pidfd_open(process.pid)
        process.wait()
    told = exit_status(descriptor) is not None
    os.close(descriptor)
    return told


def sleeper():
    """A process that does nothing, to stand for a training script."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def test_an_experiment_and_its_checkpoints_are_recorded_listed_and_read_back(project):
    project.write("train.py", b"print(1)")
    experiment = project.init("train.py", params={"lr": 0.1, "nan": float("nan")}, name="first", tags=("a",))
    project.write("model.pt", b"one")
    worse = project.checkpoint(experiment, "model.pt", step=0, metrics={"loss": 0.5})
    project.write("model.pt", b"two")
    best = project.checkpoint(experiment, "model.pt", step=1, metrics={"loss": 0.25})
    project.checkpoint(experiment, step=2, metrics={"loss": 0.75})
    assert project.flush().failed == 0
    (summary,) = project.list()
    assert summary.record.id == experiment.id
    assert summary.record.params["lr"] == 0.1
    assert summary.record.params["nan"] != summary.record.params["nan"]
    assert (summary.status, summary.state, summary.checkpoint_count) == ("running", "stored", 3)
    assert summary.best.id == best.id
    assert summary.latest.step == 2
    assert [c.state for c in project.checkpoints(experiment.id)] == ["stored"] * 3
    assert project.read(worse.id, "model.pt") == b"one"
    assert project.read(experiment.id, "model.pt") == b"two"
    assert project.read(f"{experiment.id[:9]}:step=0", "model.pt") == b"one"
    assert project.read("latest", "train.py") == b"print(1)"
    assert set(project.files(f"{experiment.id}:code")) == {b"train.py"}
    assert set(project.files(best.id)) == {b"train.py", b"model.pt"}


def test_ranges_of_files_are_read(project):
    data = os.urandom(3_000_000)
    project.write("data.bin", data)
    experiment = project.init("data.bin")
    project.flush()
    assert project.read(experiment.id, "data.bin") == data
    assert project.read(experiment.id, "data.bin", 1_000_001, 1_500_000) == data[1_000_001:2_500_001]
    assert project.read(experiment.id, "data.bin", 2_999_990, 100) == data[-10:]
    assert project.read(experiment.id, "data.bin", 4_000_000) == b""


def test_overwriting_a_file_right_after_the_call_changes_nothing(project):
    data = os.urandom(20 << 20)
    file = project.write("weights", data)
    experiment = project.init("weights")
    file.write_bytes(b"gone")
    project.flush()
    assert project.read(experiment.id, "weights") == data


def test_a_repeated_request_is_one_snapshot(project):
    project.write("a", b"first")
    experiment = project.init("a")
    project.write("a", b"second")
    reply = project.send_init(experiment)
    assert reply.file_count == 1
    project.flush()
    assert len(project.list()) == 1
    assert project.read(experiment.id, "a") == b"first"


def test_a_second_copy_of_unchanged_data_takes_next_to_nothing(project):
    project.write("data/train.bin", os.urandom(30 << 20))
    project.init("data")
    project.flush()
    before = project.daemon.stub.GetDiskUsage(pb.DiskUsageRequest(repository=project.repository)).total
    project.init("data")
    project.flush()
    after = project.daemon.stub.GetDiskUsage(pb.DiskUsageRequest(repository=project.repository)).total
    assert before.stored_bytes >= 30 << 20
    assert after.stored_bytes - before.stored_bytes < 100_000
    assert after.logical_bytes == 2 * before.logical_bytes == 2 * (30 << 20)
    assert before.unique_bytes == pytest.approx(30 << 20, rel=0.01)


def test_reading_what_is_not_stored_yet_says_so(project, error_of):
    project.write("a", os.urandom(200 << 20))
    experiment = project.init("a")
    error = error_of(lambda: project.read(experiment.id, "a"))
    assert isinstance(error, errors.NotStored)
    assert (error.fields["state"], error.fields["id"]) == ("captured", experiment.id)
    (summary,) = project.list()
    assert summary.state == "captured"
    project.flush()
    (summary,) = project.list()
    assert summary.state == "stored"


def test_a_process_that_is_killed_is_noticed_at_once(project, wait_until):
    with sleeper() as process:
        project.init(process=identify(process.pid))
        assert project.list()[0].status == "running"
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: project.list()[0].status == "killed", "the run counts as killed")
    wait_until(lambda: project.list()[0].ended is not None, "the end is recorded")
    project.flush()
    assert project.list()[0].status == "killed"
    assert len(list((project.directory / ".replicate" / "edits").rglob("*.json"))) == 1


def test_a_process_that_dies_while_no_daemon_runs_is_noticed_by_the_next(project, wait_until):
    with sleeper() as process:
        project.init(process=identify(process.pid))
        project.flush()
        project.daemon.kill()
        process.kill()
    project.daemon.start()
    wait_until(lambda: project.list()[0].status == "killed", "the run counts as killed")


@pytest.mark.skipif(not kernel_tells_exit_status(), reason="the kernel does not tell exit statuses")
@pytest.mark.parametrize(
    ("code", "says_stopped", "status"),
    [(3, False, "failed"), (3, True, "failed"), (0, True, "stopped"), (0, False, "killed")],
)
def test_an_exit_status_other_than_zero_is_a_failure(project, wait_until, code, says_stopped, status):
    script = f"import sys; sys.stdin.read(); sys.exit({code})"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as process:
        experiment = project.init(process=identify(process.pid))
        if says_stopped:
            project.end(experiment, is_exiting=True)
            assert project.list()[0].status == "stopped"
        process.stdin.close()
        process.wait()
    wait_until(lambda: project.list()[0].status == status, f"the run counts as {status}")


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_the_end_of_a_run_is_recorded(project, status, wait_until):
    experiment = project.init()
    project.flush()
    project.end(experiment, status)
    assert project.list()[0].status == status
    project.flush()
    assert project.list()[0].status == status
    heartbeats = project.directory / ".replicate" / "heartbeats"
    wait_until(lambda: not list(heartbeats.glob("*")), "the sign of life is taken away")


def test_a_pid_that_was_reused_is_not_the_process(project, wait_until):
    project.init(process=ProcessIdentity(os.getpid(), 1, current_boot_id()))
    wait_until(lambda: project.list()[0].status == "killed", "another process of that pid does not count")


def test_a_resumed_experiment_is_running_again(project):
    experiment = project.init()
    project.end(experiment)
    project.flush()
    me = identify(os.getpid())
    reply = project.daemon.stub.ResumeExperiment(
        pb.ResumeExperimentRequest(
            target=project.target(experiment.id),
            process=pb.Process(pid=me.pid, start_ticks=me.start_ticks, boot_id=me.boot_id),
            at_ns=0,
        )
    )
    assert reply.status == "running"
    assert project.list()[0].status == "running"


def test_two_repositories_are_stored_side_by_side(project, tmp_path):
    project.write("a")
    other = dataclasses.replace(project, repository=f"file://{tmp_path}/other")
    first, second = project.init("a"), other.init("a")
    project.flush()
    assert [s.record.id for s in project.list()] == [first.id]
    assert [s.record.id for s in other.list()] == [second.id]


def test_a_missing_path_is_refused_and_nothing_is_recorded(project, error_of):
    error = error_of(lambda: project.init("nothing.pt"))
    assert isinstance(error, errors.PathMissing)
    assert "nothing.pt" in error.message
    assert project.list() == []


def test_a_checkpoint_whose_files_cannot_be_frozen_keeps_its_metrics(project, error_of):
    experiment = project.init()
    project.write("model.pt")
    spool = project.daemon.home / "state" / "spool"
    spool.rename(spool.with_name("elsewhere"))
    spool.write_text("in the way")
    error = error_of(lambda: project.checkpoint(experiment, "model.pt", step=4, metrics={"loss": 0.5}))
    spool.unlink()
    spool.with_name("elsewhere").rename(spool)
    assert isinstance(error, errors.CaptureFailed)
    assert "cannot write to the spool" in error.message
    reply = project.flush()
    assert reply.failed == 1
    assert "cannot write to the spool" in reply.failures[0].error
    (checkpoint,) = project.checkpoints(experiment.id)
    assert (checkpoint.state, checkpoint.step, checkpoint.metrics) == ("failed", 4, {"loss": 0.5})


@pytest.mark.parametrize(
    "reference", ["", "xyz", "../../etc", "ab", "latest:nope", "abcd:step=x", "/", "latest:best"]
)
def test_references_that_mean_nothing_are_refused(project, error_of, reference):
    project.init()
    error = error_of(lambda: project.resolve(reference))
    assert isinstance(error, (errors.InvalidArgument, errors.NotFound))


def test_an_ambiguous_prefix_is_refused(project, error_of):
    first = project.init()
    twin = dataclasses.replace(first, id=first.id[:10] + new_id()[10:])
    project.send_init(twin)
    error = error_of(lambda: project.resolve(first.id[:10]))
    assert isinstance(error, errors.Ambiguous)
    assert project.resolve(first.id).summary.experiment.id == first.id


def test_hostile_requests_are_refused_and_the_daemon_lives_on(project, error_of):
    stub = project.daemon.stub
    good = project.init()
    requests = [
        lambda: project.send_init(dataclasses.replace(good, id="short")),
        lambda: project.send_init(dataclasses.replace(good, id=new_id(), paths=("../up",))),
        lambda: project.send_init(dataclasses.replace(good, id=new_id(), paths=("/etc/passwd",))),
        lambda: project.send_init(dataclasses.replace(good, id=new_id(), paths=("a\0b",))),
        lambda: stub.CreateExperiment(pb.CreateExperimentRequest(repository="relative")),
        lambda: stub.Checkout(
            pb.CheckoutRequest(target=project.target("latest"), output_directory=b"x")
        ).next(),
        lambda: stub.Mount(pb.MountRequest(target=project.target("latest"), directory=b"x")),
        lambda: stub.Unmount(pb.UnmountRequest()),
        lambda: stub.WaitStored(pb.WaitStoredRequest(ids=["zz"])),
        lambda: list(
            stub.ListExperiments(pb.ListExperimentsRequest(repository=project.repository, filters=["("]))
        ),
    ]
    for request in requests:
        assert isinstance(error_of(request), errors.ReplicateError)
    assert project.daemon.answers()


def test_a_message_that_is_too_large_is_refused(project):
    with pytest.raises(grpc.RpcError) as caught:
        project.daemon.stub.WaitStored(pb.WaitStoredRequest(ids=["x" * (5 << 20)]))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert project.daemon.answers()


def test_random_bytes_on_the_socket_do_no_harm(project):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(project.daemon.home / "run" / "replicated.sock"))
        client.sendall(os.urandom(4096))
    assert project.daemon.answers()


def test_checkout_over_the_wire_streams_progress_and_honours_force(project, error_of, tmp_path):
    project.write("a/b", b"hello")
    experiment = project.init(".")
    project.flush()
    out = tmp_path / "out"

    def checkout(**options):
        request = pb.CheckoutRequest(
            target=project.target(experiment.id), output_directory=os.fsencode(out), **options
        )
        return list(project.daemon.stub.Checkout(request))

    events = checkout()
    assert (events[0].files_total, events[0].bytes_total) == (1, 5)
    assert (out / "a/b").read_bytes() == b"hello"
    (out / "a/b").write_bytes(b"changed")
    assert isinstance(error_of(checkout), errors.CheckoutConflict)
    actions = [action for event in checkout(dry_run=True) for action in event.actions]
    assert [(a.verb, a.path) for a in actions if a.verb == "replace"] == [("replace", b"a/b")]
    assert (out / "a/b").read_bytes() == b"changed"
    checkout(force=True)
    assert (out / "a/b").read_bytes() == b"hello"


def test_differences_of_files_come_over_the_wire(project):
    project.write("same")
    project.write("changed", b"1")
    first = project.init(".")
    project.write("changed", b"2")
    project.write("added")
    second = project.init(".")
    project.flush()
    request = pb.DiffFilesRequest(left=project.target(first.id), right=project.target(second.id))
    changes = [c for batch in project.daemon.stub.DiffFiles(request) for c in batch.changes]
    assert [(c.left.path, c.right.path) for c in changes] == [(b"", b"added"), (b"changed", b"changed")]


def test_the_repository_is_probed(project):
    reply = project.daemon.stub.ProbeRepository(pb.ProbeRequest(repository=project.repository))
    assert [(s.name, s.ok) for s in reply.steps] == [("repository", True)]
    assert "does not exist yet" in reply.steps[0].detail
    project.init()
    reply = project.daemon.stub.ProbeRepository(pb.ProbeRequest(repository=project.repository))
    assert {"repository", "repository write", "repository listing", "repository ranged read"} <= {
        step.name for step in reply.steps
    }
    assert all(step.ok and step.outcome == "ok" for step in reply.steps)


def test_a_checkpoint_and_the_whole_repository_are_mounted_listed_and_unmounted(project, tmp_path):
    stub = project.daemon.stub
    project.write("train.py", b"code")
    project.write("model.pt", b"weights")
    experiment = project.init("train.py", name="baseline")
    checkpoint = project.checkpoint(experiment, "model.pt", metrics={"loss": 1.0})
    project.flush()
    one, everything = tmp_path / "one", tmp_path / "everything"
    try:
        info = stub.Mount(pb.MountRequest(target=project.target(experiment.id), directory=os.fsencode(one)))
        assert info.id == checkpoint.id
        assert (one / "train.py").read_bytes() + (one / "model.pt").read_bytes() == b"codeweights"
        stub.Mount(pb.MountRequest(target=project.target(""), directory=os.fsencode(everything)))
        assert (everything / "experiments" / experiment.id / "best" / "model.pt").read_bytes() == b"weights"
        assert (everything / "by-name/baseline/code/train.py").read_bytes() == b"code"
        assert len(stub.ListMounts(pb.ListMountsRequest()).mounts) == 2
        assert stub.GetStatus(pb.GetStatusRequest()).mounts == 2
    finally:
        ended = stub.Unmount(pb.UnmountRequest(all=True)).mounts
    assert len(ended) == 2
    assert not one.exists()


def test_times_beyond_64_bits_of_nanoseconds_come_back(project):
    file = project.write("late")
    os.utime(file, (10**10, 10**10))
    experiment = project.init("late")
    project.flush()
    assert project.files(experiment.id)[b"late"].mtime_s == 10**10
