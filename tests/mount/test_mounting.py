"""Real mounts of a real repository."""

import errno
import mmap
import os
import random
import subprocess
import threading

import pytest

from replicated.mount.libfuse import check_fuse
from replicated.mount.mountinfo import find_mounted

missing = "; ".join(finding.detail for finding in check_fuse() if not finding.ok)
pytestmark = pytest.mark.skipif(bool(missing), reason=f"cannot mount here: {missing}")

BIG = random.Random(1).randbytes(5_000_003)
TREE = (
    {
        b"with space": b"1",
        b"new\nline": b"2",
        b"back\\slash": b"3",
        b"\xff\xfe": (b"4", 0o400, 1),
        b"empty": b"",
        b"void": {},
        b"big": BIG,
        b"zeros": bytes(3_000_000),
        b"sub": (
            {
                b"run.sh": (b"#!/bin/sh\necho ran\n", 0o755, 10**18 + 1),
                b"out": "/etc/hostname",
                b"dangling": "nowhere",
                b"inside": "../with space",
                b"needle.txt": b"a needle in a haystack\n",
                b"locked": ({b"in": (b"x", 0o400, -5)}, 0o500, 10**18 + 3),
            },
            0o751,
            10**18 + 4,
        ),
        b"many": {b"%04d" % number: b"%d" % number for number in range(3000)},
    },
    0o755,
    10**18 + 5,
)


def test_everything_is_as_it_was_saved(mount, described):
    _, directory, tree = mount(TREE)
    assert described(directory) == described(tree)
    # Once more, from the kernel's caches.
    assert described(directory) == described(tree)
    assert os.stat(directory).st_mtime_ns == 10**18 + 5


def test_a_checkpoint_is_laid_over_its_experiment(snapshots, table, described, tmp_path):
    code, _ = snapshots.add({b"train.py": b"code", b"d": {b"a": b"1", b"b": b"1"}, b"x": {b"gone": b""}})
    checkpoint, _ = snapshots.add({b"model": b"weights", b"d": {b"b": b"2"}, b"x": b"file"})
    info = table.mount(snapshots.url, code, checkpoint, [code, checkpoint], tmp_path / "mnt")
    found = {path: entry[3] for path, entry in described(tmp_path / "mnt").items() if entry[0] == "file"}
    assert found == {
        b"train.py": b"code",
        b"model": b"weights",
        b"d/a": b"1",
        b"d/b": b"2",
        b"x": b"file",
    }
    assert (info.id, info.experiment_id) == (checkpoint, code)


def test_it_is_mounted_as_it_should_be(mount):
    info, directory, _ = mount(TREE)
    mounted = find_mounted(os.fsencode(directory))
    assert mounted.type == b"fuse.replicate"
    assert mounted.source == b"replicate:" + info.id[:7].encode()
    flags = os.statvfs(directory).f_flag
    assert flags & os.ST_RDONLY and flags & os.ST_NOSUID and flags & os.ST_NODEV


def test_the_size_of_the_whole_is_shown(mount):
    _, directory, _ = mount(TREE)
    usage = os.statvfs(directory)
    assert usage.f_blocks * usage.f_frsize >= len(BIG) + 3_000_000
    assert (usage.f_bfree, usage.f_bavail, usage.f_ffree) == (0, 0, 0)
    assert usage.f_files == 3000 + 18
    assert usage.f_namemax == 255


def test_stat_shows_what_tools_rely_on(mount):
    _, directory, _ = mount(TREE)
    info = os.lstat(directory / "big")
    assert (info.st_uid, info.st_gid, info.st_nlink) == (os.getuid(), os.getgid(), 1)
    assert info.st_blocks * 512 >= info.st_size == len(BIG)
    assert info.st_atime_ns == info.st_ctime_ns == info.st_mtime_ns
    with open(directory / "big", "rb") as file:
        assert os.fstat(file.fileno()) == info
    listed = {entry.name: entry.inode() for entry in os.scandir(directory)}
    assert listed["big"] == info.st_ino
    assert len(set(listed.values())) == len(listed)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda d: (d / "empty").write_bytes(b"1"),
        lambda d: os.open(d / "empty", os.O_RDWR),
        lambda d: os.open(d / "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL),
        lambda d: os.mkdir(d / "new"),
        lambda d: os.unlink(d / "empty"),
        lambda d: os.rmdir(d / "void"),
        lambda d: os.rename(d / "empty", d / "other"),
        lambda d: os.chmod(d / "empty", 0o777),
        lambda d: os.utime(d / "empty"),
        lambda d: os.truncate(d / "empty", 3),
        lambda d: os.symlink("x", d / "new"),
        lambda d: os.link(d / "empty", d / "new"),
        lambda d: os.mkfifo(d / "new"),
        lambda d: os.setxattr(d / "empty", "user.x", b"1"),
    ],
)
def test_every_way_of_writing_is_refused(mount, attempt):
    _, directory, _ = mount({b"empty": b"", b"void": {}})
    with pytest.raises(OSError) as raised:
        attempt(directory)
    assert raised.value.errno == errno.EROFS


