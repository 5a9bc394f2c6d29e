"""`mount`, `mounts` and `umount` as users type them, with a real daemon and real mounts."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from replicate import mounts
from replicated.mount.life.mountinfo import find_mounted


def test_mount_list_and_unmount(project, tmp_path):
    directory = tmp_path / "m"
    directory.mkdir()
    mounted = project.json("mount", "latest", directory)
    assert mounted["directory"] == str(directory) and mounted["pid"] > 0
    assert (directory / "model.pt").read_bytes() == b"\0\x02" * 50_000
    assert project.json("mounts") == [mounted]
    assert mounted["id"][:7] in project.replicate("mounts")
    result = project.run("umount", "m", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, f"Unmounted {directory}\n")
    assert not os.path.ismount(directory)
    assert project.json("mounts") == []
    assert project.run("umount", directory).returncode == 1


def test_unmount_by_id(project, tmp_path):
    directory = tmp_path / "m"
    directory.mkdir()
    identifier = project.json("mount", "latest:step=0", directory)["id"]
    project.replicate("umount", identifier[:8])
    assert not os.path.ismount(directory)


@pytest.mark.parametrize("reference", ["latest", "latest:step=0"])
def test_unmount_by_what_was_given_to_mount(project, tmp_path, reference):
    directory = tmp_path / "m"
    directory.mkdir()
    project.replicate("mount", reference, directory)
    assert project.run("umount", "latest:step=1").returncode == 1
    project.replicate("umount", reference)
    assert not os.path.ismount(directory)


def test_the_command_that_ends_a_mount_can_be_pasted(project, tmp_path):
    directory = tmp_path / "new directory"
    said = project.run("mount", "latest", directory).stderr
    assert said.endswith(f"(`replicate umount '{directory}'` ends it)\n")
    project.replicate("umount", directory)


@pytest.mark.parametrize(("end", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_mount_in_the_foreground_ends_with_a_signal(project, tmp_path, end, status):
    directory = tmp_path / "m"
    directory.mkdir()
    with project.running("mount", "latest", directory, "--foreground", stderr=subprocess.PIPE) as process:
        assert process.stderr.readline().endswith("(Ctrl-C ends it)\n")
        assert os.path.ismount(directory)
        process.send_signal(end)
        assert process.wait(timeout=project.deadline_s) == status
    assert not os.path.ismount(directory)


@pytest.mark.parametrize(("end", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_mount_that_is_interrupted_while_it_is_made_is_not_left_behind(
    project, tmp_path, monkeypatch, end, status
):
    def mount_and_interrupt(*arguments):
        os.kill(os.getpid(), end)
        return mount(*arguments)

    mount = mounts.mount
    monkeypatch.setattr(mounts, "mount", mount_and_interrupt)
    result = project.run("mount", "latest", tmp_path / "m")
    assert (result.returncode, result.stdout) == (status, "")
    assert result.stderr == f"Unmounted {tmp_path}/m\n"
    assert project.json("mounts") == []


def test_a_mount_in_the_foreground_ends_when_it_is_unmounted_elsewhere(project, tmp_path):
    directory = tmp_path / "m"
    directory.mkdir()
    with project.running("mount", "latest", directory, "--foreground", stderr=subprocess.PIPE) as process:
        process.stderr.readline()
        project.replicate("umount", directory)
        assert process.wait(timeout=project.deadline_s) == 0


def mount_of(project, directory, **wanted):
    """The one mount on a directory, once it is as it is wanted."""
    deadline = time.monotonic() + project.deadline_s
    while True:
        found = [mount for mount in project.json("mounts") if mount["directory"] == str(directory)]
        if found and all(found[0][key] == value for key, value in wanted.items()):
            return found[0]
        assert time.monotonic() < deadline, f"never {wanted}: {found}"


def test_a_mount_says_what_serves_it_and_how(project, tmp_path):
    mounted = project.json("mount", "latest", tmp_path / "m", "--engine", "native", "--no-passthrough")
    assert (mounted["engine"], mounted["passthrough"]) == ("native", False)
    assert (mounted["persist"], mounted["restarts"], mounted["error"]) == (False, 0, None)
    assert (mounted["given_up"], mounted["prefetch"]) == (False, None)
    assert "native" in project.replicate("mounts")
    project.replicate("umount", tmp_path / "m")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["m", "--engine", "none"], "none"),
        (["m", "--timeout", "0"], "0"),
        (["m", "--timeout", "nan"], "nan"),
        (["m", "--prefetch="], "empty"),
        (["--prefetch", "latest", "m"], "an id or a pattern"),
        (["m", "--foreground", "--persist"], "leave out --persist"),
    ],
)
def test_options_that_make_no_sense_are_refused(project, arguments, complaint):
    result = project.run("mount", *arguments)
    assert result.returncode == 2
    assert complaint in result.stderr


def test_a_killed_mount_comes_back_and_counts_it(own_project, tmp_path):
    mounted = own_project.json("mount", "latest", tmp_path / "m")
    os.kill(mounted["pid"], signal.SIGKILL)
    back = mount_of(own_project, tmp_path / "m", restarts=1, error=None)
    assert back["pid"] != mounted["pid"]
    assert (tmp_path / "m" / "model.pt").read_bytes() == b"\0\x02" * 50_000
    assert "restarted 1x" in own_project.replicate("mounts")


@pytest.mark.proves("S-60")
def test_a_killed_daemon_leaves_mounts_alive_and_the_next_one_watches_over_them(own_project, tmp_path):
    directory = tmp_path / "m"
    mounted = own_project.json("mount", "latest", directory)
    os.kill(own_project.json("status")["daemon"]["pid"], signal.SIGKILL)
    assert (directory / "model.pt").read_bytes() == b"\0\x02" * 50_000
    assert own_project.json("mounts") == [mounted]
    os.kill(mounted["pid"], signal.SIGKILL)
    mount_of(own_project, directory, restarts=1, error=None)
    assert (directory / "model.pt").read_bytes() == b"\0\x02" * 50_000


def test_persistent_mounts_come_back_after_a_restart_of_the_machine(own_project, tmp_path):
    directory = tmp_path / "m"
    mounted = own_project.json("mount", "latest", directory, "--persist")
    other = own_project.json("mount", "latest:step=0", tmp_path / "other")
    # As a restart does: everything ends, and what lies in memory is gone.
    os.kill(own_project.json("status")["daemon"]["pid"], signal.SIGKILL)
    for mount in (mounted, other):
        os.kill(mount["pid"], signal.SIGKILL)
        subprocess.run(["fusermount3", "-u", "-z", "--", mount["directory"]], check=False)
        wait_until_unmounted(mount["directory"])
    shutil.rmtree(own_project.home / "run")
    back = mount_of(own_project, directory, error=None)
    assert back["persist"] and back["restarts"] == 0
    assert (directory / "model.pt").read_bytes() == b"\0\x02" * 50_000
    assert [mount["directory"] for mount in own_project.json("mounts")] == [str(directory)]
    assert "persistent" in own_project.replicate("mounts")
    own_project.replicate("umount", directory)
    own_project.replicate("daemon", "stop")
    assert own_project.json("mounts") == []


def wait_until_unmounted(directory):
    deadline = time.monotonic() + 30
    while find_mounted(os.fsencode(directory)) is not None:
        assert time.monotonic() < deadline


def test_a_mount_in_the_foreground_ends_with_a_command_that_is_killed(project, tmp_path):
    directory = tmp_path / "m"
    with project.running("mount", "latest", directory, "--foreground", stderr=subprocess.PIPE) as process:
        process.stderr.readline()
        process.kill()
        process.wait()
    wait_until_unmounted(directory)


def test_a_mount_in_the_foreground_outlives_its_mount_process(project, tmp_path):
    directory = tmp_path / "m"
    with project.running("mount", "latest", directory, "--foreground", stderr=subprocess.PIPE) as process:
        process.stderr.readline()
        os.kill(mount_of(project, directory)["pid"], signal.SIGKILL)
        mount_of(project, directory, restarts=1, error=None)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=project.deadline_s) == 130
    assert not os.path.ismount(directory)


def test_what_is_mounted_is_not_removed_unless_forced(own_project, tmp_path):
    mounted = own_project.json("mount", "latest", tmp_path / "m")
    experiment = own_project.json("ls")[0]["id"]
    for identifier in (experiment, mounted["id"]):
        result = own_project.on_terminal(["rm", identifier], ["y"])
        assert result[0] != 0 and f"is mounted on {tmp_path / 'm'}" in result[1]
    own_project.replicate("rm", "-f", experiment)
    assert own_project.json("ls") == []
    assert (tmp_path / "m" / "model.pt").read_bytes() == b"\0\x02" * 50_000


def test_reading_in_advance_is_waited_for_and_shown(project, tmp_path):
    directory = tmp_path / "m"
    mounted = project.json("mount", "latest", directory, "--prefetch")
    assert mounted["prefetch"]["finished"] and mounted["prefetch"]["error"] is None
    assert mounted["prefetch"]["files_done"] == mounted["prefetch"]["files_total"] > 0
    assert "warm" in project.replicate("mounts")
    project.replicate("umount", directory)
    result = project.run("mount", "latest", directory, "--prefetch=*.pt")
    assert "Read 1 file (97.7 KiB) in advance" in result.stderr
    project.replicate("umount", directory)
