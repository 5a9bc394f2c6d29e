"""One mount from beginning to end: made, greeted, served, and taken away again.

It agrees with the kernel on what both can do, decides how files are opened, and watches over the requests
and the open files while `loop` serves them. Runs in the main thread of a mount process.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from replicate.errors import MountFailed
from replicated.file_systems import is_stacked
from replicated.mount.engine.native import protocol
from replicated.mount.engine.native.answers import Answers
from replicated.mount.engine.native.device import Device, mount
from replicated.mount.engine.native.loop import MAX_WRITE, Loop
from replicated.mount.engine.native.openings import Openings
from replicated.mount.engine.native.operations import Operations
from replicated.mount.engine.native.passthrough import Passthrough, find_obstacle
from replicated.mount.filesystem import Filesystem
from replicated.mount.options import EngineReport, MountOptions

_LOG = logging.getLogger(__name__)

#: What ends a mount; logging out sends the last.
_END_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: How often the watchdog looks.
_WATCH_S: Final = 0.5
#: How long threads may take to end once the mount is gone. Those that hang in a store never do.
_JOIN_S: Final = 1.0

#: Requests that the kernel sends before it waits for answers: read-ahead of several readers.
_MAX_BACKGROUND: Final = 64
_CONGESTION_THRESHOLD: Final = 48
#: The most that a request can ask for: 1 MiB.
_MAX_PAGES: Final = 256
_WANTED: Final = (
    # Not ASYNC_DIO: no signal, not even SIGKILL, ends who waits for such a read.
    protocol.ASYNC_READ
    # Always with attributes, not only while the kernel guesses that somebody wants them.
    | protocol.DO_READDIRPLUS
    | protocol.PARALLEL_DIROPS
    | protocol.MAX_PAGES
)

#: A snapshot with so many files that are so small on average has many small files.
_MANY_ENTRIES: Final = 1000
_SMALL_BYTES: Final = 256 << 10


def serve(
    filesystem: Filesystem,
    directory: bytes,
    *,
    source_name: str,
    options: MountOptions,
    on_mounted: Callable[[EngineReport], None],
) -> None:
    """Mount `filesystem` on `directory` and serve it until it is unmounted or a signal ends it.

    `source_name` is what `mount` and `df` show as the device. Must be called in the main thread, by a
    process that ends afterwards: the signals that end a mount are ignored from then on. Raises `MountFailed`
    when it cannot be mounted, and `RuntimeError` when it cannot be served any more.
    """
    # The signals must be ours before there is a mount to be left behind.
    with _wakening() as (wake, waker):
        device = mount(directory, source_name, allow_other=options.allow_other)
        loop: Loop | None = None
        try:
            passthrough, reason = _greet(device, filesystem, options)
            packer = Answers(filesystem.uid, filesystem.gid)
            openings = None
            if passthrough is not None or not filesystem.is_immutable:
                may_end = options.passthrough == "auto" and _has_many_small(filesystem)
                openings = Openings(filesystem, passthrough, packer.generations, may_end=may_end)
            operations = Operations(filesystem, packer, openings)
            loop = Loop(device.descriptor, operations, options.timeout_s, on_end=lambda: _write_wake(waker))
            loop.start()
            report = EngineReport("native", passthrough is not None, reason)
            threading.Thread(target=on_mounted, args=(report,), name="mounted", daemon=True).start()
            while not _is_woken(wake):
                loop.look_after()
                if openings is not None:
                    openings.watch()
            if loop.failure is not None:
                raise RuntimeError("a thread that serves requests failed") from loop.failure
        finally:
            device.unmount()
            # A thread that still uses the device must not find another file under its number.
            if loop is None or loop.join(_JOIN_S):
                device.close()


def _greet(device: Device, filesystem: Filesystem, options: MountOptions) -> tuple[Passthrough | None, str]:
    """Agree with the kernel on what both can do; whether files are passed through, and if not, why."""
    request = protocol.parse_request(memoryview(os.read(device.descriptor, MAX_WRITE << 1)))
    greeting = protocol.parse_greeting(request.body)
    if greeting.major != protocol.MAJOR or greeting.minor < protocol.MIN_MINOR:
        raise MountFailed(f"this kernel speaks version {greeting.major}.{greeting.minor} of FUSE")
    reason = _find_reason(filesystem, options)
    wanted = _WANTED
    if not reason:
        wanted |= protocol.PASSTHROUGH
    if filesystem.is_immutable:
        wanted |= protocol.CACHE_SYMLINKS
    answer, agreed = protocol.pack_greeting(
        greeting,
        wanted,
        max_background=_MAX_BACKGROUND,
        congestion_threshold=_CONGESTION_THRESHOLD,
        max_write=MAX_WRITE,
        max_pages=_MAX_PAGES,
        stack_depth=_stack_depth(filesystem.backing_directory),
    )
    header = protocol.ANSWER_HEADER.pack(protocol.ANSWER_HEADER.size + len(answer), 0, request.unique)
    os.writev(device.descriptor, [header, answer])
    device.raise_read_ahead()
    passthrough = Passthrough(device)
    if not reason:
        offered = agreed & protocol.PASSTHROUGH
        reason = passthrough.probe() if offered else "this kernel cannot pass files through"
    if reason and options.passthrough == "on":
        raise MountFailed(reason, hint="leave out --passthrough")
    return (None if reason else passthrough), reason


def _stack_depth(directory: Path | None) -> int:
    """How many file systems may lie below ours, which allows as many fewer to be laid over it."""
    # It may be made only when something is put into it.
    for existing in (directory, *directory.parents) if directory is not None else ():
        try:
            descriptor = os.open(existing, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            return 2 if is_stacked(descriptor) else 1
        finally:
            os.close(descriptor)
    return 1


def _find_reason(filesystem: Filesystem, options: MountOptions) -> str:
    """Why files are not to be passed through; empty when they are, if the kernel agrees."""
    if options.passthrough == "off":
        return "passing files through is switched off"
    if options.cache_bytes == 0:
        return "there is no cache from which files could be passed through"
    return find_obstacle()


def _has_many_small(filesystem: Filesystem) -> bool:
    """Whether a snapshot gains more from files that need not be opened than from passing some through."""
    usage = filesystem.usage
    return (
        filesystem.is_immutable
        and usage.entries >= _MANY_ENTRIES
        and usage.size_bytes < usage.entries * _SMALL_BYTES
    )


# -- waiting -----------------------------------------------------------------------------------------


@contextmanager
def _wakening() -> Iterator[tuple[int, int]]:
    """Two ends of a pipe: what is written to the second wakes the first, as do signals that end a mount."""
    wake, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for number in _END_SIGNALS:
        signal.signal(number, _do_nothing)
    # Sent to who holds a lease; without this it would be the end.
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    # Not the handlers, which would have to wait for the main thread and must not take locks.
    previous_waker = signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    try:
        yield wake, waker
    finally:
        # At the end of a session several come, and whoever called has to clean up all the same.
        for number in _END_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(previous_waker)
        os.close(wake)
        # The other end stays open: a thread that is late may write to it.


def _do_nothing(number: int, frame: object) -> None:
    """A handler, so that the signal neither kills nor is forgotten."""


def _write_wake(waker: int) -> None:
    try:
        os.write(waker, b"\0")
    except BlockingIOError:
        pass


def _is_woken(wake: int) -> bool:
    """Wait for a moment; whether the mount is to end."""
    if not select.select([wake], [], [], _WATCH_S)[0]:
        return False
    # Other signals with a handler come here as well.
    return any(number == 0 or number in _END_SIGNALS for number in os.read(wake, 4096))
