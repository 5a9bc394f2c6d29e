"""Mounts as the daemon makes them; what each operation does is the matter of the suite in contract/."""

import errno
import os
import random

import pytest

from replicated.mount.engine.libfuse import check_device
from replicated.mount.life.mountinfo import find_mounted

device = check_device()
pytestmark = pytest.mark.skipif(not device.ok, reason=f"cannot mount here: {device.detail}")

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
