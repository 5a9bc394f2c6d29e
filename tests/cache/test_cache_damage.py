"""Whoever deletes, cuts, overwrites or fills the cache while it is used: a miss, and never other bytes."""

import os
import random
import shutil
import subprocess
import sys

import pytest
from blake3 import blake3

from replicated.cache import ContentCache
from replicated.cache.ledger import STAMP_S, Ledger

LIMIT_BYTES = 8 << 20
SIZE = 1 << 20


@pytest.fixture
def chunks(contents):
    return contents(64, 3000)


@pytest.fixture
def filled(cache, chunks):
    cache.remember(chunks)
    return cache


def files_of(directory):
    return [path for path in directory.glob("*/*") if path.is_file()]


def build(cache, content):
    return cache.build_plain(blake3(content).digest(), len(content), [content])


def open_plain(cache, content):
    return cache.open_plain(blake3(content).digest(), len(content))


def test_flipped_chunk_is_missing_once_and_can_be_kept_again(filled, chunks, directory, caplog):
    (path,) = files_of(directory)
    with open(path, "r+b") as file:
        file.seek(10_000)
        (byte,) = file.read(1)
        file.seek(10_000)
        file.write(bytes([byte ^ 1]))
    found = filled.recall(list(chunks))
    assert len(found) == len(chunks) - 1
    assert found.items() <= chunks.items()
    assert caplog.text.count("damaged chunks in the content cache") == 1
    assert filled.recall(list(chunks)) == found
    assert caplog.text.count("damaged chunks in the content cache") == 1
    filled.remember(chunks)
    filled.close()
    again = ContentCache(directory, LIMIT_BYTES)
    assert again.recall(list(chunks)) == chunks
    again.close()


@pytest.mark.parametrize("damage", ["cut", "emptied", "zeros", "other", "deleted", "directory", "link"])
def test_damaged_file_of_chunks_is_a_miss(filled, chunks, directory, contents, tmp_path, damage):
    (path,) = files_of(directory)
    whole = path.read_bytes()
    if damage == "cut":
        os.truncate(path, len(whole) // 2)
    elif damage == "emptied":
        os.truncate(path, 0)
    elif damage == "zeros":
        path.write_bytes(bytes(len(whole)))
    elif damage == "other":
        path.write_bytes(random.Random(3).randbytes(len(whole)))
    else:
        path.unlink()
        if damage == "directory":
            path.mkdir()
        elif damage == "link":
            (tmp_path / "elsewhere").write_bytes(whole)
            path.symlink_to(tmp_path / "elsewhere")
    found = filled.recall(list(chunks))
    assert found.items() < chunks.items()
    # Whoever has the file open for writing notices by the next time, and takes another one.
    filled.remember(contents(64, 3000, seed=1))
    more = contents(64, 3000, seed=2)
    filled.remember(more)
    assert filled.recall(list(more)) == more
    if damage == "link":
        assert (tmp_path / "elsewhere").read_bytes() == whole, "nothing outside is written"


def test_cache_that_is_deleted_while_it_is_used_begins_anew(filled, chunks, directory, contents):
    content = os.urandom(SIZE)
    assert build(filled, content)
    plain = open_plain(filled, content)
    shutil.rmtree(directory)
    assert filled.recall(list(chunks)) == {}
    assert open_plain(filled, content) is None
    assert not filled.has_plain(blake3(content).digest())
    buffer = bytearray(SIZE)
    assert plain.read_into(memoryview(buffer), 0) == SIZE
    assert plain.is_intact(), "deleted, but not changed"
    assert buffer == content
    plain.close()
    # What was being written is lost with the directory; from then on all is as ever.
    filled.remember(contents(64, 20_000, seed=1))
    filled.remember(chunks)
    assert filled.recall(list(chunks)) == chunks
    assert build(filled, content)
    open_plain(filled, content).close()


def test_files_that_are_deleted_without_their_ledger_are_made_again(filled, chunks, directory):
    content = os.urandom(SIZE)
    assert build(filled, content)
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    assert open_plain(filled, content) is None
    assert build(filled, content)
    open_plain(filled, content).close()
    assert filled.recall(list(chunks)) == {}


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "replaced", "deleted"])
def test_plain_file_that_was_changed_is_not_opened_and_made_again(cache, directory, damage):
    content = os.urandom(SIZE)
    assert build(cache, content)
    (path,) = files_of(directory)
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    if damage in ("replaced", "deleted"):
        path.unlink()
        if damage == "replaced":
            path.write_bytes(content[:-1] + b"x")
    else:
        path.chmod(0o644)
        with open(path, "r+b") as file:
            if damage == "flipped":
                file.write(bytes([content[0] ^ 1]))
            elif damage == "cut":
                file.truncate(SIZE - 1)
            else:
                file.truncate(SIZE + 1)
    if damage != "deleted":
        # Whoever puts the time back is found out as well.
        os.utime(path, ns=times)
    assert open_plain(cache, content) is None
    assert not cache.has_plain(blake3(content).digest())
    assert build(cache, content)
    with open_plain(cache, content) as plain:
        buffer = bytearray(SIZE)
        assert plain.read_into(memoryview(buffer), 0) == SIZE
        assert buffer == content


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_plain_file_that_is_changed_while_it_is_open_says_so(cache, directory, damage):
    content = os.urandom(SIZE)
    assert build(cache, content)
    (path,) = files_of(directory)
    with open_plain(cache, content) as plain:
        assert plain.is_intact()
        with open(path, "r+b") as file:
            if damage == "flipped":
                file.write(bytes([content[0] ^ 1]))
            else:
                file.truncate(100)
        assert not plain.is_intact()
        assert open_plain(cache, content) is None
        assert not plain.is_intact()
    assert build(cache, content)


