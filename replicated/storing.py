"""The daemon's side of a store process: starts it when there is something to store, and talks to it.

Storing is work for processors and disks at the lowest priority; in a thread of the daemon it would hold
up every request, since a thread of low priority that has Python's lock keeps it from all others. Called
by `jobs`, which has one for each repository. The process keeps nothing that matters: when it dies, the
same snapshot is stored again.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Final

from replicated.priority import set_priority
from replicated.reaching import Access
from replicated.snapshot import store_channel
from replicated.snapshot.entries import unpack_root
from replicated.snapshot.held import HeldFiles
from replicated.snapshot.store_channel import (
    Channel,
    ChannelClosed,
    Message,
    StoredTree,
    StoringBroken,
    StoringFailed,
)

__all__ = ["StoreProcessDied", "Storing", "StoringBroken", "StoringFailed"]

#: `on_progress` is called at least so often.
PROGRESS_S: Final = 0.5
#: How long a process may take to end what is not wanted any more before it is killed.
ABORT_GRACE_S: Final = 2.0

_CRASHES: Final = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGSYS}
)
_COMMAND = (sys.executable, "-m", "replicated", "store-process")

_log = logging.getLogger(__name__)


class _TooSlow(Exception):
    """Somebody waits, and the process cannot be made faster."""


class StoreProcessDied(Exception):
    """The process ended without an answer; `is_crash`: by a bug of ours, as opposed to being killed."""

    def __init__(self, message: str, *, is_crash: bool) -> None:
        super().__init__(message)
        self.is_crash = is_crash


class Storing:
    """Stores snapshots of one repository in a process of its own; see the module's text.

    To be used by one thread, which has to live for as long: the process ends with it.
    """

    def __init__(self, held: HeldFiles, cache: Path, access: Access | None = None) -> None:
        """`access` tells how buckets are reached."""
        self._held = held
        self._cache = cache
        self._access = access or Access()
        self._process: _Process | None = None

    def ingest(
        self,
        repository_url: str,
        experiment: str,
        snapshot: str,
        entries: bytes,
        spool_directory: Path,
        *,
        upload_limit: int,
        on_progress: Callable[[int], None],
        is_urgent: Callable[[], bool] = lambda: False,
    ) -> StoredTree:
        """Bring what was captured into the repository; what is to be announced and committed.

        Empty `entries` are read from the spool directory. `upload_limit` is in bytes a second, 0 for
        none. `on_progress` gets the bytes of content done so far, from time to time also when that is no
        more than before; what it raises passes, and the ingest is given up. While `is_urgent`, somebody
        waits for it: the process then has a higher priority. Raises what `ingest` raises, `OSError`s as
        `StoringFailed`, `StoringBroken` for a bug, and `StoreProcessDied`.
        """
        while True:
            process = self._process or self._start(is_urgent=is_urgent())
            try:
                process.tell_access(repository_url, self._access.environment(repository_url))
                process.channel.send(
                    store_channel.INGEST,
                    repository_url,
                    experiment,
                    snapshot,
                    entries,
                    os.fsencode(spool_directory),
                    upload_limit,
                )
                answer = self._serve(process, snapshot, on_progress, is_urgent)
                break
            except _TooSlow:
                # From the beginning: what has been stored is found and not stored again.
                self.stop()
            except ChannelClosed:
                self._process = None
                how = process.end()
                if how:
                    raise StoreProcessDied(
                        f"the process that stores snapshots has ended: {how}", is_crash=process.has_crashed
                    ) from None
                # It left, having been idle, before it saw that there is something to do again.
        if answer.kind != store_channel.DONE:
            raise store_channel.failure_of(answer)
        generation, *root = answer.values
        return StoredTree(generation, unpack_root(tuple(root)))

    def stop(self) -> None:
        """End the process; may be repeated, and another ingest starts another one."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def _start(self, *, is_urgent: bool) -> _Process:
        self._process = _Process(self._held.flags_descriptor, self._cache, is_urgent=is_urgent)
        return self._process

    def _serve(
        self,
        process: _Process,
        snapshot: str,
        on_progress: Callable[[int], None],
        is_urgent: Callable[[], bool],
    ) -> Message:
        """Give the process what it asks for until it answers; its answer."""
        done = 0
        try:
            while True:
                if not process.adapt(is_urgent=is_urgent()):
                    raise _TooSlow
                message = process.channel.receive(PROGRESS_S)
                if message is None or message.kind == store_channel.PROGRESS:
                    done = message.values[0] if message is not None else done
                    on_progress(done)
                elif message.kind == store_channel.OPEN_HELD:
                    self._send_held(process.channel, snapshot, message.values[0])
                elif message.kind == store_channel.LOG:
                    _pass_on(message)
                else:
                    return message
        except ChannelClosed:
            raise
        except BaseException:
            if not process.abort():
                self._process = None
            raise

    def _send_held(self, channel: Channel, snapshot: str, number: int) -> None:
        try:
            descriptor, slot = self._held.open(snapshot, number)
        except Exception as error:
            channel.send(*store_channel.describe_failure(error))
            return
        try:
            channel.send(store_channel.HELD, slot, descriptor=descriptor)
        finally:
            os.close(descriptor)


