"""The daemon in trouble: killed, out of space, its repository moved, damaged or deleted; and removals."""

import dataclasses
import os
import shutil
import subprocess
import threading

import pytest

from replicate import errors
from replicate._pb import daemon_pb2 as pb
from replicate.ids import new_id


def test_requests_of_one_id_at_the_same_time_are_one_snapshot(project):
    project.write("big", os.urandom(8 << 20))
    record = dataclasses.replace(project.init(), id=new_id(), paths=("big",))
    threads = [threading.Thread(target=project.send_init, args=(record,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert project.flush().failed == 0
    assert len(project.list()) == 2
    assert not list((project.daemon.home / "state" / "spool").iterdir())


def test_snapshots_are_listed_as_captured_until_they_are_stored_and_never_half(project, error_of, tmp_path):
    project.write("a")
    first = project.init("a")
    project.flush()
    # The repository disappears from under the daemon: nothing can be stored, and nothing is lost.
    hidden = tmp_path / "hidden"
    (project.directory / ".replicate").rename(hidden)
    (project.directory / ".replicate").write_text("in the way")
    checkpoint = project.checkpoint(first, "a", metrics={"loss": 1.0})
    reply = project.daemon.stub.WaitStored(pb.WaitStoredRequest(timeout_s=0.2))
    assert reply.pending + reply.active == 1
    (project.directory / ".replicate").unlink()
    hidden.rename(project.directory / ".replicate")
    assert project.flush().failed == 0
    assert project.read(checkpoint.id, "a") == b"x"


def test_a_repository_that_was_moved_is_waited_for_and_not_made_anew(project, wait_until):
    experiment = project.init()
    project.flush()
    repository = project.directory / ".replicate"
    repository.rename(project.directory / "moved")
    checkpoint = project.checkpoint(experiment, metrics={"loss": 1.0})

    def reason():
        return project.daemon.stub.GetStatus(pb.GetStatusRequest()).waiting_because

    assert "no repository at" in wait_until(reason, "the status says what it waits for")
    assert not repository.exists()
    (project.directory / "moved").rename(repository)
    assert project.flush().failed == 0
    assert [c.id for c in project.checkpoints(experiment.id)] == [checkpoint.id]


def test_a_checkpoint_of_an_experiment_that_somebody_else_deleted_fails(project):
    experiment = project.init()
    project.flush()
    shutil.rmtree(project.directory / ".replicate")
    project.init()
    project.checkpoint(experiment, metrics={"loss": 1.0})
    reply = project.flush()
    assert reply.failed == 1
    assert "is not in file://" in reply.failures[0].error


@pytest.mark.parametrize("mode", ["auto", "copy"])
def test_a_daemon_killed_while_storing_is_continued_by_the_next(project, mode):
    data = os.urandom(150 << 20)
    project.write("weights", data)
    experiment = project.init("weights", mode=mode)
    checkpoint = project.checkpoint(experiment, "weights", metrics={"loss": 0.1}, mode=mode)
    project.daemon.kill()
    assert not (project.directory / ".replicate" / "snapshots" / checkpoint.id).exists()
    project.daemon.start()
    assert project.flush().failed == 0
    assert project.read(checkpoint.id, "weights") == data
    (summary,) = project.list()
    assert summary.best.id == checkpoint.id
    assert not list((project.daemon.home / "state" / "spool").iterdir())


def test_a_stopped_daemon_leaves_nothing_behind_and_loses_nothing(project, wait_until):
    project.write("weights", os.urandom(100 << 20))
    experiment = project.init("weights")
    assert project.daemon.stop() == 0
    assert not (project.daemon.home / "run" / "replicated.sock").exists()
    project.daemon.start()
    project.flush()
    assert len(project.read(experiment.id, "weights")) == 100 << 20


def test_captures_of_an_earlier_boot_that_were_not_fsynced_are_failed_not_believed(project, home):
    import sqlite3

    project.write("a")
    (project.directory / ".replicate").mkdir()
    (project.directory / ".replicate").chmod(0o700)
    project.daemon.stub.Shutdown(pb.ShutdownRequest())
    project.daemon.process.wait()
    project.daemon.start()
    experiment = project.init("a")
    project.flush()
    big = os.urandom(150 << 20)
    project.write("b", big)
    unsafe = project.checkpoint(experiment, "b", metrics={"loss": 0.5})
    safe = project.checkpoint(experiment, "b", mode="copy")
    project.daemon.kill()
    with sqlite3.connect(home / "state" / "journal.db") as journal:
        journal.execute("UPDATE jobs SET boot_id = 'another boot'")
    journal.close()
    project.daemon.start()
    reply = project.flush()
    assert reply.failed == 1
    assert "the machine restarted" in reply.failures[0].error
    states = {c.id: c for c in project.checkpoints(experiment.id)}
    assert states[unsafe.id].state == "failed"
    assert states[unsafe.id].metrics == {"loss": 0.5}
    assert project.read(safe.id, "b") == big


def test_removing_takes_away_records_at_once_and_for_good(project, error_of):
    project.write("a")
    experiment = project.init("a")
    kept = project.checkpoint(experiment, "a", step=1)
    gone = project.checkpoint(experiment, "a", step=2)
    project.flush()
    request = pb.RemoveRequest(repository=project.repository, ids=[gone.id[:8]])
    (item,) = project.daemon.stub.Remove(request).items
    assert (item.id, item.kind, item.step) == (gone.id, "checkpoint", 2)
    assert [c.id for c in project.checkpoints(experiment.id)] == [kept.id]
    refused = error_of(
        lambda: project.daemon.stub.Remove(
            pb.RemoveRequest(repository=project.repository, ids=[experiment.id])
        )
    )
    assert isinstance(refused, errors.InvalidArgument)
    project.end(experiment)
    project.daemon.stub.Remove(pb.RemoveRequest(repository=project.repository, ids=[experiment.id]))
    project.flush()
    assert project.list() == []
    assert isinstance(error_of(lambda: project.resolve(experiment.id)), errors.NotFound)
    # The script goes on, and is told.
    error = error_of(lambda: project.checkpoint(experiment, "a"))
    assert isinstance(error, errors.NotFound)
    assert "was deleted" in error.message


def test_removing_what_is_being_stored_keeps_it_from_appearing(project):
    project.write("big", os.urandom(100 << 20))
    experiment = project.init("big")
    project.daemon.stub.Remove(
        pb.RemoveRequest(repository=project.repository, ids=[experiment.id], force=True)
    )
    project.flush()
    assert project.list() == []
    assert not list((project.directory / ".replicate" / "snapshots").glob("*"))


def test_damaged_records_are_listed_as_such_and_others_are_not_affected(project, error_of):
    first, second = project.init(), project.init()
    project.flush()
    record = project.directory / ".replicate" / "experiments" / f"{first.id}.json"
    record.chmod(0o600)
    record.write_bytes(record.read_bytes()[:-30])
    project.daemon.stop()
    shutil.rmtree(project.daemon.home / "cache")
    project.daemon.start()
    found = {s.record.id: s for s in project.list()}
    assert found[first.id].state == "failed"
    assert "damaged" in found[first.id].error
    error = error_of(lambda: project.files(first.id))
    assert isinstance(error, errors.RepositoryDamaged)
    assert found[second.id].state == "stored"


def test_a_repository_without_its_head_is_damaged_and_not_empty(project, error_of):
    project.init()
    project.flush()
    (project.directory / ".replicate" / "repository.json").unlink()
    error = error_of(project.list)
    assert isinstance(error, errors.RepositoryDamaged)
    assert "repository.json is missing" in error.message


def test_trouble_with_storing_is_told_to_the_script(project, wait_until):
    experiment = project.init()
    project.flush()
    (project.directory / ".replicate").rename(project.directory / "moved")

    def told():
        record = dataclasses.replace(project.checkpoint(experiment), id=new_id())
        return project.send_checkpoint(record).waiting_because

    assert "no repository at" in wait_until(told, "the answer says why nothing is stored")
    assert "no repository at" in project.end(experiment).waiting_because
    (project.directory / "moved").rename(project.directory / ".replicate")
    project.flush()
    assert project.daemon.stub.GetStatus(pb.GetStatusRequest()).waiting_because == ""


def test_what_waits_for_a_missing_repository_is_listed_and_can_be_removed(project, error_of):
    experiment = project.init()
    project.flush()
    (project.directory / ".replicate").rename(project.directory / "moved")
    checkpoint = project.checkpoint(experiment, metrics={"loss": 1.0})
    assert project.resolve(checkpoint.id).checkpoint.state == "captured"
    error = error_of(
        lambda: project.daemon.stub.Remove(
            pb.RemoveRequest(repository=project.repository, ids=[experiment.id], force=True)
        )
    )
    assert isinstance(error, (errors.NotFound, errors.RepositoryMissing))
    project.daemon.stub.Remove(pb.RemoveRequest(repository=project.repository, ids=[checkpoint.id]))
    assert project.flush().pending == 0


@pytest.mark.skipif(os.getuid() != 0, reason="needs to mount a small file system")
def test_storing_goes_on_once_a_full_home_has_space_again(make_project, tmp_path, error_of):
    place = tmp_path / "place"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], check=True)
    try:
        project = make_project(place / "home")
        experiment = project.init()
        project.flush()
        before = project.checkpoint(experiment)
        filler = place / "filler"
        with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        error = error_of(
            lambda: [project.checkpoint(experiment, metrics={"x": "y" * 50_000}) for _ in range(50)]
        )
        assert isinstance(error, errors.StateUnwritable)
        filler.unlink()
        after = project.checkpoint(experiment)
        assert project.flush().failed == 0
        stored = {c.id for c in project.checkpoints(experiment.id) if c.state == "stored"}
        assert {before.id, after.id} <= stored
        project.daemon.stop()
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_records_that_are_repaired_are_read_again(project):
    experiment = project.init()
    checkpoint = project.checkpoint(experiment, metrics={"loss": 0.5})
    project.flush()
    file = project.directory / ".replicate" / "checkpoints" / experiment.id / f"{checkpoint.id}.json"
    good = file.read_bytes()
    file.chmod(0o600)
    project.daemon.stop()
    shutil.rmtree(project.daemon.home / "cache")
    file.write_bytes(good.replace(b"0.5", b"0.6"))
    project.daemon.start()
    assert project.checkpoints(experiment.id)[0].state == "failed"
    file.write_bytes(good)
    assert project.checkpoints(experiment.id)[0].metrics == {"loss": 0.5}
    assert project.list()[0].best.id == checkpoint.id


def test_a_damaged_catalog_is_made_anew(project):
    experiment = project.init()
    project.flush()
    project.list()
    project.daemon.stop()
    (catalog,) = (project.daemon.home / "cache" / "catalogs").glob("*.db")
    data = catalog.read_bytes()
    catalog.write_bytes(data[:4096] + b"\xa5" * (len(data) - 4096))
    project.daemon.start()
    assert [s.record.id for s in project.list()] == [experiment.id]


def test_a_copy_of_a_repository_has_a_catalog_of_its_own(project, tmp_path):
    experiment = project.init()
    project.end(experiment)
    project.flush()
    shutil.copytree(project.directory / ".replicate", tmp_path / "copy")
    copy = dataclasses.replace(project, repository=f"file://{tmp_path}/copy")
    assert len(copy.list()) == 1
    copy.daemon.stub.Remove(pb.RemoveRequest(repository=copy.repository, ids=[experiment.id]))
    assert (len(copy.list()), len(project.list())) == (0, 1)
