"""Held files against real writers in other processes."""

import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from replicate.errors import CaptureFailed
from replicated.snapshot import duplicate, leases
from replicated.snapshot.held import HeldFiles

DEADLINE_S = 60
CONTENT = bytes(range(256)) * 4096


def until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        os.sched_yield()


def start_writer(code, *arguments):
    program = "import mmap, os, shutil, sys\npath = sys.argv[1]\n" + code
    return subprocess.Popen([sys.executable, "-S", "-c", program, *map(str, arguments)])


def finish(writer):
    assert writer.wait(DEADLINE_S) == 0


def write(code, *arguments):
    """Run code in another process; it has `path`, and ends only when nobody keeps it from writing."""
    finish(start_writer(code, *arguments))


@pytest.fixture
def spool(tmp_path):
    directory = tmp_path / "spool"
    directory.mkdir()
    return directory


@pytest.fixture
def make_held(spool):
    made = []

    def make(**options):
        held = HeldFiles(lambda snapshot: spool / snapshot, **options)
        held.start()
        made.append(held)
        return held

    yield make
    for held in made:
        held.stop()


@pytest.fixture
def held(make_held):
    return make_held()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(CONTENT)
    return path


def hold(held, path, snapshot="a"):
    descriptor = os.open(path, os.O_RDONLY)
    holding = held.hold(snapshot, descriptor)
    if holding is None:
        os.close(descriptor)
    return holding


def content(held, snapshot="a", number=0):
    opened = held.open(snapshot, number)
    with open(opened.descriptor, "rb") as file:
        return os.pread(opened.descriptor, os.fstat(file.fileno()).st_size, 0)


def is_copy(held, snapshot="a", number=0):
    opened = held.open(snapshot, number)
    os.close(opened.descriptor)
    return opened.slot is None


