"""S3 servers on loopback: moto, in memory, with conditional PUT; rclone, on disk, with signatures."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DEADLINE_S = 60.0
ACCESS_KEY = "AKIAREPLICATETESTS00"
SECRET_KEY = "secret-of-the-tests"
#: What a client needs to speak to any of them, beside the endpoint.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Server:
    """A process that serves; `kill` and `start` again as often as wanted. One on disk keeps what it has."""

    def __init__(
        self, command: list[str], port: int, *, checks_signatures: bool, scheme: str = "http"
    ) -> None:
        #: Such a server is ours to tell from the other: it is on disk, and knows no conditional PUT.
        self.checks_signatures = checks_signatures
        self.url = f"{scheme}://127.0.0.1:{port}"
        self._command = command
        self._port = port
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; returns when it accepts connections."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self._process = subprocess.Popen(
            self._command, stdout=self._output, stderr=self._output, env=environment
        )
        deadline = time.monotonic() + DEADLINE_S
        while not self._accepts():
            is_alive = self._process.poll() is None
            if not is_alive or time.monotonic() > deadline:
                self._output.seek(0)
                raise RuntimeError(f"{self._command[0]} does not serve: {self._output.read()!r}")
            time.sleep(0.02)

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
        self._output.close()

    def _accepts(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0


@contextlib.contextmanager
def moto() -> Iterator[Server]:
    """A server in memory."""
    port = _free_port()
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(Server(command, port, checks_signatures=False)) as server:
        yield server


@contextlib.contextmanager
def rclone(directory: Path, tls: tuple[Path, Path] | None = None) -> Iterator[Server]:
    """A server on a directory, whose subdirectories are its buckets; `tls`: its certificate and key."""
    port = _free_port()
    program = Path(sys.executable).with_name("rclone")
    command = [str(program), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--config", os.devnull]
    command += ["--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--vfs-cache-mode", "off", str(directory)]
    if tls is not None:
        command += ["--cert", str(tls[0]), "--key", str(tls[1])]
    scheme = "http" if tls is None else "https"
    with _running(Server(command, port, checks_signatures=True, scheme=scheme)) as server:
        yield server


@contextlib.contextmanager
def _running(server: Server) -> Iterator[Server]:
    try:
        server.start()
        yield server
    finally:
        server.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
