"""A real daemon process in a home of its own, spoken to over its socket."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from replicate import wire
from replicate._pb import daemon_pb2 as pb
from replicate._pb import daemon_pb2_grpc as pb_grpc
from replicate.ids import CheckpointId, ExperimentId, new_id
from replicate.records import CheckpointRecord, ExperimentRecord, PrimaryMetric, ProcessIdentity, utc_now
from replicated.processes import identify

DEADLINE_S = 60.0


def wait_until(condition: Callable[[], object], what: str):
    """Wait for a condition to hold; what it gave."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)
    return found


class Daemon:
    """One home, and the daemon that serves it at present."""

    def __init__(self, home: Path):
        self.home = home
        self.process: subprocess.Popen | None = None
        self.channel: grpc.Channel | None = None
        self.stub: pb_grpc.DaemonStub = None

    def start(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "replicated", "serve", *options],
            env={**os.environ, "REPLICATE_HOME": str(self.home)},
            cwd="/",
        )
        socket = self.home / "run" / "replicated.sock"
        wait_until(socket.exists, "the daemon listens")
        self.connect(socket)

    def connect(self, socket: Path) -> None:
        if self.channel is not None:
            self.channel.close()
        self.channel = grpc.insecure_channel(f"unix:{socket}")
        self.stub = pb_grpc.DaemonStub(self.channel)
        wait_until(self.answers, "the daemon answers")

    def answers(self) -> bool:
        try:
            self.stub.Hello(pb.HelloRequest(protocol=wire.PROTOCOL_VERSION), timeout=5)
        except grpc.RpcError:
            return False
        return True

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=DEADLINE_S) if self.process is not None else 0

    def log(self) -> str:
        return (self.home / "logs" / "replicated.log").read_text()


@dataclasses.dataclass
class Project:
    """A project directory and its repository, recorded through a daemon."""

    daemon: Daemon
    directory: Path
    repository: str

    def write(self, name: str, data: bytes = b"x") -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def capture(self, paths, mode="auto", ignore=()):
        return pb.Capture(
            project_directory=os.fsencode(self.directory),
            paths=[os.fsencode(path) for path in paths],
            ignore=[os.fsencode(pattern) for pattern in ignore],
            mode=mode,
        )

    def init(
        self, *paths, process: ProcessIdentity | None = None, mode="auto", **changes
    ) -> ExperimentRecord:
        record = ExperimentRecord(
            id=ExperimentId(new_id()),
            created=utc_now(),
            paths=paths,
            process=process or identify(os.getpid()),
            **changes,
        )
        self.send_init(record, mode)
        return record

    def send_init(self, record, mode="auto"):
        request = pb.CreateExperimentRequest(
            repository=self.repository,
            experiment=wire.encode_experiment(record),
            capture=self.capture(record.paths, mode),
        )
        return self.daemon.stub.CreateExperiment(request)

    def checkpoint(self, experiment, *paths, step=0, metrics=None, mode="auto") -> CheckpointRecord:
        metrics = metrics or {}
        record = CheckpointRecord(
            id=CheckpointId(new_id()),
            experiment_id=experiment.id,
            created=utc_now(),
            step=step,
            paths=paths,
            metrics=metrics,
            primary_metric=PrimaryMetric("loss", "minimize") if "loss" in metrics else None,
        )
        self.send_checkpoint(record, mode)
        return record

    def send_checkpoint(self, record, mode="auto"):
        request = pb.CreateCheckpointRequest(
            repository=self.repository,
            checkpoint=wire.encode_checkpoint(record),
            capture=self.capture(record.paths, mode),
        )
        return self.daemon.stub.CreateCheckpoint(request)

    def end(self, experiment, status="stopped", is_exiting=False):
        return self.daemon.stub.EndExperiment(
            pb.EndExperimentRequest(
                repository=self.repository,
                experiment_id=experiment.id,
                status=status,
                ended_ns=wire.encode_time(utc_now()),
                is_exiting=is_exiting,
            )
        )

    def flush(self) -> pb.StatusReply:
        def drained():
            reply = self.daemon.stub.WaitStored(pb.WaitStoredRequest(timeout_s=1))
            return reply if reply.pending + reply.active == 0 else None

        return wait_until(drained, "everything is stored")

    def target(self, reference):
        return pb.Target(repository=self.repository, id=reference)

    def list(self, *filters, sort="", limit=0):
        request = pb.ListExperimentsRequest(
            repository=self.repository, filters=filters, sort=sort, limit=limit
        )
        return [wire.decode_summary(message) for message in self.daemon.stub.ListExperiments(request)]

    def resolve(self, reference):
        return self.daemon.stub.Resolve(self.target(reference))

    def checkpoints(self, reference):
        return [wire.decode_checkpoint(m) for m in self.daemon.stub.ListCheckpoints(self.target(reference))]

    def files(self, reference, path=b""):
        request = pb.ListFilesRequest(target=self.target(reference), path=path)
        return {entry.path: entry for batch in self.daemon.stub.ListFiles(request) for entry in batch.entries}

    def read(self, reference, path, offset=0, length=0):
        request = pb.ReadFileRequest(
            target=self.target(reference), path=os.fsencode(path), offset=offset, length=length
        )
        return b"".join(message.data for message in self.daemon.stub.ReadFile(request))


@pytest.fixture
def home():
    # Short: the path of a socket holds 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="rpl-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def daemon(home):
    running = Daemon(home)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def project(daemon, tmp_path):
    directory = tmp_path / "project"
    directory.mkdir()
    return Project(daemon, directory, f"file://{directory}/.replicate")


@pytest.fixture
def make_project(tmp_path):
    """Projects with daemons of their own, in a given home."""
    made = []

    def make(home: Path) -> Project:
        running = Daemon(home)
        made.append(running)
        running.start()
        directory = tmp_path / f"project-{len(made)}"
        directory.mkdir()
        return Project(running, directory, f"file://{directory}/.replicate")

    yield make
    for running in made:
        running.stop()


@pytest.fixture
def error_of():
    """Call something that fails in the daemon; the error of ours that came back."""

    def call_and_catch(call: Callable[[], object]):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        metadata = dict(caught.value.trailing_metadata() or ())
        return wire.decode_error(metadata[wire.ERROR_METADATA_KEY])

    return call_and_catch


@pytest.fixture(name="wait_until")
def _wait_until():
    return wait_until
