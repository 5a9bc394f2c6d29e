"""Storing in a process of its own: the same result, the same errors, and an end when it should end."""

import dataclasses
import errno
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from replicate.errors import CaptureFailed, RepositoryFull, RepositoryMissing, RepositoryUnreachable
from replicate.ids import ExperimentId, SnapshotId, new_id
from replicate.records import ExperimentRecord
from replicated import priority
from replicated import storing as storing_module
from replicated.format.metadata import Snapshot
from replicated.processes import start_ticks
from replicated.snapshot import store_channel
from replicated.snapshot.entries import (
    HELD,
    PACKED,
    SPOOLED,
    Header,
    SameTree,
    pack_directory,
    pack_header,
    pack_same_tree,
    pack_sources,
)
from replicated.snapshot.held import HeldFiles
from replicated.snapshot.spool import INLINE_BYTES
from replicated.snapshot.treecache import TreeCache
from replicated.storing import StoreProcessDied, Storing, StoringBroken, StoringFailed
from replicated.tree import open_tree

DEADLINE_S = 60.0
TIME = datetime(2026, 1, 2, tzinfo=timezone.utc)


@pytest.fixture
def held(tmp_path):
    (tmp_path / "spool").mkdir()
    files = HeldFiles(lambda snapshot: tmp_path / "spool" / snapshot)
    files.start()
    yield files
    files.stop()


@pytest.fixture
def storing(held, tmp_path):
    made = Storing(held, tmp_path / "cache")
    yield made
    made.stop()


@pytest.fixture
def spool(tmp_path, held):
    """The directory and the id of a snapshot."""
    snapshot = SnapshotId(new_id())
    return tmp_path / "spool" / snapshot


def wait_until(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)
    return found


def ignore(done):
    """Progress that nobody looks at."""


def store(storing, repository, frozen, *, on_progress=ignore, limit=0, entries=None, is_urgent=lambda: False):
    snapshot = SnapshotId(frozen.spool.name)
    stored = storing.ingest(
        repository.url,
        "an experiment",
        snapshot,
        frozen.entries if entries is None else entries,
        frozen.spool,
        upload_limit=limit,
        on_progress=on_progress,
        is_urgent=is_urgent,
    )
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot), TIME), stored.root)
    return Snapshot(snapshot, stored.root)


def pid_of(storing):
    return storing._process._process.pid


def fill(project):
    (project / "sub").mkdir()
    (project / "large").write_bytes(random.Random(1).randbytes(20_000_000))
    (project / "sub" / "small").write_bytes(b"small")
    (project / "sub" / "link").symlink_to("small")


def test_what_was_captured_is_what_is_read(project, repository, storing, freeze, spool, described, tmp_path):
    fill(project)
    frozen = freeze(project, spool)
    reported = []
    snapshot = store(storing, repository, frozen, on_progress=reported.append)
    assert described(open_tree(repository, snapshot.id)) == described(project)
    assert reported == sorted(reported)
    assert reported[-1] <= frozen.size_bytes
    cache = TreeCache(tmp_path / "cache" / "trees", repository.id, repository.url)
    assert cache.load_tree(b"tree").root == snapshot.root
    same = pack_header(Header(os.fsencode(project), b"tree")) + pack_same_tree(SameTree(snapshot.root))
    pid = pid_of(storing)
    assert store(storing, repository, frozen, entries=same) == snapshot
    assert pid_of(storing) == pid, "one process for all"
    cache.close()


def test_many_entries_are_read_from_the_spool(project, repository, storing, freeze, spool, described):
    fill(project)
    frozen = freeze(project, spool)
    (spool / "entries").write_bytes(frozen.entries)
    snapshot = store(storing, repository, frozen, entries=b"")
    assert described(open_tree(repository, snapshot.id)) == described(project)


