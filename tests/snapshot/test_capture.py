"""Capture: what lands in the spool is what was in the tree, file by file."""

import os
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from replicate.errors import CaptureFailed, ChangedWhileReading, PathMissing
from replicated.snapshot import capture as capture_module
from replicated.snapshot.capture import SMALL_FILE_BYTES, Capturer, CaptureRequest
from replicated.snapshot.spool import Spool, read_entries

SNAPSHOT = "a" * 64


@pytest.fixture
def project(tmp_path):
    directory = tmp_path / "project"
    directory.mkdir()
    return directory


@pytest.fixture
def spool(tmp_path):
    directory = tmp_path / "spool"
    directory.mkdir()
    return Spool(directory)


def capture(spool, project, *paths, ignore=(), private=(), repository=None, durable=False):
    request = CaptureRequest(
        SNAPSHOT, os.fsencode(project), tuple(os.fsencode(path) for path in paths), tuple(ignore), durable
    )
    captured = Capturer(spool, private).capture(request, repository)
    return captured, {entry.path: entry for entry in read_entries(spool.path(SNAPSHOT))}


def content(spool, entry):
    with (spool.path(SNAPSHOT) / entry.source).open("rb") as file:
        file.seek(entry.offset)
        return file.read(entry.size)


def write(path: Path, data: bytes = b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_files_of_every_size_are_captured_byte_for_byte(spool, project):
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
    captured, entries = capture(spool, project, ".")
    assert captured.file_count == len(sizes)
    assert captured.size_bytes == sum(sizes)
    assert {name: content(spool, entries[name]) for name in originals} == originals


def test_odd_names_modes_times_links_and_empty_directories_are_kept(spool, project):
    odd = os.fsdecode(b"bad \xff\xfe\n name")
    write(project / odd, b"1").chmod(0o400)
    write(project / "run.sh", b"2").chmod(0o755)
    (project / "empty").mkdir(mode=0o700)
    os.utime(project / odd, ns=(1, 1_234_567_891_234_567_891))
    os.symlink("../outside/nowhere", project / "link")
    os.symlink(b"\xff", os.fsencode(project) + b"/\xfe")
    _, entries = capture(spool, project, ".")
    assert stat.filemode(entries[os.fsencode(odd)].mode) == "?r--------"
    assert entries[os.fsencode(odd)].mtime_ns == 1_234_567_891_234_567_891
    assert entries[b"run.sh"].mode == 0o755
    assert (entries[b"empty"].type, entries[b"empty"].mode) == ("directory", 0o700)
    assert (entries[b"link"].type, entries[b"link"].target) == ("symlink", b"../outside/nowhere")
    assert entries[b"\xfe"].target == b"\xff"
    assert entries[b""].type == "directory"


def test_entries_come_parents_first_and_siblings_by_bytes(spool, project):
    for name in ["b/x", "a/z/1", "a/b", "a.txt", "Z"]:
        write(project / name)
    capture(spool, project, ".")
    paths = [entry.path for entry in read_entries(spool.path(SNAPSHOT))]
    assert paths == sorted(paths, key=lambda path: path.split(b"/") if path else [])
    assert paths[0] == b""


def test_only_chosen_paths_and_the_directories_on_the_way_are_captured(spool, project):
    for name in ["a/b/keep", "a/b/also/deep", "a/other", "top"]:
        write(project / name)
    _, entries = capture(spool, project, "a/b")
    assert set(entries) == {b"", b"a", b"a/b", b"a/b/keep", b"a/b/also", b"a/b/also/deep"}


def test_overlapping_paths_are_captured_once(spool, project):
    write(project / "a/b")
    captured, entries = capture(spool, project, "a", "a/b", ".")
    assert captured.file_count == 1
    assert set(entries) == {b"", b"a", b"a/b"}


def test_symlinks_to_directories_are_not_followed(spool, project, tmp_path):
    write(tmp_path / "outside/secret")
    os.symlink(tmp_path / "outside", project / "out")
    os.symlink("..", project / "loop")
    _, entries = capture(spool, project, ".")
    assert set(entries) == {b"", b"out", b"loop"}


def test_a_holey_file_stays_holey_in_the_spool(spool, project):
    with (project / "sparse").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(512 << 20)
        file.write(b"middle")
    _, entries = capture(spool, project, ".")
    copy = spool.path(SNAPSHOT) / entries[b"sparse"].source
    assert copy.stat().st_size == 1 << 30
    assert copy.stat().st_blocks * 512 < 64 << 20
    with copy.open("rb") as file:
        file.seek(512 << 20)
        assert file.read(6) == b"middle"


@pytest.mark.parametrize("errno_name", ["EXDEV", "EINVAL", "ENOSYS"])
def test_big_files_are_copied_through_memory_where_the_kernel_cannot(spool, project, monkeypatch, errno_name):
    import errno

    def refuse(*_):
        raise OSError(getattr(errno, errno_name), errno_name)

    monkeypatch.setattr(os, "copy_file_range", refuse)
    data = os.urandom(3 * SMALL_FILE_BYTES + 11)
    write(project / "big", data)
    _, entries = capture(spool, project, ".")
    assert content(spool, entries[b"big"]) == data


def test_sockets_and_pipes_are_skipped_with_a_warning(spool, project):
    os.mkfifo(project / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(project / "sock"))
        captured, entries = capture(spool, project, ".")
    assert set(entries) == {b""}
    assert captured.warnings == ("skipped 2 sockets, pipes or devices: pipe, sock",)


def test_version_control_caches_and_virtual_environments_are_skipped(spool, project):
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
    _, entries = capture(spool, project, ".")
    assert set(entries) == {b"", b"kept", b"sub"}


def test_secrets_are_skipped_with_a_warning_unless_asked_for(spool, project):
    for name in [".env", ".ssh/known_hosts", "deep/id_rsa", "key.pem", "kept"]:
        write(project / name)
    captured, entries = capture(spool, project, ".")
    assert set(entries) == {b"", b"deep", b"kept"}
    assert "skipped 4 files that may hold secrets: .env, .ssh, deep/id_rsa, …" in captured.warnings[0]
    (project / ".replicateignore").write_text("!.env\n!*.pem\n")
    _, entries = capture(spool, project, ".")
    assert {b".env", b"key.pem"} < set(entries)
    _, entries = capture(spool, project, "deep/id_rsa")
    assert b"deep/id_rsa" in entries


def test_ignore_files_are_honoured_in_every_directory(spool, project):
    for name in ["a.log", "keep.log", "sub/a.log", "sub/b.tmp", "sub/deep/b.tmp", "logs/x"]:
        write(project / name)
    (project / ".replicateignore").write_text("*.log\n!keep.log\nlogs/\n")
    (project / "sub/.replicateignore").write_text("*.tmp\n!a.log\n")
    _, entries = capture(spool, project, ".")
    files = {path for path, entry in entries.items() if entry.type == "file"}
    assert files == {b".replicateignore", b"keep.log", b"sub/.replicateignore", b"sub/a.log"}


def test_patterns_of_the_call_are_stronger_than_ignore_files(spool, project):
    write(project / "a.log")
    write(project / "b.txt")
    (project / ".replicateignore").write_text("*.log\n")
    _, entries = capture(spool, project, ".", ignore=["!a.log", "*.txt"])
    assert set(entries) == {b"", b".replicateignore", b"a.log"}


def test_a_path_that_is_asked_for_is_captured_though_a_pattern_excludes_it(spool, project):
    for name in ["weights/model.pt", "weights/junk.tmp", "other.pt"]:
        write(project / name)
    (project / ".replicateignore").write_text("weights/\n*.pt\n*.tmp\n")
    _, entries = capture(spool, project, "weights")
    assert b"weights" in entries
    assert b"weights/junk.tmp" not in entries
    _, entries = capture(spool, project, "weights/model.pt")
    assert b"weights/model.pt" in entries
    _, entries = capture(spool, project, ".", "weights/model.pt")
    assert b"weights/model.pt" in entries
    assert b"other.pt" not in entries


def test_our_own_directories_and_the_repository_are_never_captured(spool, project, tmp_path):
    write(project / "home/journal.db")
    write(project / "repo/packs/x")
    write(project / "kept")
    _, entries = capture(spool, project, ".", private=[project / "home"], repository=project / "repo")
    assert set(entries) == {b"", b"kept"}


def test_a_missing_path_is_named_and_leaves_nothing(spool, project):
    with pytest.raises(PathMissing, match=r"no such file or directory: sub/none\.pt"):
        (project / "sub").mkdir()
        capture(spool, project, "sub/none.pt")
    assert spool.identifiers() == []


def test_a_path_above_the_project_is_refused(spool, project):
    with pytest.raises(PathMissing, match="outside"):
        capture(spool, project, "../x")


@pytest.mark.parametrize("size", [100, 2 * SMALL_FILE_BYTES])
def test_a_file_that_keeps_changing_is_refused_and_named(spool, project, monkeypatch, size):
    file = write(project / "live.log", b"x" * size)
    monkeypatch.setattr(capture_module, "FIRST_PAUSE_S", 0.0)
    real_fstat = os.fstat

    def fstat(descriptor):
        info = real_fstat(descriptor)
        if info.st_ino == file.stat().st_ino:
            with file.open("r+b") as writer:
                writer.write(os.urandom(8))
        return info

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(ChangedWhileReading, match=r"kept changing while it was saved: live\.log"):
        capture(spool, project, ".")
    assert spool.identifiers() == []


@pytest.mark.parametrize("size", [100, 2 * SMALL_FILE_BYTES])
def test_a_file_that_changes_once_is_taken_again(spool, project, monkeypatch, size):
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
    _, entries = capture(spool, project, ".")
    assert content(spool, entries[b"model.pt"]) == b"b" * size


def test_no_snapshot_is_a_mixture_while_a_writer_rewrites_in_place(spool, project):
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
                _, entries = capture(spool, project, ".")
                outcomes.append(len(set(content(spool, entries[b"weights"]))))
            except ChangedWhileReading:
                outcomes.append(None)
    finally:
        stop.set()
        writer.join()
    assert set(outcomes) <= {1, None}


def test_a_file_deleted_during_the_walk_is_left_out(spool, project, monkeypatch):
    write(project / "a")
    write(project / "b")
    real_listdir = os.listdir

    def listdir(path):
        names = real_listdir(path)
        if "b" in names:
            (project / "b").unlink()
        return names

    monkeypatch.setattr(os, "listdir", listdir)
    _, entries = capture(spool, project, ".")
    assert set(entries) == {b"", b"a"}


def test_a_full_spool_is_told_with_the_place_and_leaves_nothing(spool, project, monkeypatch):
    import errno

    write(project / "big", b"x" * (2 * SMALL_FILE_BYTES))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(
        CaptureFailed, match=r"cannot write to the spool .*: No space left on device .*MiB free"
    ):
        capture(spool, project, ".")
    assert spool.identifiers() == []


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


def test_a_deep_tree_is_captured(spool, project, deep_directory):
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=deep_directory))
    captured, entries = capture(spool, project, ".")
    assert captured.file_count == 1
    assert max(len(path.split(b"/")) for path in entries) == 1201


def test_a_spool_that_is_cut_short_is_refused(spool, project):
    write(project / "a")
    capture(spool, project, ".")
    entries = spool.path(SNAPSHOT) / "entries"
    entries.write_bytes(entries.read_bytes()[:-3])
    with pytest.raises(CaptureFailed, match="cut short"):
        list(read_entries(spool.path(SNAPSHOT)))
