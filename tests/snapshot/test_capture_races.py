"""Capture while others change the files, and when it fails: no mixtures, and nothing is left behind."""

import errno
import os
import threading
from pathlib import Path

import pytest

from replicate.errors import CaptureFailed, ChangedWhileReading, PathMissing
from replicated.snapshot import listing
from replicated.snapshot.freeze import SMALL_FILE_BYTES

SNAPSHOT = "a" * 64


def write(path: Path, data: bytes = b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


#: How a file of 100 bytes and one of 2 MiB are taken.
WAYS = [(100, ""), (2 * SMALL_FILE_BYTES, "memory"), (2 * SMALL_FILE_BYTES, "copy")]


@pytest.mark.parametrize(("size", "rung"), WAYS)
def test_a_file_that_keeps_changing_is_refused_and_named(captures, project, monkeypatch, size, rung):
    file = write(project / "live.log", b"x" * size)
    monkeypatch.setattr(listing, "FIRST_PAUSE_S", 0.0)
    real_fstat = os.fstat

    def fstat(descriptor):
        info = real_fstat(descriptor)
        if info.st_ino == file.stat().st_ino:
            with file.open("r+b") as writer:
                writer.write(os.urandom(8))
        return info

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(ChangedWhileReading, match=r"kept changing while it was saved: live\.log"):
        captures.capture(project, ".", rung=rung)
    assert captures.spool.identifiers() == []


@pytest.mark.parametrize(("size", "rung"), WAYS)
def test_a_file_that_changes_once_is_taken_again(captures, project, monkeypatch, size, rung):
    file = write(project / "model.pt", b"a" * size)
    real_fstat = os.fstat
    changes = iter([b"b" * size])

    def fstat(descriptor):
        info = real_fstat(descriptor)
        if info.st_ino == file.stat().st_ino:
            for data in changes:
                file.write_bytes(data)
        return info

    monkeypatch.setattr(os, "fstat", fstat)
    _, entries = captures.capture(project, ".", rung=rung)
    assert captures.content(entries[b"model.pt"]) == b"b" * size


@pytest.mark.parametrize("size", [100, 2 * SMALL_FILE_BYTES])
def test_a_file_that_grows_or_shrinks_while_it_is_read_is_taken_again(captures, project, monkeypatch, size):
    file = write(project / "log", b"a" * size)
    real_fstat = os.fstat
    sizes = iter([size * 2, size // 2])

    def fstat(descriptor):
        info = real_fstat(descriptor)
        if info.st_ino == file.stat().st_ino:
            for changed in sizes:
                os.truncate(file, changed)
                break
        return info

    monkeypatch.setattr(os, "fstat", fstat)
    _, entries = captures.capture(project, ".", rung="memory")
    assert entries[b"log"].size == size // 2
    assert captures.content(entries[b"log"]) == file.read_bytes()


def test_no_snapshot_is_a_mixture_while_a_writer_rewrites_in_place(captures, project):
    size = 3 * SMALL_FILE_BYTES
    file = write(project / "weights", b"0" * size)
    stop = threading.Event()

    def rewrite():
        turn = 0
        while not stop.is_set():
            turn += 1
            with file.open("r+b") as writer:
                writer.write(bytes([65 + turn % 26]) * size)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        outcomes = []
        for _ in range(15):
            try:
                _, entries = captures.capture(project, ".")
                outcomes.append(len(set(captures.content(entries[b"weights"]))))
            except ChangedWhileReading:
                outcomes.append(None)
    finally:
        stop.set()
        writer.join()
    assert set(outcomes) <= {1, None}


def test_a_file_deleted_during_the_walk_is_left_out(captures, project, monkeypatch):
    write(project / "a")
    write(project / "b")
    write(project / "c/d")
    real_scandir = os.scandir

    def scandir(path):
        found = real_scandir(path)
        (project / "b").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(os, "scandir", scandir)
    _, entries = captures.capture(project, ".")
    assert b"b" not in entries
    assert {b"a", b"c/d"} < set(entries)


def test_a_directory_that_becomes_a_link_during_the_walk_is_not_followed(captures, project, monkeypatch):
    write(project / "a/secret")
    real_open = os.open

    def open_(path, flags, *rest, **options):
        if path == b"a" and (project / "a").is_dir():
            (project / "a").rename(project.parent / "outside")
            (project / "a").symlink_to(project.parent / "outside")
        return real_open(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", open_)
    _, entries = captures.capture(project, ".")
    assert set(entries) == {b""}


@pytest.mark.parametrize(
    ("size", "rung", "call"),
    [
        (2 * SMALL_FILE_BYTES, "copy", "copy_file_range"),
        (2 * SMALL_FILE_BYTES, "memory", "posix_fallocate"),
        (100, "", "posix_fallocate"),
        (100, "", "mkdir"),
    ],
)
def test_a_full_spool_is_told_with_the_place_and_leaves_nothing(
    captures, project, monkeypatch, size, rung, call
):
    write(project / "file", b"x" * size)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(
        CaptureFailed, match=r"cannot write to the spool .*: No space left on device .*MiB free"
    ) as raised:
        captures.capture(project, ".", rung=rung)
    assert "REPLICATE_HOME" in raised.value.hint
    assert captures.spool.identifiers() == []
    assert captures.held.count == 0


def test_a_durable_capture_does_not_return_when_it_cannot_be_written(captures, project, monkeypatch):
    write(project / "file")

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(CaptureFailed, match=r"cannot write to the spool .*: Input/output error"):
        captures.capture(project, ".", durable=True)
    assert captures.spool.identifiers() == []


def test_a_write_that_fails_behind_the_capture_is_told_by_finish(captures, project, monkeypatch):
    write(project / "file")

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", fail)
    captures.capture(project, ".")
    with pytest.raises(CaptureFailed, match=r"cannot write to the spool .*: Input/output error"):
        captures.capturer.finish(SNAPSHOT)
    assert not captures.spool.is_complete(SNAPSHOT)


def test_what_an_earlier_attempt_left_is_removed(captures, project):
    write(captures.spool.path(SNAPSHOT) / "packed", b"old" * 1000)
    write(captures.spool.path(SNAPSHOT) / "held-0", b"old")
    write(project / "big", b"x" * (2 * SMALL_FILE_BYTES))
    captures.capture(project, ".")
    assert captures.spool.identifiers() == []
    write(project / "small", b"new")
    write(captures.spool.path(SNAPSHOT) / "packed", b"old" * 1000)
    _, entries = captures.capture(project, "small")
    assert captures.content(entries[b"small"]) == b"new"
    assert (captures.spool.path(SNAPSHOT) / "packed").stat().st_size < 100


def test_a_capture_that_fails_releases_what_it_held(captures, project):
    write(project / "a", b"x" * (2 * SMALL_FILE_BYTES))
    with pytest.raises(PathMissing):
        captures.capture(project, "a", "none")
    assert captures.held.count == 0
    with pytest.raises(PathMissing):
        captures.capture(project / "nowhere", ".")


def test_captures_at_the_same_time_do_not_disturb_each_other(captures, project, tmp_path):
    count = 8
    for number in range(count):
        for size in (10, 5000, 300_000):
            write(tmp_path / f"p{number}" / f"{size}", os.urandom(size))
    failures = []

    def capture(number):
        try:
            directory = tmp_path / f"p{number}"
            identifier = f"{number:064}"
            _, entries = captures.capture(directory, ".", identifier=identifier)
            for size in (10, 5000, 300_000):
                expected = (directory / f"{size}").read_bytes()
                assert captures.content(entries[b"%d" % size], identifier) == expected
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=capture, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
