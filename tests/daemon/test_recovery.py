"""A daemon that is killed before anything is stored: the next one goes on, or says what is lost."""

import dataclasses
import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from replicate._pb import daemon_pb2 as pb
from replicated.repository import Repository
from replicated.store import open_store

BIG = 5 << 20
#: One byte a second: nothing is ever stored.
NEVER = ("--limit", "1")


@pytest.fixture
def slow_project(project):
    """A project whose daemon stores nothing; its experiment is stored already."""
    experiment = project.init()
    project.flush()
    project.daemon.stop()
    project.daemon.start(*NEVER)
    return project, experiment


def restart(project) -> None:
    project.daemon.kill()
    project.daemon.start()


def state_of(project, experiment, checkpoint):
    return next(c for c in project.checkpoints(experiment.id) if c.id == checkpoint.id)


def test_leased_file_that_is_as_it_was_is_stored_by_the_next_daemon(slow_project):
    project, experiment = slow_project
    data = os.urandom(BIG)
    project.write("model.pt", data)
    checkpoint = project.checkpoint(experiment, "model.pt")
    status = project.daemon.stub.GetStatus(pb.GetStatusRequest())
    assert (status.leased_files, status.leased_bytes, status.spool_bytes) == (1, BIG, 0)
    restart(project)
    assert project.flush().failed == 0
    assert project.read(checkpoint.id, "model.pt") == data


@pytest.mark.parametrize("fate", ["rewritten", "same bytes again", "deleted", "replaced"])
def test_leased_file_that_changed_without_a_daemon_is_reported_and_never_mixed_up(slow_project, fate):
    project, experiment = slow_project
    data = os.urandom(BIG)
    path = project.write("model.pt", data)
    checkpoint = project.checkpoint(experiment, "model.pt", metrics={"loss": 1.0})
    project.daemon.kill()
    if fate == "rewritten":
        path.write_bytes(os.urandom(BIG))
    elif fate == "same bytes again":
        path.write_bytes(data)
    elif fate == "deleted":
        path.unlink()
    else:
        other = project.write("other", data)
        other.replace(path)
    project.daemon.start()
    assert project.flush().failed == 1
    found = state_of(project, experiment, checkpoint)
    assert found.state == "failed"
    assert "the daemon ended before" in found.error
    assert "model.pt" in found.error
    assert found.metrics == {"loss": 1.0}


def test_what_was_committed_before_the_daemon_died_is_adopted_though_its_capture_is_lost(
    slow_project, tmp_path
):
    project, experiment = slow_project
    path = project.write("model.pt", os.urandom(BIG))
    checkpoint = project.checkpoint(experiment, "model.pt")
    project.daemon.kill()
    store = open_store(f"file://{project.directory}/.replicate", create=False)
    repository = Repository.open_on(store, cache=tmp_path / "cache", create=False)
    repository.put_checkpoint(dataclasses.replace(checkpoint, state="stored"))
    path.write_bytes(os.urandom(BIG))
    project.daemon.start()
    assert project.flush().failed == 0
    assert state_of(project, experiment, checkpoint).state == "stored"
    assert not list(store.list("log/new/"))
    repository.close()


def test_leased_file_that_was_rewritten_before_the_daemon_died_is_safe_in_the_spool(slow_project, wait_until):
    project, experiment = slow_project
    data = os.urandom(BIG)
    path = project.write("model.pt", data)
    checkpoint = project.checkpoint(experiment, "model.pt")
    path.write_bytes(b"something else")
    later = project.checkpoint(experiment, "model.pt")
    restart(project)
    assert project.flush().failed == 0
    assert project.read(checkpoint.id, "model.pt") == data
    assert project.read(later.id, "model.pt") == b"something else"


def test_small_files_are_safe_or_read_again(slow_project):
    project, experiment = slow_project
    contents = {f"data/{number}": os.urandom(1000 + number) for number in range(300)}
    contents["data/empty"] = b""
    for name, data in contents.items():
        project.write(name, data)
    checkpoint = project.checkpoint(experiment, "data")
    restart(project)
    assert project.flush().failed == 0
    for name, data in contents.items():
        assert project.read(checkpoint.id, name) == data


def test_empty_files_need_no_spool(slow_project):
    project, experiment = slow_project
    project.write("empty", b"")
    checkpoint = project.checkpoint(experiment, "empty")
    project.daemon.kill()
    project.write("empty", b"not any more")
    project.daemon.start()
    assert project.flush().failed == 0
    assert project.read(checkpoint.id, "empty") == b""


def test_copied_files_survive_whatever_happens_to_them(slow_project):
    project, experiment = slow_project
    data = os.urandom(BIG)
    path = project.write("model.pt", data)
    checkpoint = project.checkpoint(experiment, "model.pt", mode="copy")
    project.daemon.kill()
    path.unlink()
    project.daemon.start()
    assert project.flush().failed == 0
    assert project.read(checkpoint.id, "model.pt") == data