CHANGES = {
    "truncated by open": "open(path, 'wb').write(b'new')",
    "truncated by name": "os.truncate(path, 1000)",
    "made longer": "os.truncate(path, os.stat(path).st_size + 5)",
    "written in place": "open(path, 'r+b').write(b'new')",
    "appended to": "open(path, 'ab').write(b'new')",
    "rewritten with the same bytes": "data = open(path, 'rb').read(); open(path, 'wb').write(data)",
    "copied over": "open(path + '2', 'wb').write(b'new'); shutil.copyfile(path + '2', path)",
    "written through memory": "f = open(path, 'r+b'); m = mmap.mmap(f.fileno(), 0); m[:3] = b'new'",
    "written twice": "open(path, 'wb').write(b'new'); open(path, 'r+b').write(b'newer')",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_held_file_is_what_it_was_whatever_a_writer_does(held, path, change):
    hold(held, path)
    write(change, path)
    assert content(held) == CONTENT
    assert is_copy(held)
    assert (held.count, held.size_bytes) == (0, 0)


@pytest.mark.parametrize(
    "change", ["os.unlink(path)", "open(path + '2', 'wb').write(b'new'); os.replace(path + '2', path)"]
)
def test_a_file_that_is_removed_or_replaced_needs_no_copy(held, spool, path, change):
    hold(held, path)
    write(change, path)
    assert content(held) == CONTENT
    assert not is_copy(held)
    assert not os.listdir(spool)


def test_a_file_that_is_removed_and_then_written_through_another_name_is_what_it_was(held, path):
    os.link(path, f"{path}2")
    hold(held, path)
    write("os.unlink(path); os.chmod(path + '2', 0o600); open(path + '2', 'wb').write(b'new')", path)
    assert content(held) == CONTENT


def test_a_writer_that_will_not_wait_can_write_once_the_file_is_copied(held, path):
    hold(held, path)
    write(
        "while True:\n"
        "    try: os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_TRUNC)\n"
        "    except BlockingIOError: os.sched_yield()\n"
        "    else: break",
        path,
    )
    assert content(held) == CONTENT


def test_reading_and_changing_permissions_disturb_nobody(held, path):
    hold(held, path)
    write("open(path, 'rb').read(); os.chmod(path, 0o600); os.utime(path, (1, 1))", path)
    assert not is_copy(held)


def test_permissions_that_change_during_the_life_of_a_holding_do_not_lose_it(held, path):
    hold(held, path)
    write("os.chmod(path, 0o600); os.utime(path, (1, 1)); open(path, 'wb').write(b'new')", path)
    assert content(held) == CONTENT


def test_the_stat_of_a_holding_is_that_of_the_file(held, path):
    holding = hold(held, path)
    assert holding.number == 0
    assert holding.info == os.stat(path)
    assert (held.count, held.size_bytes) == (1, len(CONTENT))


def test_numbers_count_within_a_snapshot(held, path, tmp_path):
    (tmp_path / "other").write_bytes(b"other")
    numbers = [hold(held, path).number, hold(held, tmp_path / "other").number]
    assert [*numbers, hold(held, path, "b").number] == [0, 1, 0]


def test_a_file_that_is_open_for_writing_is_refused_and_its_descriptor_stays_open(held, path):
    descriptor = os.open(path, os.O_RDONLY)
    with open(path, "r+b"):
        assert held.hold("a", descriptor) is None
    assert os.read(descriptor, 3) == CONTENT[:3]
    os.close(descriptor)
    assert held.count == 0


def test_a_file_that_is_mapped_for_writing_is_refused(held, path):
    with open(path, "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    assert hold(held, path) is None
    mapped.close()
    assert hold(held, path) is not None


def test_a_file_system_that_is_not_known_is_refused(held):
    assert hold(held, "/proc/self/status") is None


def test_nothing_is_held_before_the_start_and_after_the_end(spool, path):
    held = HeldFiles(lambda snapshot: spool / snapshot)
    assert hold(held, path) is None
    held.start()
    assert hold(held, path) is not None
    held.stop()
    assert hold(held, path) is None


def test_when_enough_are_held_the_next_is_refused_until_one_is_released(make_held, path, tmp_path):
    held = make_held(descriptor_limit=1)
    (tmp_path / "other").write_bytes(b"other")
    assert hold(held, path) is not None
    assert hold(held, tmp_path / "other") is None
    held.release("a")
    assert hold(held, tmp_path / "other") is not None


def test_a_file_of_somebody_else_is_refused_without_the_right_to_hold_it(spool, path):
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    code = (
        "import os, pathlib, sys\n"
        "from replicated.snapshot.held import HeldFiles\n"
        "held = HeldFiles(lambda snapshot: pathlib.Path(sys.argv[2]) / snapshot)\n"
        "held.start()\n"
        "descriptor = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.setuid(65534)\n"
        "assert held.hold('a', descriptor) is None\n"
        "held.stop()\n"
    )
    subprocess.run([sys.executable, "-c", code, path, spool], check=True, timeout=DEADLINE_S)


def test_a_file_is_shared_between_snapshots_and_copied_once(held, spool, path):
    hold(held, path)
    assert held.share("b", os.stat(path)).number == 0
    assert held.share("a", os.stat(path)).number == 1
    assert held.count == 1
    write("open(path, 'wb').write(b'new')", path)
    for snapshot, number in (("a", 0), ("a", 1), ("b", 0)):
        assert content(held, snapshot, number) == CONTENT
    assert {entry.stat().st_nlink for name in "ab" for entry in (spool / name).iterdir()} == {3}


def test_a_file_that_was_released_by_one_snapshot_is_held_for_the_other(held, spool, path):
    hold(held, path)
    held.share("b", os.stat(path))
    held.release("a")
    write("open(path, 'wb').write(b'new')", path)
    assert content(held, "b") == CONTENT
    assert not (spool / "a").exists()


def test_a_file_that_nobody_holds_or_that_has_changed_cannot_be_shared(held, path):
    assert held.share("b", os.stat(path)) is None
    hold(held, path)
    info = os.stat(path)
    os.chmod(path, 0o600)
    assert held.share("b", os.stat(path)) is None
    write("open(path, 'wb').write(b'new')", path)
    assert held.share("b", info) is None


def test_a_released_file_can_be_written_without_a_copy(held, spool, path):
    hold(held, path)
    duplicated = held.open("a", 0).descriptor
    held.release("a", 0)
    # The store process has not closed its descriptor yet: that must not keep the writer.
    write("open(path, 'wb').write(b'new')", path)
    os.close(duplicated)
    assert held.count == 0
    assert not os.listdir(spool)
    with pytest.raises(CaptureFailed, match="not held"):
        held.open("a", 0)


def test_releasing_what_is_not_held_does_no_harm(held, path):
    held.release("nothing")
    hold(held, path)
    held.release("a", 7)
    held.release("a", 0)
    held.release("a", 0)
    held.release("a")
    assert held.count == 0


def test_a_copy_leaves_holes_as_holes(held, tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"data")
    hold(held, path)
    write("open(path, 'wb').write(b'new')", path)
    opened = held.open("a", 0)
    info = os.fstat(opened.descriptor)
    assert info.st_size == 64 << 20
    assert info.st_blocks * 512 < 1 << 20
    assert os.pread(opened.descriptor, 6, (32 << 20) - 1) == b"\0data\0"
    os.close(opened.descriptor)


def test_an_empty_file_can_be_held(held, tmp_path):
    path = tmp_path / "empty"
    path.touch()
    hold(held, path)
    write("open(path, 'wb').write(b'new')", path)
    assert content(held) == b""


def test_who_opens_while_a_writer_waits_gets_the_copy(held, path, monkeypatch):
    """Not the file itself, which may change before it is read; who has it open already is told so."""
    hold(held, path)
    already = held.open("a", 0)
    go = threading.Event()
    copy = duplicate.copy
    monkeypatch.setattr(duplicate, "copy", lambda *arguments: go.wait(DEADLINE_S) and copy(*arguments))
    writer = start_writer("open(path, 'wb').write(b'new')", path)
    until(lambda: held._holdings.leased and not leases.is_whole(next(iter(held._holdings.leased))))
    opened = []
    reader = threading.Thread(target=lambda: opened.append(is_copy(held)))
    reader.start()
    until(lambda: os.pread(held.flags_descriptor, 1, already.slot) == b"\1")
    assert writer.poll() is None
    os.close(already.descriptor)
    go.set()
    reader.join()
    finish(writer)
    assert opened == [True]


def test_a_writer_that_comes_while_the_file_is_being_secured_changes_nothing(held, path, monkeypatch):
    hold(held, path)
    writers = []
    copy = duplicate.copy

    def begin_writing_and_copy(source, *arguments):
        writers.append(start_writer("open(path, 'wb').write(b'new')", path))
        until(lambda: not leases.is_whole(source))
        copy(source, *arguments)

    monkeypatch.setattr(duplicate, "copy", begin_writing_and_copy)
    held.secure("a")
    finish(*writers)
    assert content(held) == CONTENT


def test_a_release_during_the_copy_ends_it_and_leaves_nothing_in_the_spool(held, spool, path, monkeypatch):
    hold(held, path)
    copying = threading.Event()
    copy = duplicate.copy

    def wait_and_copy(source, destination, size, go_on):
        copying.set()
        until(lambda: not held._holdings._snapshots)
        copy(source, destination, size, go_on)

    monkeypatch.setattr(duplicate, "copy", wait_and_copy)
    writer = start_writer("open(path, 'wb').write(b'new')", path)
    assert copying.wait(DEADLINE_S)
    held.release("a")
    assert os.listdir(spool / "a") == []
    finish(writer)
    assert held.count == 0


def test_a_copy_that_comes_too_late_is_not_believed_and_says_so(make_held, spool, path):
    held = make_held(break_time_s=lambda: 0.0)
    hold(held, path)
    write("open(path, 'wb').write(b'new')", path)
    with pytest.raises(CaptureFailed, match="longer than the kernel lets a writer wait") as failure:
        held.open("a", 0)
    assert str(path) in str(failure.value)
    assert os.listdir(spool / "a") == []
    held.release("a")
    with pytest.raises(CaptureFailed, match="not held for this snapshot"):
        held.open("a", 0)


def test_a_file_that_was_too_large_to_be_copied_in_time_is_not_held_again(
    make_held, tmp_path, path, monkeypatch
):
    held = make_held(break_time_s=lambda: 0.2)
    copy = duplicate.copy

    def copy_slowly(source, destination, size, go_on):
        deadline = next(iter(held._holdings.leased.values())).deadline
        until(lambda: time.monotonic() > deadline)
        copy(source, destination, size, go_on)

    monkeypatch.setattr(duplicate, "copy", copy_slowly)
    hold(held, path)
    write("open(path, 'r+b').write(b'new')", path)
    with pytest.raises(CaptureFailed, match="longer than the kernel lets a writer wait"):
        held.open("a", 0)
    assert hold(held, path, "b") is None
    (tmp_path / "small").write_bytes(b"small")
    assert hold(held, tmp_path / "small", "b") is not None


def test_a_file_is_lost_with_the_reason_when_its_copy_cannot_be_made(held, spool, path):
    hold(held, path)
    (spool / "a").write_bytes(b"in the way")
    write("open(path, 'wb').write(b'new')", path)
    with pytest.raises(CaptureFailed, match=r"File exists|Not a directory"):
        held.open("a", 0)
    assert held.count == 0


def test_stopping_lets_writers_go_on(held, path):
    hold(held, path)
    held.stop()
    write("open(path, 'wb').write(b'new')", path)
    with pytest.raises(OSError, match="not held any more"):
        held.open("a", 0)


def test_stopping_finishes_the_copy_that_a_writer_waits_for(held, make_held, path, monkeypatch):
    hold(held, path)
    copying = threading.Event()
    copy = duplicate.copy

    def copy_while_stopping(*arguments):
        copying.set()
        until(lambda: not held._is_running)
        copy(*arguments)

    monkeypatch.setattr(duplicate, "copy", copy_while_stopping)
    writer = start_writer("open(path, 'wb').write(b'new')", path)
    assert copying.wait(DEADLINE_S)
    held.stop()
    finish(writer)
    restarted = make_held()
    assert restarted.adopt("a", 0, None)
    assert content(restarted) == CONTENT


def test_secured_files_are_in_the_spool_and_need_no_lease(held, make_held, spool, path):
    hold(held, path)
    held.share("b", os.stat(path))
    held.secure("a")
    assert held.count == 0
    assert os.listdir(spool / "a") == ["held-0"]
    assert content(held) == content(held, "b") == CONTENT
    held.secure("a")
    assert os.listdir(spool / "b") == ["held-0"]
    assert make_held().adopt("b", 0, None)


def test_files_that_cannot_be_secured_are_held_as_before(held, spool, path):
    hold(held, path)
    (spool / "a").write_bytes(b"in the way")
    with pytest.raises(OSError, match=r"exists|directory"):
        held.secure("a")
    assert not is_copy(held)
    (spool / "a").unlink()
    write("open(path, 'wb').write(b'new')", path)
    assert content(held) == CONTENT


def test_securing_passes_over_what_is_lost_or_unknown(make_held, path):
    held = make_held(break_time_s=lambda: 0.0)
    hold(held, path)
    write("open(path, 'wb').write(b'new')", path)
    held.secure("a")
    held.secure("nothing")
    with pytest.raises(CaptureFailed, match="longer than the kernel lets a writer wait"):
        held.open("a", 0)


def test_a_file_is_held_again_under_its_number_after_a_restart(held, path, tmp_path):
    assert held.adopt("a", 3, os.open(path, os.O_RDONLY))
    (tmp_path / "other").write_bytes(b"other")
    assert hold(held, tmp_path / "other").number == 4
    write("open(path, 'wb').write(b'new')", path)
    assert content(held, "a", 3) == CONTENT


def test_a_file_that_is_being_written_cannot_be_held_again(held, path):
    descriptor = os.open(path, os.O_RDONLY)
    with path.open("r+b"):
        assert not held.adopt("a", 0, descriptor)
    os.close(descriptor)


def test_a_copy_is_found_after_a_restart_only_if_it_was_complete(held, spool):
    (spool / "a").mkdir()
    (spool / "a" / "held-0.tmp").write_bytes(b"half of it")
    assert not held.adopt("a", 0, None)
    (spool / "a" / "held-0").write_bytes(b"all of it")
    assert held.adopt("a", 0, None)
    assert content(held) == b"all of it"
    held.release("a")


def test_a_copy_that_vanished_is_an_error_that_names_it(held, spool, path):
    hold(held, path)
    held.secure("a")
    (spool / "a" / "held-0").unlink()
    with pytest.raises(CaptureFailed, match=r"vanished.*held-0"):
        held.open("a", 0)


READER = """
import mmap, os, sys
descriptor, flags, slot = map(int, sys.argv[1:])
flags = mmap.mmap(flags, 0)
print("reading", flush=True)
while True:
    data = os.pread(descriptor, 8192, 0)
    if flags[slot]:
        break
    assert not data.strip(b"o"), "bytes of a writer were believed"
"""


def test_the_byte_of_a_slot_is_set_before_a_reader_can_see_what_a_writer_writes(held, tmp_path):
    path = tmp_path / "file"
    for turn in range(10):
        path.write_bytes(b"o" * 8192)
        snapshot = f"turn-{turn}"
        hold(held, path, snapshot)
        opened = held.open(snapshot, 0)
        descriptors = (opened.descriptor, held.flags_descriptor)
        reader = subprocess.Popen(
            [sys.executable, "-S", "-c", READER, *map(str, descriptors), str(opened.slot)],
            pass_fds=descriptors,
            stdout=subprocess.PIPE,
        )
        assert reader.stdout.readline() == b"reading\n"
        write("f = open(path, 'r+b', 0); f.write(b'n' * 8192)", path)
        reader.stdout.close()
        finish(reader)
        os.close(opened.descriptor)
        assert content(held, snapshot) == b"o" * 8192
        held.release(snapshot)


@pytest.fixture
def without_scans(monkeypatch):
    """A function that holds a first file, after which nothing but signals tells of breaks."""
    monkeypatch.setattr("replicated.snapshot.held._SCAN_INTERVAL_S", 3600)

    def hold_first(held, path):
        hold(held, path)
        until(lambda: held._scanned_at)

    return hold_first


def test_breaks_are_heard_of_when_the_kernel_has_no_room_for_their_signals(held, path, without_scans):
    without_scans(held, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, hard))
    try:
        write("open(path, 'wb').write(b'new')", path)
    finally:
        resource.setrlimit(resource.RLIMIT_SIGPENDING, (soft, hard))
    assert content(held) == CONTENT


def test_breaks_are_found_when_no_signal_comes(held, path, monkeypatch):
    monkeypatch.setattr("replicated.snapshot.held._SCAN_INTERVAL_S", 0.05)
    done = threading.Event()
    ready = threading.Event()

    def hear_nothing():
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        ready.set()
        done.wait()

    deaf = threading.Thread(target=hear_nothing)
    deaf.start()
    ready.wait()
    held._waiter.thread = deaf.native_id
    hold(held, path)
    write("open(path, 'wb').write(b'new')", path)
    done.set()
    deaf.join()
    assert content(held) == CONTENT


def test_a_writer_that_comes_before_the_file_is_entered_is_noticed(held, path, tmp_path, without_scans):
    (tmp_path / "other").write_bytes(b"other")
    without_scans(held, tmp_path / "other")
    heard, heard_before_waiting = [], [0]
    wait, take = held._waiter.wait, leases.take
    writers = []

    def wait_and_note(timeout_s):
        heard_before_waiting.append(len(heard))
        breaks = wait(timeout_s)
        heard.extend(breaks.descriptors)
        return breaks

    def take_and_have_it_broken(descriptor, thread):
        is_taken = take(descriptor, thread)
        writers.append(start_writer("open(path, 'wb').write(b'new')", path))
        # Until the signal has come and gone.
        until(lambda: heard == [descriptor] and heard_before_waiting[-1] == 1)
        return is_taken

    held._waiter.wait = wait_and_note
    held._waiter.wake()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "take", take_and_have_it_broken)
        hold(held, path)
    finish(*writers)
    assert content(held, "a", 1) == CONTENT