class _Process:
    """A running store process."""

    def __init__(self, flags_descriptor: int, cache: Path, *, is_urgent: bool) -> None:
        self._is_urgent = is_urgent
        #: By repository, how its bucket is reached, as the process was told.
        self._told: dict[str, Mapping[str, str]] = {}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = Channel(ours)
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        command = [
            *_COMMAND,
            f"--socket={theirs.fileno()}",
            f"--flags={flags_descriptor}",
            f"--cache={cache}",
            f"--parent={os.getpid()}",
            *(["--urgent"] if is_urgent else []),
        ]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._complaints,
                cwd="/",
                pass_fds=(theirs.fileno(), flags_descriptor),
                # The signals of a terminal are not for it, and its priority is that of its own session.
                start_new_session=True,
            )
        except BaseException:
            self.channel.close()
            self._complaints.close()
            raise
        finally:
            theirs.close()
        # So that one that has left does not stay a zombie until there is something to do again.
        self._reaper = threading.Thread(target=self._process.wait, name="store process", daemon=True)
        self._reaper.start()

    def tell_access(self, url: str, environment: Mapping[str, str] | None) -> None:
        """Let it reach the bucket of a repository like this; raises `ChannelClosed`."""
        if environment is not None and self._told.get(url) != environment:
            self.channel.send(store_channel.ACCESS, url, dict(environment))
            self._told[url] = environment

    def adapt(self, *, is_urgent: bool) -> bool:
        """Give it the priority that fits; False when it is too slow and cannot be made faster."""
        if is_urgent != self._is_urgent:
            if not set_priority(self._process.pid, is_urgent=is_urgent):
                return False
            self._is_urgent = is_urgent
        return True

    def abort(self) -> bool:
        """Let it give up what it does; whether it can be used again, else it is ended."""
        try:
            self.channel.send(store_channel.ABORT)
            while message := self.channel.receive(ABORT_GRACE_S):
                if message.kind == store_channel.LOG:
                    _pass_on(message)
                elif message.kind in store_channel.ANSWERS:
                    return True
        except ChannelClosed:
            pass
        self.end()
        return False

    def end(self) -> str:
        """End it if it has not ended by itself; how it ended, empty when as it should."""
        self.channel.close()
        self._reaper.join(ABORT_GRACE_S)
        if self._reaper.is_alive():
            self._process.kill()
            self._reaper.join()
            how = "it had to be killed"
        else:
            how = self._describe_end()
        self._complaints.close()
        return how

    @property
    def has_crashed(self) -> bool:
        """Whether it ended by a bug of its own; a process that somebody kills has done nothing wrong."""
        status = self._process.returncode
        return status is not None and (status > 0 or -status in _CRASHES)

    def _describe_end(self) -> str:
        status = self._process.returncode
        if status == 0:
            return ""
        self._complaints.seek(0)
        said = self._complaints.read().decode(errors="replace").strip()
        if said:
            _log.error("the store process %d has said: %s", self._process.pid, said)
        if status < 0:
            try:
                return f"by signal {signal.Signals(-status).name}"
            except ValueError:
                return f"by signal {-status}"
        return f"with status {status}: {said.splitlines()[-1] if said else 'it did not say why'}"


def _pass_on(message: Message) -> None:
    level, name, text = message.values
    logging.getLogger(name).log(level, "%s", text)
