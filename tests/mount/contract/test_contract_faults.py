"""When the store, the cache or a process fails: right bytes or an error, in time, and well again after."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

proves = pytest.mark.proves

DEADLINE_S = 30
#: Longer than any test waits: what ends earlier has not been ended by it.
NEVER_S = 600
#: For what must run into it.
SOON_S = 0.5
STEP = 128 << 10

#: What the store can do wrong; a file for each of them.
FAULTS = ("fail", "flip", "cut", "lose")
CONTENTS = {name: random.Random(name).randbytes(1_500_000) for name in (*FAULTS, "hang", "other")}
TREE = {
    **{os.fsencode(name): content for name, content in CONTENTS.items()},
    b"far": {b"%03d" % number: random.Random(number).randbytes(600) for number in range(200)},
    b"farther": {b"x": b"x"},
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory, make_snapshots, memory_tree):
    top = tmp_path_factory.mktemp("faults")
    snapshots = make_snapshots(top / "repository", top / "cache", memory_tree)
    identifier, _ = snapshots.add(TREE)
    snapshots.close()
    return snapshots, identifier


@pytest.fixture
def begin(serve, repository, tmp_path, ending):
    """Mount the repository behind a store that can be made to fail."""
    begun = []

    def begin(variant, **options):
        snapshots, identifier = repository
        served = serve(tmp_path, snapshots, identifier, variant=variant, faulty=True, **options)
        begun.append(served)
        return served

    yield begin
    for served in begun:
        ending(served)


def read(path, expected):
    """Read a file to its end: 0, or the errno that ended it. What was read until then is right."""
    try:
        with open(path, "rb", buffering=0) as file:
            # Not from pages that were read before.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            offset = 0
            # What precedes an error may be given first, as a part of what was asked for.
            while part := os.pread(file.fileno(), STEP, offset):
                assert part == expected[offset : offset + len(part)]
                offset += len(part)
            assert offset == len(expected)
    except OSError as error:
        return error.errno
    return 0


def begin_reader(path):
    """A process that reads a file."""
    return subprocess.Popen(["cat", "--", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@proves("S-50", "S-51")
def test_what_the_store_does_not_give_as_it_was_saved_is_an_error_until_it_does(engine, begin, wait_until):
    served = begin(engine, cache_bytes=0)
    assert len(os.listdir(served.directory)) == len(TREE)
    for mode in FAULTS:
        served.set_store(mode)
        assert read(served.directory / mode, CONTENTS[mode]) == errno.EIO
        assert served.requests(mode)
        # Everything else works.
        assert len(os.listdir(served.directory)) == len(TREE)
        assert os.stat(served.directory / mode).st_size == len(CONTENTS[mode])
    served.set_store("ok")
    # What was damaged is not asked for again for a few seconds, by whatever engine.
    healing = FAULTS if engine == "native" else ("fail",)
    wait_until(lambda: all(read(served.directory / mode, CONTENTS[mode]) == 0 for mode in healing))
    assert "damaged" in served.messages.read_text()


@proves("S-50", "S-51")
def test_a_repository_that_is_damaged_on_the_disk_is_an_error_until_it_is_repaired(
    serve, ending, make_snapshots, memory_tree, tmp_path, wait_until
):
    snapshots = make_snapshots(tmp_path / "repository", tmp_path / "cache", memory_tree)
    identifier, _ = snapshots.add(TREE)
    snapshots.close()
    served = serve(tmp_path, snapshots, identifier, variant="native", cache_bytes=0)
    os.listdir(served.directory)
    shutil.copytree(tmp_path / "repository", tmp_path / "repaired")
    packs = [path for path in (tmp_path / "repository/packs").rglob("*") if path.is_file()]
    assert packs
    for pack in packs:
        pack.chmod(0o644)
        pack.write_bytes(inverted(pack.read_bytes()))
    assert read(served.directory / "other", CONTENTS["other"]) == errno.EIO
    assert read(served.directory / "cut", CONTENTS["cut"]) == errno.EIO
    for pack in packs:
        pack.write_bytes((tmp_path / "repaired" / pack.relative_to(tmp_path / "repository")).read_bytes())
    wait_until(lambda: read(served.directory / "other", CONTENTS["other"]) == 0)
    ending(served)


@proves("S-50")
def test_a_mapping_of_what_cannot_be_read_is_a_signal_and_never_wrong(engine, begin):
    served = begin(engine, cache_bytes=0)
    os.listdir(served.directory)
    code = """
import mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    print("mapped", flush=True)
    mapped[1_000_000]
