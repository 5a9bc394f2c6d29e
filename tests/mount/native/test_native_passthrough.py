"""Files that the kernel reads by itself from our cache, and how they are taken away from it again."""

import errno
import os
import random
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import blake3
import pytest

from replicate.errors import MountFailed
from replicated.cache import ContentCache
from replicated.mount.engine.native.openings import MIN_PASSED_BYTES, SMALL_OPENS, Openings
from replicated.mount.engine.native.passthrough import find_obstacle
from replicated.mount.errors import Refused
from replicated.mount.filesystem import Filesystem, Usage
from replicated.mount.reading.open_files import OpenFiles

CONTENT = random.Random(6).randbytes(MIN_PASSED_BYTES + 12345)

needs_passthrough = pytest.mark.skipif(bool(find_obstacle()), reason=find_obstacle())


class Kept:
    """A cache on disk, looked at from both processes."""

    def __init__(self, directory):
        self.directory = directory
        self.cache = ContentCache(directory, 1 << 30)

    def keep(self, content):
        assert self.cache.build_plain(blake3.blake3(content).digest(), len(content), [content])

    def path(self, content):
        """Where the cache keeps a file."""
        with self.cache.open_plain(blake3.blake3(content).digest(), len(content)) as plain:
            return os.readlink(f"/proc/self/fd/{plain.descriptor}")


def held_by(pid):
    """What a process has open; the kernel tells it of a last close after that has returned."""
    held = []
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            held.append(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return held


@pytest.fixture
def kept(tmp_path):
    kept = Kept(tmp_path / "content")
    yield kept
    kept.cache.close()


class Unreadable:
    """The reader of a file that nobody of us may be asked for."""

    @staticmethod
    def pread(offset, length):
        raise AssertionError("read through us")


@pytest.fixture
def passed(natively, memory_tree, kept):
    """Mount a tree over the cache; files that are named are not there but in the cache."""

    def passed(content, *unreadable, usage=None, **options):
        tree = memory_tree(content)
        for name in unreadable:
            tree.readers[name] = Unreadable
        # Opened by the process that serves it, as databases should not cross a fork.
        files = OpenFiles(tree, cache=Reopened(kept.directory))
        filesystem = Filesystem(tree, files=files, usage=usage)
        filesystem.backing_directory = kept.directory / "not yet there"
        return natively(filesystem, **options)

    return passed


class Reopened:
    """The cache of a directory, opened when it is first used."""

    def __init__(self, directory):
        self._directory = directory
        self._lock = threading.Lock()
        self._cache = None

    def open_plain(self, digest, size):
        with self._lock:
            self._cache = self._cache or ContentCache(self._directory, 1 << 30)
        return self._cache.open_plain(digest, size)


@needs_passthrough
def test_a_file_of_the_cache_is_read_by_the_kernel(passed, kept):
    kept.keep(CONTENT)
    served = passed({b"f": CONTENT}, b"f")
    assert (served.report.passthrough, served.report.reason) == (True, "")
    for _ in range(3):
        assert (served.directory / "f").read_bytes() == CONTENT
    assert os.stat(served.directory / "f").st_size == len(CONTENT)
    # Mapped by another process, as this one may wait for the mount while it holds what that needs.
    subprocess.run(["cmp", served.directory / "f", kept.path(CONTENT)], check=True)


@needs_passthrough
def test_a_small_file_is_read_through_us(passed, kept, memory_tree):
    small = CONTENT[: MIN_PASSED_BYTES - 1]
    kept.keep(small)
    served = passed({b"small": small, b"absent": CONTENT})
    assert (served.directory / "small").read_bytes() == small
    assert (served.directory / "absent").read_bytes() == CONTENT
    assert served.report.passthrough


@needs_passthrough
def test_many_at_once_open_and_close_a_file(passed, kept, eventually):
    kept.keep(CONTENT)
    served = passed({b"f": CONTENT}, b"f")
    wrong = []

    def use():
        for _ in range(100):
            with open(served.directory / "f", "rb", buffering=0) as file:
                if os.pread(file.fileno(), 10, 500_000) != CONTENT[500_000:500_010]:
                    wrong.append(file)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    # All that was registered is given back: nothing keeps the file of the cache open.
    eventually(lambda: kept.path(CONTENT) not in held_by(served.pid))


@needs_passthrough
def test_a_file_that_comes_into_the_cache_while_it_is_open_is_passed_through_later(passed, kept):
    tree = {b"f": CONTENT}
    served = passed(tree)
    with open(served.directory / "f", "rb", buffering=0) as first:
        assert first.read(10) == CONTENT[:10]
        kept.keep(CONTENT)
        # The kernel allows an inode only one way at a time.
        with open(served.directory / "f", "rb") as second:
            assert second.read() == CONTENT
        assert os.pread(first.fileno(), 100, 600_000) == CONTENT[600_000:600_100]
        assert kept.path(CONTENT) not in files_of(served)
    with open(served.directory / "f", "rb") as third:
        assert third.read() == CONTENT
        assert kept.path(CONTENT) in files_of(served)


def files_of(served):
    return [os.readlink(f"/proc/{served.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{served.pid}/fd")]


@needs_passthrough
def test_a_file_that_was_deleted_from_the_cache_is_read_on(passed, kept):
    kept.keep(CONTENT)
    served = passed({b"f": CONTENT})
    with open(served.directory / "f", "rb", buffering=0) as file:
        os.unlink(kept.path(CONTENT))
        assert file.read() == CONTENT
    assert (served.directory / "f").read_bytes() == CONTENT


@needs_passthrough
@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 5000),
        lambda path: Path(path).open("r+b").close(),
    ],
    ids=["truncated", "opened for writing"],
)
def test_who_reads_a_file_of_the_cache_that_somebody_changes_gets_an_error(passed, kept, error_of, change):
    kept.keep(CONTENT)
    served = passed({b"f": CONTENT})
    path = kept.path(CONTENT)
    file = os.open(served.directory / "f", os.O_RDONLY)
    number = os.fstat(file).st_ino
    # Waits until nobody can read the file any more.
    change(path)
    assert error_of(lambda: os.pread(file, 10, 100_000)) == "EIO"
    assert error_of(lambda: os.fstat(file)) == "EIO"
    # Who opens it anew gets what was saved, though not from there.
    assert (served.directory / "f").read_bytes() == CONTENT
    assert os.stat(served.directory / "f").st_ino == number
    assert error_of(lambda: os.pread(file, 10, 100_000)) == "EIO"
    assert error_of(lambda: os.close(file)) == "EIO"
    assert (served.directory / "f").read_bytes() == CONTENT
    assert "somebody changes a file of the cache" in served.log.read_text()