def test_longest_entries_that_come_in_a_message_arrive(project, repository, storing, freeze, spool):
    for number in range(INLINE_BYTES // 290):
        (project / f"{number:0250}").touch()
    frozen = freeze(project, spool)
    assert INLINE_BYTES * 0.9 < len(frozen.entries) <= INLINE_BYTES
    assert store(storing, repository, frozen).root.files == INLINE_BYTES // 290


def freeze_held(freeze, project, spool, held):
    """A frozen directory whose files are under leases."""
    frozen = freeze(project, spool, lambda path, size: HELD)
    numbers = []
    for file in frozen.held:
        descriptor = os.open(file, os.O_RDONLY)
        numbers.append(held.hold(spool.name, descriptor).number)
    assert numbers == list(range(len(frozen.held)))
    return frozen


def test_held_files_are_read_where_they_are(project, repository, storing, freeze, spool, held, described):
    fill(project)
    frozen = freeze_held(freeze, project, spool, held)
    snapshot = store(storing, repository, frozen)
    assert described(open_tree(repository, snapshot.id)) == described(project)
    assert not list(spool.iterdir())


def test_file_that_is_written_to_while_it_is_read_is_stored_as_it_was(
    project, repository, storing, freeze, spool, held, described
):
    fill(project)
    (project / "large").write_bytes(random.Random(2).randbytes(80_000_000))
    expected = described(project)
    frozen = freeze_held(freeze, project, spool, held)
    writers = []

    def write(done):
        # Progress tells that reading has begun; the limit, that it takes long enough.
        if done and not writers:
            writers.append(threading.Thread(target=(project / "large").write_bytes, args=(b"new",)))
            writers[0].start()

    snapshot = store(storing, repository, frozen, on_progress=write, limit=60_000_000)
    writers[0].join()
    assert (project / "large").read_bytes() == b"new"
    assert described(open_tree(repository, snapshot.id)) == expected


def test_lost_file_is_an_error(project, repository, storing, freeze, spool):
    fill(project)
    frozen = freeze(project, spool, lambda path, size: HELD)
    with pytest.raises(CaptureFailed, match="not held"):
        store(storing, repository, frozen)


# Errors


def test_errors_are_those_of_the_process(project, repository, storing, freeze, spool, tmp_path):
    fill(project)
    frozen = freeze(project, spool)
    (spool / "large-0").unlink()
    with pytest.raises(CaptureFailed, match=f"gone from the spool: {spool}/large-0"):
        store(storing, repository, frozen)
    (tmp_path / "repository" / "repository.json").unlink()
    os.rename(tmp_path / "repository", tmp_path / "elsewhere")
    with pytest.raises(RepositoryMissing) as caught:
        store(storing, repository, frozen)
    assert caught.value.hint


@pytest.mark.parametrize(
    "error",
    [
        RepositoryFull("no \udcff space", hint="make some", fields={"path": "a\udcff"}),
        OSError(errno.ENOSPC, "No space left on device", b"a\xff"),
        OSError("without a number"),
    ],
)
def test_failures_cross_with_all_they_say(error):
    kind, *values = store_channel.describe_failure(error)
    found = store_channel.failure_of(store_channel.Message(kind, tuple(values)))
    if isinstance(error, RepositoryFull):
        assert type(found) is RepositoryFull
        assert (found.message, found.hint, found.fields) == (error.message, error.hint, error.fields)
    else:
        assert type(found) is StoringFailed
        assert found.errno == (error.errno or errno.EIO)
        assert (error.strerror or str(error)) in str(found)


def test_lack_of_descriptors_is_a_passing_trouble(project, repository, storing, freeze, spool):
    fill(project)
    frozen = freeze(project, spool)
    store(storing, repository, frozen)
    pid = pid_of(storing)
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
    with pytest.raises((StoringFailed, RepositoryUnreachable), match="Too many open files"):
        store(storing, repository, frozen)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    assert store(storing, repository, frozen).root.files == 2
    assert pid_of(storing) == pid


def test_bug_is_told_with_its_traceback(project, repository, storing, freeze, spool):
    (project / "file").write_bytes(b"x")
    frozen = freeze(project, spool)
    (directory,) = frozen.directories
    sources = pack_sources([(PACKED, "not an offset", "packed")])
    wrong = pack_header(frozen.header) + pack_directory(dataclasses.replace(directory, sources=sources))
    with pytest.raises(StoringBroken, match=r"Traceback(.|\n)*store_process\.py(.|\n)*TypeError"):
        store(storing, repository, frozen, entries=wrong)
    assert store(storing, repository, frozen).root.files == 1


def test_log_of_the_process_is_that_of_the_daemon(
    project, repository, storing, freeze, spool, caplog, tmp_path
):
    fill(project)
    frozen = freeze(project, spool)
    store(storing, repository, frozen)
    key = next(repository.store.list("log/index/")).key
    repository.store.replace(key, b"damaged")
    storing.stop()
    for file in (tmp_path / "cache" / "index").iterdir():
        file.unlink()
    with caplog.at_level(logging.WARNING):
        store(storing, repository, frozen)
    assert [(r.name, r.levelname) for r in caplog.records] == [("replicated.index", "WARNING")]
    assert f"index object {key} in {repository.url} is damaged" in caplog.text


# Ends


class Unwanted(Exception):
    pass


@pytest.mark.parametrize("after", [0, 30_000_000])
def test_what_is_not_wanted_any_more_is_given_up(project, repository, storing, freeze, spool, after):
    (project / "large").write_bytes(random.Random(1).randbytes(100_000_000))
    frozen = freeze(project, spool)

    def refuse(done):
        if done >= after:
            raise Unwanted

    with pytest.raises(Unwanted):
        # Slow enough that it is not over before.
        store(storing, repository, frozen, on_progress=refuse, limit=30_000_000)
    pid = pid_of(storing)
    assert store(storing, repository, frozen).root.files == 1
    assert pid_of(storing) == pid, "it did not have to be killed"


def test_waiting_for_the_limit_ends_when_it_is_not_wanted(
    project, repository, storing, freeze, spool, monkeypatch
):
    monkeypatch.setattr(storing_module, "ABORT_GRACE_S", 60.0)
    (project / "large").write_bytes(random.Random(1).randbytes(10_000_000))
    frozen = freeze(project, spool)
    begun = time.monotonic()

    def refuse(done):
        if time.monotonic() - begun > 1:
            raise Unwanted

    with pytest.raises(Unwanted):
        store(storing, repository, frozen, on_progress=refuse, limit=1)
    pid = pid_of(storing)
    store(storing, repository, frozen)
    assert pid_of(storing) == pid


def test_frozen_process_that_is_not_wanted_is_killed(
    project, repository, storing, freeze, spool, monkeypatch
):
    monkeypatch.setattr(storing_module, "ABORT_GRACE_S", 0.1)
    fill(project)
    frozen = freeze(project, spool)
    store(storing, repository, frozen)
    pid = pid_of(storing)
    os.kill(pid, signal.SIGSTOP)

    def refuse(done):
        raise Unwanted

    with pytest.raises(Unwanted):
        store(storing, repository, frozen, on_progress=refuse)
    assert start_ticks(pid) is None
    assert store(storing, repository, frozen).root.files == 2


def test_death_is_told_and_the_next_try_has_another_process(project, repository, storing, freeze, spool):
    (project / "large").write_bytes(random.Random(1).randbytes(100_000_000))
    frozen = freeze(project, spool)

    def kill(done):
        os.kill(pid_of(storing), signal.SIGKILL)

    with pytest.raises(StoreProcessDied, match="SIGKILL"):
        store(storing, repository, frozen, on_progress=kill, limit=30_000_000)
    assert store(storing, repository, frozen).root.files == 1


def test_process_that_cannot_start_says_why(project, repository, freeze, spool, held, monkeypatch, tmp_path):
    fill(project)
    frozen = freeze(project, spool)
    (tmp_path / "broken" / "msgpack").mkdir(parents=True)
    (tmp_path / "broken" / "msgpack" / "__init__.py").write_text("raise ImportError('it is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    storing = Storing(held, tmp_path / "cache")
    with pytest.raises(StoreProcessDied, match="status 1: ImportError: it is broken"):
        store(storing, repository, frozen)
    storing.stop()


def test_process_leaves_when_it_is_idle_and_is_not_missed(
    project, repository, freeze, spool, held, tmp_path, monkeypatch
):
    command = [*storing_module._COMMAND, "--idle-exit=0.01"]
    monkeypatch.setattr(storing_module, "_COMMAND", command)
    fill(project)
    frozen = freeze(project, spool)
    storing = Storing(held, tmp_path / "cache")
    pids = set()
    for _ in range(3):
        assert store(storing, repository, frozen).root.files == 2
        pids.add(pid_of(storing))
        wait_until(lambda: start_ticks(pid_of(storing)) is None, "it left")
        wait_until(lambda: not os.path.exists(f"/proc/{pid_of(storing)}"), "it is no zombie")
    assert len(pids) == 3
    storing.stop()


def test_process_ends_with_stop(project, repository, storing, freeze, spool):
    fill(project)
    frozen = freeze(project, spool)
    store(storing, repository, frozen)
    pid = pid_of(storing)
    storing.stop()
    storing.stop()
    assert not os.path.exists(f"/proc/{pid}")
    assert store(storing, repository, frozen).root.files == 2


def test_process_ends_with_the_daemon(project, repository, freeze, spool, tmp_path, described):
    """Also one that is killed, in the middle of an ingest."""
    (project / "large").write_bytes(random.Random(1).randbytes(100_000_000))
    frozen = freeze(project, spool)
    told, tell = os.pipe()
    daemon = os.fork()
    if daemon == 0:
        try:
            held = HeldFiles(lambda snapshot: tmp_path / "spool" / snapshot)
            storing = Storing(held, tmp_path / "cache")
            store(
                storing,
                repository,
                frozen,
                on_progress=lambda done: os.write(tell, b"%d\n" % pid_of(storing)),
                limit=1,
            )
        finally:
            os._exit(1)
    os.close(tell)
    with open(told, "rb") as lines:
        pid = int(lines.readline())
    assert start_ticks(pid) is not None
    os.kill(daemon, signal.SIGKILL)
    os.waitpid(daemon, 0)
    wait_until(lambda: start_ticks(pid) is None, "it ended")


# What it may take


def test_process_has_the_lowest_priority(project, repository, storing, freeze, spool):
    fill(project)
    store(storing, repository, freeze(project, spool))
    pid = pid_of(storing)
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    for thread in os.listdir(f"/proc/{pid}/task"):
        assert os.getpriority(os.PRIO_PROCESS, int(thread)) == 19
    if os.path.exists(f"/proc/{pid}/autogroup"):
        assert Path(f"/proc/{pid}/autogroup").read_text().split()[-1] == "19"
        # Empty where no session was begun since the machine's start, as on some build machines.
        others = Path("/proc/self/autogroup").read_text().split()
        assert others[-1:] != ["19"], "that of others is left alone"


def test_process_loads_nothing_of_the_wire():
    code = (
        "import sys, replicated.snapshot.store_process\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('grpc', 'google', 'click')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_memory_does_not_grow_with_a_file(project, repository, storing, freeze, spool):
    fill(project)
    frozen = freeze(project, spool)
    generator = random.Random(1)
    with (project / "large").open("wb") as file:
        for _ in range(60):
            file.write(generator.randbytes(10 << 20))
    os.link(project / "large", spool / "huge")
    frozen = freeze(project, spool, lambda path, size: SPOOLED)
    store(storing, repository, frozen)
    status = Path(f"/proc/{pid_of(storing)}/status").read_text()
    peak = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak < 220 << 20


def niceness_of(storing):
    return os.getpriority(os.PRIO_PROCESS, pid_of(storing))


def test_process_has_a_higher_priority_while_somebody_waits(project, repository, storing, freeze, spool):
    fill(project)
    store(storing, repository, freeze(project, spool))
    pid = pid_of(storing)
    assert niceness_of(storing) == priority.LOWEST_NICENESS
    store(storing, repository, freeze(project, spool), is_urgent=lambda: True)
    assert niceness_of(storing) == priority.URGENT_NICENESS
    assert Path(f"/proc/{pid}/autogroup").read_text().strip().endswith("nice 10")
    store(storing, repository, freeze(project, spool))
    assert niceness_of(storing) == priority.LOWEST_NICENESS
    assert pid_of(storing) == pid


def test_where_a_process_cannot_be_made_faster_another_one_takes_over(
    project, repository, storing, freeze, spool, monkeypatch
):
    fill(project)
    store(storing, repository, freeze(project, spool))
    pid = pid_of(storing)

    def only_lower(pid, *, is_urgent):
        return not is_urgent and priority.set_priority(pid, is_urgent=False)

    monkeypatch.setattr(storing_module, "set_priority", only_lower)
    store(storing, repository, freeze(project, spool), is_urgent=lambda: True)
    assert pid_of(storing) != pid
    assert niceness_of(storing) == priority.URGENT_NICENESS
