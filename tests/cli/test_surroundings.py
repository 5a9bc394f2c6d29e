"""Shells, locales and working directories that are not as one expects. No daemon is started here."""

import os
import subprocess
import sys

import pytest

from replicate.cli.diagnosis import run_check
from replicate.cli.refusals import describe_refusal

MAIN = [sys.executable, "-m", "replicate.cli"]


@pytest.fixture
def environment(tmp_path):
    """A home in which no daemon could start, so that reaching for one is an error."""
    (tmp_path / "home").touch()
    environment = {**os.environ, "REPLICATE_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    for name in ("REPLICATE_REPOSITORY", "REPLICATE_PROJECT_DIR"):
        environment.pop(name, None)
    return environment


@pytest.fixture
def run(environment, tmp_path):
    def run(*arguments, stdout=subprocess.PIPE, cwd=tmp_path, **variables):
        return subprocess.run(
            [*MAIN, *arguments],
            env={**environment, **variables},
            cwd=cwd,
            stdout=stdout,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    return run


@pytest.mark.parametrize(
    ("option", "name"),
    [("-f", "-f/--filter"), ("--filter", "-f/--filter"), ("-s", "-s/--sort")],
)
def test_bytes_that_are_not_utf8_are_wrong_usage_naming_the_option(run, option, name):
    result = run("ls", option, b"a\xff=1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: the value of {name} is not UTF-8: a\\xff=1\n"


def test_a_filter_is_utf8_whatever_the_locale(run):
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = run("ls", "-f", "größe = 1", "-s", "größe", **c_locale)
    # It got as far as looking for the daemon.
    assert result.returncode == 3, result.stderr


@pytest.mark.parametrize("arguments", [["completion", "bash"], ["daemon", "status"], ["--version"]])
def test_a_full_disk_behind_stdout_is_said(run, arguments):
    with open("/dev/full", "w") as full:
        result = run(*arguments, stdout=full)
    assert result.returncode == 1
    assert result.stderr == "error: cannot write to stdout: No space left on device\n"


def test_a_full_disk_behind_stderr_changes_nothing_else(environment, tmp_path):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*MAIN, "lss"], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=full
        )
    assert (result.returncode, result.stdout) == (2, b"")


@pytest.fixture
def lost_directory(tmp_path, monkeypatch):
    directory = tmp_path / "gone (deleted)"
    directory.mkdir()
    monkeypatch.chdir(directory)
    directory.rmdir()
    return directory


def test_a_working_directory_that_was_deleted_is_named(lost_directory):
    with pytest.raises(FileNotFoundError) as caught:
        os.getcwd()
    message = f"the working directory does not exist any more: {lost_directory}"
    assert describe_refusal(caught.value)[0] == message
    assert run_check("Project", os.getcwd)[0].detail == message


def test_another_missing_file_is_named_also_without_a_working_directory(lost_directory):
    error = FileNotFoundError(2, "No such file or directory", "/x")
    assert describe_refusal(error) == ("No such file or directory: /x", "")


def test_commands_say_that_the_working_directory_was_deleted(environment, tmp_path):
    script = 'mkdir gone; cd gone; rmdir "$PWD"; "$@"'
    for arguments in (["ls"], ["show", "latest"], ["ls", "-R", "file:///nowhere"]):
        result = subprocess.run(
            ["sh", "-c", script, "sh", *MAIN, *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert (result.returncode, result.stdout) == (1, "")
        assert "working directory" in result.stderr and f"{tmp_path}/gone" in result.stderr