@needs_passthrough
def test_a_file_that_somebody_has_open_for_writing_is_not_passed_through(passed, kept):
    kept.keep(CONTENT)
    served = passed({b"f": CONTENT})
    path = kept.path(CONTENT)
    with open(path, "r+b", buffering=0) as writer, open(served.directory / "f", "rb", buffering=0) as file:
        assert file.read(10) == CONTENT[:10]
        os.pwrite(writer.fileno(), b"wrong", len(CONTENT) - 5)
        assert os.pread(file.fileno(), 5, len(CONTENT) - 5) == CONTENT[-5:]


@needs_passthrough
@pytest.mark.parametrize(
    "options, reason",
    [
        ({"passthrough": "off"}, "passing files through is switched off"),
        ({"cache_bytes": 0}, "there is no cache from which files could be passed through"),
    ],
)
def test_files_are_read_through_us_where_that_is_better(passed, kept, options, reason):
    kept.keep(CONTENT)
    served = passed({b"f": CONTENT}, **options)
    assert (served.report.passthrough, served.report.reason) == (False, reason)
    assert (served.directory / "f").read_bytes() == CONTENT


MANY_SMALL = Usage(size_bytes=10**6, entries=1000)


def test_files_are_not_opened_any_more_once_many_small_ones_were(memory_tree):
    filesystem = Filesystem(memory_tree({b"small": b"1", b"large": CONTENT}))
    small, large = (filesystem.lookup(1, name).inode for name in (b"small", b"large"))
    openings = Openings(filesystem, None, {}, may_end=True)
    for _ in range(SMALL_OPENS - 1):
        handle, _ = openings.open(small)
    openings.open(large)
    for _ in range(SMALL_OPENS - 1):
        openings.open(small)
    for inode in (small, large):
        with pytest.raises(Refused) as raised:
            openings.open(inode)
        assert raised.value.errno == errno.ENOSYS
    assert b"".join(filesystem.read(small, handle, 0, 1)) == b"1"
    openings.release(handle)


@needs_passthrough
def test_a_snapshot_of_small_files_is_read_rightly_before_and_after_files_are_opened(passed, kept):
    kept.keep(CONTENT)
    tree = {b"%d" % number: b"%d" % number for number in range(SMALL_OPENS + 100)}
    served = passed({**tree, b"f": CONTENT}, b"f", usage=MANY_SMALL)
    assert (served.report.passthrough, served.report.reason) == (True, "")
    with open(served.directory / "f", "rb") as before:
        for name, content in tree.items():
            assert (served.directory / os.fsdecode(name)).read_bytes() == content
        assert before.read() == CONTENT
        assert (served.directory / "f").read_bytes() == CONTENT
    for name, content in tree.items():
        assert (served.directory / os.fsdecode(name)).read_bytes() == content
    assert (served.directory / "f").read_bytes() == CONTENT


@needs_passthrough
def test_many_small_files_are_passed_through_when_asked(passed, kept):
    kept.keep(CONTENT)
    served = passed({b"f": CONTENT}, b"f", usage=MANY_SMALL, passthrough="on")
    assert served.report.passthrough
    assert (served.directory / "f").read_bytes() == CONTENT


def test_what_cannot_be_passed_through_is_not_mounted_when_asked(passed, tmp_path):
    with pytest.raises(MountFailed, match="no cache"):
        passed({}, passthrough="on", cache_bytes=0)
    assert not os.path.ismount(tmp_path / "mount0")


@needs_passthrough
def test_a_cache_on_an_overlay_is_passed_through(natively, memory_tree, tmp_path):
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    layers = "lowerdir=lower,upperdir=upper,workdir=work"
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", "merged"], cwd=tmp_path, check=True)
    try:
        kept = Kept(tmp_path / "merged" / "content")
        kept.keep(CONTENT)
        tree = memory_tree({b"f": CONTENT})
        tree.readers[b"f"] = Unreadable
        filesystem = Filesystem(tree, files=OpenFiles(tree, cache=Reopened(kept.directory)))
        filesystem.backing_directory = kept.directory
        served = natively(filesystem)
        assert (served.directory / "f").read_bytes() == CONTENT
        assert "cannot be passed through" not in served.log.read_text()
        kept.cache.close()
        served.end()
    finally:
        subprocess.run(["umount", "-l", tmp_path / "merged"], check=True)


@needs_passthrough
def test_ending_the_mount_ends_what_is_passed_through(passed, kept, error_of):
    kept.keep(CONTENT)
    served = passed({b"f": CONTENT})
    with open(served.directory / "f", "rb", buffering=0) as file:
        assert file.read(4) == CONTENT[:4]
        served.kill(signal.SIGTERM)
        assert served.wait() == 0
        # The kernel reads on without us what was open: these are the bytes that were saved.
        assert os.pread(file.fileno(), 4, 0) == CONTENT[:4]
