"""`replicate gc` against a real daemon."""

import json


def disk_bytes(project):
    repository = project.directory / ".replicate"
    return sum(path.stat().st_size for path in repository.glob("packs/*/*"))


def test_gc_deletes_what_rm_has_left_and_nothing_else(own_project):
    project = own_project
    experiment = project.json("ls")[0]["id"]
    nothing = json.loads(project.replicate("gc", "--json"))
    assert nothing["deleted_packs"] == 0
    assert nothing["kept_bytes"] == disk_bytes(project)
    project.train(0.01)
    before = disk_bytes(project)
    project.replicate("rm", "--force", experiment)
    foreseen = json.loads(project.replicate("gc", "--dry-run", "--json"))
    assert foreseen["dry_run"] is True
    assert disk_bytes(project) == before
    text = project.replicate("gc")
    assert text.startswith("Deleted ")
    assert before - disk_bytes(project) == foreseen["deleted_bytes"] > 0
    assert project.replicate("gc").startswith("There is nothing to delete")
    left = project.json("ls")[0]["id"]
    assert "train.py" in project.replicate("files", left)
    assert project.replicate("cat", left, "train.py").startswith("import pathlib")
    project.train(0.1)
    assert len(project.json("ls")) == 2


def test_gc_says_what_it_cannot_read_and_deletes_nothing(own_project):
    project = own_project
    repository = project.directory / ".replicate"
    (damaged,) = repository.glob("experiments/*.json")
    damaged.chmod(0o644)
    damaged.write_bytes(b"not a record")
    before = disk_bytes(project)
    result = project.run("gc")
    assert result.returncode == 1
    assert damaged.name in result.stderr
    assert "nothing was deleted" in result.stderr
    assert disk_bytes(project) == before


def test_gc_of_a_repository_that_is_not_there_yet(own_project, tmp_path):
    result = own_project.run("gc", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "There is nothing to delete\n")
    assert json.loads(own_project.replicate("gc", "--json", cwd=tmp_path))["deleted_bytes"] == 0
