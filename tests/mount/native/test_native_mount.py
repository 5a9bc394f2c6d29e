"""Real mounts through the native engine: what is served, how it ends, and what a slow store holds up."""

import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from replicate.errors import MountFailed
from replicated.mount.engine.native import protocol
from replicated.mount.engine.native.requests import MAX_READING, MAX_THREADS
from replicated.mount.filesystem import Filesystem, Usage
from replicated.mount.life.mountinfo import find_mounted
from replicated.mount.reading.open_files import OpenFiles

NOBODY = 65534
CLONE_NEWNS = 0x20000
BIG = random.Random(5).randbytes(3_333_333)
TREE = (
    {
        b"with space": b"1",
        b"\xff\xfe\n": (b"4", 0o400, 1),
        b"n" * 255: b"long",
        b"empty": b"",
        b"void": {},
        b"big": BIG,
        b"sub": (
            {
                b"out": "/etc/hostname",
                b"inside": "../with space",
                b"before 1970": ({b"in": (b"x", 0o400, -5)}, 0o500, -(10**18) - 1),
            },
            0o751,
            10**18 + 4,
        ),
        b"many": {b"%04d" % number: b"%d" % number for number in range(300)},
    },
    0o755,
    10**18 + 5,
)


class NeverOpened(OpenFiles):
    """Files of a kernel that does not say what it opens."""

    def open(self, inode, node):
        raise AssertionError("opened")


class NeverRead(OpenFiles):
    """Files that are read by handle only."""

    def read_unopened(self, inode, node, offset, length):
        raise AssertionError("not opened")


def changing(node):
    return True


@pytest.fixture(params=["opened", "not opened"])
def modes(request, memory_tree):
    """File systems of both kinds: whose files are opened, as what may change, and whose are not."""

    def modes(content):
        tree = memory_tree(content)
        if request.param == "opened":
            return tree, Filesystem(tree, files=NeverRead(tree), changing=changing)
        return tree, Filesystem(tree, files=NeverOpened(tree))

    return modes


def test_everything_is_as_it_was_saved(natively, modes, described):
    tree, filesystem = modes(TREE)
    served = natively(filesystem, passthrough="off")
    assert described(served.directory) == described(tree)
    # Once more, from the kernel's caches.
    assert described(served.directory) == described(tree)
    assert os.stat(served.directory).st_mtime_ns == 10**18 + 5


def test_it_is_mounted_as_it_should_be(natively):
    served = natively(TREE)
    mounted = find_mounted(os.fsencode(served.directory))
    assert mounted.is_ours
    assert mounted.source == b"replicate:a,b"
    flags = os.statvfs(served.directory).f_flag
    assert flags & os.ST_RDONLY and flags & os.ST_NOSUID and flags & os.ST_NODEV


def test_listing_a_directory_tells_the_attributes_of_its_entries(natively, memory_tree):
    class Counting(Filesystem):
        def lookup(self, parent, name):
            raise AssertionError(f"{name} was looked up")

        def getattr(self, inode):
            # The directory itself, and the one above it.
            assert inode < 10, f"{inode} was asked for"
            return super().getattr(inode)

    tree = memory_tree({b"%05d" % number: b"12" for number in range(2000)})
    served = natively(Counting(tree))
    with os.scandir(served.directory) as entries:
        assert sum(entry.stat(follow_symlinks=False).st_size for entry in entries) == 4000


def test_listings_and_absent_names_of_a_snapshot_are_asked_for_once(natively, memory_tree, tmp_path):
    asked = tmp_path / "asked"

    class Telling(Filesystem):
        def lookup(self, parent, name):
            with open(asked, "ab") as file:
                file.write(b"lookup %s\n" % name)
            return super().lookup(parent, name)

        def read_entries(self, inode, offset, limit):
            with open(asked, "ab") as file:
                file.write(b"list %d\n" % inode)
            return super().read_entries(inode, offset, limit)

    served = natively(Telling(memory_tree({b"a": b"", b"b": b""})))
    for _ in range(2):
        assert not os.path.exists(served.directory / "absent")
        assert sorted(os.listdir(served.directory)) == ["a", "b"]
    before = asked.read_bytes()
    assert before.count(b"lookup absent") == 1
    assert sorted(os.listdir(served.directory)) == ["a", "b"]
    assert asked.read_bytes() == before


