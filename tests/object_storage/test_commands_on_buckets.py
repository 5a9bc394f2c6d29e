"""Every command does on a bucket what it does on a disk, also on a machine that never saw the files."""

import shutil

import pytest
from object_storage.machines import model

SIZE = 3_000_000

pytestmark = pytest.mark.parametrize("server", ["moto", "rclone"], indirect=True)


@pytest.fixture
def run(machine):
    """The ids of a run of two checkpoints that is stored, and whose originals are gone."""
    ids = machine.train(2, SIZE)
    machine.flush()
    shutil.rmtree(machine.directory / "code")
    (machine.directory / "model.pt").unlink()
    return ids


@pytest.fixture
def others(machine, run, make_machine):
    """The machine that saved, and another one."""
    return [machine, make_machine()]


def test_runs_are_listed_and_shown_everywhere(run, others):
    experiment, first, second = run
    for machine in others:
        (listed,) = machine.json("ls")
        assert (listed["id"], listed["name"], listed["num_checkpoints"]) == (experiment, "run-1", 2)
        assert listed["best_checkpoint"]["id"] == listed["latest_checkpoint"]["id"] == second
        assert listed["params"] == {"seed": 1, "lr": 0.1}
        assert listed["status"] == "stopped"
        shown = machine.json("show", first[:9])
        assert (shown["id"], shown["state"], shown["metrics"]) == (first, "stored", {"loss": 1.0})


def test_files_are_listed_printed_and_checked_out_everywhere(run, others, tmp_path):
    _experiment, first, second = run
    for number, machine in enumerate(others):
        paths = {entry["path"] for entry in machine.json("files", first)}
        assert {"model.pt", "code/train.py", "code/model.py"} <= paths
        done = machine.run("cat", first, "model.pt", text=False)
        assert (done.returncode, done.stdout) == (0, model(1, 0, SIZE))
        target = tmp_path / f"out-{number}"
        machine.replicate("checkout", second, "-o", target)
        assert (target / "model.pt").read_bytes() == model(1, 1, SIZE)
        assert (target / "code" / "train.py").read_text() == "# train.py 1\n" * 50


def test_checkpoints_are_compared_everywhere(run, others):
    _, first, second = run
    for machine in others:
        changed = machine.json("diff", first, second)
        assert "model.pt" in str(changed)
        assert "code/train.py" not in str(changed)


def test_snapshots_are_mounted_everywhere(run, others, tmp_path):
    _, first, _ = run
    for number, machine in enumerate(others):
        target = tmp_path / f"mounted-{number}"
        target.mkdir()
        machine.replicate("mount", first, target)
        try:
            assert (target / "model.pt").read_bytes() == model(1, 0, SIZE)
            assert sorted(path.name for path in (target / "code").iterdir()) == ["model.py", "train.py"]
        finally:
            machine.replicate("umount", target)


def test_what_is_removed_is_gone_everywhere(run, others):
    experiment, first, second = run
    saver, other = others
    assert other.json("ls")[0]["num_checkpoints"] == 2
    other.replicate("rm", "-f", first)
    for machine in others:
        assert machine.json("ls")[0]["num_checkpoints"] == 1
        done = machine.run("cat", first, "model.pt")
        assert (done.returncode, done.stdout) == (1, "")
        assert first[:7] in done.stderr
        assert machine.run("cat", second, "model.pt", text=False).stdout == model(1, 1, SIZE)
    saver.replicate("rm", "-f", experiment)
    assert [machine.json("ls") for machine in others] == [[], []]


def test_sizes_are_shown_everywhere(run, others):
    for machine in others:
        sizes = machine.json("du")
        assert sizes["logical_bytes"] >= 2 * SIZE
        assert 2 * SIZE <= sizes["stored_bytes"] < 2.1 * SIZE


def test_two_machines_save_into_one_repository(machine, make_machine):
    other = make_machine()
    processes = [machine.begin(3, SIZE, 1), other.begin(3, SIZE, 2)]
    ids = [process.communicate(timeout=100)[0].split() for process in processes]
    for each in (machine, other):
        each.flush()
    for each in (machine, other):
        assert {found["id"] for found in each.json("ls")} == {ids[0][0], ids[1][0]}
        for seed, (_, *checkpoints) in enumerate(ids, start=1):
            for step, checkpoint in enumerate(checkpoints):
                assert each.run("cat", checkpoint, "model.pt", text=False).stdout == model(seed, step, SIZE)


def test_a_bucket_that_is_not_there_is_named_and_not_made_by_readers(make_machine, proxy, server):
    machine = make_machine()
    (machine.directory / "replicate.yaml").write_text("repository: s3://nobody-made-this/runs\n")
    done = machine.run("ls")
    assert done.returncode == 3
    assert "nobody-made-this" in done.stderr
    assert "Traceback" not in done.stderr
    machine.train()
    machine.flush()
    assert len(machine.json("ls")) == 1
