"""A bucket that cannot be reached: training goes on; what it saved waits on disk, says so, and is stored."""

import signal

import pytest
from object_storage.machines import model, wait_until
from servers import faults

SIZE = 200_000
#: Executed after each step of the training script: it dies when it has made three.
DIE_AFTER_THREE = "import os, signal; step == 2 and os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def machine(machine):
    """A machine that has seen the bucket: `init` refuses a repository that nobody has ever reached."""
    machine.train(1, SIZE, 7)
    machine.flush()
    return machine


def assert_stored(machine, ids, seed=1):
    """Every checkpoint has its files, for this machine."""
    experiment, *checkpoints = ids
    assert machine.json("show", experiment)["state"] == "stored"
    for step, checkpoint in enumerate(checkpoints):
        assert machine.json("show", checkpoint)["state"] == "stored"
        assert machine.run("cat", checkpoint, "model.pt", text=False).stdout == model(seed, step, SIZE)


def waiting(machine):
    """What `status` says of the repository that waits."""
    return wait_until(
        lambda: next((one for one in machine.status()["repositories"] if one["waiting_because"]), None),
        "status says that a repository waits",
    )


def test_training_goes_on_and_the_queue_drains_when_the_bucket_is_back(machine, make_machine, proxy):
    proxy.go_away()
    ids = machine.train(4, SIZE)
    standing = waiting(machine)
    assert standing["pending"] + standing["active"] >= 5
    assert standing["bytes_pending"] >= 4 * SIZE
    assert (
        proxy.url.removeprefix("http://") in standing["waiting_because"]
        or "lab" in standing["waiting_because"]
    )
    since = standing["waiting_since"]
    assert since
    assert "s3://lab/" in machine.run("status").stdout
    # Also what is saved later, and it is since the first that it waits.
    later = machine.train(1, SIZE, 2)
    assert waiting(machine)["waiting_since"] == since
    proxy.come_back()
    machine.flush()
    status = machine.status()
    assert not any(status["queue"][name] for name in ("pending", "active", "failed", "bytes_pending"))
    assert not [one for one in status["repositories"] if one["waiting_because"]]
    other = make_machine()
    for each in (machine, other):
        assert_stored(each, ids)
        assert_stored(each, later, seed=2)


def test_the_queue_and_since_when_it_waits_survive_the_daemon(machine, make_machine, proxy):
    proxy.go_away()
    ids = machine.train(3, SIZE)
    since = waiting(machine)["waiting_since"]
    machine.kill_daemon()
    assert waiting(machine)["waiting_since"] == since
    machine.replicate("daemon", "stop")
    assert waiting(machine)["waiting_since"] == since
    proxy.come_back()
    machine.flush()
    assert_stored(make_machine(), ids)


def test_a_trainer_that_is_killed_while_the_bucket_is_away_loses_nothing(machine, make_machine, proxy):
    proxy.go_away()
    with machine.begin(5, SIZE, 1, DIE_AFTER_THREE) as process:
        output, errors = process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL, errors
    ids = output.split()
    assert len(ids) == 4
    machine.kill_daemon()
    proxy.come_back()
    machine.flush()
    assert_stored(make_machine(), ids)
    assert machine.json("show", ids[0])["status"] == "killed"


def test_commands_say_which_bucket_cannot_be_reached_and_why(machine, proxy):
    machine.replicate("ls")
    proxy.go_away()
    for command in (["ls"], ["show", "latest"], ["du"], ["cat", "latest", "model.pt"]):
        done = machine.run(*command)
        if done.returncode == 0:
            # What is on this machine may be shown, and it is said that it may be old.
            assert "lab" in done.stderr, command
        else:
            assert done.returncode == 3, command
            assert "s3://lab" in done.stderr
        assert "Traceback" not in done.stderr
    proxy.come_back()
    machine.replicate("ls")


def test_a_bucket_that_answers_nothing_but_errors_is_as_one_that_is_away(machine, make_machine, proxy):
    rule = proxy.add(faults.slow_down)
    ids = machine.train(2, SIZE)
    assert "SlowDown" in waiting(machine)["waiting_because"] or "slow" in waiting(machine)["waiting_because"]
    assert rule.hits
    proxy.clear()
    machine.flush()
    assert_stored(make_machine(), ids)
