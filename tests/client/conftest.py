"""A home of its own for each test, a project, scripts run as users run them, and a server to talk to."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from replicate import connection
from replicate._pb import daemon_pb2 as pb

DEADLINE_S = 60.0
#: Also where a test lets the library believe in another one.
PYTHON = sys.executable

#: A server that speaks the protocol and keeps nothing: what it does is told by the request.
SERVER = """
import os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import grpc
from replicate import wire
from replicate._pb import daemon_pb2 as pb, daemon_pb2_grpc as pb_grpc
from replicate.errors import from_code

class Server(pb_grpc.DaemonServicer):
    asked = 0

    def Hello(self, request, context):
        return pb.HelloReply(protocol=int(sys.argv[1]), version="9.9", pid=os.getpid())

    def Resolve(self, request, context):
        Server.asked += 1
        action, _, argument = request.id.partition(":")
        if action == "raise":
            error = from_code(argument, "what happened", "what to do", {"field": "value"})
            context.set_trailing_metadata(((wire.ERROR_METADATA_KEY, wire.encode_error(error)),))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "")
        if action == "bug":
            raise RuntimeError("a bug")
        if action == "unavailable" and Server.asked <= int(argument):
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return pb.Resolution(chosen=str(Server.asked))

    def WaitStored(self, request, context):
        time.sleep(request.timeout_s)
        return pb.StatusReply(pending=1)

    def ListExperiments(self, request, context):
        for number in range(request.limit):
            yield pb.ExperimentSummary(status=str(number))

    def _write(self, request, context, reply):
        # Noted; and sent back as long as its repository says `full:N`, N times in all, or `stuck`, while it
        # has files and there is a file of that name.
        with open("requests", "ab") as file:
            data = request.SerializeToString()
            file.write(type(request).__name__.encode() + b" " + data.hex().encode() + b"\\n")
        word, _, count = request.repository.rpartition("/")[2].partition(":")
        Server.asked += 1
        if word == "full" and Server.asked <= int(count):
            error = from_code("queue_full", "9 GB wait", "patience", {})
            context.set_trailing_metadata(((wire.ERROR_METADATA_KEY, wire.encode_error(error)),))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "")
        if word == "stuck" and request.capture.paths and os.path.exists("stuck"):
            with open("stuck") as file:
                fields = {"stuck": file.read()}
            error = from_code("queue_full", "9 GB wait", "patience", fields)
            context.set_trailing_metadata(((wire.ERROR_METADATA_KEY, wire.encode_error(error)),))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "")
        return reply

    def CreateExperiment(self, request, context):
        return self._write(request, context, pb.CaptureReply(state="captured"))

    def CreateCheckpoint(self, request, context):
        state = "failed" if request.missed_because else "captured"
        return self._write(request, context, pb.CaptureReply(state=state))

    def EndExperiment(self, request, context):
        return self._write(request, context, pb.EndExperimentReply())

    def Shutdown(self, request, context):
        threading.Timer(0.1, os._exit, [0]).start()
        return pb.ShutdownReply()

server = grpc.server(ThreadPoolExecutor(32), options=[("grpc.http2.max_ping_strikes", 0)])
pb_grpc.add_DaemonServicer_to_server(Server(), server)
server.add_insecure_port("unix:run/replicated.sock")
server.start()
print("up", flush=True)
server.wait_for_termination()
"""


def wait_until(condition, what):
    """Wait for a condition to hold; what it gave."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)
    return found


@pytest.fixture(name="wait_until")
def _wait_until():
    return wait_until


def daemons_of(home: Path):
    """Pids of the daemons that were started for a home, listening or not."""
    setting = b"REPLICATE_HOME=" + os.fsencode(home)
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = setting in (directory / "environ").read_bytes().split(b"\0")
            if is_ours and b"replicated\0serve" in (directory / "cmdline").read_bytes():
                yield int(directory.name)
        except OSError:
            continue  # it has just ended


@pytest.fixture(name="daemons_of")
def _daemons_of():
    return daemons_of


@pytest.fixture
def home(monkeypatch):
    """REPLICATE_HOME in a new directory; whatever daemon runs there at the end is stopped."""
    # Short: the path of a socket holds 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="rpl-"))
    monkeypatch.setenv("REPLICATE_HOME", str(directory))
    for name in ("REPLICATE_REPOSITORY", "REPLICATE_PROJECT_DIR", "REPLICATE_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("REPLICATE_DISABLED", raising=False)
    yield directory
    connection.stop_daemon()
    for pid in daemons_of(directory):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(directory)


@pytest.fixture
def project(home, tmp_path, monkeypatch):
    """An empty project directory, in which the test works."""
    directory = tmp_path / "project"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@dataclasses.dataclass
class Done:
    """A script that has ended."""

    status: int
    output: str
    errors: str


@pytest.fixture
def run_script(project):
    """Run Python source as a script of the project, to its end."""

    strict = ("-X", "dev", "-W", "error", "-W", "ignore:This process:DeprecationWarning")

    def run(source, *arguments, options=strict, environment=None) -> Done:
        script = project / "script.py"
        script.write_text(source)
        done = subprocess.run(
            [sys.executable, *options, "script.py", *arguments],
            env={**os.environ, **(environment or {})},
            cwd=project,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def server(home):
    """Start a server on the socket of the home that speaks a version of the protocol; its process."""
    processes = []

    def start(protocol=1):
        (home / "run").mkdir(mode=0o700, exist_ok=True)
        # Bound through the directory, whose path may be too long.
        process = subprocess.Popen(
            [PYTHON, "-c", SERVER, str(protocol)],
            cwd=home,
            stdout=subprocess.PIPE,
        )
        processes.append(process)
        assert process.stdout.readline() == b"up\n"
        return process

    yield start
    for process in processes:
        process.kill()  # also when it is stopped
        process.wait()
        process.stdout.close()


@pytest.fixture
def written(home):
    """The requests that write, as the server noted them, in order."""

    def read():
        file = home / "requests"
        lines = [line.split(" ") for line in file.read_text().splitlines()] if file.exists() else []
        return [getattr(pb, name).FromString(bytes.fromhex(data)) for name, data in lines]

    return read


@pytest.fixture
def no_daemon(home, tmp_path, monkeypatch):
    """Let the daemon be unable to start; gives the file with a line for each time it was tried."""
    starts = tmp_path / "starts"
    program = tmp_path / "python-that-fails"
    program.write_text(f"#!/bin/sh\necho x >>{starts}\necho 'no luck' >&2\nexit 7\n")
    program.chmod(0o755)
    starts.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(program))
        yield starts
