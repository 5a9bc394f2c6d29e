"""Starting, listing, ending and cleaning up mount processes."""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from replicate.errors import MountFailed, NotFound
from replicated.mount.engine.libfuse import check_device
from replicated.mount.life.mountinfo import find_mounted, find_watchers, is_disconnected
from replicated.mount.life.persisting import leased_snapshots
from replicated.mount.life.table import MountTable
from replicated.mount.options import MountOptions
from replicated.processes import identify, open_pidfd

device = check_device()
pytestmark = pytest.mark.skipif(not device.ok, reason=f"cannot mount here: {device.detail}")

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


@pytest.mark.proves("S-70")
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


def test_what_is_mounted_inside_another_mount_is_ended_first(mount, table, tmp_path):
    outer, _, _ = mount({b"inner": {}}, tmp_path / "a")
    inner, _, _ = mount({b"f": b"1"}, tmp_path / "a" / "inner")
    assert table.unmount(everything=True) == [outer, inner]


def test_a_mount_whose_process_stands_still_can_be_ended(mount, table, monkeypatch):
    monkeypatch.setattr("replicated.mount.life.unmounting._END_TIMEOUT_S", 0.2)
    info, directory, _ = mount({b"f": b"1"})
    os.kill(info.pid, signal.SIGSTOP)
    assert table.unmount(directory=directory) == [info]
    assert identify(info.pid) is None


def test_the_repository_is_not_mounted_over(mount, snapshots):
    with pytest.raises(MountFailed, match="in the repository itself"):
        mount({b"f": b"1"}, snapshots.directory / "packs" / "mine")


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
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MountFailed, match="not in the PATH") as raised:
        mount({}, options=MountOptions(engine="mfusepy"))
    assert "apt install fuse3" in raised.value.hint


