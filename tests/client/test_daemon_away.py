"""A daemon that cannot be reached, or does not answer: training goes on, the missed is told later."""

import os
import signal

import pytest

import replicate
from replicate import channel, connection, delivery, launch, missed, notices
from replicate._pb import daemon_pb2 as pb
from replicate.errors import DaemonUnavailable
from replicate.home import find_home


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Short waits, and a pause that does not end by itself."""
    monkeypatch.setattr(connection, "_RETRY_DELAYS_S", (0.0,) * 2)
    monkeypatch.setattr(delivery, "_FIRST_PAUSE_S", 1000.0)
    monkeypatch.setattr(delivery, "_LONGEST_PAUSE_S", 1000.0)
    monkeypatch.setattr(delivery, "_outage", None)
    monkeypatch.setattr(notices, "_said", set())
    monkeypatch.setattr(missed, "_kept", [])


@pytest.fixture
def end_pause(monkeypatch):
    """Let the next call look for the daemon again."""

    def end():
        monkeypatch.setattr(delivery, "_FIRST_PAUSE_S", 0.0)
        monkeypatch.setattr(delivery, "_LONGEST_PAUSE_S", 0.0)
        if delivery._outage is not None:
            delivery._outage = delivery._Outage(delivery._outage.home, delivery._outage.error, 0.0, 0.0)

    return end


@pytest.fixture
def trainer(project, server, no_daemon):
    """An experiment, and the server that it began with, which is killed by `away` and started by `back`."""

    class Trainer:
        def __init__(self):
            self.server = server()
            self.experiment = replicate.init()

        def away(self):
            self.server.kill()
            self.server.wait()

        def back(self):
            self.server = server()

    (project / "model.pt").write_bytes(b"model")
    return Trainer()


def starts(file):
    return len(file.read_text().splitlines())


def test_only_the_first_call_looks_for_the_daemon(trainer, no_daemon, capsys):
    capsys.readouterr()
    trainer.away()
    first = trainer.experiment.checkpoint("model.pt", {"loss": 1})
    tried = starts(no_daemon)
    assert tried > 0
    later = [trainer.experiment.checkpoint("model.pt", {"loss": loss}) for loss in range(50)]
    assert starts(no_daemon) == tried
    assert {one.state for one in (first, *later)} == {"failed"}
    assert {one.error for one in (first, *later)} == {first.error}
    assert "no luck" in first.error
    assert [one.step for one in (first, *later)] == list(range(51))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("replicate: a checkpoint was not saved: ")
    assert "training goes on" in line


def test_what_was_missed_is_told_first_and_in_order(trainer, written, end_pause, capsys):
    trainer.away()
    missed_ones = [
        trainer.experiment.checkpoint("model.pt", {"loss": 1}, primary_metric=("loss", "minimize")),
        trainer.experiment.checkpoint(metrics={"loss": 2}),
        trainer.experiment.checkpoint("model.pt"),
    ]
    trainer.back()
    end_pause()
    before = len(written())
    capsys.readouterr()
    last = trainer.experiment.checkpoint("model.pt", {"loss": 4})
    assert last.state == "captured"
    assert capsys.readouterr().err == (
        "replicate: checkpoints are saved again, and the metrics of 3 earlier ones were recorded\n"
    )
    told = written()[before:]
    assert [request.checkpoint.id for request in told] == [one.id for one in (*missed_ones, last)]
    assert [request.checkpoint.step for request in told] == [0, 1, 2, 3]
    assert [bool(request.missed_because) for request in told] == [True, False, True, False]
    assert "no luck" in told[0].missed_because
    assert [list(request.capture.paths) for request in told] == [[], [], [], [b"model.pt"]]
    assert list(told[0].checkpoint.paths) == [b"model.pt"]
    assert told[0].checkpoint.primary_metric.name == "loss"
    assert all(request.stall_ns > 0 for request in told)
    # Told once, and the next trouble is told again.
    trainer.experiment.checkpoint()
    assert len(written()) == before + 5
    trainer.away()
    trainer.experiment.checkpoint()
    assert "a checkpoint was not saved" in capsys.readouterr().err


def test_stopping_looks_again_whatever_the_pause(trainer, written):
    trainer.away()
    one = trainer.experiment.checkpoint(metrics={"loss": 1})
    trainer.back()
    trainer.experiment.stop()
    told, end = written()[-2:]
    assert told.checkpoint.id == one.id
    assert end.status == "stopped"
    assert end.stall_ns > 0


def test_an_end_that_could_not_be_told_takes_no_time_with_it(trainer, written, capsys):
    trainer.away()
    trainer.experiment.stop()
    assert "was not recorded" in capsys.readouterr().err
    trainer.back()
    trainer.experiment.stop()
    assert written()[-1].stall_ns / 1e9 == pytest.approx(trainer.experiment._run.stall.told_seconds)


def test_a_new_experiment_looks_for_the_daemon_with_all_patience(trainer, no_daemon):
    trainer.away()
    trainer.experiment.checkpoint()
    tried = starts(no_daemon)
    with pytest.raises(DaemonUnavailable):
        replicate.init()
    assert starts(no_daemon) > tried
    trainer.back()
    assert replicate.init(quiet=True).checkpoint().state == "captured"
    assert trainer.experiment.checkpoint().state == "captured"


def test_what_is_kept_is_bounded_and_the_newest(trainer, written, end_pause, monkeypatch):
    monkeypatch.setattr(missed, "MAX_COUNT", 10)
    trainer.away()
    made = [trainer.experiment.checkpoint() for _ in range(25)]
    assert len(trainer.experiment._run.missed) == 10
    monkeypatch.setattr(missed, "MAX_BYTES", 5000)
    made.append(trainer.experiment.checkpoint(metrics={"text": "x" * 4000}))
    assert 1 <= len(trainer.experiment._run.missed) < 10
    trainer.back()
    end_pause()
    trainer.experiment.stop()
    kept = [request.checkpoint.id for request in written()[1:-1]]
    assert kept == [one.id for one in made[-len(kept) :]]


def test_one_that_is_refused_later_does_not_hold_up_the_others(trainer, written, end_pause):
    trainer.away()
    trainer.experiment.checkpoint(metrics={"loss": 1})
    queue = trainer.experiment._run.missed
    queue._waiting.appendleft(b"")  # has no id: the daemon refuses it
    trainer.back()
    end_pause()
    trainer.experiment.checkpoint()
    assert [request.checkpoint.step for request in written()[-2:]] == [0, 1]


def test_a_forked_child_does_not_tell_what_its_parent_missed(trainer, written, end_pause):
    trainer.away()
    one = trainer.experiment.checkpoint()
    trainer.back()
    end_pause()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if trainer.experiment.checkpoint().state == "captured" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert one.id not in [request.checkpoint.id for request in written()[1:]]
    trainer.experiment.stop()
    assert one.id in [request.checkpoint.id for request in written()[1:-1]]


def test_the_pause_grows_to_a_minute(monkeypatch, project):
    monkeypatch.setattr(delivery, "_FIRST_PAUSE_S", 5.0)
    monkeypatch.setattr(delivery, "_LONGEST_PAUSE_S", 60.0)
    pauses = []
    for begun in range(6):
        delivery._note_outage(DaemonUnavailable("away"), begun * 10.0**12)
        pauses.append(delivery._outage.pause_s)
    assert pauses == [5, 10, 20, 40, 60, 60]


def test_threads_that_fail_together_make_one_pause(project):
    delivery._note_outage(DaemonUnavailable("away"), 0.0)
    first = delivery._outage
    delivery._note_outage(DaemonUnavailable("away too"), 0.0)
    assert delivery._outage is first


@pytest.fixture
def quick_pings(monkeypatch):
    monkeypatch.setattr(channel, "_PING_INTERVAL_S", 0.1)
    monkeypatch.setattr(channel, "_PING_PATIENCE_S", 0.5)
    monkeypatch.setattr(connection, "_SILENCE_PATIENCE_S", 0.2)
    monkeypatch.setattr(delivery, "_REACH_S", 0.2)


def test_a_daemon_that_is_stopped_during_a_call_is_given_up(server, quick_pings):
    process = server()
    connection.start_daemon()
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(DaemonUnavailable) as caught:
        connection.call("WaitStored", pb.WaitStoredRequest(timeout_s=0), pb.StatusReply)
    assert "does not answer in time" in caught.value.message
    os.kill(process.pid, signal.SIGCONT)
    assert connection.call("WaitStored", pb.WaitStoredRequest(timeout_s=0), pb.StatusReply).pending == 1


def test_a_call_may_take_longer_than_a_daemon_may_be_silent(server, quick_pings):
    server()
    reply = connection.call("WaitStored", pb.WaitStoredRequest(timeout_s=2), pb.StatusReply)
    assert reply.pending == 1


def test_training_goes_on_past_a_stopped_daemon_and_is_told_when_it_goes_on(
    trainer, written, quick_pings, end_pause
):
    connection._link._close(connection._link._current)  # its successor pings quickly
    connection._link._current = None
    connection.start_daemon()
    os.kill(trainer.server.pid, signal.SIGSTOP)
    made = [trainer.experiment.checkpoint("model.pt", {"loss": loss}) for loss in range(20)]
    assert {one.state for one in made} == {"failed"}
    os.kill(trainer.server.pid, signal.SIGCONT)
    end_pause()
    made.append(trainer.experiment.checkpoint("model.pt"))
    assert made[-1].state == "captured"
    told = dict.fromkeys(request.checkpoint.id for request in written()[1:])
    assert list(told) == [one.id for one in made]


def test_a_process_that_is_stopped_is_named(home, wait_until):
    pid = connection.start_daemon().pid
    assert launch.describe_silence(find_home())[0] == ""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: launch.describe_silence(find_home())[0], "the process is stopped")
    reason, hint = launch.describe_silence(find_home())
    os.kill(pid, signal.SIGCONT)
    assert (reason, hint) == (
        f"its process {pid} was stopped by a signal",
        f"`kill -CONT {pid}` lets it go on",
    )


MISSING = """
import os, sys
import replicate
from replicate import connection, delivery
connection._RETRY_DELAYS_S = (0.0,)
experiment = replicate.init(quiet=True)
os.kill(connection.probe().pid, 9)
program = sys.executable
sys.executable = "/bin/false"
experiment.checkpoint(metrics={"loss": 1})
experiment.checkpoint("script.py", {"loss": 2})
"""


def test_what_cannot_be_told_at_the_end_is_said_in_one_line(run_script):
    done = run_script(MISSING)
    assert done.status == 0
    warning, lost, end = done.errors.splitlines()
    assert "a checkpoint was not saved" in warning
    assert lost.startswith("replicate: 2 checkpoints could not be recorded, not even the metrics: ")
    assert "the end of experiment" in end


def test_what_was_missed_is_told_at_the_end(run_script):
    done = run_script(MISSING + "sys.executable = program\n")
    assert done.status == 0
    assert len(done.errors.splitlines()) == 2
    (experiment,) = replicate.experiments.list()
    assert experiment.checkpoints.metrics["loss"] == [1, 2]
    assert experiment.checkpoints[0].error == ""


def test_a_worker_that_missed_something_tells_it_when_it_ends(run_script):
    source = (
        MISSING
        + """
