"""What becomes of mounts whose process, whose owner or whose daemon has died."""

import logging
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicated.mount.engine.libfuse import check_device
from replicated.mount.life.mountinfo import find_mounted, find_watchers
from replicated.mount.life.supervising import FAILURES_WITHIN_S, MAX_FAILURES, Supervisor, next_attempt_s
from replicated.mount.life.table import MountTable
from replicated.mount.options import MountOptions
from replicated.mount.process import READY, Start
from replicated.processes import exit_status, identify

missing = check_device()
needs_fuse = pytest.mark.skipif(not missing.ok, reason=f"cannot mount here: {missing.detail}")

DEADLINE_S = 30


def wait_until(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)
    return found


def test_the_first_failure_is_mended_at_once():
    assert next_attempt_s([], 100, is_patient=False) == 0
    assert next_attempt_s([100], 100, is_patient=False) == 0


def test_what_fails_again_and_again_is_given_up_unless_it_was_promised_to_come_back():
    failures = [100.0 + n for n in range(MAX_FAILURES)]
    assert next_attempt_s(failures, 110, is_patient=False) is None
    assert next_attempt_s(failures, 110, is_patient=True) > 10
    assert next_attempt_s(failures[1:], 110, is_patient=False) is not None


@given(st.lists(st.floats(0, 1000)), st.booleans())
def test_old_failures_do_not_count(failures, is_patient):
    now = 1000 + FAILURES_WITHIN_S
    assert next_attempt_s(failures, now, is_patient=is_patient) == 0


@pytest.fixture
def supervise():
    """Start supervisors of tables, which end with the test."""
    supervisors = []

    def start(table):
        supervisor = Supervisor(table)
        supervisor.start()
        supervisors.append(supervisor)
        return supervisor

    yield start
    for supervisor in supervisors:
        supervisor.stop()


def one(table):
    """The only mount, if it can be used."""
    found = table.list()
    return found[0] if len(found) == 1 and found[0].pid else None


def wait_for_another(table, info):
    return wait_until(lambda: (now := one(table)) and now.pid != info.pid and now, "mounted again")


@pytest.mark.proves("S-59")
@needs_fuse
@pytest.mark.parametrize("engine", ["native", "mfusepy"])
def test_a_killed_mount_process_is_replaced(mount, table, supervise, engine):
    supervise(table)
    info, directory, _ = mount({b"f": b"1" * 100}, options=MountOptions(engine=engine))
    os.kill(info.pid, signal.SIGKILL)
    back = wait_for_another(table, info)
    assert (back.directory, back.restarts, back.engine) == (info.directory, 1, engine)
    assert (directory / "f").read_bytes() == b"1" * 100
    os.kill(back.pid, signal.SIGKILL)
    assert wait_for_another(table, back).restarts == 2
    assert (directory / "f").read_bytes() == b"1" * 100


@needs_fuse
def test_a_mount_that_was_killed_with_its_watcher_is_replaced(mount, table, supervise):
    supervise(table)
    info, directory, _ = mount({b"f": b"1"})
    for pid in (*find_watchers(os.fsencode(directory)), info.pid):
        os.kill(pid, signal.SIGKILL)
    wait_for_another(table, info)
    assert (directory / "f").read_bytes() == b"1"


@needs_fuse
def test_a_reader_in_the_middle_gets_an_error_and_finds_everything_afterwards(mount, table, supervise):
    supervise(table)
    content = os.urandom(1 << 20) * 8
    info, directory, _ = mount({b"f": content}, options=MountOptions(passthrough="off", cache_bytes=0))
    file = os.open(directory / "f", os.O_RDONLY)
    try:
        assert os.pread(file, 4096, 0) == content[:4096]
        os.kill(info.pid, signal.SIGKILL)
        wait_for_another(table, info)
        with pytest.raises(OSError):
            os.pread(file, 4096, 7 << 20)
    finally:
        with suppress(OSError):  # what is told of a mount that is gone
            os.close(file)
    assert (directory / "f").read_bytes() == content


@needs_fuse
def test_what_was_ended_stays_ended(mount, table, home, supervise):
    supervisor = supervise(table)
    _, one_directory, _ = mount({b"f": b"1"})
    info, directory, _ = mount({b"f": b"1"}, one_directory.with_name("other"))
    table.unmount(directory=one_directory)
    os.kill(info.pid, signal.SIGTERM)
    wait_until(lambda: not table.list(), "ended")
    wait_until(lambda: not supervisor._threads, "forgotten")
    assert not one_directory.exists() and not directory.exists()
    assert list(home.mounts.iterdir()) == []


@needs_fuse
def test_the_next_supervisor_takes_over_what_lives_and_mends_what_died_meanwhile(
    mount, table, home, supervise, tmp_path
):
    first = supervise(table)
    living, _, _ = mount({b"f": b"1"}, tmp_path / "a")
    dying, directory, _ = mount({b"f": b"2"}, tmp_path / "b")
    first.stop()
    os.kill(dying.pid, signal.SIGKILL)
    wait_until(lambda: table.list()[1].error, "dead")
    other = MountTable(home)
    other.adopt()
    supervise(other)
    wait_until(lambda: all(info.pid for info in other.list()), "mounted again")
    kept, back = other.list()
    assert kept == living
    assert (back.restarts, (directory / "f").read_bytes()) == (1, b"2")
    os.kill(living.pid, signal.SIGKILL)
    wait_until(lambda: other.list()[0].restarts == 1, "mounted again by the second one")


def another_or_given_up(table, pid):
    return next((now for now in table.list() if now.is_given_up or now.pid not in (0, pid)), None)


