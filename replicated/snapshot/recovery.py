"""After a restart: take up again what the last daemon had captured and kept outside the spool.

A leased file lived only in the user's file, and bytes that were still in memory are gone. Where the
file is as the entries say, nothing is lost: it is leased again, or read again. Where it has changed, that
one snapshot is lost, and says so. Called by `daemon`, once, before anybody is answered: the training
goes on meanwhile.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from replicate.errors import CaptureFailed
from replicate.ids import short
from replicated.journal import Job, Journal
from replicated.processes import current_boot_id
from replicated.snapshot.entries import (
    HELD,
    PACKED,
    SPOOLED,
    CapturedDirectory,
    Row,
    Source,
    held_name,
    read_entries,
    unpack_rows,
    unpack_sources,
)
from replicated.snapshot.held import HeldFiles
from replicated.snapshot.spool import Spool

_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_COPY_STEP_BYTES = 64 << 20

_log = logging.getLogger(__name__)


def recover(journal: Journal, spool: Spool, held: HeldFiles) -> dict[str, str]:
    """Take up all captured jobs; those that cannot be completed, by id, and why."""
    jobs = [job for job in journal.captured() if job.has_files and _is_believed(job)]
    lost: dict[str, str] = {}
    # Leases first: they take microseconds, and from then on nothing can change any more.
    for take_up in (_hold_again, _complete_spool):
        for job in jobs:
            if job.id in lost:
                continue
            try:
                take_up(job, journal.entries(job.id), spool, held)
            except CaptureFailed as error:
                lost[job.id] = error.message
                _log.error("%s %s is lost: %s", job.kind, short(job.id), error.message)
    return lost


def _is_believed(job: Job) -> bool:
    # What was captured before the machine restarted was never safe on disk: its job fails by itself.
    return job.is_durable or job.boot_id == current_boot_id()


def _hold_again(job: Job, inline: bytes, spool: Spool, held: HeldFiles) -> None:
    for path, row, source in _files(job, inline, spool):
        if source[0] != HELD:
            continue
        number = source[1]
        if held.adopt(job.id, number, None):
            continue  # it was copied into the spool
        descriptor = _open_unchanged(path, row)
        observer = os.dup(descriptor)  # the other one is given away
        try:
            if not held.adopt(job.id, number, descriptor):
                # Somebody has it open for writing now.
                with _closing(descriptor), _spool_trouble(spool):
                    _copy_held(path, descriptor, row, spool.path(job.id) / held_name(number))
                held.adopt(job.id, number, None)
            elif not _is_unchanged(observer, row):
                held.release(job.id, number)
                raise _lost(path, "has changed since")
        finally:
            os.close(observer)


def _complete_spool(job: Job, inline: bytes, spool: Spool, held: HeldFiles) -> None:
    """Read again what may have been in memory only when the daemon ended."""
    if spool.is_complete(job.id):
        return
    #: By name. Files anew: those that are there may be shared with a snapshot that is complete.
    made: dict[str, Path] = {}
    try:
        for path, row, source in _files(job, inline, spool):
            if row.size == 0:
                continue  # nothing was kept for it
            if source[0] == PACKED:
                offset, name = source[1:]
            elif source[0] == SPOOLED:
                offset, name = 0, source[1]
            else:
                continue
            descriptor = _open_unchanged(path, row)
            made[name] = spool.path(job.id) / f"{name}.tmp"
            with _closing(descriptor), _spool_trouble(spool):
                _copy(path, descriptor, row, made[name], offset)
        with _spool_trouble(spool):
            for name, temporary in made.items():
                temporary.replace(spool.path(job.id) / name)
            if made:
                spool.set_complete(job.id)
    except BaseException:
        for temporary in made.values():
            temporary.unlink(missing_ok=True)
        raise


def _files(job: Job, inline: bytes, spool: Spool) -> Iterator[tuple[bytes, Row, Source]]:
    """The files and links of a capture, by their absolute paths."""
    header, records = read_entries([inline] if inline else spool.read_entries(job.id))
    for record in records:
        if not isinstance(record, CapturedDirectory):
            continue
        directory = os.path.join(header.project_directory, record.path)
        for row, source in zip(unpack_rows(record.rows), unpack_sources(record.sources), strict=True):
            yield os.path.join(directory, row.name), row, source


def _open_unchanged(path: bytes, row: Row) -> int:
    """Open a file that is still as it was captured; raises `CaptureFailed`."""
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        raise _lost(path, f"cannot be opened any more ({error.strerror})") from error
    if _is_unchanged(descriptor, row):
        return descriptor
    os.close(descriptor)
    raise _lost(path, "has changed since")


def _is_unchanged(descriptor: int, row: Row) -> bool:
    info = os.fstat(descriptor)
    found = (info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    return found == (row.inode, row.size, row.mtime_ns, row.ctime_ns)


def _copy_held(path: bytes, descriptor: int, row: Row, target: Path) -> None:
    """Make the copy of a held file; under its name it counts as durable."""
    temporary = target.with_name(target.name + ".tmp")
    target.parent.mkdir(mode=0o700, exist_ok=True)
    _copy(path, descriptor, row, temporary, 0)
    with open(temporary, "rb") as copy:
        os.fsync(copy.fileno())
    temporary.replace(target)


def _copy(path: bytes, descriptor: int, row: Row, target: Path, offset: int) -> None:
    output = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        position = 0
        os.lseek(output, offset, os.SEEK_SET)
        while position < row.size:
            copied = os.sendfile(output, descriptor, position, min(row.size - position, _COPY_STEP_BYTES))
            if copied == 0:
                break
            position += copied
    finally:
        os.close(output)
    if position != row.size or not _is_unchanged(descriptor, row):
        raise _lost(path, "has changed since")


@contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _spool_trouble(spool: Spool) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CaptureFailed(f"cannot write to the spool {spool.directory}: {error.strerror}") from error


def _lost(path: bytes, what: str) -> CaptureFailed:
    shown = os.fsdecode(path)
    return CaptureFailed(
        f"the daemon ended before {shown} was stored, and the file {what}", fields={"path": shown}
    )
