"""More waits to be stored than may: calls wait, and go on by themselves."""

import dataclasses

import pytest

import replicate
from replicate import delivery, notices


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