def test_ten_thousand_held_files_survive_a_writer_that_rewrites_them_all(make_held, tmp_path):
    count = 10_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * count:
        pytest.skip(f"only {hard} open files are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        held = make_held(descriptor_limit=count)
        paths = [tmp_path / str(number) for number in range(count)]
        for number, path in enumerate(paths):
            path.write_bytes(b"%d" % number)
            assert hold(held, path).number == number
        assert held.count == count
        write(f"for n in range({count}): open(f'{{path}}/{{n}}', 'wb').write(b'new')", tmp_path)
        assert held.count == 0
        for number in range(count):
            assert content(held, "a", number) == b"%d" % number
        held.release("a")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_many_writers_sharers_and_readers_at_once_never_see_a_mixed_file(held, tmp_path):
    """Each file holds one number, written 4096 times; writers change it, every opened one is uniform."""
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        path.write_bytes(b"%08d" % 0 * 4096)
    rewrite = (
        "for turn in range(1, 150):\n"
        "    for n in range(4):\n"
        "        with open(f'{path}/{n}', 'r+b', 0) as f: f.write(b'%08d' % turn * 4096)\n"
    )
    failures = []

    def capture(name):
        for turn in range(150):
            snapshot = f"{name}-{turn}"
            expected = {}
            for path in paths:
                holding = held.share(snapshot, os.stat(path)) or hold(held, path, snapshot)
                if holding is not None:
                    expected[holding.number] = holding.info.st_size
            if turn % 5 == 0:
                held.secure(snapshot)
            for number, size in expected.items():
                data = content(held, snapshot, number)
                if len(data) != size or data != data[:8] * (size // 8):
                    failures.append((snapshot, number))
                held.release(snapshot, number)
            held.release(snapshot)

    threads = [threading.Thread(target=capture, args=(f"t{number}",)) for number in range(3)]
    writers = [start_writer(rewrite, tmp_path) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for writer in writers:
        finish(writer)
    assert failures == []
    assert (held.count, held.size_bytes) == (0, 0)
    assert held._holdings._snapshots == {}
    assert len(held._slots._free) == len(set(held._slots._free))
