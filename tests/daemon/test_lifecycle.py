"""The daemon's own life: one a home, private, leaving when idle."""

import os
import subprocess
import sys

import pytest


def serve(home, *options):
    """Run a daemon to its end; its exit status and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "replicated", "serve", *options],
        env={**os.environ, "REPLICATE_HOME": str(home)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


def test_the_socket_and_all_state_are_private(daemon):
    for name in ("run", "state", "cache", "logs", "state/spool"):
        assert (daemon.home / name).stat().st_mode & 0o777 == 0o700, name
    assert (daemon.home / "run/replicated.sock").stat().st_mode & 0o777 == 0o600


def test_a_second_daemon_of_a_home_is_refused_and_names_the_first(daemon):
    status, said = serve(daemon.home)
    assert status == 3
    assert f"another replicated (pid {daemon.process.pid}) owns" in said
    assert daemon.answers()


def test_a_daemon_takes_over_what_a_killed_one_left(daemon):
    daemon.kill()
    assert (daemon.home / "run/replicated.sock").exists()
    daemon.start()
    assert daemon.answers()


def test_a_daemon_started_on_demand_leaves_when_it_is_idle(home):
    assert serve(home, "--on-demand", "--idle-exit", "0.5") == (0, "")
    assert not (home / "run/replicated.sock").exists()


def test_a_daemon_stays_while_a_run_lives(daemon, project, wait_until):
    daemon.stop()
    daemon.start("--on-demand", "--idle-exit", "0.5")
    experiment = project.init()
    project.flush()
    wait_until(lambda: "idle" not in daemon.log() and daemon.process.poll() is None, "it is still there")
    project.end(experiment)
    wait_until(lambda: daemon.process.poll() == 0, "it leaves when the run has ended")


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o710])
def test_a_run_directory_that_others_can_enter_is_refused(home, mode):
    (home / "run").mkdir()
    (home / "run").chmod(mode)
    status, said = serve(home)
    assert status == 3
    assert "it must be 0700" in said


def test_a_run_directory_that_is_a_link_is_refused(home, tmp_path):
    (home / "run").symlink_to(tmp_path)
    status, said = serve(home)
    assert status == 3
    assert "not a directory" in said


def test_a_journal_that_is_not_ours_is_refused_and_left_alone(home):
    (home / "state").mkdir(mode=0o700)
    (home / "state/journal.db").write_bytes(b"this is not a database, but somebody's letter" * 100)
    status, said = serve(home)
    assert status == 3
    assert "journal.db" in said
    assert (home / "state/journal.db").read_bytes().startswith(b"this is not")


def test_a_home_with_a_path_longer_than_a_socket_name_works(tmp_path):
    home = tmp_path / ("long" * 30)
    home.mkdir()
    assert serve(home, "--on-demand", "--idle-exit", "0.5") == (0, "")
    assert "idle, leaving" in (home / "logs/replicated.log").read_text()


def test_what_captures_that_were_never_acknowledged_left_is_removed(daemon, wait_until):
    daemon.kill()
    left = daemon.home / "state/spool" / ("a" * 64 + ".tmp")
    left.mkdir()
    (left / "packed").write_bytes(b"half")
    daemon.start()
    assert not left.exists()


def test_a_daemon_whose_socket_was_removed_makes_room_for_another(daemon, wait_until):
    (daemon.home / "run/replicated.sock").unlink()
    wait_until(lambda: daemon.process.poll() == 0, "it leaves")
    assert "the socket was removed" in daemon.log()
    daemon.start()
    assert daemon.answers()


@pytest.mark.parametrize("name", ["state", "cache", "logs"])
def test_a_directory_that_others_could_read_is_made_private_again(home, name):
    (home / name).mkdir(mode=0o755)
    assert serve(home, "--on-demand", "--idle-exit", "0.5") == (0, "")
    assert (home / name).stat().st_mode & 0o777 == 0o700


def test_a_home_too_long_for_a_database_is_refused_with_the_reason(tmp_path):
    home = tmp_path / ("a" * 200) / ("b" * 200) / ("c" * 200)
    home.mkdir(parents=True)
    status, said = serve(home)
    assert status == 3
    assert "too long for SQLite" in said
