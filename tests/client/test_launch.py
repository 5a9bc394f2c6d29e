"""Finding and starting the daemon."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from replicate import connection, launch, query
from replicate.errors import ConfigError, DaemonUnavailable
from replicate.home import Home, find_home


def fake_python(tmp_path, monkeypatch, script):
    """Let the daemon be started with this shell script."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_nobody_listens_where_there_is_nothing(home):
    assert not launch.is_listening(find_home())
    assert connection.probe() is None
    assert list(home.iterdir()) == []


def test_a_socket_that_was_left_behind_is_not_listened_on(home):
    (home / "run").mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(home / "run" / "replicated.sock"))
    assert not launch.is_listening(find_home())
    assert connection.start_daemon().pid


def test_the_daemon_is_started_on_demand_and_once(home):
    assert connection.stop_daemon() is False
    pid = query.status().daemon.pid
    assert connection.start_daemon().pid == pid
    assert connection.probe().pid == pid
    assert os.getpgid(pid) != os.getpgrp()
    assert os.readlink(f"/proc/{pid}/cwd") == "/"


def test_a_stopped_daemon_is_gone(home):
    pid = connection.start_daemon().pid
    assert connection.stop_daemon() is True
    assert not launch.is_alive(pid)
    assert connection.probe() is None


def test_starting_leaves_the_environment_as_it_was(home, monkeypatch):
    monkeypatch.delenv("GRPC_ENABLE_FORK_SUPPORT", raising=False)
    before = dict(os.environ)
    pid = connection.start_daemon().pid
    assert dict(os.environ) == before
    assert b"GRPC_ENABLE_FORK_SUPPORT" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_many_threads_start_one_daemon(home):
    pids = []
    threads = [threading.Thread(target=lambda: pids.append(query.status().daemon.pid)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 8
    assert len(set(pids)) == 1


def test_many_processes_start_one_daemon(home, daemons_of, wait_until):
    source = "from replicate import query; print(query.status().daemon.pid)"
    children = [
        subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    pids = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0] * 4
    assert len(set(pids)) == 1
    # Those that lost the race have been ended, and do not wait to take over.
    wait_until(lambda: list(daemons_of(home)) == [int(pids[0])], "one daemon is left")


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_that_others_can_enter_is_refused(home, mode):
    (home / "run").mkdir()
    (home / "run").chmod(mode)
    with pytest.raises(DaemonUnavailable, match=f"its mode is {mode:04o}, it must be 0700") as caught:
        query.status()
    assert "chmod 700" in caught.value.hint
    (home / "run").chmod(0o700)


def test_a_link_in_place_of_the_directory_is_refused(home, tmp_path):
    tmp_path.chmod(0o700)
    (home / "run").symlink_to(tmp_path)
    with pytest.raises(DaemonUnavailable, match="a link is not followed"):
        query.status()
    (home / "run").unlink()


def test_a_directory_of_somebody_else_is_refused(home):
    if os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    (home / "run").mkdir(mode=0o700)
    os.chown(home / "run", 12345, -1)
    with pytest.raises(DaemonUnavailable, match="owned by uid 12345"):
        query.status()
    (home / "run").rmdir()


def test_a_home_with_a_path_longer_than_a_socket_name_works(home, monkeypatch):
    deep = home / ("d" * 100) / ("e" * 100)
    monkeypatch.setenv("REPLICATE_HOME", str(deep))
    pid = query.status().daemon.pid
    assert query.status().daemon.pid == pid
    assert connection.stop_daemon()


def test_the_descriptor_of_a_long_path_is_given_back(home, monkeypatch):
    monkeypatch.setenv("REPLICATE_HOME", str(home / ("d" * 100)))

    def descriptors():
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        targets = [os.readlink(link) for link in links if os.path.lexists(link)]
        return targets.count(str(find_home().run))

    query.status()
    assert descriptors() == 1  # of the channel that is kept
    for _ in range(3):
        assert connection.probe() is not None
    assert descriptors() == 1
    connection.stop_daemon()


def test_a_daemon_that_cannot_start_says_why(home):
    (home / "state").mkdir(mode=0o700)
    (home / "state" / "journal.db").write_bytes(b"no database" * 1000)
    with pytest.raises(DaemonUnavailable, match=r"ended as it started, with status 3: .*journal") as caught:
        query.status()
    assert "journal.db" in caught.value.hint
    (home / "state" / "journal.db").unlink()


def test_the_last_words_of_a_daemon_are_told(home, tmp_path, monkeypatch):
    fake_python(tmp_path, monkeypatch, "echo first >&2; echo 'ImportError: no grpc' >&2; exit 7")
    with pytest.raises(DaemonUnavailable) as caught:
        query.status()
    assert caught.value.message == "the daemon ended as it started, with status 7: ImportError: no grpc"
    assert str(home / "logs" / "replicated.log") in caught.value.hint


@pytest.mark.parametrize(
    "words",
    [
        "OSError: [Errno 28] No space left on device: run",
        "error: no space is left: No space left on device\nhint: more",
    ],
)
def test_a_full_disk_is_told_with_its_home(home, tmp_path, monkeypatch, words):
    fake_python(tmp_path, monkeypatch, f"printf '%s\\n' '{words}' >&2; exit 1")
    with pytest.raises(DaemonUnavailable) as caught:
        query.status()
    assert caught.value.message == f"no space is left in {home}"
    assert caught.value.hint == "free some space, or set REPLICATE_HOME to another disk"


@pytest.mark.parametrize("below", [(), ("a", "b")])
def test_a_file_in_the_place_of_the_home_is_named(home, tmp_path, monkeypatch, below):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("REPLICATE_HOME", str(file.joinpath(*below)))
    with pytest.raises(DaemonUnavailable) as caught:
        query.status()
    assert caught.value.message == f"{file} is not a directory"


def test_a_daemon_that_dies_silently_is_noticed(home, tmp_path, monkeypatch):
    fake_python(tmp_path, monkeypatch, "kill -9 $$")
    with pytest.raises(DaemonUnavailable, match="with signal 9: it said nothing"):
        query.status()


def test_a_daemon_that_never_listens_is_given_up(home, tmp_path, monkeypatch):
    fake_python(tmp_path, monkeypatch, f"echo $$ >{tmp_path}/pid; exec sleep 1000")
    monkeypatch.setattr(launch, "START_TIMEOUT_S", 0.3)
    with pytest.raises(DaemonUnavailable, match=r"does not listen after 0\.3 s"):
        query.status()
    os.kill(int((tmp_path / "pid").read_text()), 9)


def test_a_program_that_does_not_know_its_python_says_so(home, monkeypatch):
    monkeypatch.setattr(sys, "executable", None)
    with pytest.raises(DaemonUnavailable, match="cannot start the daemon") as caught:
        query.status()
    assert "replicate daemon start" in caught.value.hint


def test_the_home_is_private(home):
    connection.start_daemon()
    assert stat.S_IMODE((home / "run").stat().st_mode) == 0o700


def test_a_relative_home_is_one_home_wherever_one_works(home, tmp_path, monkeypatch, daemons_of):
    monkeypatch.chdir(home)
    monkeypatch.setenv("REPLICATE_HOME", f"relative-{home.name}")
    pid = connection.start_daemon().pid
    monkeypatch.chdir(tmp_path)
    assert query.status().daemon.pid == pid
    assert find_home().socket == home / f"relative-{home.name}" / "run" / "replicated.sock"
    assert list(daemons_of(home / f"relative-{home.name}")) == [pid]
    assert connection.stop_daemon()


def test_relative_xdg_directories_are_ignored(tmp_path, monkeypatch):
    monkeypatch.delenv("REPLICATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relative").mkdir()
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, "relative")
    state = tmp_path / ".local" / "state" / "replicate"
    assert find_home() == Home(state, tmp_path / ".cache" / "replicate", state / "run", state / "logs")


@pytest.mark.parametrize(
    "variable", ["REPLICATE_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"]
)
def test_a_home_that_is_no_text_is_refused_with_the_variable(monkeypatch, variable):
    monkeypatch.delenv("REPLICATE_HOME", raising=False)
    monkeypatch.setenv(variable, "/tmp/b\udcffd")
    with pytest.raises(ConfigError, match=rf"{variable} is not UTF-8: /tmp/b\\xffd"):
        query.status()


def test_a_relative_home_needs_a_working_directory(home, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert connection.start_daemon().pid
    monkeypatch.setenv("REPLICATE_HOME", "relative-and-gone")
    with pytest.raises(ConfigError, match="REPLICATE_HOME is relative and the working directory"):
        find_home()
    monkeypatch.setenv("REPLICATE_HOME", str(home))


def test_a_daemon_whose_socket_was_removed_is_replaced(home, wait_until):
    pid = connection.start_daemon().pid
    find_home().socket.unlink()
    other = subprocess.run(
        [sys.executable, "-c", "from replicate import query; print(query.status().daemon.pid)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(other.stdout) not in (0, pid)
    wait_until(lambda: not launch.is_alive(pid), "the daemon without a socket leaves")


def test_a_daemon_whose_socket_was_removed_can_be_stopped(home):
    pid = connection.start_daemon().pid
    assert launch.lock_owner(find_home()) == pid
    find_home().socket.unlink()
    assert connection.stop_daemon() is True
    assert not launch.is_alive(pid)
    assert launch.lock_owner(find_home()) is None
    assert connection.stop_daemon() is False


def test_a_daemon_that_owns_the_home_and_does_not_listen_is_named(home, monkeypatch):
    pid = connection.start_daemon().pid
    os.kill(pid, signal.SIGSTOP)  # or it would leave
    find_home().socket.unlink()
    monkeypatch.setattr(launch, "START_TIMEOUT_S", 0.5)
    started = launch.Launch(find_home())
    with pytest.raises(DaemonUnavailable) as caught:
        started.wait()
    started.end(daemon_pid=pid)
    os.kill(pid, signal.SIGCONT)
    assert f"another replicated (pid {pid}) owns {home / 'run'}" in caught.value.message
    assert "replicate daemon stop" in caught.value.hint


def test_an_entry_of_a_dead_process_is_no_owner(home):
    (home / "run").mkdir(mode=0o700)
    for text in ("", "x", str(os.getpid()), "4194305"):
        find_home().lock.write_text(text)
        assert launch.lock_owner(find_home()) is None
