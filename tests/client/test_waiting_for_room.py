"""More waits to be stored than may: calls wait, and go on by themselves."""

import dataclasses

import pytest

import replicate
from replicate import delivery, missed, notices
from replicate.errors import QueueFull


@pytest.fixture
def full(server, project, monkeypatch):
    """A project whose daemon sends this many requests back."""
    monkeypatch.setattr(delivery, "_QUEUE_POLL_S", 0.01)
    monkeypatch.setattr(notices, "_said", set())
    server()

    def make(count):
        return replicate.Project(repository=f"file:///full:{count}").experiments

    return make


def test_init_and_checkpoint_wait_and_say_so_once(full, written, capsys):
    experiment = full(5).create(quiet=True)
    assert len({request.experiment.id for request in written()}) == 1
    assert len(written()) == 6
    for _ in range(2):
        assert experiment.checkpoint().state == "captured"
    assert len(written()) == 8
    experiment.stop()
    assert capsys.readouterr().err == "replicate: a call has to wait: 9 GB wait (patience)\n"


def test_a_checkpoint_that_waits_keeps_its_id_and_its_step(full, written):
    experiment = full(0).create(quiet=True)
    run = experiment._run
    run.project = dataclasses.replace(run.project, repository="file:///full:5")
    checkpoint = experiment.checkpoint(metrics={"loss": 1})
    assert checkpoint.state == "captured"
    assert [request.checkpoint.id for request in written()[1:]] == [checkpoint.id] * 5
    assert experiment.checkpoint().step == 1


def test_waiting_counts_as_holding_up(full, monkeypatch):
    waits = []
    monkeypatch.setattr(delivery.time, "sleep", waits.append)
    experiment = full(3).create(quiet=True)
    assert len(waits) == 3
    assert all(0 <= wait <= delivery._QUEUE_POLL_S for wait in waits)
    assert experiment.stall_seconds > 0


def test_ctrl_c_ends_the_waiting(server, run_script):
    server()
    source = """
import os, signal, threading
import replicate
experiments = replicate.Project(repository="file:///full:1000000").experiments
threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT]).start()
try:
    experiments.create(quiet=True)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = run_script(source)
    assert (done.status, done.output) == (0, "interrupted\n")
    assert done.errors == "replicate: a call has to wait: 9 GB wait (patience)\n"


def test_a_signal_handler_runs_while_a_call_waits(server, run_script):
    server()
    source = """
import os, signal, threading
import replicate
from replicate import delivery
experiments = replicate.Project(repository="file:///full:6").experiments
signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
threading.Timer(0.7, os.kill, [os.getpid(), signal.SIGUSR1]).start()
with experiments.create(quiet=True):
    print("begun", flush=True)
