"""The spool: captured files on their way into a repository, one directory a snapshot, made when needed.

    <id>/entries        what `entries` describes, when it is too long for the journal
    <id>/packed         the content of small files, one after another with gaps
    <id>/packed-N       hard link to the packed file of another snapshot
    <id>/large-N        one big file each: copy, reflink, or hard link to that of another snapshot
    <id>/held-N         copy of a file that a lease kept from changing (`held`)
    <id>/complete       empty: all that was in memory has been written to `packed` and `large-N`

The journal, not the spool, says whether a snapshot was acknowledged. `capture` and `held` write, `ingest`
reads; whoever ends a snapshot removes it by `Capturer.forget`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from replicate.errors import CaptureFailed

ENTRIES_FILE: Final = "entries"
PACKED_FILE: Final = "packed"
COMPLETE_FILE: Final = "complete"
#: Up to here entries go into the journal: a checkpoint of one held file then makes no spool directory.
INLINE_BYTES: Final = 64 << 10

_WRITE_BYTES = 256 << 10
_READ_BYTES = 1 << 20


class Spool:
    """The directory that holds the spools of all snapshots."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def begin(self, identifier: str) -> Path:
        """The directory for a snapshot, made unless it is there: a rescued file may have been first."""
        directory = self.directory / identifier
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory

    def sync(self, identifier: str) -> None:
        """Make the spool of a snapshot survive a power cut; nothing to do when it has none."""
        directory = self.directory / identifier
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    _fsync(Path(entry.path))
            _fsync(directory)
        except FileNotFoundError:
            if directory.exists():
                raise
        _fsync(self.directory)

    def remove(self, identifier: str) -> None:
        """Remove the spool of a snapshot; harmless when it has none."""
        shutil.rmtree(self.directory / identifier, ignore_errors=True)

    def path(self, identifier: str) -> Path:
        """Where the spool of a snapshot lies, if it has one."""
        return self.directory / identifier

    def is_complete(self, identifier: str) -> bool:
        """Whether all that was in memory when the snapshot was acknowledged is in its spool now."""
        return (self.directory / identifier / COMPLETE_FILE).exists()

    def set_complete(self, identifier: str) -> None:
        """Say that it is."""
        (self.directory / identifier / COMPLETE_FILE).touch(mode=0o600)

    def read_entries(self, identifier: str) -> Iterator[bytes]:
        """The entries in pieces, for `entries.read_entries`; `CaptureFailed` when they are not there."""
        file = self.directory / identifier / ENTRIES_FILE
        try:
            with file.open("rb", buffering=0) as opened:
                while chunk := opened.read(_READ_BYTES):
                    yield chunk
        except FileNotFoundError as error:
            raise CaptureFailed(f"the spool cannot be read: {file}: {error.strerror}") from error

    def identifiers(self) -> list[str]:
        """The names of all directories there."""
        return [entry.name for entry in os.scandir(self.directory) if entry.is_dir(follow_symlinks=False)]

    def size_bytes(self) -> int:
        """What the spool occupies on disk."""
        total = 0
        linked = set()
        for identifier in self.identifiers():
            try:
                with os.scandir(self.directory / identifier) as entries:
                    for entry in entries:
                        info = entry.stat(follow_symlinks=False)
                        if info.st_nlink > 1:
                            if info.st_ino in linked:
                                continue
                            linked.add(info.st_ino)
                        total += info.st_blocks * 512
            except FileNotFoundError:
                continue  # stored in this moment
        return total


class SnapshotSpool:
    """The spool of a capture in progress, on disk from the first `make` on."""

    def __init__(self, spool: Spool, identifier: str) -> None:
        self._spool = spool
        self.identifier = identifier
        self.exists = False
        self._names = 0

    def make(self) -> Path:
        """The directory; raises `CaptureFailed` when it cannot be made."""
        if not self.exists:
            try:
                self._spool.begin(self.identifier)
            except OSError as error:
                raise self.failure(error) from error
            self.exists = True
        return self._spool.path(self.identifier)

    def new_file(self, kind: str) -> Path:
        """A name in the directory that is not in use yet: `kind-N`."""
        path = self.make() / f"{kind}-{self._names}"
        self._names += 1
        return path

    def failure(self, error: OSError) -> CaptureFailed:
        """What to raise when the spool could not be written."""
        return spool_failure(error, self._spool.directory)


class EntriesWriter:
    """Takes the entries of a capture; they come back as bytes, or lie in the spool when they are many."""

    def __init__(self, spool: SnapshotSpool) -> None:
        self._spool = spool
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._descriptor = -1

    def write(self, record: bytes) -> None:
        """Append one packed record; raises `CaptureFailed` when the spool cannot take it."""
        self._pending.append(record)
        self._pending_bytes += len(record)
        if self._pending_bytes > _WRITE_BYTES:
            self._flush()

    def finish(self) -> bytes:
        """All of them, or nothing when they are in the spool."""
        if self._descriptor < 0 and self._pending_bytes <= INLINE_BYTES:
            return b"".join(self._pending)
        self._flush()
        return b""

    def close(self) -> None:
        """Close the file; whatever `finish` gave stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _flush(self) -> None:
        data = memoryview(b"".join(self._pending))
        self._pending.clear()
        self._pending_bytes = 0
        path = self._spool.make() / ENTRIES_FILE
        try:
            if self._descriptor < 0:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._descriptor = os.open(path, flags, 0o600)
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise self._spool.failure(error) from error


def spool_failure(error: OSError, directory: Path) -> CaptureFailed:
    """The error to raise when the spool below `directory` could not be written."""
    try:
        status = os.statvfs(directory)
        free = f" ({status.f_bavail * status.f_frsize >> 20} MiB free)"
    except OSError:
        free = ""
    return CaptureFailed(
        f"cannot write to the spool {directory}: {error.strerror}{free}",
        hint="free some space, or set REPLICATE_HOME to a larger disk",
    )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
