"""Whether a daemon listens on the socket of a home, and how to start one when none does.

Knows processes and plain sockets, not gRPC: whether somebody listens is found out by connecting, because
gRPC's own first failure costs a second of back-off. Used by `connection` only. Any number of processes
may start a daemon at once: the daemon's lock leaves one, the others see that it listens and leave.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from replicate.errors import DaemonUnavailable
from replicate.home import Home, check_private, chosen_root

#: How long a daemon may take until it listens.
START_TIMEOUT_S = 15.0
#: sun_path of a Unix socket holds 108 bytes, the last of them NUL.
MAX_SOCKET_PATH = 107

_POLL_S = 0.005
#: A daemon that loses the race to another one that then leaves is started again, a daemon that cannot
#: start is not started for ever.
_MAX_STARTS = 2

#: Daemons started by this process, to be reaped when they end before us.
_children: list[int] = []


class SocketAddress:
    """A path of the socket that fits into `sun_path`, valid until `close`.

    A longer path is reached through an open descriptor of its directory.
    """

    def __init__(self, home: Home) -> None:
        self._directory: int | None = None
        self.path = str(home.socket)
        if len(os.fsencode(self.path)) > MAX_SOCKET_PATH:
            self._directory = os.open(home.run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self.path = f"/proc/self/fd/{self._directory}/{home.socket.name}"

    def close(self) -> None:
        """Give the descriptor back; harmless when repeated."""
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None

    def __enter__(self) -> SocketAddress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_listening(home: Home) -> bool:
    """Whether somebody accepts connections on the socket of this home.

    Raises `DaemonUnavailable` when others than this user can get at the directory of the socket.
    """
    try:
        check_private(home.run)
        with SocketAddress(home) as address, socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            probe.connect(address.path)
    except BlockingIOError:
        return True  # its backlog is full
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError, ConnectionResetError):
        return False
    except OSError as error:
        raise DaemonUnavailable(f"cannot use the socket {home.socket}: {error.strerror}") from error
    return True


class Launch:
    """Makes sure that a daemon listens: begun at once, waited for later."""

    def __init__(self, home: Home, serve_options: Sequence[str] = ()) -> None:
        self._home = home
        self._serve_options = tuple(serve_options)
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._starts = 0
        if not is_listening(home):
            _check_directories(home)
            self._start()

    def wait(self, deadline: float | None = None) -> None:
        """Return when somebody listens, at the latest at `deadline` (of `time.monotonic`).

        Raises `DaemonUnavailable` saying why nobody does.
        """
        begun = time.monotonic()
        deadline = min(begun + START_TIMEOUT_S, begun + START_TIMEOUT_S if deadline is None else deadline)
        while not is_listening(self._home):
            status = self._process.poll() if self._process else 0
            if status is not None:
                # It may have lost against another one, which is seen only now.
                if is_listening(self._home):
                    return
                if self._starts >= _MAX_STARTS:
                    raise self._died(status)
                self._start()
            if time.monotonic() > deadline:
                raise self._silent(deadline - begun)
            time.sleep(_POLL_S)

    def end(self, daemon_pid: int | None = None) -> None:
        """Let the started process go on by itself; must be called, and may be repeated.

        With the pid of the daemon that answers, another one that was started here is ended: it lost the
        race, and would take over as soon as the winner leaves.
        """
        if self._process is not None:
            if self._process.poll() is None:
                if daemon_pid not in (None, self._process.pid):
                    self._process.terminate()
                _children.append(self._process.pid)
                # It outlives us on purpose; Popen would warn of that when it is deleted.
                self._process.returncode = 0
            self._process = None
        if self._said is not None:
            self._said.close()
            self._said = None

    def _start(self) -> None:
        self.end()
        _reap()
        if not sys.executable:
            raise DaemonUnavailable(
                "cannot start the daemon: this program does not say where its Python is",
                hint="start it with `replicate daemon start`",
            )
        try:
            self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "replicated", "serve", "--on-demand", *self._serve_options],
                cwd="/",
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                start_new_session=True,
            )
        except OSError as error:
            raise DaemonUnavailable(f"cannot start the daemon: {error}") from error
        self._starts += 1

    def _silent(self, waited_s: float) -> DaemonUnavailable:
        owner = lock_owner(self._home)
        started = self._process.pid if self._process else None
        if owner not in (None, started):
            return DaemonUnavailable(
                f"another replicated (pid {owner}) owns {self._home.run} and does not listen",
                hint="`replicate daemon stop` stops it",
            )
        return DaemonUnavailable(
            f"the daemon was started but does not listen after {waited_s:.1f} s",
            hint=f"its log is {self._home.log_file}",
        )

    def _died(self, status: int) -> DaemonUnavailable:
        if os.strerror(errno.ENOSPC) in self._words():
            return DaemonUnavailable(
                f"no space is left in {chosen_root() or self._home.state}",
                hint="free some space, or set REPLICATE_HOME to another disk",
            )
        reason, hint = self._last_words()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return DaemonUnavailable(
            f"the daemon ended as it started, with {how}: {reason}",
            hint=hint or f"its log is {self._home.log_file}",
            fields={"log": str(self._home.log_file)},
        )

    def _words(self) -> str:
        """All that it said on stderr."""
        if self._said is None:
            return ""
        self._said.seek(0)
        return self._said.read().decode(errors="replace")

    def _last_words(self) -> tuple[str, str]:
        """What it said last, and its advice if it gave one."""
        lines = [line.strip() for line in self._words().splitlines()]
        advice = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
        spoken = [line.removeprefix("error: ") for line in lines if line and not line.startswith("hint: ")]
        return spoken[-1] if spoken else "it said nothing", advice[-1] if advice else ""


def _check_directories(home: Home) -> None:
    """Raise `DaemonUnavailable` when a file is in the place of a directory of this home."""
    for directory in (home.state, home.run):
        existing = next(path for path in (directory, *directory.parents) if os.path.exists(path))
        if not existing.is_dir():
            raise DaemonUnavailable(
                f"{existing} is not a directory", hint="set REPLICATE_HOME to a directory, or remove the file"
            )


def lock_owner(home: Home) -> int | None:
    """Pid of the daemon that owns this home, whether it listens or not; None when none does.

    Looks only: trying the lock would be in the way of a daemon that starts.
    """
    try:
        lock = os.stat(home.lock)
        pid = int(home.lock.read_text())
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except (OSError, ValueError):
        return None
    for descriptor in descriptors:
        with suppress(OSError):  # closed meanwhile
            if os.path.samestat(lock, os.stat(f"/proc/{pid}/fd/{descriptor}")):
                return pid
    return None


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    _reap()
    return _process_state(pid) not in (b"", b"Z", b"X")


def describe_silence(home: Home) -> tuple[str, str]:
    """Why the daemon of this home does not answer, if that can be seen (else empty), and what to do."""
    pid = lock_owner(home)
    if pid is not None and _process_state(pid) in (b"T", b"t"):
        return f"its process {pid} was stopped by a signal", f"`kill -CONT {pid}` lets it go on"
    return "", f"its log is {home.log_file}"


def _process_state(pid: int) -> bytes:
    """The letter that the kernel has for what a process is doing; empty when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return b""


def _environment() -> dict[str, str]:
    """Ours, with relative paths made absolute where they matter: the daemon runs in another directory."""
    environment = dict(os.environ)
    root = chosen_root()
    if root is not None:
        environment["REPLICATE_HOME"] = str(root)
    if environment.get("PYTHONPATH"):
        entries = environment["PYTHONPATH"].split(os.pathsep)
        with suppress(FileNotFoundError):  # of a working directory that was deleted
            environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in entries)
    return environment


def _reap() -> None:
    for pid in list(_children):
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        except ChildProcessError:
            pass  # reaped by somebody else, or the child of our parent before a fork
        if pid in _children:
            _children.remove(pid)
