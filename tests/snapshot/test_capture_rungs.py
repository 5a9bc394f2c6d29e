"""Capture: by which rung a file is frozen, and what of it is in the spool."""

import errno
import os
from pathlib import Path

import pytest

from replicate.errors import CaptureFailed
from replicated.snapshot.entries import HELD, PACKED, SPOOLED
from replicated.snapshot.freeze import SMALL_FILE_BYTES

SNAPSHOT = "a" * 64


def write(path: Path, data: bytes = b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("rung", ["copy", "memory"])
def test_a_holey_file_stays_holey_in_the_spool(captures, project, rung):
    with (project / "sparse").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(512 << 20)
        file.write(b"middle")
    _, entries = captures.capture(project, ".", rung=rung)
    captures.capturer.finish(SNAPSHOT)
    kind, name = entries[b"sparse"].source
    assert kind == SPOOLED
    copy = captures.spool.path(SNAPSHOT) / name
    assert copy.stat().st_size == 1 << 30
    assert copy.stat().st_blocks * 512 < 64 << 20
    with copy.open("rb") as file:
        file.seek(512 << 20)
        assert file.read(6) == b"middle"


@pytest.mark.parametrize("errno_name", ["EXDEV", "EINVAL", "ENOSYS"])
def test_big_files_are_copied_where_the_kernel_has_no_short_way(captures, project, monkeypatch, errno_name):
    def refuse(*_):
        raise OSError(getattr(errno, errno_name), errno_name)

    monkeypatch.setattr(os, "copy_file_range", refuse)
    data = os.urandom(3 * SMALL_FILE_BYTES + 11)
    write(project / "big", data)
    _, entries = captures.capture(project, ".", rung="copy")
    assert captures.content(entries[b"big"]) == data


def test_big_files_are_held_and_need_no_spool(captures, project):
    data = os.urandom(2 * SMALL_FILE_BYTES)
    write(project / "model.pt", data)
    captured, entries = captures.capture(project, ".")
    assert entries[b"model.pt"].source[0] == HELD
    assert captures.content(entries[b"model.pt"]) == data
    assert (captured.has_spool, captured.frozen_bytes, captured.spooled_bytes) == (False, len(data), 0)
    assert captures.spool.identifiers() == []
    captures.capturer.forget(SNAPSHOT)
    assert captures.held.count == 0


def test_empty_files_need_no_spool(captures, project):
    write(project / "empty", b"")
    captured, entries = captures.capture(project, ".")
    assert (captured.file_count, captured.has_spool) == (1, False)
    assert entries[b"empty"].source[0] == PACKED
    assert captures.spool.identifiers() == []


def test_a_file_that_somebody_writes_is_copied_instead_of_held(captures, project):
    data = os.urandom(2 * SMALL_FILE_BYTES)
    file = write(project / "model.pt", data)
    with file.open("r+b"):
        captured, entries = captures.capture(project, ".")
    assert entries[b"model.pt"].source[0] == SPOOLED
    assert captured.spooled_bytes == captured.frozen_bytes == len(data)
    assert captures.content(entries[b"model.pt"]) == data


def test_what_was_captured_stays_when_the_files_change(captures, project):
    originals = {b"small": os.urandom(5000), b"big": os.urandom(2 * SMALL_FILE_BYTES)}
    for name, data in originals.items():
        write(project / os.fsdecode(name), data)
    _, entries = captures.capture(project, ".")
    for name in originals:
        write(project / os.fsdecode(name), b"other")
    assert {name: captures.content(entries[name]) for name in originals} == originals


def test_a_durable_capture_holds_nothing_and_is_written_on_return(captures, project, monkeypatch):
    originals = {b"small": os.urandom(5000), b"big": os.urandom(2 * SMALL_FILE_BYTES)}
    for name, data in originals.items():
        write(project / os.fsdecode(name), data)
    synced = []
    real_fsync = os.fsync

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    captured, entries = captures.capture(project, ".", durable=True)
    spool = captures.spool.path(SNAPSHOT)
    assert captures.held.count == 0
    assert captured.spooled_bytes == captured.size_bytes
    assert captures.spool.is_complete(SNAPSHOT)
    large = entries[b"big"].source[1]
    expected = [spool / "packed", spool / large, spool / "complete", spool, spool.parent]
    assert set(map(str, expected)) == set(synced)
    assert synced[-2:] == [str(spool), str(spool.parent)]
    assert {name: captures.content(entries[name]) for name in originals} == originals


def test_a_spool_that_cannot_promise_space_is_written_before_the_return(captures, project, monkeypatch):
    write(project / "file", b"content")

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    captures.capture(project, ".")
    assert captures.spool.is_complete(SNAPSHOT)
    assert (captures.spool.path(SNAPSHOT) / "packed").read_bytes().startswith(b"content")


def test_many_entries_go_to_the_spool(captures, project):
    for number in range(2000):
        write(project / f"{number:0100}", b"")
    captured, entries = captures.capture(project, ".")
    assert captured.entries == b""
    assert captured.has_spool
    assert len(entries) == 2001
    captures.capturer.forget(SNAPSHOT)
    assert captures.spool.identifiers() == []


def test_entries_that_are_gone_are_missed(captures):
    with pytest.raises(CaptureFailed, match="spool cannot be read"):
        list(captures.spool.read_entries(SNAPSHOT))


@pytest.mark.parametrize(
    ("rung", "kinds"),
    [("lease", {HELD}), ("memory", {PACKED, SPOOLED}), ("copy", {SPOOLED})],
)
def test_one_rung_can_be_insisted_on(captures, project, rung, kinds):
    originals = {b"small": b"some", b"big": os.urandom(2 * SMALL_FILE_BYTES), b"empty": b""}
    for name, data in originals.items():
        write(project / os.fsdecode(name), data)
    for _ in range(2):
        _, entries = captures.capture(project, ".", rung=rung, cached=True)
        assert {entries[name].source[0] for name in (b"small", b"big")} == kinds
        assert {name: captures.content(entries[name]) for name in originals} == originals


def test_a_rung_that_cannot_be_had_is_an_error_naming_the_file(captures, project):
    file = write(project / "file")
    with file.open("r+b"), pytest.raises(CaptureFailed, match=r"no lease can be had of this file.*: file"):
        captures.capture(project, ".", rung="lease")


def test_the_environment_of_the_daemon_chooses_no_rung(captures, project, monkeypatch):
    # It is that of the script which started the daemon, and others use the daemon too.
    monkeypatch.setenv("REPLICATE_CAPTURE_RUNG", "lease")
    file = write(project / "file")
    with file.open("r+b"):
        _, entries = captures.capture(project, ".")
    assert entries[b"file"].source[0] == PACKED


def test_reflink_is_insisted_on_where_there_is_none(captures, project):
    write(project / "file")
    try:
        _, entries = captures.capture(project, ".", rung="reflink")
    except CaptureFailed as error:
        assert "no reflink can be had of this file" in error.message
        assert captures.spool.identifiers() == []
    else:
        assert captures.content(entries[b"file"]) == b"x"