def test_what_may_change_is_asked_for_again(natively, memory_tree, eventually):
    tree = memory_tree({b"a": b"1"})
    later = memory_tree({b"a": b"1", b"b": b"22"})

    class Switching:
        """A source that changes when its process is told to."""

        def __init__(self):
            self.current = tree

        @property
        def root(self):
            return tree.root

        def __getattr__(self, name):
            return getattr(self.current, name)

    source = Switching()

    def switch(*_):
        source.current = later

    served = natively(
        Filesystem(source, changing=changing), prepare=lambda: signal.signal(signal.SIGUSR1, switch)
    )
    assert os.listdir(served.directory) == ["a"]
    number = os.stat(served.directory / "a").st_ino
    served.kill(signal.SIGUSR1)
    eventually(lambda: os.listdir(served.directory) == ["a", "b"])
    eventually(lambda: os.path.exists(served.directory / "b"))
    assert os.stat(served.directory / "a").st_ino == number


def test_reads_anywhere_give_what_is_there(natively, modes):
    _, filesystem = modes({b"big": BIG})
    served = natively(filesystem, passthrough="off")
    with open(served.directory / "big", "rb", buffering=0) as file:
        for offset, length in ((0, 1), (4095, 2), (1_048_570, 2_000_000), (3_333_330, 100), (3_333_333, 1)):
            assert os.pread(file.fileno(), length, offset) == BIG[offset : offset + length]
        assert os.pread(file.fileno(), 10, 10**15) == b""
        assert os.lseek(file.fileno(), -3, os.SEEK_END) == len(BIG) - 3
        assert file.read() == BIG[-3:]


def test_an_answer_of_many_small_parts_arrives(natively, memory_tree):
    class InParts(OpenFiles):
        def read_unopened(self, inode, node, offset, length):
            data = BIG[offset : offset + length]
            return [data[start : start + 100] for start in range(0, len(data), 100)]

    tree = memory_tree({b"big": BIG})
    served = natively(Filesystem(tree, files=InParts(tree)))
    assert (served.directory / "big").read_bytes() == BIG


