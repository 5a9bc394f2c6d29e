"""A whole repository that grows while it is mounted."""

import os
from datetime import datetime, timezone

import pytest

from replicate.ids import new_id
from replicate.records import CheckpointRecord, ExperimentRecord

proves = pytest.mark.proves

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


@pytest.fixture
def growing(make_snapshots, memory_tree, tmp_path):
    """Makes checkpoints of one experiment."""
    snapshots = make_snapshots(tmp_path / "repository", tmp_path / "cache", memory_tree)
    experiment = ExperimentRecord(new_id(), AT, paths=("code",))
    _, root = snapshots.store({b"train.py": b"code"})
    snapshots.repository.put_experiment(experiment, root)

    def add(step):
        record = CheckpointRecord(new_id(), experiment.id, AT, step, ("model",), state="stored")
        _, root = snapshots.store({b"model": b"weights of step %d" % step})
        snapshots.repository.put_checkpoint(record, root)

    add(1)
    yield snapshots, experiment.id, add
    snapshots.close()


@proves("S-25", "S-26")
def test_new_checkpoints_show_and_what_is_there_stays(engine, serve, ending, growing, tmp_path, wait_until):
    snapshots, experiment_id, add = growing
    served = serve(tmp_path, snapshots, variant=engine)
    # Its name is the beginning of the id.
    (experiment,) = (served.directory / "experiments").iterdir()
    assert experiment_id.startswith(experiment.name)

    def checkpoints():
        return [entry for entry in (experiment / "checkpoints").iterdir() if entry.is_dir()]

    (first,) = checkpoints()
    number = os.stat(first / "model").st_ino
    with open(first / "model", "rb", buffering=0) as file:
        add(2)
        wait_until(lambda: len(checkpoints()) == 2)
        assert os.pread(file.fileno(), 100, 0) == b"weights of step 1"
    found = {(path / "model").read_bytes() for path in checkpoints()}
    assert found == {b"weights of step 1", b"weights of step 2"}
    assert os.stat(first / "model").st_ino == number
    assert (experiment / "code/train.py").read_bytes() == b"code"
    ending(served)