def test_what_nobody_knows_is_swept_by_the_next_process(filled, chunks, directory):
    filled.close()
    (path,) = files_of(directory)
    (path.parent / "ffff").write_bytes(bytes(SIZE))
    other = directory / "0123456789abcdef"
    other.mkdir()
    (other / "1").write_bytes(bytes(SIZE))
    cache = ContentCache(directory, LIMIT_BYTES)
    assert files_of(directory) == [path]
    assert not other.exists()
    assert cache.recall(list(chunks)) == chunks
    cache.close()


def test_damaged_ledger_tells_no_lies(directory, contents, caplog):
    """Any byte of it; whether it is noticed or not, and whatever becomes of the rest."""
    chunks, content = contents(64, 20_000), os.urandom(SIZE)
    cache = ContentCache(directory, LIMIT_BYTES)
    cache.remember(chunks)
    assert build(cache, content)
    cache.close()
    (database,) = directory.glob("*.db")
    source = random.Random(11)
    saved = directory.with_name("saved")
    shutil.copytree(directory, saved)
    whole = database.read_bytes()
    for _ in range(80):
        shutil.rmtree(directory)
        shutil.copytree(saved, directory)
        damaged = bytearray(whole)
        for _ in range(source.choice([1, 1, 20])):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        database.write_bytes(damaged)
        cache = ContentCache(directory, LIMIT_BYTES)
        assert cache.recall(list(chunks)).items() <= chunks.items()
        plain = open_plain(cache, content)
        if plain is not None:
            with plain:
                buffer = bytearray(SIZE)
                assert plain.read_into(memoryview(buffer), 0) == SIZE
                assert buffer == content
        more = contents(64, 20_000, seed=1)
        cache.remember(more)
        assert cache.recall(list(more)).items() <= more.items()
        build(cache, content[::-1])
        cache.close()


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mount is not possible here")
    yield place
    subprocess.run(["umount", place], check=True)


def free_bytes(place):
    info = os.statvfs(place)
    return info.f_bavail * info.f_frsize


def test_the_last_of_the_disk_is_left_to_others(small_disk, contents):
    cache = ContentCache(small_disk / "content", 100 << 20)
    for seed in range(20):
        cache.remember(contents(64, 20_000, seed=seed))
        build(cache, os.urandom(SIZE))
        assert free_bytes(small_disk) >= (8 << 20) // 20 - (64 << 10)
    last = contents(64, 20_000, seed=19)
    assert cache.recall(list(last))
    cache.close()