@pytest.mark.skipif(os.getuid() != 0, reason="only root mounts without fusermount3")
def test_root_mounts_and_unmounts_without_a_program(mount, table, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    info, directory, _ = mount({b"f": b"1"})
    assert (directory / "f").read_bytes() == b"1"
    assert table.unmount(directory=directory) == [info]
    assert find_mounted(os.fsencode(directory)) is None


@pytest.mark.parametrize("engine", ["native", "mfusepy"])
def test_the_engine_that_was_asked_for_serves_and_is_shown(mount, table, engine):
    info, directory, _ = mount({b"f": b"1"}, options=MountOptions(engine=engine, passthrough="off"))
    assert (info.engine, info.passthrough) == (engine, False)
    assert table.list() == [info]
    assert (directory / "f").read_bytes() == b"1"


@pytest.mark.proves("S-71")
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


@pytest.mark.parametrize("engine", ["native", "mfusepy"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_that_asks_for_the_end_leaves_nothing_behind(mount, table, home, number, engine):
    info, directory, _ = mount({b"f": b"1"}, options=MountOptions(engine=engine))
    os.kill(info.pid, number)
    assert os.waitpid(info.pid, 0)[1] == 0
    assert find_mounted(os.fsencode(directory)) is None
    assert not directory.exists()
    assert list(home.mounts.iterdir()) == []
    assert table.list() == []


@pytest.mark.proves("S-70")
def test_a_plain_unmount_ends_the_process(mount, table, home):
    info, directory, _ = mount({b"f": b"1"})
    subprocess.run(["fusermount3", "-u", directory], check=True)
    wait_until_gone(info.pid)
    assert list(home.mounts.iterdir()) == []


def kill_all(info):
    """Kill a mount process and what watches over its mount: the kernel still has it."""
    for pid in (*find_watchers(os.fsencode(info.directory)), info.pid):
        os.kill(pid, signal.SIGKILL)
        wait_until_gone(pid)
    deadline = time.monotonic() + DEADLINE_S
    while not is_disconnected(os.fsencode(info.directory)):
        assert time.monotonic() < deadline


def test_a_killed_mount_is_shown_until_it_is_ended(mount, table, home):
    info, directory, _ = mount({b"f": b"1"})
    os.kill(info.pid, signal.SIGKILL)
    wait_until_gone(info.pid)
    (shown,) = table.list()
    assert (shown.directory, shown.pid) == (str(directory), 0)
    assert "died" in shown.error
    assert table.unmount(directory=directory) == [shown]
    assert table.list() == []
    assert find_mounted(os.fsencode(directory)) is None
    assert not directory.exists()
    assert list(home.mounts.iterdir()) == []


def test_a_dead_mount_can_be_ended(mount, table, home):
    info, directory, _ = mount({b"f": b"1"})
    kill_all(info)
    assert len(table.unmount(identifier=info.id)) == 1
    assert find_mounted(os.fsencode(directory)) is None
    assert not directory.exists()
    assert list(home.mounts.iterdir()) == []


def test_a_mount_that_died_is_brought_back(mount, table, home):
    info, directory, _ = mount({b"f": b"1"})
    kill_all(info)
    (registration,) = table.registrations()
    table.bring_back(registration)
    (back,) = MountTable(home).list()
    assert (back.directory, back.restarts, back.error) == (info.directory, 1, "")
    assert back.pid not in (0, info.pid)
    assert (directory / "f").read_bytes() == b"1"


def test_what_was_ended_is_not_brought_back(mount, table):
    _, directory, _ = mount({b"f": b"1"})
    (registration,) = table.registrations()
    table.unmount(directory=directory)
    table.bring_back(registration)
    assert table.list() == []
    assert not directory.exists()


def test_a_mount_that_cannot_be_brought_back_says_why(mount, table, snapshots, tmp_path):
    info, directory, _ = mount({b"f": b"1"})
    os.kill(info.pid, signal.SIGKILL)
    wait_until_gone(info.pid)
    (registration,) = table.registrations()
    snapshots.directory.rename(tmp_path / "away")
    with pytest.raises(MountFailed, match="repository"):
        table.bring_back(registration)
    assert "it is tried again: " in table.list()[0].error
    (tmp_path / "away").rename(snapshots.directory)
    table.bring_back(registration)
    assert table.list()[0].error == ""
    assert (directory / "f").read_bytes() == b"1"


def test_what_was_given_up_stays_so_until_it_is_mounted_anew(mount, table, home, snapshots):
    info, directory, _ = mount({b"f": b"1"})
    kill_all(info)
    table.give_up(table.registrations()[0], "it died too often")
    (shown,) = MountTable(home).list()
    assert (shown.error, shown.is_given_up, shown.pid) == ("it died too often", True, 0)
    assert table.is_idle()
    table.bring_back(table.registrations()[0])
    assert table.list() == [shown]
    anew = table.mount(snapshots.url, info.id, "", [info.id], directory)
    assert table.list() == [anew]
    assert (directory / "f").read_bytes() == b"1"


def test_a_mount_whose_start_was_interrupted_is_forgotten(mount, table, home):
    info, directory, _ = mount({b"f": b"1"})
    file = next(home.mounts.glob("*.json"))
    never_ready = file.read_text().replace(
        file.read_text().partition('"report": ')[2].partition("}")[0], "nul"
    )
    kill_all(info)
    file.write_text(never_ready.replace('"report": nul}', '"report": null'))
    assert table.list() == []
    MountTable(home).adopt()
    assert find_mounted(os.fsencode(directory)) is None
    assert list(home.mounts.iterdir()) == []


def test_what_died_with_the_machine_is_forgotten(mount, table, home):
    info, directory, _ = mount({b"f": b"1"})
    file = next(home.mounts.glob("*.json"))
    kill_all(info)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    file.write_text(file.read_text().replace(boot, "another boot"))
    MountTable(home).adopt()
    assert find_mounted(os.fsencode(directory)) is None
    assert not directory.exists()
    assert list(home.mounts.iterdir()) == []


def test_a_mount_that_is_to_last_comes_back_when_everything_is_gone(mount, table, home, snapshots):
    info, directory, _ = mount({b"f": b"1"}, options=MountOptions(persist=True, timeout_s=7.0))
    kill_all(info)
    subprocess.run(["fusermount3", "-u", "-z", "--", directory], check=True)
    directory.rmdir()
    shutil.rmtree(home.run)
    other = MountTable(home)
    assert leased_snapshots(home, snapshots.url) == {info.id}
    other.adopt()
    (registration,) = other.registrations()
    assert registration.order.options.timeout_s == 7.0
    other.bring_back(registration)
    (back,) = other.list()
    assert (back.persist, back.restarts, back.error) == (True, 0, "")
    assert (directory / "f").read_bytes() == b"1"
    other.unmount(directory=directory)
    assert not directory.exists()
    MountTable(home).adopt()
    assert MountTable(home).registrations() == []


def test_a_mount_that_is_to_last_can_be_ended_when_it_is_not_there(mount, table, home):
    info, directory, _ = mount({b"f": b"1"}, options=MountOptions(persist=True))
    os.kill(info.pid, signal.SIGTERM)
    wait_until_gone(info.pid)
    (shown,) = table.list()
    assert "comes back with the next daemon" in shown.error
    assert table.is_idle()
    assert table.unmount(directory=directory) == [shown]
    other = MountTable(home)
    other.adopt()
    assert other.list() == []


def test_a_mount_that_is_to_last_and_could_not_be_made_is_not_kept(snapshots, table, home, tmp_path):
    with pytest.raises(MountFailed):
        table.mount(snapshots.url, "f" * 64, "", ["f" * 64], tmp_path / "mnt", MountOptions(persist=True))
    other = MountTable(home)
    other.adopt()
    assert other.list() == []


def test_kept_mounts_that_cannot_be_read_are_left_alone(mount, table, home, caplog):
    info, _, _ = mount({b"f": b"1"}, options=MountOptions(persist=True))
    damaged = home.lasting_mounts / "x.json"
    damaged.write_text("{")
    other = MountTable(home)
    other.adopt()
    assert other.list() == [info]
    assert damaged.exists()
    assert str(damaged) in caplog.text


def test_snapshots_that_are_mounted_are_leased(mount, table, home, snapshots):
    info, directory, _ = mount({b"f": b"1"})
    assert leased_snapshots(home, snapshots.url) == {info.id}
    assert leased_snapshots(home, "file:///another") == frozenset()
    table.unmount(directory=directory)
    assert leased_snapshots(home, snapshots.url) == frozenset()


@pytest.fixture
def dead_mount(mount):
    """A mount whose process and whose watcher have been killed: the kernel still has it."""
    info, directory, _ = mount({b"f": b"1"})
    kill_all(info)
    return directory


def test_a_dead_mount_that_no_register_knows_is_cleaned_up(dead_mount, home):
    for file in home.mounts.iterdir():
        file.unlink()
    MountTable(home).adopt()
    assert find_mounted(os.fsencode(dead_mount)) is None


def test_a_dead_mount_does_not_hinder_the_next_one(dead_mount, mount):
    mount({b"f": b"2"}, dead_mount)
    assert (dead_mount / "f").read_bytes() == b"2"


def test_a_mount_that_hangs_is_not_taken_for_dead(mount, table):
    info, directory, _ = mount({b"f": b"1"})
    os.kill(info.pid, signal.SIGSTOP)
    try:
        table.adopt()
        assert table.list() == [info]
    finally:
        os.kill(info.pid, signal.SIGCONT)
    assert (directory / "f").read_bytes() == b"1"


def test_files_that_are_no_registrations_are_ignored(mount, table, home):
    info, _, _ = mount({b"f": b"1"})
    (home.mounts / "x.json").write_text("{")
    (home.mounts / "y.json").write_text("[]")
    (home.mounts / "z.json").write_text('{"order": {}}')
    assert table.list() == [info]