@needs_fuse
def test_a_mount_that_dies_again_and_again_is_given_up_and_shown(mount, table, supervise):
    supervise(table)
    info, directory, _ = mount({b"f": b"1"})
    for _ in range(MAX_FAILURES):
        os.kill(info.pid, signal.SIGKILL)
        info = wait_until(partial(another_or_given_up, table, info.pid), "mounted again or given up")
    assert info.is_given_up
    assert f"given up after {MAX_FAILURES} failures" in info.error
    assert info.restarts == MAX_FAILURES - 1
    assert find_mounted(os.fsencode(directory)) is None
    assert table.unmount(directory=directory) == [info]
    assert not directory.exists()


@needs_fuse
def test_a_mount_whose_repository_is_gone_is_given_up_with_the_reason(
    mount, table, supervise, snapshots, tmp_path
):
    supervise(table)
    info, _, _ = mount({b"f": b"1"})
    snapshots.directory.rename(tmp_path / "away")
    os.kill(info.pid, signal.SIGKILL)
    given_up = wait_until(lambda: next((i for i in table.list() if i.is_given_up), None), "given up")
    assert "repository" in given_up.error


@needs_fuse
def test_a_mount_that_is_to_last_comes_back_with_the_next_daemon(mount, table, home, supervise):
    info, directory, _ = mount({b"f": b"1"}, options=MountOptions(persist=True))
    os.kill(info.pid, signal.SIGTERM)
    wait_until(lambda: not table.registrations(), "ended")
    other = MountTable(home)
    other.adopt()
    supervise(other)
    back = wait_until(lambda: one(other), "mounted again")
    assert (back.persist, back.restarts) == (True, 0)
    assert (directory / "f").read_bytes() == b"1"


@pytest.fixture
def owner():
    """A process that lives until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


@needs_fuse
def test_a_mount_ends_with_its_owner(mount, table, home, supervise, owner):
    supervise(table)
    _, directory, _ = mount({b"f": b"1"}, owner=identify(owner.pid))
    assert (directory / "f").read_bytes() == b"1"
    owner.kill()
    owner.wait()
    wait_until(lambda: not list(home.mounts.iterdir()), "ended")
    assert not directory.exists()


@needs_fuse
def test_a_mount_in_use_outlives_its_owner_until_it_is_free(mount, table, home, supervise, owner, caplog):
    caplog.set_level(logging.INFO)
    supervise(table)
    _, directory, _ = mount({b"f": b"1"}, owner=identify(owner.pid))
    with (directory / "f").open("rb") as file:
        owner.kill()
        owner.wait()
        wait_until(lambda: any("in use" in record.getMessage() for record in caplog.records), "looked at")
        assert file.read() == b"1"
    wait_until(lambda: not list(home.mounts.iterdir()), "ended")


def hide_packs(repository):
    """Put pipes in the place of all packs: whoever opens one waits until somebody writes to it."""
    packs = [path for path in (repository / "packs").rglob("*") if path.is_file()]
    assert packs
    for pack in packs:
        pack.unlink()
        os.mkfifo(pack)


def hangs_in_a_pipe(pid):
    """How many threads of a process wait in opening a pipe."""
    count = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with suppress(FileNotFoundError), open(f"/proc/{pid}/task/{task}/wchan") as file:
            count += file.read() == "wait_for_partner"
    return count


@needs_fuse
@pytest.mark.parametrize("engine", ["native", "mfusepy"])
def test_a_mount_process_ends_while_the_store_hangs(mount, table, home, snapshots, engine):
    info, directory, _ = mount({b"f": os.urandom(64 << 20)}, options=MountOptions(engine=engine))
    process = os.pidfd_open(info.pid)
    with open(directory / "f", "rb", buffering=0) as file:
        # After that much, several threads fetch what comes next.
        for _ in range(16):
            file.read(1 << 20)
        hide_packs(snapshots.directory)
        reader = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: hangs_in_a_pipe(info.pid), "read")
        os.kill(info.pid, signal.SIGTERM)
        assert select.select([process], [], [], DEADLINE_S)[0], "the process does not end"
        table.reap()
        assert exit_status(process) in (0, None)  # not all kernels tell
        assert reader.wait(DEADLINE_S) != 0
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        reader.kill()
        reader.wait()
        os.close(process)
    assert list(home.mounts.iterdir()) == []
    assert not directory.exists()


CLOSING_HANGS = """
import sys, threading
from replicated.mount import process

class Hanging(process.MountedFiles):
    def __exit__(self, *_):
        threading.Event().wait()

process.MountedFiles = Hanging
process._CLOSE_S = 0.1
process.main(sys.argv[1:])
"""


@needs_fuse
@pytest.mark.parametrize("engine, status", [("native", 0), ("absent", 1)])
def test_a_mount_process_ends_when_closing_hangs(mount, table, home, tmp_path, engine, status):
    mount({b"f": b"1"})
    (registration,) = table.registrations()
    table.unmount(everything=True)
    os.mkdir(registration.target)
    options = replace(registration.order.options, engine=engine)
    registration = replace(registration, order=replace(registration.order, options=options))
    start = Start(str(home.mounts), str(home.cache), str(tmp_path / "log"), registration)
    with subprocess.Popen(
        [sys.executable, "-c", CLOSING_HANGS, start.encode()], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout.read(len(READY)) == (READY if status == 0 else b"")
            process.terminate()
            assert process.wait(DEADLINE_S) == status
        finally:
            process.kill()
        # Of a mount that failed the register tells, and why it did, the process.
        assert len(list(home.mounts.iterdir())) == (status != 0)
        assert (b"KeyError" in process.stderr.read()) == (status != 0)
    for left in table.registrations():
        table.end(left)
