"""The state of the Git work tree around a directory, as far as git tells it in a short time.

Asks the command `git`, which knows every repository format, and only reads: no lock is taken, no hook,
pager, external diff or file system monitor is run. Used by `environment`; never raises.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from pathlib import Path

from replicate.records import GitState

#: What goes beyond is cut, with a line that says so.
MAX_DIFF_BYTES = 1 << 20
_TIMEOUT_S = 2.0

_GIT = ("git", "--no-pager", "-c", "core.fsmonitor=false", "-c", "core.quotePath=false")
_DIFF = ("diff", "--no-color", "--no-ext-diff", "--no-textconv")


class _TooSlow(Exception):
    """git did not end in time."""


def git_state(directory: Path) -> GitState | None:
    """Commit, branch (empty when detached), whether tracked files were changed, and how.

    None when the directory is in no work tree or git cannot be run. The commit is empty in a repository
    without any; the diff is then of what was added to the index.
    """
    try:
        return _git_state(directory)
    except (OSError, ValueError):
        return None


def _git_state(directory: Path) -> GitState | None:
    try:
        status = _run(directory, "status", "--porcelain=v2", "--branch", "--untracked-files=no")
    except _TooSlow:
        return _commit_only(directory)
    if status is None:
        return None
    commit = branch = ""
    is_dirty = False
    for line in status.splitlines():
        if line.startswith("# branch.oid "):
            commit = line.removeprefix("# branch.oid ").replace("(initial)", "")
        elif line.startswith("# branch.head "):
            branch = line.removeprefix("# branch.head ").replace("(detached)", "")
        elif not line.startswith("#"):
            is_dirty = True
    if not is_dirty:
        return GitState(commit, branch, dirty=False)
    since = "HEAD" if commit else "--cached"
    try:
        diff = _run(directory, *_DIFF, since, limit=MAX_DIFF_BYTES) or ""
    except _TooSlow:
        diff = f"# left out: git diff took longer than {_TIMEOUT_S:g} s\n"
    return GitState(commit, branch, dirty=True, diff=diff)


def _commit_only(directory: Path) -> GitState | None:
    """For a work tree so large that its changes cannot be found out in time."""
    try:
        commit = _run(directory, "rev-parse", "--verify", "HEAD") or ""
        branch = _run(directory, "symbolic-ref", "--quiet", "--short", "HEAD") or ""
    except _TooSlow:
        return None
    note = f"# not known: git status took longer than {_TIMEOUT_S:g} s\n"
    return GitState(commit.strip(), branch.strip(), dirty=True, diff=note)


def _run(directory: Path, *arguments: str, limit: int = 64 << 20) -> str | None:
    """What git printed, cut at `limit` bytes; None when it failed. Raises `_TooSlow`."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    process = subprocess.Popen(
        [*_GIT, *arguments],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    late = threading.Event()

    def give_up() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(_TIMEOUT_S, give_up)
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # Python 3.12 begins no thread while it exits
        timer.start()
    assert process.stdout is not None
    with process:
        try:
            output = process.stdout.read(limit + 1)
        finally:
            timer.cancel()
            is_cut = len(output) > limit
            if is_cut:
                process.kill()
    if late.is_set():
        raise _TooSlow
    if process.returncode != 0 and not is_cut:
        return None
    text = output[:limit].decode(errors="replace")
    return f"{text}\n# cut: the output of git is longer than {limit} bytes\n" if is_cut else text