def write_sparse(project, name):
    """A file of 128 MiB that holds a few bytes."""
    path = project.write(name, b"beginning")
    with path.open("r+b") as file:
        file.truncate(128 << 20)
        file.seek(64 << 20)
        file.write(b"middle")
    return path


def check_sparse(project, checkpoint, name):
    path = project.daemon.home / "state" / "spool" / checkpoint.id / name
    info = path.stat()
    assert (info.st_size, info.st_blocks * 512 < 1 << 20) == (128 << 20, True)
    with path.open("rb") as file:
        assert file.read(10) == b"beginning\0"
        file.seek((64 << 20) - 1)
        assert file.read(8) == b"\0middle\0"


def test_a_held_file_that_somebody_writes_now_is_copied_with_its_holes(slow_project):
    project, experiment = slow_project
    path = write_sparse(project, "sparse")
    checkpoint = project.checkpoint(experiment, "sparse")
    project.daemon.kill()
    with path.open("r+b"):
        project.daemon.start(*NEVER)
    check_sparse(project, checkpoint, "held-0")


def test_a_file_that_was_in_memory_is_read_again_with_its_holes(slow_project):
    project, experiment = slow_project
    path = write_sparse(project, "sparse")
    with path.open("r+b"):
        checkpoint = project.checkpoint(experiment, "sparse")
    project.daemon.kill()
    spool = project.daemon.home / "state" / "spool" / checkpoint.id
    (spool / "complete").unlink()
    (copy,) = spool.glob("large-*")
    copy.write_bytes(b"not yet")
    project.daemon.start(*NEVER)
    check_sparse(project, checkpoint, copy.name)


def test_several_restarts_in_a_row_lose_nothing(slow_project):
    project, experiment = slow_project
    data = os.urandom(BIG)
    project.write("model.pt", data)
    checkpoints = [project.checkpoint(experiment, "model.pt", step=step) for step in range(3)]
    for _ in range(3):
        project.daemon.kill()
        project.daemon.start(*NEVER)
        checkpoints.append(project.checkpoint(experiment, "model.pt", step=9))
    restart(project)
    assert project.flush().failed == 0
    for checkpoint in checkpoints:
        assert project.read(checkpoint.id, "model.pt") == data


def test_a_daemon_that_is_told_to_stop_copies_what_it_holds_first(slow_project):
    project, experiment = slow_project
    contents = [os.urandom(BIG) for _ in range(3)]
    checkpoints = []
    for step, data in enumerate(contents):
        project.write(f"model-{step}.pt", data)
        checkpoints.append(project.checkpoint(experiment, f"model-{step}.pt", step=step))
    assert project.daemon.stop() == 0
    for step in range(3):
        project.write(f"model-{step}.pt", b"another")
    project.daemon.start()
    assert project.flush().failed == 0
    for step, data in enumerate(contents):
        assert project.read(checkpoints[step].id, f"model-{step}.pt") == data


def test_recovery_never_writes_into_a_file_that_a_complete_snapshot_shares(slow_project, wait_until):
    project, experiment = slow_project
    data = os.urandom(BIG)
    path = project.write("model.pt", data)
    # What is younger is not shared: it may change once more without a change of its times.
    wait_until(lambda: time.time_ns() - path.stat().st_ctime_ns > 10**8, "the file is not racy any more")
    first = project.checkpoint(experiment, "model.pt", mode="copy")
    second = project.checkpoint(experiment, "model.pt", mode="copy")
    spool = project.daemon.home / "state" / "spool"
    shared = [next((spool / one.id).glob("large-*")) for one in (first, second)]
    assert shared[0].stat().st_ino == shared[1].stat().st_ino
    project.daemon.kill()
    # As if the daemon had died before the second was complete.
    (spool / second.id / "complete").unlink()
    with closing(sqlite3.connect(project.daemon.home / "state" / "journal.db")) as journal, journal:
        journal.execute("UPDATE jobs SET is_durable = 0 WHERE id = ?", (second.id,))
    with path.open("r+b") as opened:
        opened.write(b"another")
    project.daemon.start()
    assert project.flush().failed == 1
    assert state_of(project, experiment, second).state == "failed"
    assert project.read(first.id, "model.pt") == data


def test_a_store_process_that_is_killed_again_and_again_loses_nothing(slow_project, wait_until):
    project, experiment = slow_project
    data = os.urandom(BIG)
    project.write("model.pt", data)
    checkpoint = project.checkpoint(experiment, "model.pt")
    for _ in range(5):
        pid = wait_until(lambda: store_process_of(project.daemon.process.pid), "a store process runs")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), "it has ended")
    restart(project)
    assert project.flush().failed == 0
    assert project.read(checkpoint.id, "model.pt") == data


def store_process_of(daemon: int) -> int:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == daemon and b"store-process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        except OSError:
            continue  # it has just ended
    return 0
