"""The state of a Git work tree, from real repositories."""

import os
import subprocess

import pytest

from replicate import worktree
from replicate.records import GitState
from replicate.worktree import git_state


@pytest.fixture
def git(tmp_path, monkeypatch):
    """Run git in a new repository on branch `main`."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    directory = tmp_path / "tree"
    directory.mkdir()

    def run(*arguments):
        done = subprocess.run(["git", *arguments], cwd=directory, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    run("init", "--initial-branch=main")
    run("config", "user.name", "Somebody")
    run("config", "user.email", "somebody@example.org")
    run.directory = directory
    return run


@pytest.fixture
def committed(git):
    (git.directory / "train.py").write_text("lr = 1\n")
    git("add", "train.py")
    git("commit", "-m", "First")
    return git


def test_a_clean_tree_has_a_commit_and_a_branch(committed):
    assert git_state(committed.directory) == GitState(committed("rev-parse", "HEAD"), "main", dirty=False)


def test_a_directory_below_the_top_is_in_the_tree(committed):
    below = committed.directory / "below"
    below.mkdir()
    assert git_state(below).branch == "main"


def test_changes_of_tracked_files_are_recorded(committed):
    (committed.directory / "train.py").write_text("lr = 2\n")
    (committed.directory / "new.py").write_text("staged\n")
    committed("add", "new.py")
    state = git_state(committed.directory)
    assert state.dirty
    assert "-lr = 1\n+lr = 2\n" in state.diff
    assert "+staged\n" in state.diff


def test_untracked_files_do_not_make_a_tree_dirty(committed):
    (committed.directory / "notes.txt").write_text("x")
    assert git_state(committed.directory) == GitState(committed("rev-parse", "HEAD"), "main", dirty=False)


def test_a_detached_head_has_no_branch(committed):
    committed("checkout", "--detach")
    assert git_state(committed.directory) == GitState(committed("rev-parse", "HEAD"), "", dirty=False)


def test_a_repository_without_commits_is_a_state_too(git):
    assert git_state(git.directory) == GitState("", "main", dirty=False)
    (git.directory / "train.py").write_text("lr = 1\n")
    git("add", "train.py")
    state = git_state(git.directory)
    assert (state.commit, state.branch, state.dirty) == ("", "main", True)
    assert "+lr = 1\n" in state.diff


def test_a_directory_outside_of_git_has_no_state(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None


def test_no_git_is_no_state(committed, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert git_state(committed.directory) is None


def test_a_long_diff_is_cut_and_says_so(committed, monkeypatch):
    monkeypatch.setattr(worktree, "MAX_DIFF_BYTES", 100)
    (committed.directory / "train.py").write_text("x\n" * 10000)
    state = git_state(committed.directory)
    assert len(state.diff) < 200
    assert state.diff.endswith("\n# cut: the output of git is longer than 100 bytes\n")


def test_bytes_that_are_not_text_do_not_matter(committed):
    (committed.directory / "train.py").write_bytes(b"caf\xe9\n")
    assert "+caf\ufffd\n" in git_state(committed.directory).diff


def test_configured_commands_are_not_run(committed, tmp_path):
    trace = tmp_path / "trace"
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/sh\necho ran >>{trace}\n")
    tool.chmod(0o755)
    for setting in ("core.fsmonitor", "core.pager", "diff.external", "pager.diff", "diff.text.textconv"):
        committed("config", setting, str(tool))
    (committed.directory / ".gitattributes").write_text("*.py diff=text\n")
    (committed.directory / "train.py").write_text("lr = 2\n")
    assert "+lr = 2" in git_state(committed.directory).diff
    assert not trace.exists()


def test_a_git_that_hangs_is_given_up(committed, tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "git"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nexec sleep 1000\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(worktree, "_TIMEOUT_S", 0.05)
    assert git_state(committed.directory) is None


def test_a_status_that_takes_too_long_leaves_the_commit(committed, tmp_path, monkeypatch):
    commit = committed("rev-parse", "HEAD")
    real = subprocess.run(["which", "git"], capture_output=True, text=True, check=True).stdout.strip()
    tool = tmp_path / "bin" / "git"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\ncase "$*" in *status*) exec sleep 1000;; esac\nexec {real} "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(worktree, "_TIMEOUT_S", 1.0)
    state = git_state(committed.directory)
    assert (state.commit, state.branch, state.dirty) == (commit, "main", True)
    assert "git status took longer" in state.diff
