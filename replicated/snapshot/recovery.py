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
from typing import NamedTuple

from replicate.errors import CaptureFailed
from replicate.ids import short
from replicated import file_systems
from replicated.journal import Job, Journal
from replicated.processes import current_boot_id
from replicated.snapshot import duplicate
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
from replicated.snapshot.frozen import is_unchanged, open_below
from replicated.snapshot.held import HeldFiles
from replicated.snapshot.spool import Spool

_log = logging.getLogger(__name__)


class _File(NamedTuple):
    """A file or link of a capture."""

    project_directory: bytes
    #: Relative to the project directory.
    path: bytes
    row: Row
    source: Source


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
    for file in _files(job, inline, spool):
        if file.source[0] != HELD:
            continue
        number = file.source[1]
        if held.adopt(job.id, number, None):
            continue  # it was copied into the spool
        descriptor = _open_unchanged(file)
        observer = os.dup(descriptor)  # the other one is given away
        try:
            if not held.adopt(job.id, number, descriptor):
                # Somebody has it open for writing now.
                with _closing(descriptor), _spool_trouble(spool):
                    _copy_held(file, descriptor, spool.path(job.id) / held_name(number))
                held.adopt(job.id, number, None)
            elif not is_unchanged(observer, file.row):
                held.release(job.id, number)
                raise _lost(file, "has changed since")
        finally:
            os.close(observer)


def _complete_spool(job: Job, inline: bytes, spool: Spool, held: HeldFiles) -> None:
    """Read again what may have been in memory only when the daemon ended."""
    if spool.is_complete(job.id):
        return
    #: By name. Files anew: those that are there may be shared with a snapshot that is complete.
    made: dict[str, Path] = {}
    try:
        for file in _files(job, inline, spool):
            kind, *_, name = file.source
            if file.row.size == 0 or kind not in (PACKED, SPOOLED):
                continue  # nothing was kept for it, or not in memory
            descriptor = _open_unchanged(file)
            made[name] = spool.path(job.id) / f"{name}.tmp"
            with _closing(descriptor), _spool_trouble(spool):
                if kind == PACKED:
                    _copy_into(file, descriptor, made[name], file.source[1])
                else:
                    _copy(file, descriptor, made[name])
        with _spool_trouble(spool):
            for name, temporary in made.items():
                temporary.replace(spool.path(job.id) / name)
            if made:
                spool.set_complete(job.id)
    except BaseException:
        for temporary in made.values():
            temporary.unlink(missing_ok=True)
        raise


def _files(job: Job, inline: bytes, spool: Spool) -> Iterator[_File]:
    header, records = read_entries([inline] if inline else spool.read_entries(job.id))
    for record in records:
        if not isinstance(record, CapturedDirectory):
            continue
        for row, source in zip(unpack_rows(record.rows), unpack_sources(record.sources), strict=True):
            yield _File(header.project_directory, os.path.join(record.path, row.name), row, source)


def _open_unchanged(file: _File) -> int:
    """Open a file that is still as it was captured; raises `CaptureFailed`."""
    try:
        descriptor = open_below(file.project_directory, file.path)
    except OSError as error:
        raise _lost(file, f"cannot be opened any more ({error.strerror})") from error
    if is_unchanged(descriptor, file.row):
        return descriptor
    os.close(descriptor)
    raise _lost(file, "has changed since")


def _copy_held(file: _File, descriptor: int, target: Path) -> None:
    """Make the copy of a held file; under its name it counts as durable."""
    temporary = target.with_name(target.name + ".tmp")
    target.parent.mkdir(mode=0o700, exist_ok=True)
    _copy(file, descriptor, temporary)
    with open(temporary, "rb") as copy:
        os.fsync(copy.fileno())
    temporary.replace(target)


def _copy(file: _File, descriptor: int, target: Path) -> None:
    """Make a duplicate of a whole file."""
    with _unchanged(file, descriptor):
        output = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with _closing(output):
            may_share = file_systems.may_share_blocks(descriptor, output)
            if not (may_share and duplicate.reflink(descriptor, output)):
                duplicate.copy(descriptor, output, file.row.size, lambda: None)


def _copy_into(file: _File, descriptor: int, target: Path, offset: int) -> None:
    """Copy a small file to where it lies in a packed one."""
    with _unchanged(file, descriptor):
        output = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with _closing(output):
            os.lseek(output, offset, os.SEEK_SET)
            position = 0
            while copied := os.sendfile(output, descriptor, position, file.row.size - position):
                position += copied


@contextmanager
def _unchanged(file: _File, descriptor: int) -> Iterator[None]:
    """What is copied within is the file as it was captured, or it is lost; an error may be due to that."""
    try:
        yield
    except OSError as error:
        if is_unchanged(descriptor, file.row):
            raise
        raise _lost(file, "has changed since") from error
    if not is_unchanged(descriptor, file.row):
        raise _lost(file, "has changed since")


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


def _lost(file: _File, what: str) -> CaptureFailed:
    shown = os.fsdecode(os.path.join(file.project_directory, file.path))
    return CaptureFailed(
        f"the daemon ended before {shown} was stored, and the file {what}", fields={"path": shown}
    )
