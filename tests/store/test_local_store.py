"""What only a store in a directory can do right or wrong."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from replicate.errors import ConfigError, RepositoryFull, RepositoryMissing, RepositoryUnreachable
from replicated.store import open_store
from replicated.store.local import STALE_TEMPORARY_S, LocalStore


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The system calls that matter for durability, with the path each was for."""
    calls: list[tuple[str, str]] = []
    fsync, link = os.fsync, os.link

    def traced_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def traced_link(source: str, target: str) -> None:
        calls.append(("link", target))
        link(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "link", traced_link)
    return calls


def test_object_is_synced_before_it_gets_its_name_and_its_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    calls = record_calls(monkeypatch)
    store.put("packs/ab/name", [b"x"])
    path = str(tmp_path / "packs/ab/name")
    named = calls.index(("link", path))
    assert any(call == "fsync" and "/tmp/" in at for call, at in calls[:named])
    assert calls[named + 1 :] == [("fsync", str(tmp_path / "packs/ab"))]
    # The new directories are durable in theirs before anything is in them.
    assert ("fsync", str(tmp_path)) in calls[:named]
    assert ("fsync", str(tmp_path / "packs")) in calls[:named]


def test_object_found_from_before_a_crash_is_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LocalStore(tmp_path).put("a/b", [b"x"])
    calls = record_calls(monkeypatch)
    LocalStore(tmp_path).put("a/b", [b"x"])
    assert ("fsync", str(tmp_path)) in calls
    assert calls[-1] == ("fsync", str(tmp_path / "a"))


def test_failed_sync_leaves_no_object_to_believe_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.put("a/warm", [b""])
    fsync = os.fsync
    count = 0

    def failing(descriptor: int) -> None:
        nonlocal count
        count += 1
        raise OSError(errno.EIO, "Input/output error")

    for sync_to_fail in ("file", "directory"):
        count = 0
        with monkeypatch.context() as patch:
            if sync_to_fail == "file":
                patch.setattr(os, "fsync", failing)
            else:
                patch.setattr(
                    os, "fsync", lambda fd: failing(fd) if stat.S_ISDIR(os.fstat(fd).st_mode) else fsync(fd)
                )
            with pytest.raises(RepositoryUnreachable, match=r"a/b.*Input/output error"):
                store.put("a/b", [b"x"])
        assert count == 1, "a failed fsync is not repeated"
        assert not store.exists("a/b")
    store.put("a/b", [b"x"])
    assert store.get("a/b") == b"x"


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_told_apart_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    store = LocalStore(tmp_path)

    def full(descriptor: int, buffers: list[memoryview]) -> int:
        raise OSError(reason, os.strerror(reason))

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        with pytest.raises(RepositoryFull, match=os.strerror(reason)):
            store.put("a/b", [b"x"])
        with pytest.raises(RepositoryFull):
            store.replace("a/b", b"x")
    assert list(store.list("")) == []
    assert os.listdir(tmp_path / "tmp") == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "writev", lambda fd, buffers: os.write(fd, buffers[0][:3]))
    store = LocalStore(tmp_path)
    store.put("a", [b"0123456789", b"", b"abc", b"de"])
    assert store.get("a") == b"0123456789abcde"


def test_file_system_without_hard_links_works_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = LocalStore(tmp_path)
    store.put("a/b", [b"x"])
    assert store.get("a/b") == b"x"
    assert os.listdir(tmp_path / "tmp") == []


def test_objects_are_read_only_and_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        LocalStore(tmp_path).put("a/b", [b"x"])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o440
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750


def test_unfinished_and_foreign_files_are_not_listed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b", [b"x"])
    (tmp_path / "tmp" / "0123").write_bytes(b"unfinished")
    (tmp_path / "README.TXT").write_bytes(b"")
    (tmp_path / "a" / "with space").write_bytes(b"")
    os.mkfifo(tmp_path / "a" / "fifo")
    (tmp_path / "a" / "dangling").symlink_to("nowhere")
    assert [info.key for info in store.list("")] == ["a/b"]
    with pytest.raises(ValueError, match="reserved"):
        store.get("tmp/0123")


def test_temporaries_are_removed_only_when_their_writer_is_surely_gone(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}", create=True).put("a", [b"x"])
    old, young = tmp_path / "tmp" / "old", tmp_path / "tmp" / "young"
    old.write_bytes(b"")
    young.write_bytes(b"")
    past = old.stat().st_mtime - STALE_TEMPORARY_S - 10
    os.utime(old, (past, past))
    open_store(f"file://{tmp_path}", create=False)
    assert old.exists()
    open_store(f"file://{tmp_path}", create=True)
    assert not old.exists()
    assert young.exists()


def test_killed_writer_leaves_no_object(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib\n"
        "from replicated.store.local import LocalStore\n"
        "os.link = lambda *_: os.kill(os.getpid(), 9)\n"
        "LocalStore(pathlib.Path(sys.argv[1])).put('a/b', [b'x' * 100000])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -9
    store = LocalStore(tmp_path)
    assert list(store.list("")) == []
    store.put("a/b", [b"x" * 100000])
    assert store.exists("a/b")


def test_unreadable_place_is_unreachable_with_path_and_reason(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(RepositoryUnreachable, match=rf"{tmp_path}/a/b: (Not a directory|File exists)"):
        LocalStore(tmp_path).put("a/b", [b"x"])
    assert not LocalStore(tmp_path).exists("a/b")


def test_directory_is_made_only_when_asked(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/one/two"
    with pytest.raises(RepositoryMissing, match="no such directory"):
        open_store(url, create=False)
    assert not (tmp_path / "one").exists()
    store = open_store(url, create=True)
    assert store.url == url
    assert store.capabilities.local_root == tmp_path / "one/two"
    assert open_store(url + "/", create=False).url == url


def test_file_in_the_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for create in (False, True):
        with pytest.raises(RepositoryMissing, match="not a directory"):
            open_store(f"file://{tmp_path}/file", create=create)
    with pytest.raises(RepositoryUnreachable, match="Not a directory"):
        open_store(f"file://{tmp_path}/file/below", create=True)


@pytest.mark.parametrize("url", ["", "/plain", "file://relative", "file:/x", "http://x", "file:///a\0b"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="not a repository URL"):
        open_store(url, create=True)


def test_directory_on_a_local_disk_is_near(tmp_path: Path) -> None:
    assert LocalStore(tmp_path).capabilities.is_near


@pytest.mark.parametrize("path", ["/proc", "/sys/kernel"])
def test_directory_on_a_file_system_that_nobody_knows_is_far(path: str) -> None:
    assert not LocalStore(Path(path)).capabilities.is_near


def test_directory_that_cannot_be_opened_is_far(tmp_path: Path) -> None:
    assert not LocalStore(tmp_path / "missing").capabilities.is_near
