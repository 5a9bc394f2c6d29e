"""Starting, listing, ending and cleaning up mount processes."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest

from replicate.errors import MountFailed, NotFound
from replicated.mount import table as module
from replicated.mount.libfuse import Finding, check_fuse
from replicated.mount.mountinfo import find_mounted, is_disconnected
from replicated.mount.table import MountTable
from replicated.processes import identify, open_pidfd

missing = "; ".join(finding.detail for finding in check_fuse() if not finding.ok)
pytestmark = pytest.mark.skipif(bool(missing), reason=f"cannot mount here: {missing}")

DEADLINE_S = 20


def wait_until_gone(pid):
    process = identify(pid)
    descriptor = process and open_pidfd(process)
    if descriptor:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        ended = poll.poll(DEADLINE_S * 1000)
        os.close(descriptor)
        assert ended, f"process {pid} still runs"


def test_a_mount_is_listed_and_can_be_ended_by_directory(mount, table, home):
    info, directory, _ = mount({b"f": b"1"})
    assert table.list() == [info]
    assert identify(info.pid) is not None
    assert table.unmount(directory=directory) == [info]
    assert table.list() == []
    assert identify(info.pid) is None
    assert find_mounted(os.fsencode(directory)) is None
    assert list(home.mounts.iterdir()) == []


@pytest.mark.parametrize("length", [64, 7])
def test_a_mount_can_be_ended_by_id(mount, table, length):
    info, _, _ = mount({b"f": b"1"})
    assert table.unmount(identifier=info.id[:length]) == [info]
    assert table.list() == []


def test_all_mounts_can_be_ended(mount, table, tmp_path):
    infos = [mount({b"f": b"1"}, tmp_path / name)[0] for name in ("a", "b")]
    assert table.unmount(everything=True) == infos
    assert table.unmount(everything=True) == []


def test_a_mount_survives_the_table_that_made_it(mount, home):
    info, directory, _ = mount({b"f": b"1"})
    other = MountTable(home)
    assert other.list() == [info]
    assert (directory / "f").read_bytes() == b"1"
    assert other.unmount(directory=directory) == [info]


def test_a_mount_point_that_was_made_goes_with_the_mount(mount, table, tmp_path):
    (tmp_path / "there").mkdir()
    mount({b"f": b"1"}, tmp_path / "there")
    mount({b"f": b"1"}, tmp_path / "new")
    table.unmount(everything=True)
    assert (tmp_path / "there").is_dir()
    assert not (tmp_path / "new").exists()


def test_a_directory_of_any_name_can_be_mounted_on(mount, table, tmp_path):
    for name in (b"with space", b"new\nline", b"\xff\xfe", b"back\\slash", b"-o ro,x"):
        directory = tmp_path / os.fsdecode(name)
        info, _, _ = mount({b"f": b"1"}, directory)
        assert (directory / "f").read_bytes() == b"1"
        assert table.list() == [info]
        assert table.unmount(directory=directory) == [info]


def test_a_link_to_a_directory_is_mounted_where_it_leads(mount, table, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    info, _, _ = mount({b"f": b"1"}, tmp_path / "link")
    assert info.directory == os.path.realpath(tmp_path / "real")
    assert table.unmount(directory=tmp_path / "link") == [info]


def test_a_missing_parent_is_named(mount, tmp_path):
    with pytest.raises(MountFailed, match=r"does not exist.*no"):
        mount({}, tmp_path / "no/such")
    assert not (tmp_path / "no").exists()


def test_a_directory_with_files_is_refused(mount, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/f").write_bytes(b"")
    with pytest.raises(MountFailed, match=r"not empty.*full"):
        mount({}, tmp_path / "full")


def test_a_file_is_refused(mount, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MountFailed, match=r"not a directory.*file"):
        mount({}, tmp_path / "file")


def test_what_is_mounted_already_is_named(mount):
    info, directory, _ = mount({b"f": b"1"})
    with pytest.raises(MountFailed, match=f"replicate:{info.id[:7]} is mounted there already"):
        mount({b"f": b"2"}, directory)
    assert (directory / "f").read_bytes() == b"1"


def test_our_own_state_is_not_mounted_over(mount, home):
    home.cache.mkdir(parents=True, exist_ok=True)
    with pytest.raises(MountFailed, match=r"replicate's own"):
        mount({}, home.cache / "x")


def test_a_mount_point_chosen_by_us_lies_beside_the_register(mount, table, home):
    home.mounts.mkdir(parents=True, mode=0o700)
    home.run.chmod(0o700)
    info, directory, _ = mount({b"f": b"1"}, home.mounts / "chosen")
    assert (directory / "f").read_bytes() == b"1"
    assert table.list() == [info]


def test_the_reason_why_a_process_failed_is_told(snapshots, table, tmp_path):
    with pytest.raises(MountFailed, match="f" * 7):
        table.mount(snapshots.url, "f" * 64, "", ["f" * 64], tmp_path / "mnt")
    assert not (tmp_path / "mnt").exists()
    assert table.list() == []


def test_without_fuse_the_way_out_is_told(mount, monkeypatch):
    finding = Finding("fusermount3", False, "fusermount3 is not in the PATH", "install fuse3")
    monkeypatch.setattr(module, "check_fuse", lambda: [finding])
    with pytest.raises(MountFailed, match="not in the PATH") as raised:
        mount({})
    assert raised.value.hint == "install fuse3"


def test_every_finding_that_is_not_right_says_what_to_do(monkeypatch):
    monkeypatch.setattr("replicated.mount.libfuse.DEVICE", "/dev/no-such-device")
    monkeypatch.setattr("replicated.mount.libfuse._LIBRARIES", ("libnosuch.so.0",))
    monkeypatch.setenv("PATH", "/nonexistent")
    findings = check_fuse()
    assert [finding.ok for finding in findings] == [False, False, False]
    assert all("replicate checkout" in finding.hint for finding in findings)


def test_what_keeps_a_mount_in_use_is_named(mount, table):
    info, directory, _ = mount({b"f": b"1"})
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        with pytest.raises(MountFailed, match=f"in use by process {process.pid} \\(python") as raised:
            table.unmount(directory=directory)
        assert raised.value.fields["pids"] == str(process.pid)
        assert table.list() == [info]
        process.stdin.close()
    assert table.unmount(directory=directory) == [info]


def test_unmounting_what_is_not_mounted_is_not_found(table, tmp_path):
    with pytest.raises(NotFound, match=str(tmp_path)):
        table.unmount(directory=tmp_path)
    with pytest.raises(NotFound, match="abcd"):
        table.unmount(identifier="abcd")


def test_sigterm_ends_a_mount_cleanly(mount, table, home):
    info, directory, _ = mount({b"f": b"1"})
    child = table._children[info.pid]
    os.kill(info.pid, signal.SIGTERM)
    assert child.wait(DEADLINE_S) == 0
    assert find_mounted(os.fsencode(directory)) is None
    assert not directory.exists()
    assert list(home.mounts.iterdir()) == []
    assert table.list() == []


def test_a_plain_unmount_ends_the_process(mount, table, home):
    info, directory, _ = mount({b"f": b"1"})
    subprocess.run(["fusermount3", "-u", directory], check=True)
    wait_until_gone(info.pid)
    assert list(home.mounts.iterdir()) == []


def watchers(directory):
    """The pids of the fusermount3 processes that watch over the mount on `directory`."""
    found = []
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                arguments = file.read().split(b"\0")
        except OSError:
            continue
        if arguments[0].endswith(b"fusermount3") and os.fsencode(directory) in arguments:
            found.append(int(name))
    return found


def test_a_killed_mount_goes_away(mount, table, home):
    info, directory, _ = mount({b"f": b"1"})
    watching = watchers(directory)
    os.kill(info.pid, signal.SIGKILL)
    wait_until_gone(info.pid)
    for pid in watching:
        wait_until_gone(pid)
    assert table.list() == []
    assert find_mounted(os.fsencode(directory)) is None
    assert not directory.exists()
    assert list(home.mounts.iterdir()) == []


@pytest.fixture
def dead_mount(mount):
    """A mount whose process and whose watcher have been killed: the kernel still has it."""
    info, directory, _ = mount({b"f": b"1"})
    for pid in (*watchers(directory), info.pid):
        os.kill(pid, signal.SIGKILL)
        wait_until_gone(pid)
    deadline = time.monotonic() + DEADLINE_S
    while not is_disconnected(os.fsencode(directory)):
        assert time.monotonic() < deadline
    return directory


def test_a_dead_mount_is_cleaned_up(dead_mount, home):
    other = MountTable(home)
    other.clean_dead()
    assert find_mounted(os.fsencode(dead_mount)) is None
    assert not dead_mount.exists()
    assert list(home.mounts.iterdir()) == []


def test_a_dead_mount_that_no_register_knows_is_cleaned_up(dead_mount, home):
    for file in home.mounts.iterdir():
        file.unlink()
    MountTable(home).clean_dead()
    assert find_mounted(os.fsencode(dead_mount)) is None


def test_a_dead_mount_does_not_hinder_the_next_one(dead_mount, mount):
    mount({b"f": b"2"}, dead_mount)
    assert (dead_mount / "f").read_bytes() == b"2"


def test_a_mount_that_hangs_is_not_taken_for_dead(mount, table):
    info, directory, _ = mount({b"f": b"1"})
    os.kill(info.pid, signal.SIGSTOP)
    try:
        table.clean_dead()
        assert table.list() == [info]
    finally:
        os.kill(info.pid, signal.SIGCONT)
    assert (directory / "f").read_bytes() == b"1"


def test_files_that_are_no_registrations_are_ignored(mount, table, home):
    info, _, _ = mount({b"f": b"1"})
    (home.mounts / "x.json").write_text("{")
    (home.mounts / "y.json").write_text("[]")
    (home.mounts / "z.json").write_text('{"info": {}}')
    assert table.list() == [info]