import multiprocessing
def work():
    experiment.checkpoint(metrics={"from": "worker"})
    sys.executable = program
worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
worker.join()
sys.executable = program
"""
    )
    done = run_script(source)
    assert done.status == 0
    replicate.flush()
    (experiment,) = replicate.experiments.list()
    workers = [one.metrics.get("from") for one in experiment.checkpoints]
    assert workers == [None, None, "worker"]


def test_flush_tells_what_was_missed_and_raises_for_lost_files(run_script):
    source = (
        MISSING
        + """
without_files, with_files = experiment._made
print(without_files.state, with_files.state)
sys.executable = program
try:
    replicate.flush(60)
except replicate.errors.NotStored as error:
    print(error.message.partition(", ")[0], error.fields["ids"] == with_files.id)
print(without_files.state, without_files.error == "", with_files.state)
print(experiment.checkpoints.metrics["loss"])
"""
    )
    done = run_script(source)
    assert done.status == 0, done.errors
    assert done.output.splitlines() == [
        "failed failed",
        "1 snapshot could not be stored True",
        "stored True failed",
        "[1, 2]",
    ]
    warning, end = done.errors.splitlines()
    assert "a checkpoint was not saved" in warning
    assert end == "replicate: 1 snapshot could not be stored; `replicate status` says why"


@pytest.mark.parametrize(
    "end", ["", "experiment.stop()\n", "experiment.stop()\nreplicate.experiments.list()\n"]
)
def test_files_that_were_missed_are_said_at_the_end(run_script, end):
    done = run_script(MISSING + "sys.executable = program\n" + end)
    assert done.status == 0
    assert done.errors.splitlines()[1:] == [
        "replicate: 1 snapshot could not be stored; `replicate status` says why"
    ]


def test_an_experiment_that_was_deleted_has_no_failures_at_the_end(run_script):
    done = run_script(MISSING + "sys.executable = program\nexperiment.stop()\nexperiment.delete()\n")
    assert done.status == 0
    assert "could not be stored" not in done.errors


def test_flush_raises_for_what_was_lost_for_good(trainer):
    trainer.away()
    trainer.experiment.checkpoint()
    with pytest.raises(DaemonUnavailable):
        replicate.flush()
    queue = trainer.experiment._run.missed
    queue._lost, queue._because = 2, "too many"
    trainer.back()  # in the pause in which nobody looks for it
    assert missed.tell_now() == (2, "too many")
    assert len(queue) == 0
