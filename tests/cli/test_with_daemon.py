"""The commands against a real daemon and a repository that a real script recorded."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager

import pytest


def test_ls_shows_what_differs(project):
    lines = project.replicate("ls").splitlines()
    assert lines[0].split("  ")[0] == "EXPERIMENT"
    assert "lr=0.1" in lines[1] and "run-0.1" in lines[1] and "stopped" in lines[1]
    assert "opt=adam" not in project.replicate("ls")
    assert "opt=adam" in project.replicate("ls", "--all")


def test_ls_json(project):
    first, second = project.json("ls")
    assert first["params"] == {"lr": 0.1, "opt": "adam"}
    assert first["num_checkpoints"] == 3
    assert first["best_checkpoint"]["step"] == second["latest_checkpoint"]["step"] == 2
    assert first["best_checkpoint"]["metrics"]["odd"] == "NaN"
    assert first["best_checkpoint"]["state"] == "stored"
    assert first["status"] == "stopped"


def test_ls_filters_sorts_and_limits(project):
    first, second = project.replicate("ls", "-q").split()
    assert project.replicate("ls", "-q", "-f", "lr < 0.05").split() == [second]
    assert project.replicate("ls", "-q", "-f", "lr > 0", "--filter", "loss > 0.01").split() == [first]
    assert project.replicate("ls", "-q", "-s", "lr").split() == [second, first]
    assert project.replicate("ls", "-q", "-n", "1").split() == [second]
    assert project.replicate("ls", "-q", "-n", "1", "-s", "created").split() == [first]


def test_the_same_list_from_elsewhere_with_a_repository_before_or_after_the_command(project, tmp_path):
    url = f"file://{project.directory}/.replicate"
    expected = project.replicate("ls", "-q")
    assert project.replicate("ls", "-q", "-R", url, cwd=tmp_path) == expected
    assert project.replicate("--repository", url, "ls", "-q", cwd=tmp_path) == expected
    assert project.replicate("-D", project.directory, "ls", "-q", cwd=tmp_path) == expected


def test_nothing_recorded_yet_is_an_empty_list(project, tmp_path):
    result = project.run("ls", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.startswith("There are no experiments in file://")
    assert project.replicate("ls", "--json", cwd=tmp_path) == "[]\n"
    assert project.replicate("ps", "-q", cwd=tmp_path) == ""
    nothing = json.loads(project.replicate("du", "--json", cwd=tmp_path))
    assert nothing["stored_bytes"] == 0
    assert list(nothing["encodings"]) == list(project.json("du")["encodings"])
    assert all(sizes == {"plain_bytes": 0, "stored_bytes": 0} for sizes in nothing["encodings"].values())


def test_a_repository_that_was_named_and_is_not_there_exits_with_3(project, tmp_path):
    result = project.run("ls", "-R", f"file://{tmp_path}/missing")
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.startswith("error: no repository at ")


def test_a_bad_filter_is_wrong_usage(project):
    result = project.run("ls", "-f", "lr")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "'lr'" in result.stderr


def test_show_an_experiment_and_a_checkpoint(project):
    experiment = project.json("ls")[0]
    text = project.replicate("show", experiment["id"][:8])
    assert text.startswith(f"Experiment {experiment['id']}\n")
    assert "(best)" in text
    best = experiment["best_checkpoint"]["id"]
    for reference in (best[:10], f"{experiment['id'][:8]}:best", f"{experiment['id']}:step=2"):
        assert project.replicate("show", reference).startswith(f"Checkpoint {best} (best)\n")


def test_show_json(project):
    experiment = project.json("show", "latest")
    assert [checkpoint["step"] for checkpoint in experiment["checkpoints"]] == [0, 1, 2]
    assert experiment["system"]["cpu_count"] >= 1
    assert experiment["python_version"].startswith("3.")
    checkpoint = project.json("show", "latest:step=1")
    assert checkpoint["step"] == 1 and checkpoint["experiment"]["id"] == experiment["id"]


@pytest.mark.parametrize("command", [["show"], ["files"], ["checkout"], ["rm", "-f"], ["diff", "latest"]])
def test_an_unknown_id(project, command):
    result = project.run(*command, "0000000")
    assert (result.returncode, result.stdout) == (1, "")
    assert "error: no experiment or checkpoint starts with: 0000000\n" in result.stderr


def test_diff(project):
    first, second = project.replicate("ls", "-q").split()
    text = project.replicate("diff", first[:7], second[:7])
    assert "lr:" in text and "opt:" not in text
    assert text.endswith("Files\n(no difference)\n")
    assert "no difference" not in project.replicate("diff", f"{first}:step=0", first).split("Files")[1]
    data = project.json("diff", f"{first}:step=0", f"{first}:step=1")
    assert [(file["path"], file["change"]) for file in data["files"]] == [("model.pt", "changed")]
    assert data["params"] == {}


def test_diff_of_code_and_checkpoint_with_content(project):
    text = project.replicate("diff", "latest:code", "latest:best", "--content")
    assert "+ model.pt  97.7 KiB\n" in text
    assert "model.pt: binary files differ" in text


def test_files_and_cat(project):
    lines = project.replicate("files", "latest").splitlines()
    assert lines[0].endswith("  data/")
    assert any(line.endswith("data/link -> ../train.py") for line in lines)
    assert any(line.endswith("data/new\\nline") for line in lines)
    assert any(line.endswith("data/\\xff") for line in lines)
    entries = {entry["path"]: entry for entry in project.json("files", "latest")}
    assert entries["train.py"]["size"] == len(project.script)
    assert entries["data/link"]["target"] == "../train.py"
    assert entries["data/\udcff"]["path_bytes"] == "ZGF0YS//"
    assert [entry["path"] for entry in project.json("files", "latest", "model.pt")] == ["model.pt"]
    assert project.run("cat", "latest:step=1", "model.pt", text=False).stdout == b"\0\x01" * 50_000
    assert project.run("cat", "latest", "./data//\udcff", text=False).stdout == b"odd"


def test_cat_of_what_is_not_there(project):
    result = project.run("cat", "latest", "nope")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and "nope" in result.stderr


def test_output_into_a_closed_pipe_ends_quietly(project):
    command = " ".join(project.command("cat", "latest", "model.pt"))
    result = subprocess.run(
        ["bash", "-c", f"{command} | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"],
        env=project.environment,
        cwd=project.directory,
        capture_output=True,
        text=True,
    )
    # The whole file may have fitted into the pipe before its reader left.
    assert result.returncode in (0, 141)
    assert result.stderr == ""


def test_checkout(project, tmp_path):
    result = project.run("checkout", "latest", "-o", tmp_path / "new" / "out")
    assert result.returncode == 0, result.stderr
    assert "the best checkpoint of" in result.stderr
    assert result.stdout.strip().endswith("train.py 0.01")
    out = tmp_path / "new" / "out"
    assert (out / "model.pt").read_bytes() == b"\0\x02" * 50_000
    assert (out / "train.py").read_text() == project.script
    assert os.readlink(out / "data" / "link") == "../train.py"
    assert sorted(os.listdir(os.fsencode(out / "data"))) == [b"link", b"new\nline", b"\xff"]


def test_checkout_of_one_path(project, tmp_path):
    project.replicate("checkout", "latest:step=0", "--path", "model.pt", "-o", tmp_path)
    assert os.listdir(tmp_path) == ["model.pt"]


def test_checkout_into_a_full_directory_needs_force(project, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"mine")
    (tmp_path / "other").write_bytes(b"stays")
    refused = project.run("checkout", "latest", "-o", tmp_path)
    assert refused.returncode == 1
    assert "--force" in refused.stderr
    assert (tmp_path / "model.pt").read_bytes() == b"mine"
    dry = project.replicate("checkout", "latest", "-o", tmp_path, "--dry-run", "--delete")
    assert "replace  model.pt\n" in dry and "delete   other\n" in dry
    assert (tmp_path / "model.pt").read_bytes() == b"mine"
    project.replicate("checkout", "latest", "-o", tmp_path, "-f")
    assert (tmp_path / "model.pt").read_bytes() == b"\0\x02" * 50_000
    assert (tmp_path / "other").exists()


def test_checkout_asks_on_a_terminal(project, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"mine")
    status, output = project.on_terminal(["checkout", "latest", "-o", tmp_path], ["what", "n"])
    assert status == 1
    assert "Please answer y or n." in output and "nothing was checked out" in output
    assert (tmp_path / "model.pt").read_bytes() == b"mine"
    status, output = project.on_terminal(["checkout", "latest", "-o", tmp_path], ["y"])
    assert status == 0, output
    assert (tmp_path / "model.pt").read_bytes() == b"\0\x02" * 50_000


def test_checkout_json(project, tmp_path):
    data = project.json("checkout", "latest:code", "-o", tmp_path / "out", "--dry-run")
    assert {"verb": "create", "path": "train.py"} in data["actions"]
    assert data["checkpoint"] is None and data["directory"] == str(tmp_path / "out")


def test_status_and_flush(project):
    status = project.json("status")
    assert status["queue"]["pending"] == status["queue"]["active"] == 0
    assert status["failures"] == []
    assert status["daemon"]["pid"] > 0
    assert "everything is stored" in project.replicate("status")
    result = project.run("flush", "latest", "--timeout", "30")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "Everything is stored\n")


def test_du(project):
    usage = project.json("du")
    assert usage["logical_bytes"] > usage["unique_bytes"] > 0
    assert len(usage["experiments"]) == 2
    *_, saved, takes = project.replicate("du").splitlines()
    assert saved.startswith("Deduplication saved ") and takes.startswith("The repository takes ")
    repository = project.directory / ".replicate"
    size = sum(path.stat().st_size for path in repository.rglob("*") if path.is_file())
    assert usage["repository_bytes"] == size
    only = project.json("du", "latest")
    assert len(only.pop("experiments")) == 1
    assert only == {name: usage[name] for name in only}


def test_du_names_a_damaged_snapshot_and_counts_the_others(own_project):
    own_project.train(0.01)
    before = own_project.json("du")
    experiment_id = own_project.json("show", "latest")["id"]
    damaged = own_project.directory / ".replicate" / "experiments" / f"{experiment_id}.json"
    damaged.chmod(0o600)
    damaged.write_bytes(b"{}")
    result = own_project.run("du", "--json")
    usage = json.loads(result.stdout)
    assert result.returncode == 1
    named = f"error: experiment {experiment_id[:7]}, what `init` saved, is left out: experiments/"
    assert named in result.stderr
    assert [snapshot["id"] for snapshot in usage["unreadable"]] == [experiment_id]
    assert usage["snapshots"] == before["snapshots"] - 1
    assert usage["experiments"][0] == before["experiments"][0]


def test_du_after_everything_was_removed(own_project):
    own_project.replicate("rm", "-f", "latest")
    result = own_project.run("du", "--json")
    usage = json.loads(result.stdout)
    assert (usage["stored_bytes"], usage["experiments"]) == (0, [])
    assert usage["unreferenced_bytes"] > 0
    result = own_project.run("du")
    assert "There are no experiments in " in result.stderr
    assert result.stdout.startswith("The repository takes ")
    assert result.stdout.endswith(" that nothing refers to\n")


def test_doctor_finds_everything_in_order_here(project):
    report = project.json("doctor")
    failed = [check for check in report["checks"] if check["outcome"] == "fail"]
    assert failed == [] and report["ok"] is True
    assert {"Python", "Daemon", "Mounting, native", "Mounting, mfusepy"} <= {
        c["name"] for c in report["checks"]
    }


def test_doctor_says_what_is_wrong_with_the_project(project, tmp_path):
    (tmp_path / "replicate.yaml").write_text("repository: ftp://x\n")
    result = project.run("doctor", cwd=tmp_path)
    assert result.returncode == 1
    assert "fail  Project: " in result.stdout and "replicate.yaml:1" in result.stdout


@contextmanager
def unwritable_store(project):
    """A repository in which no data can be stored for the time being."""
    packs = project.directory / ".replicate" / "packs"
    aside = packs.rename(packs.with_name("aside"))
    packs.touch()
    yield
    packs.unlink()
    aside.rename(packs)


def test_what_is_held_up_is_said_and_stored_later(own_project):
    with unwritable_store(own_project):
        (own_project.directory / "train.py").write_text(own_project.script + "# new")
        own_project.train(0.2, flush=False)
        result = own_project.run("flush", "--timeout", "0.1")
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("error: not everything is stored after 0.1 s: ")
        status = own_project.json("status")
        assert status["queue"]["pending"] + status["queue"]["active"] > 0
        assert "storing…" in own_project.replicate("ls")
        diff = own_project.run("diff", "latest", "latest:code")
        assert diff.returncode == 0 and "Files\n(not compared)\n" in diff.stdout
        assert "warning: files are not compared: " in diff.stderr
        assert own_project.run("files", "latest").returncode == 1
        assert "Not stored yet: " in own_project.run("daemon", "stop").stderr
    own_project.replicate("flush")
    assert own_project.json("ls")[1]["latest_checkpoint"]["state"] == "stored"


def test_what_failed_is_said_and_forgotten_on_request(own_project):
    with unwritable_store(own_project):
        (own_project.directory / "train.py").write_text(own_project.script + "# new")
        own_project.train(0.2, flush=False)
        own_project.replicate("daemon", "stop")
        for captured in (own_project.home / "state" / "spool").iterdir():
            shutil.rmtree(captured)
    result = own_project.run("flush")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith(" failed to be stored")
    status = own_project.run("status", "--json")
    assert status.returncode == 1
    failures = json.loads(status.stdout)["failures"]
    assert {failure["path"] for failure in failures if isinstance(failure["path"], str)} == {"model.pt"}
    text = own_project.run("status")
    assert text.returncode == 1 and "\nFailed\n" in text.stdout and "`replicate rm " in text.stdout
    assert "failed: " in own_project.replicate("show", "latest")
    own_project.replicate("rm", "-f", *(failure["id"] for failure in failures))
    assert own_project.json("status")["failures"] == []


def test_diff_shows_the_rest_when_files_are_damaged(own_project):
    for pack in (own_project.directory / ".replicate" / "packs").rglob("*"):
        if pack.is_file():
            pack.unlink()
    result = own_project.run("diff", "latest:code", "latest:best")
    assert result.returncode == 0, result.stderr
    assert "warning: files are not compared: chunk " in result.stderr
    assert "Metrics\nloss:" in result.stdout and result.stdout.endswith("Files\n(not compared)\n")


@pytest.fixture
def damaged_project(own_project):
    """The record of the one experiment and of its newest checkpoint cannot be read."""
    newest = own_project.json("ls")[0]["latest_checkpoint"]["id"]
    for folder, name in (("experiments", "*.json"), ("checkpoints", f"*/{newest}.json")):
        (record,) = (own_project.directory / ".replicate" / folder).glob(name)
        record.write_text("garbage\n")
    own_project.replicate("daemon", "stop")
    shutil.rmtree(own_project.home / "cache")
    return own_project


def test_what_the_daemon_lists_of_damaged_records_is_known_as_such(damaged_project):
    (row,) = damaged_project.replicate("ls").splitlines()[1:2]
    assert row.split()[1:3] == ["unknown", "damaged"]
    experiment = damaged_project.json("ls")[0]
    assert experiment["duration_s"] is None and "is damaged" in experiment["error"]
    shown = damaged_project.replicate("show", experiment["id"])
    assert "\nRecord:  damaged" in shown and "1970" not in shown and "(none saved)" not in shown
    checkpoints = damaged_project.json("show", experiment["id"])["checkpoints"]
    (checkpoint,) = [c["id"] for c in checkpoints if c["error"]]
    shown = damaged_project.replicate("show", checkpoint)
    assert shown.count("\nRecord:  damaged") == 2 and "Step" not in shown


def test_rm_refuses_without_a_terminal(own_project):
    before = own_project.replicate("ls", "-q")
    result = own_project.run("rm", "latest")
    assert result.returncode == 1
    assert "(3 checkpoints)" in result.stderr and "--force" in result.stderr
    assert own_project.replicate("ls", "-q") == before


def test_rm_of_a_checkpoint_and_an_experiment(own_project):
    status, output = own_project.on_terminal(["rm", "latest:step=0"], ["n"])
    assert status == 1 and "checkpoint " in output and "(step 0)" in output
    assert own_project.json("ls")[0]["num_checkpoints"] == 3
    status, output = own_project.on_terminal(["rm", "latest:step=0"], ["y"])
    assert status == 0, output
    assert [c["step"] for c in own_project.json("show", "latest")["checkpoints"]] == [1, 2]
    unknown = own_project.run("rm", "-f", "latest", "0000000")
    assert unknown.returncode == 1
    assert len(own_project.json("ls")) == 1
    own_project.replicate("rm", "-f", "latest")
    assert own_project.json("ls") == []


def test_the_first_command_ever_in_a_home_directory_works(tmp_path):
    environment = {"PATH": os.environ["PATH"], "HOME": tempfile.mkdtemp(prefix="rpl-")}

    def run(*arguments):
        command = [sys.executable, "-m", "replicate.cli", *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    try:
        status = run("status")
        assert status.returncode == 0, status.stderr
    finally:
        run("daemon", "stop")
        shutil.rmtree(environment["HOME"])


def test_a_limit_is_chosen_when_the_daemon_starts(own_project):
    refused = own_project.run("daemon", "start", "--limit", "5MB/s")
    assert refused.returncode == 1
    assert "error: the limit was not set: it is chosen when the daemon starts" in refused.stderr
    own_project.replicate("daemon", "stop")
    own_project.replicate("daemon", "start", "--limit", "5MB/s")
    pid = own_project.json("daemon", "status")["pid"]
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        assert file.read().endswith(b"\0--limit\0005000000\0")
    wrong = own_project.run("daemon", "start", "--limit", "fast")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: --limit: not a rate such as 50MB/s or 1000000: 'fast'")


def test_the_daemon_starts_and_stops(own_project):
    pid = own_project.json("daemon", "status")["pid"]
    assert own_project.run("daemon", "start").stderr.startswith(f"The daemon already runs (pid {pid},")
    assert f"pid {pid}" in own_project.replicate("daemon", "logs")
    assert own_project.run("daemon", "stop").stderr == f"The daemon stopped (pid {pid})\n"
    assert own_project.run("daemon", "status").returncode == 3
    assert len(own_project.json("ls")) == 1
    assert own_project.json("daemon", "status")["pid"] not in (None, pid)


def test_the_log_can_be_followed(own_project):
    with own_project.running("daemon", "logs", "-f", "-n", "1", stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() != ""
        own_project.replicate("daemon", "stop")
        assert process.stdout.readline() != ""
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=own_project.deadline_s) == 130


def test_a_run_directory_open_to_others_is_refused_with_3(own_project):
    own_project.replicate("daemon", "stop")
    run_directory = own_project.home / "run"
    run_directory.chmod(0o777)
    try:
        result = own_project.run("ls")
        assert result.returncode == 3
        assert "0777" in result.stderr and f"hint: chmod 700 {run_directory}" in result.stderr
        report = own_project.run("doctor")
        assert report.returncode == 1 and "fail  Run directory: " in report.stdout
    finally:
        run_directory.chmod(0o700)