"""
    served.set_store("flip")
    done = subprocess.run([sys.executable, "-c", code, served.directory / "flip"], stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, b"mapped\n")


@proves("S-52")
def test_a_store_that_does_not_answer_is_an_error_in_time_and_holds_up_nothing_else(
    engine, begin, wait_until
):
    served = begin(engine, cache_bytes=0, timeout_s=SOON_S)
    assert read(served.directory / "other", CONTENTS["other"]) == 0
    served.set_store("hang")
    results = []
    readers = [
        threading.Thread(target=lambda: results.append(read(served.directory / "hang", CONTENTS["hang"])))
        for _ in range(4)
    ]
    for reader in readers:
        reader.start()
    wait_until(lambda: served.requests("hang"))
    assert len(os.listdir(served.directory)) == len(TREE)
    assert os.stat(served.directory / "cut").st_size == len(CONTENTS["cut"])
    assert os.statvfs(served.directory).f_namemax == 255
    for reader in readers:
        reader.join(DEADLINE_S)
    assert results == [errno.EIO] * 4
    # A listing that has to be fetched is no different.
    with pytest.raises(OSError) as raised:
        os.listdir(served.directory / "farther")
    assert raised.value.errno == errno.EIO
    served.set_store("ok")
    wait_until(lambda: read(served.directory / "hang", CONTENTS["hang"]) == 0)
    assert os.listdir(served.directory / "farther") == ["x"]


@proves("S-53")
def test_a_store_that_is_slow_is_waited_for(engine, begin, wait_until):
    served = begin(engine, cache_bytes=0, timeout_s=NEVER_S)
    served.set_store("hang")
    reader = begin_reader(served.directory / "hang")
    wait_until(lambda: served.requests("hang"))
    served.set_store("ok")
    found, complaints = reader.communicate(timeout=DEADLINE_S)
    assert (reader.returncode, complaints) == (0, b"")
    assert found == CONTENTS["hang"]


@proves("S-54")
def test_a_reader_that_waits_for_the_store_can_be_killed(engine, begin, wait_until):
    served = begin(engine, cache_bytes=0, timeout_s=NEVER_S)
    assert read(served.directory / "other", CONTENTS["other"]) == 0
    served.set_store("hang")
    readers = [begin_reader(served.directory / "hang") for _ in range(3)]
    wait_until(lambda: served.requests("hang"))
    for reader in readers:
        reader.kill()
        reader.communicate(timeout=DEADLINE_S)
        assert reader.returncode == -signal.SIGKILL
    served.set_store("ok")
    wait_until(lambda: read(served.directory / "hang", CONTENTS["hang"]) == 0)


@proves("S-54")
def test_a_signal_ends_who_waits_for_a_directory(engine, begin, wait_until):
    served = begin(engine, cache_bytes=0, timeout_s=NEVER_S)
    os.listdir(served.directory)
    served.set_store("hang")
    listing = subprocess.Popen(["ls", "--", served.directory / "farther"], stdout=subprocess.PIPE)
    wait_until(lambda: served.requests("hang"))
    listing.send_signal(signal.SIGINT)
    listing.communicate(timeout=DEADLINE_S)
    assert listing.returncode == -signal.SIGINT
    served.set_store("ok")
    assert os.listdir(served.directory / "farther") == ["x"]


@proves("S-55")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_mount_ends_while_the_store_does_not_answer(engine, begin, wait_until, number):
    served = begin(engine, cache_bytes=0, timeout_s=NEVER_S)
    served.set_store("hang")
    reader = begin_reader(served.directory / "hang")
    wait_until(lambda: served.requests("hang"))
    served.process.send_signal(number)
    assert served.process.wait(DEADLINE_S) == 0
    found, _ = reader.communicate(timeout=DEADLINE_S)
    assert reader.returncode != 0
    assert found == b""
    assert os.listdir(served.directory) == []


@proves("S-56")
def test_what_was_read_once_is_read_again_while_the_store_is_away(engine, begin):
    served = begin(engine)
    assert read(served.directory / "other", CONTENTS["other"]) == 0
    served.set_store("fail")
    assert read(served.directory / "other", CONTENTS["other"]) == 0
    assert read(served.directory / "cut", CONTENTS["cut"]) == errno.EIO


def inverted(data):
    return bytes(byte ^ 0xFF for byte in data)


def cached_files(served):
    """The files of the cache that hold contents; those of the ledger lie beside their directory."""
    return [path for path in (served.cache / "content").glob("*/*") if path.is_file()]


def delete(served):
    # It is written to meanwhile.
    while (served.cache / "content").exists():
        shutil.rmtree(served.cache / "content", ignore_errors=True)


def truncate(served):
    for path in cached_files(served):
        path.chmod(0o644)
        os.truncate(path, path.stat().st_size // 2)


def overwrite(served):
    for path in cached_files(served):
        path.chmod(0o644)
        _overwrite(path)


def overwrite_ledger(served):
    for path in (served.cache / "content").iterdir():
        if path.is_file() and not path.name.endswith("-shm"):
            _overwrite(path)


def _overwrite(path):
    # In place, as a tool would that knows nothing of leases.
    with open(path, "r+b") as file:
        data = inverted(file.read())
        file.seek(0)
        file.write(data)


@pytest.fixture(scope="module")
def filled(serve, repository, ending, tmp_path_factory):
    """A cache that holds all chunks, as an earlier mount has left it."""
    snapshots, identifier = repository
    top = tmp_path_factory.mktemp("filled")
    served = serve(top, snapshots, identifier, variant="mfusepy", faulty=True)
    assert {read(served.directory / name, content) for name, content in CONTENTS.items()} == {0}
    ending(served)
    return served.cache


@proves("S-57")
@pytest.mark.parametrize("plain", [False, True], ids=["chunks", "plain-files"])
@pytest.mark.parametrize("damage", [delete, truncate, overwrite, overwrite_ledger])
@pytest.mark.parametrize("variant", ["native-without-open", "mfusepy"])
def test_a_cache_that_is_damaged_in_use_costs_time_and_nothing_else(
    variant, begin, filled, plain, damage, tmp_path
):
    # Where the kernel reads files by itself is the matter of the next one.
    if not plain:
        shutil.copytree(filled, tmp_path / "cache")
    served = begin(variant, plain=plain, cache=tmp_path / "cache")
    assert os.stat(served.directory / "other").st_size == len(CONTENTS["other"])
    asked = served.requests()
    with open(served.directory / "other", "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 1000, 500_000) == CONTENTS["other"][500_000:501_000]
        assert read(served.directory / "cut", CONTENTS["cut"]) == 0
        assert served.requests() == asked
        damage(served)
        assert {read(served.directory / name, content) for name, content in CONTENTS.items()} == {0}
        assert os.pread(file.fileno(), 1000, 1_400_000) == CONTENTS["other"][1_400_000:1_401_000]
    # What is in memory of the ledger may be enough.
    assert len(served.requests()) > len(asked) or damage is overwrite_ledger


@proves("S-57")
def test_a_ledger_that_loses_its_shared_memory_may_end_the_mount_but_gives_nothing_wrong(
    begin, filled, tmp_path
):
    shutil.copytree(filled, tmp_path / "cache")
    served = begin("native-without-open", cache=tmp_path / "cache")
    assert read(served.directory / "cut", CONTENTS["cut"]) == 0
    (shared,) = (served.cache / "content").glob("*-shm")
    os.truncate(shared, 0)
    gone = {errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT}
    assert read(served.directory / "other", CONTENTS["other"]) in {0, *gone}


@proves("S-58")
@pytest.mark.parametrize("damage", [delete, truncate, overwrite])
def test_damage_to_a_file_that_the_kernel_reads_by_itself_is_never_wrong_bytes(begin, damage, wait_until):
    served = begin("native-passthrough")
    assert served.report["passthrough"]
    descriptor = os.open(served.directory / "other", os.O_RDONLY)
    assert os.pread(descriptor, 1000, 500_000) == CONTENTS["other"][500_000:501_000]
    damaging = threading.Thread(target=damage, args=(served,))
    damaging.start()
    damaging.join(DEADLINE_S)
    assert not damaging.is_alive()
    for offset in range(0, len(CONTENTS["other"]), STEP):
        try:
            part = os.pread(descriptor, STEP, offset)
        except OSError as error:
            assert error.errno == errno.EIO
        else:
            assert part == CONTENTS["other"][offset : offset + STEP]
    with suppress(OSError):
        # To close it may be an error as well.
        os.close(descriptor)
    # Who opens it now gets it from the store.
    wait_until(lambda: read(served.directory / "other", CONTENTS["other"]) == 0)


@proves("S-59")
def test_a_mount_whose_process_is_killed_ends_reads_with_an_error(engine, begin, wait_until):
    served = begin(engine, cache_bytes=0, timeout_s=NEVER_S)
    served.set_store("hang")
    results = []
    reader = threading.Thread(
        target=lambda: results.append(read(served.directory / "hang", CONTENTS["hang"]))
    )
    reader.start()
    wait_until(lambda: served.requests("hang"))
    served.process.kill()
    reader.join(DEADLINE_S)
    assert len(results) == 1
    assert results[0] in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
    # Its helper unmounts what is left.
    wait_until(lambda: os.path.ismount(served.directory) is False)
    assert os.listdir(served.directory) == []