def test_full_disk_is_a_miss_and_leaves_what_there_was(small_disk, contents, caplog):
    cache = ContentCache(small_disk / "content", 100 << 20)
    chunks = contents(64, 20_000)
    cache.remember(chunks)
    with open(small_disk / "others", "wb") as file:
        file.write(bytes(free_bytes(small_disk)))
    more, content = contents(64, 20_000, seed=1), os.urandom(SIZE)
    cache.remember(more)
    cache.remember(contents(64, 20_000, seed=2))
    assert not build(cache, content)
    assert cache.recall(list(more)).items() <= more.items()
    assert cache.recall(list(chunks)).items() <= chunks.items()
    assert caplog.text.count("cannot keep anything") <= 2
    cache.close()
    os.unlink(small_disk / "others")
    cache = ContentCache(small_disk / "content", 100 << 20)
    assert build(cache, content)
    cache.remember(more)
    assert cache.recall(list(more)) == more
    cache.close()


def test_disk_that_fills_up_while_a_file_is_made_leaves_nothing_of_it(small_disk, caplog):
    cache = ContentCache(small_disk / "content", 100 << 20)
    content = os.urandom(3 << 20)

    def parts():
        yield content[: 2 << 20]
        with open(small_disk / "others", "wb") as file:
            file.write(bytes(free_bytes(small_disk)))
        yield content[2 << 20 :]

    before = free_bytes(small_disk)
    assert not cache.build_plain(blake3(content).digest(), len(content), parts())
    assert "cannot keep anything" in caplog.text
    os.unlink(small_disk / "others")
    assert before - free_bytes(small_disk) < 64 << 10
    cache.close()


def test_trouble_is_told_once_and_tried_again_later(directory, caplog):
    now = 0.0
    ledger = Ledger(directory, LIMIT_BYTES, clock=lambda: now)
    ledger.pause(OSError(28, "No space left on device"))
    assert ledger.create(4096) is None
    assert ledger.create(4096) is None
    assert caplog.text.count("No space left") == 1
    now = STAMP_S * 2
    file = ledger.create(4096)
    assert file is not None
    ledger.discard(file)
    ledger.close()


LEASE = """
import os, signal, sys, time
from pathlib import Path
from blake3 import blake3
from replicated.cache import ContentCache
signal.signal(signal.SIGIO, signal.SIG_IGN)
content = b"content" * 1000
cache = ContentCache(Path(sys.argv[1]), 8 << 20)
cache.build_plain(blake3(content).digest(), len(content), [content])
plain = cache.open_plain(blake3(content).digest(), len(content))
assert plain.is_broken(), "there is no lease yet"
assert plain.hold_lease()
assert not plain.is_broken()
print(os.readlink(f"/proc/self/fd/{plain.descriptor}"), flush=True)
sys.stdin.readline()
assert plain.is_broken()
assert plain.is_intact()
plain.release_lease()
print("released", flush=True)
sys.stdin.readline()
assert not plain.is_intact()
plain.close()
"""


def test_whoever_wants_to_change_a_leased_file_waits_and_is_noticed(directory):
    user = subprocess.Popen(
        [sys.executable, "-c", LEASE, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        path = user.stdout.readline().strip()
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        user.stdin.write("\n")
        user.stdin.flush()
        assert user.stdout.readline() == "released\n"
        descriptor = os.open(path, os.O_WRONLY)
        os.pwrite(descriptor, b"x", 0)
        os.close(descriptor)
        user.stdin.write("\n")
        user.stdin.flush()
        assert user.wait(60) == 0
    finally:
        user.kill()
        user.wait()
        user.stdin.close()
        user.stdout.close()


def test_lock_of_an_open_file_lives_as_long_as_the_kernel_uses_it(cache):
    """As it does when it passes reads through, after our descriptor was closed."""
    content = os.urandom(SIZE)
    assert build(cache, content)
    plain = open_plain(cache, content)
    kept_by_others = os.dup(plain.descriptor)
    path = os.readlink(f"/proc/self/fd/{kept_by_others}")
    plain.close()
    for _ in range(10):
        build(cache, os.urandom(2 << 20))
    assert os.path.exists(path)
    os.close(kept_by_others)
    for _ in range(10):
        build(cache, os.urandom(2 << 20))
    assert not os.path.exists(path)
