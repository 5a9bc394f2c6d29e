"""The ladder for single files."""

import os

import pytest

from replicate.errors import CaptureFailed
from replicated.snapshot import freeze
from replicated.snapshot.entries import HELD, PACKED, SPOOLED
from replicated.snapshot.freeze import SMALL_FILE_BYTES, Freezer
from replicated.snapshot.held import HeldFiles
from replicated.snapshot.spill import SLAB_BYTES, Spill
from replicated.snapshot.spool import SnapshotSpool, Spool

BIG = 2 * SMALL_FILE_BYTES


@pytest.fixture
def make_freezer(tmp_path):
    (tmp_path / "spool").mkdir()
    spool = Spool(tmp_path / "spool")
    held = HeldFiles(spool.path)
    held.start()
    spill = Spill(budget_bytes=2 * SLAB_BYTES)

    def make(name="one", is_durable=False, rung=""):
        freezer = Freezer(
            SnapshotSpool(spool, name), spill, held, is_durable=is_durable, rung=rung, no_reflink=set()
        )
        freezer.spill, freezer.directory = spill, spool.path(name)
        return freezer

    yield make
    spill.stop()
    held.stop()


@pytest.fixture
def files(tmp_path):
    """A directory of files, open."""
    directory = tmp_path / "files"
    directory.mkdir()
    descriptor = os.open(directory, os.O_RDONLY)
    yield directory, descriptor
    os.close(descriptor)


def test_small_files_are_packed_aligned_over_many_slabs(make_freezer, files):
    directory, descriptor = files
    contents = {b"%03d" % number: os.urandom(number * 9_973 % SMALL_FILE_BYTES) for number in range(60)}
    for name, content in contents.items():
        (directory / os.fsdecode(name)).write_bytes(content)
    freezer = make_freezer()
    rows, sources = [], []
    assert freezer.pack(descriptor, list(contents), rows, sources) == []
    freezer.end()
    freezer.spill.finish("one")
    packed = (freezer.directory / "packed").read_bytes()
    assert len(packed) > 2 * SLAB_BYTES
    for row, (kind, offset, name) in zip(rows, sources, strict=True):
        assert (kind, name, offset % 64) == (PACKED, "packed", 0)
        assert packed[offset : offset + row[3]] == contents[row[0]]
    assert freezer.additions.size_bytes == freezer.spooled_bytes == sum(map(len, contents.values()))


def test_pack_leaves_what_is_not_small_or_not_a_file(make_freezer, files):
    directory, descriptor = files
    (directory / "big").write_bytes(bytes(BIG))
    (directory / "link").symlink_to("big")
    (directory / "below").mkdir()
    (directory / "small").write_bytes(b"x")
    rows, sources = [], []
    freezer = make_freezer()
    names = [b"big", b"link", b"below", b"none", b"small"]
    assert freezer.pack(descriptor, names, rows, sources) == [b"big", b"link", b"below", b"none"]
    assert [row[0] for row in rows] == [b"small"]
    freezer.abandon()


def test_the_first_rung_that_holds_is_taken(make_freezer, files):
    directory, descriptor = files
    file = directory / "big"
    file.write_bytes(os.urandom(BIG))
    freezer = make_freezer()
    row, source = freezer.freeze(descriptor, b"big", b"big")
    assert source == (HELD, 0)
    assert row == (
        b"big",
        file.stat().st_mode,
        file.stat().st_ino,
        BIG,
        file.stat().st_mtime_ns,
        file.stat().st_ctime_ns,
    )
    durable = make_freezer("two", is_durable=True)
    _, (kind, name) = durable.freeze(descriptor, b"big", b"big")
    assert kind == SPOOLED
    assert (durable.directory / name).read_bytes() == file.read_bytes()


def test_a_file_that_memory_cannot_take_is_copied(make_freezer, files, monkeypatch):
    directory, descriptor = files
    calls = []
    for name in ["_read_into_memory", "_copy"]:
        real = getattr(freeze.Freezer, name)
        monkeypatch.setattr(
            freeze.Freezer,
            name,
            lambda *arguments, name=name, real=real: (calls.append(name), real(*arguments))[1],
        )
    for name, size in (("fits", 2 * SLAB_BYTES), ("larger", 2 * SLAB_BYTES + 1)):
        file = directory / name
        file.write_bytes(os.urandom(size))
        freezer = make_freezer(name)
        with file.open("r+b"):
            _, (kind, spooled) = freezer.freeze(descriptor, name.encode(), b"")
        freezer.end()
        freezer.spill.finish(name)
        assert kind == SPOOLED
        assert (freezer.directory / spooled).read_bytes() == file.read_bytes()
    assert calls[-2:] == ["_read_into_memory", "_copy"]


def test_memory_that_is_insisted_on_takes_more_than_its_budget(make_freezer, files):
    directory, descriptor = files
    (directory / "large").write_bytes(os.urandom(5 * SLAB_BYTES + 3))
    freezer = make_freezer(rung="memory")
    _, (_, name) = freezer.freeze(descriptor, b"large", b"large")
    freezer.end()
    freezer.spill.finish("one")
    assert (freezer.directory / name).read_bytes() == (directory / "large").read_bytes()


def test_a_file_beside_the_ladder_is_not_taken(make_freezer, files):
    directory, descriptor = files
    (directory / "small").write_bytes(b"x")
    (directory / "below").mkdir()
    freezer = make_freezer()
    assert freezer.freeze(descriptor, b"small", b"small") is None
    assert freezer.freeze(descriptor, b"below", b"below") is None
    with pytest.raises(FileNotFoundError):
        freezer.freeze(descriptor, b"none", b"none")
    only_lease = make_freezer("two", rung="lease")
    with (directory / "small").open("r+b"), pytest.raises(CaptureFailed, match=r"of this file.*: sub/small"):
        only_lease.freeze(descriptor, b"small", b"sub/small")


def test_descriptors_are_not_leaked(make_freezer, files):
    directory, descriptor = files
    (directory / "big").write_bytes(bytes(BIG))
    (directory / "small").write_bytes(b"x")
    freezer = make_freezer(is_durable=True)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        freezer.freeze(descriptor, b"big", b"big")
        freezer.freeze(descriptor, b"small", b"small")
        freezer.pack(descriptor, [b"small", b"big", b"none"], [], [])
    freezer.end()
    freezer.spill.finish("one")
    assert len(os.listdir("/proc/self/fd")) == before
