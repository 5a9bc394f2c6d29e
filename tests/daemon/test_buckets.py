"""Repositories in buckets: reached as the caller would, and waited for by nobody while they are away."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from servers import s3_servers

SCRIPT = """
import replicate, sys
experiment = replicate.init(path="code.py", params={"lr": float(sys.argv[1])})
for step in range(2):
    experiment.checkpoint(path="weights", step=step, metrics={"loss": 1.0 / (step + 1)})
experiment.stop()
print(experiment.id)
"""
CLOUDS = ("AWS_", "GOOGLE_", "BOTO", "REPLICATE_")


class User:
    """Somebody with a home, a project in a bucket, and shells in which variables are set or not."""

    def __init__(self, home: Path, directory: Path, server: s3_servers.Server):
        self.home = home
        self.directory = directory
        self.server = server
        self.repository = "s3://lab/models"
        self.bare = {
            **{name: value for name, value in os.environ.items() if not name.startswith(CLOUDS)},
            "REPLICATE_HOME": str(home),
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.informed = {
            **self.bare,
            **s3_servers.ENVIRONMENT,
            "AWS_ENDPOINT_URL": server.url,
        }
        directory.mkdir()
        (directory / "replicate.yaml").write_text(f"repository: {self.repository}\n")
        (directory / "code.py").write_text("print()\n")
        (directory / "train.py").write_text(SCRIPT)
        (directory / "weights").write_bytes(os.urandom(300_000))

    def run(self, *arguments: str, environment=None, status=0) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.directory,
            env=environment or self.informed,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == status, done.stderr
        return done

    def replicate(self, *arguments: str, environment=None, status=0) -> subprocess.CompletedProcess:
        return self.run("-m", "replicate.cli", *arguments, environment=environment, status=status)

    def train(self, rate: float = 0.1, environment=None) -> subprocess.CompletedProcess:
        return self.run("train.py", str(rate), environment=environment)

    def status(self, environment=None) -> dict:
        done = self.replicate("status", "--json", environment=environment)
        return json.loads(done.stdout)

    def standing(self, environment=None) -> dict | None:
        found = [s for s in self.status(environment)["repositories"] if s["repository"] == self.repository]
        return found[0] if found else None


@pytest.fixture
def user(home, tmp_path):
    buckets = tmp_path / "buckets"
    (buckets / "lab").mkdir(parents=True)
    with s3_servers.rclone(buckets) as server:
        user = User(home, tmp_path / "project", server)
        yield user
        with contextlib.suppress(AssertionError):
            user.replicate("daemon", "stop")


def test_a_bucket_is_reached_with_what_the_caller_has_and_that_is_written_nowhere(user):
    # The daemon is there already, and was started where nothing was set.
    user.replicate("daemon", "start", environment=user.bare)
    experiment = user.train().stdout.strip()
    user.replicate("flush")
    (listed,) = json.loads(user.replicate("ls", "--json").stdout)
    assert (listed["id"], listed["num_checkpoints"], listed["state"]) == (experiment, 2, "stored")
    secret = s3_servers.SECRET_KEY.encode()
    files = [file for file in user.home.rglob("*") if file.is_file()]
    assert any(file.name == "journal.db" for file in files)
    assert not [file for file in files if secret in file.read_bytes()]


def test_what_a_file_says_counts_where_the_environment_says_nothing(user):
    user.replicate("daemon", "start", environment=user.bare)
    (user.directory / "replicate.yaml").write_text(
        f"repository: {user.repository}\ns3:\n  endpoint: {user.server.url}\n  region: us-east-1\n"
        "  profile: lab\n"
    )
    credentials = user.directory.parent / "credentials"
    credentials.write_text(
        f"[lab]\naws_access_key_id = {s3_servers.ACCESS_KEY}\n"
        f"aws_secret_access_key = {s3_servers.SECRET_KEY}\n"
    )
    environment = {**user.bare, "AWS_SHARED_CREDENTIALS_FILE": os.path.relpath(credentials, user.directory)}
    user.train(environment=environment)
    user.replicate("flush", environment=environment)
    assert len(json.loads(user.replicate("ls", "--json", environment=environment).stdout)) == 1


def test_training_goes_on_while_the_bucket_is_away_and_is_stored_when_it_is_back(user, wait_until):
    first = user.train(0.1).stdout.strip()
    user.replicate("flush")
    user.server.kill()
    # The daemon forgets what it has open, and everything it was told.
    user.replicate("daemon", "stop")
    done = user.train(0.2)
    second = done.stdout.strip()
    assert f"{user.repository} cannot be reached now" in done.stderr
    standing = wait_until(lambda: (s := user.standing()) and s["waiting_because"] and s, "it says why")
    assert standing["pending"] + standing["active"] == 4
    assert standing["bytes_pending"] > 0
    assert standing["waiting_since"] is not None
    # What this machine knows is shown, and said to be that.
    listing = user.replicate("ls", "--json")
    assert {e["id"]: e["state"] for e in json.loads(listing.stdout)} == {first: "stored", second: "captured"}
    assert "what this machine knows" in listing.stderr
    assert first[:7] in user.replicate("show", first).stdout
    # The next daemon, which nobody has told how to reach it, knows since when, and says what to do.
    user.replicate("daemon", "stop")
    user.replicate("daemon", "start", environment=user.bare)
    later = wait_until(
        lambda: (s := _raw_standing(user)) and s["waiting_because"] and s["hint"] and s, "it says what to do"
    )
    assert later["waiting_since"] == standing["waiting_since"]
    assert f"replicate -R {user.repository} flush" in later["hint"]
    user.server.start()
    user.replicate("flush")
    assert user.standing() is None
    assert {e["state"] for e in json.loads(user.replicate("ls", "--json").stdout)} == {"stored"}


def _raw_standing(user) -> dict | None:
    """The standing as somebody sees it who has no project, and so tells nothing."""
    elsewhere = user.directory.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "replicate.cli", "status", "--json"],
        cwd=elsewhere,
        env=user.bare,
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = [s for s in json.loads(done.stdout)["repositories"] if s["repository"] == user.repository]
    return found[0] if found else None


def test_a_bucket_that_was_never_reached_is_told_at_once(user):
    user.server.kill()
    done = user.run("train.py", "0.1", status=1)
    assert "RepositoryUnreachable" in done.stderr
    assert user.server.url in done.stderr or user.repository in done.stderr
    assert user.standing() is None
    assert user.replicate("ls", status=3).stdout == ""


def test_one_sign_of_life_stands_for_all_runs_and_is_taken_away(user, wait_until):
    directory = user.directory.parent / "buckets" / "lab" / "models" / "heartbeats"
    (user.directory / "many.py").write_text(
        "import replicate, sys\n"
        "one, two = replicate.init(quiet=True), replicate.init(quiet=True)\n"
        "print(one.id, two.id, flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "many.py"],
        cwd=user.directory,
        env=user.informed,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    ids = process.stdout.readline().split()

    def told():
        for file in directory.glob("*.json"):
            with contextlib.suppress(ValueError):
                heartbeat = json.loads(file.read_bytes())
                if {run["id"] for run in heartbeat["experiments"]} == set(ids):
                    return heartbeat
        return None

    heartbeat = wait_until(told, "both runs are told of")
    assert heartbeat["period_s"] == 60
    assert len(list(directory.glob("*.json"))) == 1
    process.communicate("")
    wait_until(lambda: not list(directory.glob("*.json")), "the sign of life is taken away")