def test_sixteen_readers_at_once_read_what_is_there(natively, modes):
    _, filesystem = modes({b"big": BIG, b"d": {b"%d" % n: b"%d" % n for n in range(200)}})
    served = natively(filesystem, passthrough="off")
    names = sorted(str(number) for number in range(200))
    readers = [
        subprocess.Popen(
            ["cat", "big", *(f"d/{name}" for name in names)], cwd=served.directory, stdout=subprocess.PIPE
        )
        for _ in range(16)
    ]
    found = []
    threads = [threading.Thread(target=lambda p=p: found.append(p.communicate()[0])) for p in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [data == BIG + "".join(names).encode() for data in found] == [True] * 16


def test_extended_attributes_are_served(natively, error_of):
    served = natively({b"f": b"1", b"d": {}})
    (name,) = os.listxattr(served.directory / "f")
    assert name == "user.replicate.hash"
    assert len(os.getxattr(served.directory / "f", name)) == 64
    assert os.listxattr(served.directory / "d") == []
    assert error_of(lambda: os.getxattr(served.directory / "f", "user.other")) == "ENODATA"


def test_the_size_of_the_whole_is_shown(natively, memory_tree):
    served = natively(Filesystem(memory_tree({}), usage=Usage(size_bytes=4097, entries=12)))
    usage = os.statvfs(served.directory)
    assert (usage.f_blocks, usage.f_files, usage.f_ffree, usage.f_bavail) == (2, 12, 0, 0)
    assert (usage.f_frsize, usage.f_namemax) == (4096, 255)


@pytest.mark.parametrize(
    "attempt, expected",
    [
        (lambda d: os.stat(d / "absent"), "ENOENT"),
        (lambda d: os.stat(d / ("n" * 256)), "ENAMETOOLONG"),
        (lambda d: os.stat(d / "file" / "below"), "ENOTDIR"),
        (lambda d: os.readlink(d / "file"), "EINVAL"),
        (lambda d: os.listdir(d / "file"), "ENOTDIR"),
        (lambda d: os.read(os.open(d, os.O_RDONLY), 1), "EISDIR"),
        (lambda d: os.open(d / "file", os.O_WRONLY), "EROFS"),
        (lambda d: os.mkdir(d / "new"), "EROFS"),
        (lambda d: os.setxattr(d / "file", "user.a", b""), "EROFS"),
        (lambda d: os.chmod(d / "file", 0o777), "EROFS"),
    ],
)
def test_what_cannot_be_done_is_refused(natively, error_of, attempt, expected):
    served = natively({b"file": b"1"})
    assert error_of(lambda: attempt(served.directory)) == expected


@pytest.mark.parametrize(
    "error",
    [
        OSError("no errno"),
        TimeoutError(),
        FileNotFoundError(errno.ENOENT, "x"),
        SystemExit(),
        KeyboardInterrupt(),
    ],
)
def test_whatever_a_read_raises_is_an_error_to_the_reader(natively, memory_tree, error_of, error):
    def fail(offset, length):
        raise error

    tree = memory_tree({b"bad": b"123", b"good": b"4"})
    tree.readers[b"bad"] = SimpleNamespace(pread=fail)
    served = natively(tree)
    assert error_of((served.directory / "bad").read_bytes) == "EIO"
    assert (served.directory / "good").read_bytes() == b"4"


# -- slow stores -------------------------------------------------------------------------------------


def test_names_are_served_while_more_reads_hang_than_there_are_threads(natively, gated, gate, reading):
    names = [b"slow%d" % number for number in range(2 * MAX_THREADS)]
    served = natively(gated(dict.fromkeys(names, b"late") | {b"d": {b"x": b"quick"}}, *names))
    readers = [reading(served.directory / os.fsdecode(name)) for name in names]
    gate.wait_for(MAX_READING)
    assert os.listdir(served.directory / "d") == ["x"]
    assert os.stat(served.directory / "d" / "x").st_size == 5
    gate.open()
    assert [reader.communicate() for reader in readers] == [(b"late", b"")] * len(names)


def test_a_signal_ends_a_reader_that_waits(natively, gated, gate, reading):
    served = natively(gated({b"slow": bytes(1 << 20), b"other": b"1"}, b"slow"))
    reader = reading(served.directory / "slow", direct=True)
    gate.wait_for(1)
    reader.send_signal(signal.SIGINT)
    # The gate is still closed.
    assert reader.wait(20) == -signal.SIGINT
    gate.open()
    assert (served.directory / "other").read_bytes() == b"1"
    assert (served.directory / "slow").read_bytes() == bytes(1 << 20)


def test_killing_ends_a_reader_that_waits_for_the_page_cache(natively, gated, gate, reading):
    served = natively(gated({b"slow": bytes(1 << 20)}, b"slow"))
    reader = reading(served.directory / "slow")
    gate.wait_for(1)
    reader.kill()
    assert reader.wait(20) == -signal.SIGKILL


def test_what_takes_too_long_is_an_error_and_can_be_tried_again(natively, gated, gate, error_of):
    served = natively(gated({b"slow": b"late"}, b"slow"), timeout_s=0.2)
    assert error_of((served.directory / "slow").read_bytes) == "EIO"
    gate.open()
    assert (served.directory / "slow").read_bytes() == b"late"
    assert "read failed: no answer within 0.2 s" in served.log.read_text()


def test_a_store_that_hangs_for_all_readers_does_not_end_the_mount(natively, gated, gate, reading):
    names = [b"slow%d" % number for number in range(3 * MAX_THREADS)]
    served = natively(gated(dict.fromkeys(names, b"late") | {b"good": b"1"}, *names), timeout_s=0.5)
    readers = [reading(served.directory / os.fsdecode(name)) for name in names]
    assert all(b"Input/output error" in reader.communicate()[1] for reader in readers)
    assert (served.directory / "good").read_bytes() == b"1"
    gate.open()
    assert (served.directory / "slow7").read_bytes() == b"late"


def test_an_open_that_was_interrupted_leaves_no_handle(natively, memory_tree, gate, tmp_path, eventually):
    told = tmp_path / "told"

    class Slow(OpenFiles):
        def open(self, inode, node):
            handle = super().open(inode, node)
            gate.pass_through()
            return handle

        def release(self, handle):
            super().release(handle)
            told.write_text(f"{len(self._open)} open")

    tree = memory_tree({b"f": b"1"})
    served = natively(Filesystem(tree, files=Slow(tree), changing=changing))
    reader = subprocess.Popen(["cat", served.directory / "f"], stdout=subprocess.DEVNULL)
    gate.wait_for(1)
    reader.send_signal(signal.SIGINT)
    assert reader.wait(20) == -signal.SIGINT
    gate.open()
    eventually(told.exists)
    eventually(lambda: told.read_text() == "0 open")


# -- ending ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_mount(natively, number):
    served = natively(TREE)
    served.kill(number)
    assert served.wait() == 0
    assert not served.is_mounted


def test_a_signal_ends_a_mount_that_is_in_use(natively, error_of):
    served = natively({b"big": BIG})
    with open(served.directory / "big", "rb") as file:
        served.kill(signal.SIGTERM)
        assert served.wait() == 0
        assert not served.is_mounted
        assert error_of(lambda: os.pread(file.fileno(), 100, 2_000_000)) in ("ENOTCONN", "ECONNABORTED")


def test_a_signal_ends_a_mount_whose_store_hangs(natively, gated, gate, reading):
    served = natively(gated({b"slow": bytes(1 << 20)}, b"slow"))
    reader = reading(served.directory / "slow")
    gate.wait_for(1)
    served.kill(signal.SIGTERM)
    assert served.wait() == 0
    assert reader.communicate()[0] == b""
    assert reader.returncode != 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_comes_after_the_end_is_ignored(natively, number):
    served = natively({}, finish=lambda: os.kill(os.getpid(), number))
    served.kill(signal.SIGTERM)
    assert served.wait() == 0


def test_a_mount_that_cannot_be_served_any_more_fails(natively):
    def fail_later():
        parse = protocol.parse_request

        def fail(data):
            if bytes(data).endswith(b"doom\0"):
                raise MemoryError
            return parse(data)

        # In the process that serves only.
        protocol.parse_request = fail

    served = natively({b"f": b"1"}, prepare=fail_later)
    with pytest.raises(OSError):
        os.stat(served.directory / "doom")
    assert served.wait() == 1
    assert not served.is_mounted
    assert "a thread that serves requests failed" in served.log.read_text()


def test_unmounting_ends_the_process(natively):
    served = natively(TREE)
    subprocess.run(["umount", served.directory], check=True)
    assert served.wait() == 0


def test_a_mount_whose_process_was_killed_goes_away(natively, eventually):
    if shutil.which("fusermount3") is None:
        pytest.skip("there is no fusermount3")
    served = natively(TREE)
    served.kill(signal.SIGKILL)
    assert served.wait() == -signal.SIGKILL
    eventually(lambda: not served.is_mounted)


def test_what_others_mounted_on_top_is_left_alone(natively):
    served = natively(TREE)
    subprocess.run(["mount", "-t", "tmpfs", "above", served.directory], check=True)
    try:
        served.kill(signal.SIGTERM)
        assert served.wait() == 0
        assert find_mounted(os.fsencode(served.directory)).source == b"above"
    finally:
        subprocess.run(["umount", served.directory], check=True)
        subprocess.run(["umount", "-l", served.directory], check=False, stderr=subprocess.DEVNULL)


def test_without_fusermount3_root_mounts_by_system_call(natively, described, memory_tree):
    if os.geteuid() != 0:
        pytest.skip("only root may")
    tree = memory_tree(TREE)
    served = natively(tree, prepare=lambda: os.environ.update(PATH=""), allow_other=True)
    assert described(served.directory) == described(tree)
    served.kill(signal.SIGTERM)
    assert served.wait() == 0
    assert not served.is_mounted


@pytest.mark.parametrize("path", ["", os.environ["PATH"]], ids=["system call", "fusermount3"])
def test_what_cannot_be_mounted_says_why(natively, tmp_path, path):
    with pytest.raises(MountFailed, match="absent"):
        natively({}, directory=tmp_path / "absent", prepare=lambda: os.environ.update(PATH=path))


def test_another_user_can_mount(natively, memory_tree, tmp_path):
    """In a mount namespace of its own, where everybody may open the device."""
    if os.geteuid() != 0 or shutil.which("fusermount3") is None:
        pytest.skip("needs root to become another user, and fusermount3 to mount then")
    script = """
        set -e
        mount --make-rprivate /
        mknod device c 10 229
        chmod 666 device
        mount --bind device /dev/fuse
    """
    # Not below tmp_path, where nobody else may go.
    directory = Path(tempfile.mkdtemp())
    os.chown(directory, NOBODY, NOBODY)
    filesystem = Filesystem(memory_tree(TREE))
    filesystem.uid = filesystem.gid = NOBODY

    def become_nobody():
        assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
        subprocess.run(["sh", "-c", script], cwd=tmp_path, check=True)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    try:
        served = natively(filesystem, directory=directory, prepare=become_nobody)
        assert (served.report.passthrough, served.report.reason) == (
            False,
            "passing files through needs root (CAP_SYS_ADMIN)",
        )
        inside = ["nsenter", "-m", "-t", str(served.pid), "setpriv"]
        inside += ["--clear-groups", f"--reuid={NOBODY}", f"--regid={NOBODY}"]
        look = 'cat "$0/big" && ls "$0/many" | wc -l && mount | grep -c " $0 type fuse.replicate (ro,"'
        found = subprocess.run(
            [*inside, "sh", "-c", look, directory], stdout=subprocess.PIPE, check=True
        ).stdout
        assert found == BIG + b"300\n1\n"
        # Root is another user as well.
        refused = subprocess.run([*inside[:4], "ls", directory], stderr=subprocess.PIPE, check=False)
        assert b"Permission denied" in refused.stderr
        served.kill(signal.SIGTERM)
        assert served.wait() == 0
    finally:
        directory.rmdir()
