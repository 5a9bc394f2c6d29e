"""Bring one captured snapshot from the spool into the repository: chunks, tree, then the snapshot itself.

May be repeated from the start at any time: what the repository has already is found by hash and not
stored again. Called by `jobs`, one snapshot at a time a repository.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from replicate.errors import CaptureFailed
from replicate.ids import SnapshotId
from replicated.format.manifest import FileContent, TreeEntry
from replicated.format.metadata import Snapshot
from replicated.repository import Repository, SnapshotWriter
from replicated.snapshot.spool import PACKED_FILE, SpooledEntry, read_entries


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
    with ExitStack() as stack:
        source = stack.enter_context(_SpoolFiles(spool_directory))
        writer = stack.enter_context(repository.writer(on_progress))
        root = writer.add_tree(_store_files(writer, source, read_entries(spool_directory)))
        writer.finish()
    return Snapshot(id=identifier, root=root)


class _SpoolFiles:
    """The spool's files, mapped; the packed file stays mapped, of the big ones only the current one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._packed: mmap.mmap | None = None

    def __enter__(self) -> _SpoolFiles:
        return self

    def __exit__(self, *_: object) -> None:
        if self._packed is not None:
            self._packed.close()

    def add(self, writer: SnapshotWriter, entry: SpooledEntry) -> FileContent:
        if entry.size == 0:
            return writer.add_file(b"")
        if entry.source != PACKED_FILE:
            with _map(self._directory / entry.source) as mapped:
                return _add(writer, mapped, 0, entry)
        if self._packed is None:
            self._packed = _map(self._directory / PACKED_FILE)
        return _add(writer, self._packed, entry.offset, entry)


def _add(writer: SnapshotWriter, mapped: mmap.mmap, offset: int, entry: SpooledEntry) -> FileContent:
    if len(mapped) < offset + entry.size:
        raise CaptureFailed(f"the spool file {entry.source} is shorter than it was")
    # Released here: a mapping cannot be closed while views of it are about.
    with memoryview(mapped) as whole, whole[offset : offset + entry.size] as content:
        return writer.add_file(content)


def _map(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CaptureFailed(f"the spool file cannot be read: {file}: {error}") from error
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    return mapped


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
