"""Bring one captured snapshot from the spool into the repository: chunks, tree, then the snapshot itself.

May be repeated from the start at any time: what the repository has already is found by hash and not
stored again. Called by `jobs`, one snapshot at a time a repository.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from replicate.errors import CaptureFailed
from replicate.ids import SnapshotId
from replicated.format.manifest import FileContent, TreeEntry
from replicated.format.metadata import Snapshot
from replicated.repository import Repository
from replicated.snapshot.spool import PACKED_FILE, SpooledEntry, read_entries
from replicated.writer import SnapshotWriter

#: Pages of a mapped spool file are given back in steps of this size.
_FORGET_BYTES = 16 << 20


def ingest(
    repository: Repository,
    identifier: SnapshotId,
    spool_directory: Path,
    on_progress: Callable[[int], None] | None = None,
) -> Snapshot:
    """Store the spooled snapshot and return what is to be committed with `put_snapshot`.

    When this returns, all its chunks are durable and indexed, and nothing is visible to readers yet.
    Raises `RepositoryError`s (retry) and `CaptureFailed` when the spool is damaged (final).
    """
    with _SpoolFiles(spool_directory, on_progress) as source, repository.writer(source.report) as writer:
        try:
            root = writer.add_tree(_store_files(writer, source, read_entries(spool_directory)))
        except ValueError as error:
            raise CaptureFailed(f"the spool does not hold a tree: {error}") from error
        writer.finish()
    return Snapshot(id=identifier, root=root)


class _SpoolFiles:
    """The spool's files, mapped: the packed one all the time, of the big ones only the current one."""

    def __init__(self, directory: Path, on_progress: Callable[[int], None] | None) -> None:
        self._directory = directory
        self._on_progress = on_progress
        self._packed: _Mapping | None = None
        self._current: _Mapping | None = None
        #: What the writer's count of bytes was when the current mapping was at its beginning.
        self._base = 0
        self._done = 0

    def __enter__(self) -> _SpoolFiles:
        return self

    def __exit__(self, *_: object) -> None:
        if self._packed is not None:
            self._packed.close()

    def add(self, writer: SnapshotWriter, entry: SpooledEntry) -> FileContent:
        if entry.size == 0:
            return writer.add_file(b"")
        if entry.source != PACKED_FILE:
            mapping = _Mapping(self._directory / entry.source)
            try:
                return self._add(writer, mapping, entry)
            finally:
                mapping.close()
        if self._packed is None:
            self._packed = _Mapping(self._directory / PACKED_FILE)
        return self._add(writer, self._packed, entry)

    def report(self, done: int) -> None:
        """Take note of how far the writer is."""
        self._done = done
        if self._current is not None:
            self._current.forget_before(done - self._base)
        if self._on_progress is not None:
            self._on_progress(done)

    def _add(self, writer: SnapshotWriter, mapping: _Mapping, entry: SpooledEntry) -> FileContent:
        self._current, self._base = mapping, self._done - entry.offset
        try:
            with mapping.view(entry.offset, entry.size) as content:
                return writer.add_file(content)
        finally:
            self._current = None


class _Mapping:
    """One spool file in memory, read from front to back."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            with file.open("rb") as opened:
                self._mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError) as error:
            # Anything else, such as a lack of descriptors or memory, passes.
            raise CaptureFailed(f"the spool file cannot be read: {file}: {error}") from error
        self._mapped.madvise(mmap.MADV_SEQUENTIAL)
        self._forgotten = 0

    @contextmanager
    def view(self, offset: int, size: int) -> Iterator[memoryview]:
        if len(self._mapped) < offset + size:
            raise CaptureFailed(f"the spool file is shorter than it was: {self._file}")
        # Released here: a mapping cannot be closed while views of it are about.
        with memoryview(self._mapped) as whole, whole[offset : offset + size] as content:
            yield content

    def forget_before(self, offset: int) -> None:
        """Give up the memory of what has been stored, so that it does not grow with the file."""
        if offset - self._forgotten >= _FORGET_BYTES:
            length = (offset - self._forgotten) // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapped.madvise(mmap.MADV_DONTNEED, self._forgotten, length)
            self._forgotten += length

    def close(self) -> None:
        self._mapped.close()


def _store_files(
    writer: SnapshotWriter, source: _SpoolFiles, entries: Iterator[SpooledEntry]
) -> Iterator[TreeEntry]:
    for entry in entries:
        yield TreeEntry(
            path=entry.path,
            type=entry.type,
            mode=entry.mode,
            mtime_ns=entry.mtime_ns,
            content=source.add(writer, entry) if entry.type == "file" else None,
            target=entry.target,
        )
