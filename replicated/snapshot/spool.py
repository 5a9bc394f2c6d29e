"""The spool: captured files on their way into a repository, one directory a snapshot.

    <id>/entries        MessagePack stream, one array an entry, parents first, in the order of a walk
    <id>/packed         the content of small files, one after another
    <id>/large-N        one big file each

A directory is complete when its name has no `.tmp`; it is made under `<id>.tmp` and renamed. The
journal, not the spool, says whether it was acknowledged. `capture` writes, `ingest` reads, `jobs`
removes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import msgpack

from replicate.errors import CaptureFailed
from replicate.records import FileType

TEMPORARY_SUFFIX = ".tmp"
ENTRIES_FILE = "entries"
PACKED_FILE = "packed"
NANOSECONDS = 10**9
#: A name of 255 bytes at a depth of 4096 bytes, with room to spare: longer input is not ours.
_MAX_ENTRY_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class SpooledEntry:
    """One captured directory, file or symlink.

    `path` is relative to the project directory ("" is the directory itself). The content of a file is
    `size` bytes at `offset` of the spool file `source`.
    """

    path: bytes
    type: FileType
    mode: int
    mtime_ns: int
    size: int = 0
    target: bytes = b""
    source: str = ""
    offset: int = 0


class Spool:
    """The directory that holds the spools of all snapshots."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def begin(self, identifier: str) -> Path:
        """A new, empty temporary directory for a snapshot; what an earlier attempt left is removed."""
        temporary = self.directory / f"{identifier}{TEMPORARY_SUFFIX}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        return temporary

    def commit(self, identifier: str, *, durable: bool) -> None:
        """Give a finished snapshot its name; with `durable` it survives a power cut on return."""
        temporary = self.directory / f"{identifier}{TEMPORARY_SUFFIX}"
        final = self.directory / identifier
        if durable:
            _fsync_files(temporary)
        # Left by a daemon that died between this rename and its journal commit.
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        if durable:
            _fsync(self.directory)

    def sync(self, identifier: str) -> None:
        """Make a committed spool survive a power cut."""
        _fsync_files(self.directory / identifier)
        _fsync(self.directory)

    def abandon(self, identifier: str) -> None:
        """Remove what `begin` made."""
        shutil.rmtree(self.directory / f"{identifier}{TEMPORARY_SUFFIX}", ignore_errors=True)

    def remove(self, identifier: str) -> None:
        """Remove the spool of a snapshot that is stored, failed or removed; harmless when absent."""
        shutil.rmtree(self.directory / identifier, ignore_errors=True)

    def path(self, identifier: str) -> Path:
        """Where the spool of a snapshot lies."""
        return self.directory / identifier

    def identifiers(self) -> list[str]:
        """The names of all directories there, temporary ones too."""
        return [entry.name for entry in os.scandir(self.directory) if entry.is_dir(follow_symlinks=False)]

    def size_bytes(self) -> int:
        """What the spool occupies on disk."""
        total = 0
        for identifier in self.identifiers():
            try:
                with os.scandir(self.directory / identifier) as entries:
                    total += sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
            except FileNotFoundError:
                continue  # stored in this moment
        return total


class EntryWriter:
    """Appends entries to a spool directory; close before committing the spool."""

    def __init__(self, directory: Path) -> None:
        self._file = (directory / ENTRIES_FILE).open("wb", buffering=1 << 18)
        self._packer = msgpack.Packer(use_bin_type=True)

    def write(self, entry: SpooledEntry) -> None:
        """Append one entry."""
        self._file.write(
            self._packer.pack(
                (
                    entry.path,
                    entry.type,
                    entry.mode,
                    # Seconds and nanoseconds: together they end in 2262.
                    *divmod(entry.mtime_ns, NANOSECONDS),
                    entry.size,
                    entry.target,
                    entry.source,
                    entry.offset,
                )
            )
        )

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def read_entries(directory: Path) -> Iterator[SpooledEntry]:
    """The entries of a spool directory in their order; raises `CaptureFailed` when it is damaged."""
    try:
        with (directory / ENTRIES_FILE).open("rb") as file:
            unpacker = msgpack.Unpacker(
                cast("IO[bytes]", file),
                raw=False,
                use_list=False,
                max_buffer_size=1 << 20,
                max_bin_len=_MAX_ENTRY_BYTES,
                max_str_len=_MAX_ENTRY_BYTES,
            )
            for path, kind, mode, seconds, nanoseconds, *rest in unpacker:
                yield SpooledEntry(path, kind, mode, seconds * NANOSECONDS + nanoseconds, *rest)
            if unpacker.tell() != os.fstat(file.fileno()).st_size:
                raise CaptureFailed(f"the spool is cut short: {directory}")
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise CaptureFailed(f"the spool cannot be read: {directory}: {error}") from error


def _fsync_files(directory: Path) -> None:
    with os.scandir(directory) as entries:
        for entry in entries:
            _fsync(Path(entry.path))
    _fsync(directory)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