"""
    done = run_script(source)
    assert (done.status, done.output) == (0, "handled\nbegun\n")


@pytest.fixture
def stuck(server, project, home, monkeypatch):
    """A trainer whose daemon has no room for files, and the reason that it gives for that (None: room)."""
    monkeypatch.setattr(delivery, "_QUEUE_POLL_S", 0.01)
    monkeypatch.setattr(delivery, "_STUCK_PATIENCE_S", 0.1)
    monkeypatch.setattr(delivery, "_STUCK_AGAIN_S", 0.0)
    monkeypatch.setattr(delivery, "_stuck", set())
    monkeypatch.setattr(notices, "_said", set())
    monkeypatch.setattr(missed, "_kept", [])
    server()
    (project / "model.pt").write_bytes(b"model")

    class Stuck:
        def __init__(self):
            self.experiments = replicate.Project(repository="file:///stuck").experiments
            self.experiment = self.experiments.create(quiet=True)

        def because(self, reason):
            if reason is None:
                (home / "stuck").unlink()
            else:
                (home / "new").write_text(reason)
                (home / "new").rename(home / "stuck")

    return Stuck()


def test_a_checkpoint_does_without_room_when_nothing_moves(stuck, written, capsys):
    stuck.because("the disk is full")
    first = stuck.experiment.checkpoint("model.pt", {"loss": 1})
    assert (first.state, first.error) == ("failed", "9 GB wait")
    *tries, told = written()[1:]
    assert len(tries) > 1
    assert {one.checkpoint.id for one in (*tries, told)} == {first.id}
    assert told.missed_because == "the files could not be captured when it was made: 9 GB wait"
    assert not told.capture.paths
    assert told.stall_ns > 0
    waits, failed = capsys.readouterr().err.splitlines()
    assert "a call has to wait" in waits
    assert failed == (
        "replicate: a checkpoint was not saved: 9 GB wait (`replicate status` shows what waits, and why); "
        "training goes on, and until this is mended only the metrics of checkpoints are saved"
    )


def test_while_nothing_moves_later_checkpoints_give_up_at_once_and_say_nothing(stuck, written, capsys):
    stuck.because("the disk is full")
    stuck.experiment.checkpoint("model.pt")
    capsys.readouterr()
    before = len(written())
    for loss in range(3):
        assert stuck.experiment.checkpoint("model.pt", {"loss": loss}).state == "failed"
        assert stuck.experiment.checkpoint().state == "captured"
    assert len(written()) == before + 9  # asked once and told, and one without files
    assert capsys.readouterr().err == ""
    stuck.because(None)
    assert stuck.experiment.checkpoint("model.pt").state == "captured"
    stuck.because("again")
    before = len(written())
    assert stuck.experiment.checkpoint("model.pt").state == "failed"
    assert len(written()) > before + 2
    assert "a checkpoint was not saved" in capsys.readouterr().err


def test_once_something_moves_calls_are_patient_again(stuck, monkeypatch, written):
    stuck.because("the disk is full")
    stuck.experiment.checkpoint("model.pt")
    answers = iter(["", "", "the disk is full", "the disk is full", "", None])

    def sleep(_):
        stuck.because(next(answers))

    monkeypatch.setattr(delivery, "_STUCK_PATIENCE_S", 1000.0)
    monkeypatch.setattr(delivery, "_STUCK_AGAIN_S", 1000.0)
    monkeypatch.setattr(delivery.time, "sleep", sleep)
    assert stuck.experiment.checkpoint("model.pt").state == "captured"
    assert next(answers, "none left") == "none left"
    assert not delivery._stuck


def test_init_says_that_nothing_moves(stuck):
    stuck.because("the disk is full")
    for _ in range(2):
        with pytest.raises(QueueFull, match="9 GB wait") as caught:
            stuck.experiments.create("model.pt", quiet=True)
        assert caught.value.fields["stuck"] == "the disk is full"


def test_another_repository_is_no_reason_to_give_up_at_once(stuck, written):
    other = replicate.Project(repository="file:///other/stuck").experiments.create(quiet=True)
    stuck.because("the disk is full")
    stuck.experiment.checkpoint("model.pt")
    before = len(written())
    other.checkpoint("model.pt")
    assert len(written()) > before + 2


def test_the_daemon_lets_calls_wait_until_something_is_stored(run_script, project):
    (project / "replicate.yaml").write_text("queue_limit: 1MB\n")
    source = """
import os, sys, threading
import replicate
from replicate import notices

experiment = replicate.init(quiet=True)
replicate.flush()
os.rename(".replicate", "moved")  # so that nothing can be stored
open(".replicate", "w").close()

def save(step):
    with open(f"model-{step}.pt", "wb") as file:
        file.write(os.urandom(3_000_000))
    return experiment.checkpoint(file.name, {"loss": step})

def mend():
    os.unlink(".replicate")
    os.rename("moved", ".replicate")

def mend_when_told(line, about=""):
    tell(line, about=about)
    if about:
        threading.Timer(0.1, mend).start()
        notices.warn_once = tell

tell, notices.warn_once = notices.warn_once, mend_when_told
first = save(0)
waited = experiment.stall_seconds
second = save(1)
print(first.state != "failed", second.state != "failed", experiment.stall_seconds > waited + 0.1)
"""
    done = run_script(source)
    assert (done.status, done.output) == (0, "True True True\n"), done.errors
    (line,) = [line for line in done.errors.splitlines() if "has to wait" in line]
    assert "`queue_limit` is 1.0 MB" in line
    replicate.flush(60)
    assert replicate.experiments.get("latest").checkpoints.step == [0, 1]
