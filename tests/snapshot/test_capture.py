"""Capture: what lands in the spool is what was in the tree, file by file."""

import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from replicate.errors import PathMissing
from replicated.snapshot.capture import Capturer
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
