"""A distributed job as its launcher starts it: processes with homes of their own, and one repository."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
import pytest
from servers import s3_servers

from replicate._pb import daemon_pb2 as pb
from replicate._pb import daemon_pb2_grpc as pb_grpc
from replicate.ids import new_id
from replicated.processes import identify, is_alive

DEADLINE_S = 150.0
_numbers = itertools.count()


def wait_until(condition, what):
    """Wait for a condition to hold; what it gave."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)
    return found


@pytest.fixture(name="wait_until")
def _wait_until():
    return wait_until


@dataclasses.dataclass
class Done:
    """A process of the job that has ended."""

    status: int
    output: str
    errors: str


class Rank:
    """One machine: a home, a project directory, and the processes that run there."""

    def __init__(self, number, directory, environment):
        self.number = number
        #: Short: the path of a socket holds 107 bytes.
        self.home = Path(tempfile.mkdtemp(prefix="rk-"))
        self.directory = directory / self.home.name
        self.directory.mkdir()
        self.environment = {**environment, "REPLICATE_HOME": str(self.home)}
        self.process = None
        #: How a program is run there.
        self.prefix = []

    def start(self, script, *, arguments=(), **variables):
        """Start a process of this rank; a variable that is None is not set."""
        (self.directory / "train.py").write_text(script)
        environment = {**self.environment, **variables}
        self.process = subprocess.Popen(
            [*self.prefix, sys.executable, "train.py", *arguments],
            cwd=self.directory,
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.process

    def end(self):
        """Wait for the process to end."""
        output, errors = self.process.communicate(timeout=DEADLINE_S)
        return Done(self.process.returncode, output, errors)

    def run(self, script, **variables):
        """Run a process to its end, which has to be good; what it printed."""
        self.start(script, **variables)
        done = self.end()
        assert done.status == 0, done.errors
        return done.output

    def cli(self, *arguments):
        """Run the command line on this machine."""
        done = subprocess.run(
            [*self.prefix, sys.executable, "-m", "replicate.cli", *arguments],
            cwd=self.directory,
            env={**self.environment, "RANK": "0", "WORLD_SIZE": "1"},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def json(self, *arguments):
        done = self.cli(*arguments, "--json")
        assert done.output, done.errors
        return json.loads(done.output)

    def checkpoints(self, experiment_id):
        """The checkpoints as this machine shows them, oldest first."""
        found = self.cli("show", experiment_id, "--json", "--all")
        return json.loads(found.output)["checkpoints"] if found.status == 0 else []

    def stored(self, experiment_id, count=1):
        """The checkpoints, once so many are stored."""

        def look():
            found = [one for one in self.checkpoints(experiment_id) if one["state"] == "stored"]
            return found if len(found) >= count else None

        return wait_until(look, f"{count} checkpoints are stored")

    def files(self, identifier):
        return {file["path"] for file in self.json("files", identifier)}

    def daemon_pid(self):
        return self.json("status")["daemon"]["pid"]

    def kill_daemon(self):
        """End the daemon as a power cut would."""
        identity = identify(self.daemon_pid())
        os.kill(identity.pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(identity), "the daemon is gone")

    def hurry(self, is_over):
        """Wait for all that is captured, as a user does: what is stored meanwhile is stored at once.

        Nothing is stored while the processors have other things to do, as when many tests run.
        """
        while not is_over.wait(0.1):
            if not (self.home / "run" / "replicated.sock").exists():
                continue
            with grpc.insecure_channel(f"unix:{self.home}/run/replicated.sock") as channel:
                stub = pb_grpc.DaemonStub(channel)
                while not is_over.is_set():
                    try:
                        stub.WaitStored(pb.WaitStoredRequest(timeout_s=1), timeout=5)
                    except grpc.RpcError:
                        break

    def close(self):
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.communicate()
        self.cli("daemon", "stop")
        shutil.rmtree(self.home, ignore_errors=True)


class Job:
    """A job of some ranks, as torchrun's variables describe it."""

    def __init__(self, directory, repository, variables):
        self.directory = directory
        self.id = new_id()
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("REPLICATE_", "SLURM_", "OMPI_", "PMI", "TORCHELASTIC_", "AWS_"))
        }
        self.environment |= {"REPLICATE_REPOSITORY": repository, **variables}
        self.ranks = []
        self._is_over = threading.Event()
        self._hurrying = []

    def make(self, size, **variables):
        """The machines of the job, all of them with the id of its experiment unless that is None."""
        given = {"REPLICATE_EXPERIMENT_ID": self.id, **variables}
        for number in range(size):
            environment = {**self.environment, "RANK": str(number), "WORLD_SIZE": str(size), **given}
            known = {name: value for name, value in environment.items() if value is not None}
            rank = Rank(number, self.directory, known)
            self.ranks.append(rank)
            self._hurrying.append(threading.Thread(target=rank.hurry, args=(self._is_over,)))
            self._hurrying[-1].start()
        return self.ranks[-size:]

    def close(self):
        self._is_over.set()
        for thread in self._hurrying:
            thread.join()
        for rank in self.ranks:
            rank.close()


@pytest.fixture(scope="session")
def bucket_server():
    with s3_servers.moto() as server:
        yield server


@pytest.fixture
def job(tmp_path):
    """A job with a repository on a disk that all machines see."""
    job = Job(tmp_path, f"file://{tmp_path}/repository", {})
    yield job
    job.close()


@pytest.fixture(params=["disk", "bucket"])
def any_job(request, tmp_path):
    """A job with a repository on a disk, and in a bucket."""
    if request.param == "disk":
        job = Job(tmp_path, f"file://{tmp_path}/repository", {})
    else:
        server = request.getfixturevalue("bucket_server")
        variables = {**s3_servers.ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}
        job = Job(tmp_path, f"s3://ranks-{next(_numbers)}/team", variables)
    yield job
    job.close()
