"""The program that serves one mount: `replicated mount-process`, started by `launching`.

It opens the repository itself and is independent of the daemon from then on: the daemon may end and
come back. It registers before it mounts, writes `ready` to standard output once the mount can be used,
and takes itself out of the register when it was unmounted or told to end. Invariant: a file in the register
without a process means a mount that nobody ended.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from replicate.errors import ReplicateError
from replicate.ids import SnapshotId, short
from replicated.heap import collect_rarely, keep_memory
from replicated.mount.building import MountedFiles
from replicated.mount.engine.choosing import choose
from replicated.mount.life.mountinfo import raise_read_ahead
from replicated.mount.life.registry import (
    Registration,
    decode_registration,
    encode,
    remove_registration,
    write_progress,
    write_registration,
)
from replicated.mount.options import EngineReport
from replicated.processes import identify

if TYPE_CHECKING:
    from replicated.mount.reading.prefetching import Prefetcher

_LOG = logging.getLogger(__name__)

READY = b"ready\n"
_END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PROGRESS_INTERVAL_S = 0.2
#: How long closing may take once the mount is gone. It writes down a little, and may wait for the store.
_CLOSE_S: Final = 5.0
#: A reader that tries again and again in a damaged file must not fill the disk with complaints.
_MAX_LOG_RECORDS = 1000
_MAX_LOG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Start:
    """The one argument of the program."""

    #: Directory of the register.
    register: str
    #: Directory of the user's caches.
    cache: str
    #: Where messages go once it is mounted.
    log: str
    registration: Registration

    def encode(self) -> str:
        """As text, for a command line."""
        return json.dumps({**asdict(self), "registration": encode(self.registration)})

    @classmethod
    def decode(cls, text: str) -> Start:
        """What `encode` made."""
        fields = json.loads(text)
        return cls(**{**fields, "registration": decode_registration(fields["registration"])})


def main(argv: Sequence[str]) -> NoReturn:
    """Serve one mount until it ends, and end the process. Reasons for a failure go to standard error."""
    (argument,) = argv
    keep_memory()
    collect_rarely()
    _start_logging()
    # A lease that is broken tells with this signal, which would end us.
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        status = _Mount(Start.decode(argument)).serve()
    except BaseException as error:
        status = _explain(error)
    _end(status)


def _explain(error: BaseException) -> int:
    """Say why this process fails; its exit status."""
    if not isinstance(error, ReplicateError):
        traceback.print_exception(error)
        return 1
    print(error.message, file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return error.exit_status


def _end(status: int) -> NoReturn:
    """End this process, whatever its threads wait for: interpreters wait for those of executors."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _end_late(status: int) -> None:
    time.sleep(_CLOSE_S)
    _LOG.warning("closing took longer than %g s: the store does not answer", _CLOSE_S)
    _end(status)


class _Mount:
    """One mount, and what the register says of it."""

    def __init__(self, start: Start) -> None:
        process = identify(os.getpid())
        assert process is not None, "this process runs"
        self._start = start
        self._order = start.registration.order
        self._register = Path(start.register)
        self._registration = replace(start.registration, process=process)

    def serve(self) -> int:
        """Mount, and serve until that is to end; the exit status. Raises what opening the repository does."""
        # First of all: what is registered is not collected.
        write_registration(self._register, self._registration)
        order = self._order
        with MountedFiles(
            order.repository,
            [SnapshotId(identifier) for identifier in order.snapshot_ids],
            cache=Path(self._start.cache),
            directory=order.target,
            options=order.options,
        ) as files:
            status = self._serve(files)
            # What hangs in the store must not keep this process: a mount that failed is made anew only then.
            threading.Thread(target=_end_late, args=(status,), name="end", daemon=True).start()
        return status

    def _serve(self, files: MountedFiles) -> int:
        """The same with everything opened; failures are told, and become the status."""
        order = self._order
        try:
            choose(order.options).serve(
                files.filesystem,
                order.target,
                source_name=f"replicate:{short(order.shown_id or files.repository.id)}",
                options=order.options,
                on_mounted=partial(self._announce, files),
            )
        except BaseException as error:
            return _explain(error)
        finally:
            # At the end of a session several come, and the rest is to be done all the same.
            for number in _END_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        # Only now: of whoever dies or fails the register tells the daemon.
        if order.made_directory:
            with suppress(OSError):
                os.rmdir(order.target)
        remove_registration(self._register, order.name)
        return 0

    def _announce(self, files: MountedFiles, report: EngineReport) -> None:
        """Tell who started us that the mount can be used, and let go of that one's files."""
        try:
            if report.engine != "native":  # which does it by itself
                raise_read_ahead(self._order.target)
            write_registration(self._register, replace(self._registration, report=report))
            if files.prefetcher is not None:
                write_progress(self._register, self._order.name, files.prefetcher.progress)
            _redirect(2, Path(self._start.log))
            try:
                os.write(1, READY)
            except BrokenPipeError:
                if self._registration.report is None:
                    raise
                # Mounted again for users who had it before: they need no daemon.
            _redirect(1, Path(os.devnull))
        except OSError:
            _LOG.exception("mounted, but not usable")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        files.begin(report)
        if files.prefetcher is not None:
            self._tell_progress(files.prefetcher)

    def _tell_progress(self, prefetcher: Prefetcher) -> None:
        """Write down how far reading in advance is, until it has ended."""
        while True:
            progress = prefetcher.progress
            write_progress(self._register, self._order.name, progress)
            if progress.is_finished:
                return
            time.sleep(_PROGRESS_INTERVAL_S)


def _redirect(descriptor: int, file: Path) -> None:
    """Make a standard descriptor append to `file`, which is put aside first when it has grown big."""
    with suppress(FileNotFoundError):
        if file.is_file() and file.stat().st_size > _MAX_LOG_BYTES:
            file.replace(file.with_name(file.name + ".1"))
    opened = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.dup2(opened, descriptor)
    os.close(opened)


def _start_logging() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s mount %(process)d %(levelname)s %(name)s: %(message)s")
    )
    handler.addFilter(_Bound())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


class _Bound(logging.Filter):
    """Lets a number of records through and then no more."""

    def __init__(self) -> None:
        super().__init__()
        self._passed = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        self._passed += 1
        if self._passed == _MAX_LOG_RECORDS:
            record.msg, record.args = "more than %d messages: silent from here", (_MAX_LOG_RECORDS,)
        return self._passed <= _MAX_LOG_RECORDS
