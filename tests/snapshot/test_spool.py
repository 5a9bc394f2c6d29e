"""The spool: directories of snapshots."""

import os

import pytest

from replicate.errors import CaptureFailed
from replicated.snapshot.spool import INLINE_BYTES, EntriesWriter, SnapshotSpool, Spool


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path)


def test_a_directory_is_made_once_it_is_needed(spool):
    snapshot = SnapshotSpool(spool, "one")
    assert spool.identifiers() == []
    assert not snapshot.exists
    snapshot.make()
    (snapshot.make() / "packed").touch()
    assert snapshot.exists
    assert spool.identifiers() == ["one"]
    spool.remove("one")
    spool.remove("one")
    assert spool.identifiers() == []


def test_making_it_keeps_what_a_rescue_put_there_first(spool):
    spool.path("one").mkdir()
    (spool.path("one") / "held-0").touch()
    SnapshotSpool(spool, "one").make()
    assert (spool.path("one") / "held-0").exists()


def test_files_of_a_snapshot_get_different_names(spool):
    snapshot = SnapshotSpool(spool, "one")
    assert [snapshot.new_file("large").name, snapshot.new_file("packed").name] == ["large-0", "packed-1"]


def test_short_entries_come_back_and_long_ones_go_to_the_spool(spool):
    short, long = SnapshotSpool(spool, "short"), SnapshotSpool(spool, "long")
    writer = EntriesWriter(short)
    writer.write(b"x" * INLINE_BYTES)
    assert writer.finish() == b"x" * INLINE_BYTES
    writer.close()
    assert not short.exists
    writer = EntriesWriter(long)
    pieces = [bytes([number]) * 1000 for number in range(250)] * 10
    for piece in pieces:
        writer.write(piece)
    assert writer.finish() == b""
    writer.close()
    assert b"".join(spool.read_entries("long")) == b"".join(pieces)


def test_a_file_in_two_spools_counts_once(spool):
    for name in ["one", "two"]:
        spool.begin(name)
    (spool.path("one") / "packed").write_bytes(os.urandom(1 << 20))
    alone = spool.size_bytes()
    os.link(spool.path("one") / "packed", spool.path("two") / "packed-0")
    assert spool.size_bytes() == alone >= 1 << 20


def test_completeness_is_a_file(spool):
    spool.begin("one")
    assert not spool.is_complete("one")
    spool.set_complete("one")
    assert spool.is_complete("one")
    assert not spool.is_complete("two")


def test_a_snapshot_without_a_spool_needs_no_sync(spool):
    spool.sync("none")


def test_a_spool_that_cannot_be_made_is_told(tmp_path):
    with pytest.raises(
        CaptureFailed, match=r"cannot write to the spool .*: No such file or directory"
    ) as raised:
        SnapshotSpool(Spool(tmp_path / "none"), "one").make()
    assert "REPLICATE_HOME" in raised.value.hint
