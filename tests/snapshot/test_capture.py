"""Capture: what lands in the spool is what was in the tree, file by file."""

import errno
import os
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from replicate.errors import CaptureFailed, ChangedWhileReading, PathMissing
from replicated.snapshot import listing
from replicated.snapshot.capture import Capturer
from replicated.snapshot.entries import HELD, PACKED, SPOOLED
from replicated.snapshot.freeze import SMALL_FILE_BYTES

SNAPSHOT = "a" * 64


def write(path: Path, data: bytes = b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_files_of_every_size_are_captured_byte_for_byte(captures, project):
    sizes = [
        0,
        1,
        4096,
        SMALL_FILE_BYTES - 1,
        SMALL_FILE_BYTES,
        SMALL_FILE_BYTES + 1,
        5 * SMALL_FILE_BYTES + 7,
    ]
    originals = {f"f{size}".encode(): os.urandom(size) for size in sizes}
    for name, data in originals.items():
        write(project / os.fsdecode(name), data)
    captured, entries = captures.capture(project, ".")
    assert captured.file_count == len(sizes)
    assert captured.size_bytes == sum(sizes)
    assert {name: captures.content(entries[name]) for name in originals} == originals


def test_odd_names_modes_times_links_and_empty_directories_are_kept(captures, project):
    odd = os.fsdecode(b"bad \xff\xfe\n name")
    write(project / odd, b"1").chmod(0o400)
    write(project / "run.sh", b"2").chmod(0o755)
    (project / "empty").mkdir(mode=0o700)
    os.utime(project / odd, ns=(1, 1_234_567_891_234_567_891))
    os.symlink("../outside/nowhere", project / "link")
    os.symlink(b"\xff", os.fsencode(project) + b"/\xfe")
    _, entries = captures.capture(project, ".")
    assert stat.filemode(entries[os.fsencode(odd)].mode) == "?r--------"
    assert entries[os.fsencode(odd)].mtime_ns == 1_234_567_891_234_567_891
    assert entries[b"run.sh"].mode == 0o755
    assert (entries[b"empty"].type, entries[b"empty"].mode) == ("directory", 0o700)
    assert (entries[b"link"].type, entries[b"link"].target) == ("symlink", b"../outside/nowhere")
    assert entries[b"\xfe"].target == b"\xff"
    assert entries[b""].type == "directory"


def test_directories_come_before_what_they_hold_and_siblings_by_bytes(captures, project):
    for name in ["b/x", "a/z/1", "a/b", "a.d/1", "Z/1", "a-/1"]:
        write(project / name)
    (project / os.fsdecode(b"\xff")).mkdir()
    (project / "\U0001f600").mkdir()
    captured, _ = captures.capture(project, ".")
    paths = [record.path for record in captures.records(captured)[1]]
    assert paths == sorted(paths, key=lambda path: path.split(b"/") if path else [])
    assert len(paths) == 9


def test_files_and_links_of_a_directory_come_by_the_bytes_of_their_names(captures, project):
    names = [b"b", b"a", b"a.txt", b"\xff", "\U0001f600".encode(), "\uffff".encode(), b"B", b"-"]
    for name in names:
        write(project / os.fsdecode(name))
    os.symlink("nowhere", project / "aa")
    write(project / "big", b"x" * (2 * SMALL_FILE_BYTES))
    _, entries = captures.capture(project, ".")
    assert list(entries) == [b"", *sorted([*names, b"aa", b"big"])]


def test_only_chosen_paths_and_the_directories_on_the_way_are_captured(captures, project):
    for name in ["a/b/keep", "a/b/also/deep", "a/other", "top"]:
        write(project / name)
    _, entries = captures.capture(project, "a/b")
    assert set(entries) == {b"", b"a", b"a/b", b"a/b/keep", b"a/b/also", b"a/b/also/deep"}


def test_overlapping_paths_are_captured_once(captures, project):
    write(project / "a/b")
    captured, entries = captures.capture(project, "a", "a/b", ".")
    assert captured.file_count == 1
    assert set(entries) == {b"", b"a", b"a/b"}


def test_symlinks_to_directories_are_not_followed(captures, project, tmp_path):
    write(tmp_path / "outside/secret")
    os.symlink(tmp_path / "outside", project / "out")
    os.symlink("..", project / "loop")
    _, entries = captures.capture(project, ".")
    assert set(entries) == {b"", b"out", b"loop"}


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


def test_sockets_and_pipes_are_skipped_with_a_warning(captures, project):
    os.mkfifo(project / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(project / "sock"))
        captured, entries = captures.capture(project, ".")
    assert set(entries) == {b""}
    assert captured.warnings == ("skipped 2 sockets, pipes or devices: pipe, sock",)


def test_version_control_caches_and_virtual_environments_are_skipped(captures, project):
    for name in [
        ".git/config",
        ".replicate/x",
        "__pycache__/a.pyc",
        "sub/.mypy_cache/y",
        "env/pyvenv.cfg",
        "env/lib/z",
        "kept",
    ]:
        write(project / name)
    _, entries = captures.capture(project, ".")
    assert set(entries) == {b"", b"kept", b"sub"}


def test_secrets_are_skipped_with_a_warning_unless_asked_for(captures, project):
    for name in [".env", ".ssh/known_hosts", "deep/id_rsa", "key.pem", "kept"]:
        write(project / name)
    captured, entries = captures.capture(project, ".")
    assert set(entries) == {b"", b"deep", b"kept"}
    assert "skipped 4 files that may hold secrets: .env, .ssh, deep/id_rsa, …" in captured.warnings[0]
    (project / ".replicateignore").write_text("!.env\n!*.pem\n")
    _, entries = captures.capture(project, ".")
    assert {b".env", b"key.pem"} < set(entries)
    _, entries = captures.capture(project, "deep/id_rsa")
    assert b"deep/id_rsa" in entries


def test_ignore_files_are_honoured_in_every_directory(captures, project):
    for name in ["a.log", "keep.log", "sub/a.log", "sub/b.tmp", "sub/deep/b.tmp", "logs/x"]:
        write(project / name)
    (project / ".replicateignore").write_text("*.log\n!keep.log\nlogs/\n")
    (project / "sub/.replicateignore").write_text("*.tmp\n!a.log\n")
    _, entries = captures.capture(project, ".")
    files = {path for path, entry in entries.items() if entry.type == "file"}
    assert files == {b".replicateignore", b"keep.log", b"sub/.replicateignore", b"sub/a.log"}


def test_patterns_of_the_call_are_stronger_than_ignore_files(captures, project):
    write(project / "a.log")
    write(project / "b.txt")
    (project / ".replicateignore").write_text("*.log\n")
    _, entries = captures.capture(project, ".", ignore=["!a.log", "*.txt"])
    assert set(entries) == {b"", b".replicateignore", b"a.log"}


def test_a_path_that_is_asked_for_is_captured_though_a_pattern_excludes_it(captures, project):
    for name in ["weights/model.pt", "weights/junk.tmp", "other.pt"]:
        write(project / name)
    (project / ".replicateignore").write_text("weights/\n*.pt\n*.tmp\n")
    _, entries = captures.capture(project, "weights")
    assert b"weights" in entries
    assert b"weights/junk.tmp" not in entries
    _, entries = captures.capture(project, "weights/model.pt")
    assert b"weights/model.pt" in entries
    _, entries = captures.capture(project, ".", "weights/model.pt")
    assert b"weights/model.pt" in entries
    assert b"other.pt" not in entries


def test_our_own_directories_and_the_repository_are_never_captured(captures, project):
    write(project / "home/journal.db")
    write(project / "repo/packs/x")
    write(project / "kept")
    captures.capturer = Capturer(captures.spool, captures.held, captures.watches, [project / "home"])
    _, entries = captures.capture(project, ".", repository=project / "repo")
    assert set(entries) == {b"", b"kept"}


def test_a_missing_path_is_named_and_leaves_nothing(captures, project):
    with pytest.raises(PathMissing, match=r"no such file or directory: sub/none\.pt"):
        (project / "sub").mkdir()
        captures.capture(project, "sub/none.pt")
    assert captures.spool.identifiers() == []


def test_a_path_above_the_project_is_refused(captures, project):
    with pytest.raises(PathMissing, match="outside"):
        captures.capture(project, "../x")


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


@pytest.fixture
def deep_directory(project):
    """A directory 1,200 levels down; `rm` takes it away, since pytest's own clean-up recurses."""
    descriptor = os.open(project, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    yield descriptor
    os.close(descriptor)
    subprocess.run(["rm", "-rf", project / "d"], check=True)


def test_a_deep_tree_is_captured(captures, project, deep_directory):
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=deep_directory))
    captured, entries = captures.capture(project, ".")
    assert captured.file_count == 1
    assert max(len(path.split(b"/")) for path in entries) == 1201


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
