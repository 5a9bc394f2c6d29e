"""What captures have read that is not stored yet, so that the next capture need not read it again.

Kept by directory, as packed rows and sources: 100,000 files are a few MiB. A file whose stat is the same
is the same file, unless it was changed so soon before it was captured that a further change would show no
other times: such files are not shared. Filled and asked by `capture` and `walk`; it only remembers, the
spool files live as long as their snapshot, and who wants to use one makes a hard link of it in time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final, NamedTuple

from replicated.snapshot.entries import (
    PACKED,
    SPOOLED,
    PlainRow,
    Source,
    unpack_rows,
    unpack_sources,
)
from replicated.snapshot.treecache import is_racy

#: A directory of more captures than this is not likely to be asked for what the oldest had.
_CAPTURES_A_DIRECTORY: Final = 4


class PendingDirectory(NamedTuple):
    """The files of one directory that a capture has in its spool, among others."""

    #: Its absolute path.
    path: bytes
    device: int
    listed_ns: int
    rows: bytes
    sources: bytes


class PendingFiles:
    """What is pending of one directory, by name."""

    def __init__(self, captures: Iterable[tuple[str, PendingDirectory]]) -> None:
        self._files: dict[bytes, tuple[PlainRow, str, Source]] = {}
        for snapshot, directory in captures:
            rows, sources = unpack_rows(directory.rows), unpack_sources(directory.sources)
            for row, source in zip(rows, sources, strict=True):
                if source[0] in (PACKED, SPOOLED) and not is_racy(
                    row.mtime_ns, row.ctime_ns, directory.listed_ns
                ):
                    self._files[row.name] = row, snapshot, source

    def find(self, row: PlainRow) -> tuple[str, Source] | None:
        """The snapshot that has the same file in its spool, and where."""
        found = self._files.get(row[0])
        return found[1:] if found is not None and found[0] == row else None


class Pending:
    """The directories of all captures that are not stored. One lock, a leaf."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._directories: dict[bytes, dict[str, PendingDirectory]] = {}
        self._paths: dict[str, list[bytes]] = {}

    def add(self, snapshot: str, directories: Iterable[PendingDirectory]) -> None:
        """Remember what a capture has in its spool."""
        with self._lock:
            paths = self._paths.setdefault(snapshot, [])
            for directory in directories:
                captures = self._directories.setdefault(directory.path, {})
                captures[snapshot] = directory
                if len(captures) > _CAPTURES_A_DIRECTORY:
                    del captures[next(iter(captures))]
                paths.append(directory.path)

    def find(self, path: bytes, device: int) -> PendingFiles | None:
        """What is pending of the files in a directory; newer captures come before older ones."""
        if not self._directories:
            return None
        with self._lock:
            captures = list(self._directories.get(path, {}).items())
        captures = [item for item in captures if item[1].device == device]
        return PendingFiles(captures) if captures else None

    def forget(self, snapshot: str) -> None:
        """The spool of a snapshot is about to go."""
        with self._lock:
            for path in self._paths.pop(snapshot, ()):
                captures = self._directories.get(path, {})
                captures.pop(snapshot, None)
                if not captures:
                    self._directories.pop(path, None)