def test_reads_at_and_past_the_end_are_short(mount):
    _, directory, _ = mount(TREE)
    with open(directory / "big", "rb") as file:
        assert os.pread(file.fileno(), 100, len(BIG) - 7) == BIG[-7:]
        assert os.pread(file.fileno(), 100, len(BIG)) == b""
        assert os.pread(file.fileno(), 100, 10**12) == b""
        assert os.pread(file.fileno(), 3_000_000, 1_234_567) == BIG[1_234_567:4_234_567]


def test_a_file_can_be_mapped_into_memory(mount):
    _, directory, _ = mount(TREE)
    with (
        open(directory / "big", "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert mapped[4_000_000:4_000_100] == BIG[4_000_000:4_000_100]
        assert mapped[:] == BIG


def test_many_readers_at_once_get_the_right_bytes(mount):
    _, directory, _ = mount(TREE)
    wrong = []

    def read(seed):
        choice = random.Random(seed)
        for _ in range(60):
            offset, length = choice.randrange(len(BIG)), choice.randrange(1, 400_000)
            with open(directory / "big", "rb", buffering=0) as file:
                if os.pread(file.fileno(), length, offset) != BIG[offset : offset + length]:
                    wrong.append((offset, length))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_find_and_grep_work(mount):
    _, directory, tree = mount(TREE)
    found = subprocess.run(["find", ".", "-print0"], cwd=directory, capture_output=True, check=True)
    assert set(found.stdout.rstrip(b"\0").split(b"\0")) == {b"."} | {b"./" + path for path, _ in tree.walk()}
    leaves = subprocess.run(["find", ".", "-type", "l"], cwd=directory, capture_output=True, check=True)
    assert sorted(leaves.stdout.split()) == [b"./sub/dangling", b"./sub/inside", b"./sub/out"]
    grep = subprocess.run(["grep", "-rl", "needle"], cwd=directory, capture_output=True, check=True)
    assert grep.stdout == b"sub/needle.txt\n"
    ran = subprocess.run([directory / "sub/run.sh"], capture_output=True, check=True)
    assert ran.stdout == b"ran\n"


def test_the_hash_of_a_file_is_an_extended_attribute(mount):
    _, directory, tree = mount(TREE)
    assert os.listxattr(directory / "big") == ["user.replicate.hash"]
    value = os.getxattr(directory / "big", "user.replicate.hash")
    assert value == tree.find(b"big").hash.hex().encode()
    with pytest.raises(OSError) as raised:
        os.getxattr(directory / "big", "user.other")
    assert raised.value.errno == errno.ENODATA
    assert os.listxattr(directory) == []


def test_what_is_absent_stays_absent(mount):
    _, directory, _ = mount(TREE)
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            os.stat(directory / "absent")
        with pytest.raises(NotADirectoryError):
            os.stat(directory / "big/below")


def test_damage_is_an_error_and_never_wrong_bytes(mount, snapshots, home):
    _, directory, tree = mount({b"a": BIG, b"b": BIG[::-1], b"small": b"fine"})
    for pack in (snapshots.directory / "packs").rglob("*"):
        if pack.is_file():
            data = bytearray(pack.read_bytes())
            # All bits of every third page, and always some of the middle of each chunk.
            for position in range(0, len(data), 3 * 4096):
                data[position] ^= 0xFF
            pack.chmod(0o644)
            pack.write_bytes(data)
    errors = set()
    for name in (b"a", b"b"):
        whole = tree.reader(tree.find(name)).pread(0, len(BIG))
        with open(os.path.join(os.fsencode(directory), name), "rb", buffering=0) as file:
            for offset in range(0, len(BIG), 100_000):
                try:
                    data = os.pread(file.fileno(), 100_000, offset)
                except OSError as error:
                    errors.add(error.errno)
                else:
                    assert data == whole[offset : offset + 100_000]
    assert errors == {errno.EIO}
    assert "damaged" in (home.logs / "mounts.log").read_text()
