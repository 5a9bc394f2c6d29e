"""A repository: the only module that knows store, format and index together.

Writing goes through `writer` (files and trees become chunks in packs) and then the `put_` methods, in
the order packs → index → snapshot → record; reading goes the other way, so a reader never sees a part
of a snapshot. Who runs when is not decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from replicate.ids import CheckpointId, ExperimentId, SnapshotId
from replicate.records import CheckpointRecord, ExperimentRecord
from replicated.format.manifest import FileContent, RootNode, TreeEntry
from replicated.format.metadata import EndEdit, Heartbeat, Snapshot
from replicated.store.base import Buffer, Store


@dataclass(slots=True)
class WriteStats:
    """What one writer did so far."""

    #: Content that was looked at.
    bytes_done: int = 0
    #: Chunks and tree nodes that the repository did not have, before and after compression.
    new_chunks: int = 0
    new_plain_bytes: int = 0
    new_stored_bytes: int = 0


class SnapshotWriter:
    """Turns files and trees into chunks in packs; nothing becomes visible to readers by it.

    `add_file` may be called from several threads, the rest from one. Use it as a context manager:
    leaving without `finish` throws away what is not in the repository yet. After an error only
    leaving is allowed. Everything may be repeated with another writer: what is there is not stored again.
    """

    stats: WriteStats

    def add_file(self, data: Buffer) -> FileContent:
        """Store the whole content of one file; `data` is borrowed for the call only.

        Raises `RepositoryError`s.
        """
        raise NotImplementedError

    def contains(self, content: FileContent) -> bool:
        """Whether the repository holds this content already (from an earlier `add_file`)."""
        raise NotImplementedError

    def add_tree(self, entries: Iterable[TreeEntry]) -> RootNode:
        """Store a tree.

        Entries come depth-first: each directory before what it holds, siblings by the bytes of their
        names; that is the order of `path.split(b"/")`. An entry with path b"" may come first and gives
        mode and time of the root. Every directory on the way has an entry of its own. Raises
        `ValueError` for another order.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Make durable everything that was added, and findable by readers of the index."""
        raise NotImplementedError

    def __enter__(self) -> SnapshotWriter:
        raise NotImplementedError

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        raise NotImplementedError


class Repository:
    """One open repository. All methods may be called from any thread.

    Every method can raise `RepositoryUnreachable`, every read `RepositoryDamaged` and
    `RepositoryIncompatible`; writes also `RepositoryFull`. All `put_` methods are durable when they
    return and idempotent.
    """

    id: str
    url: str
    store: Store

    @classmethod
    def open(cls, url: str, *, cache: Path, create: bool) -> Repository:
        """Open the repository at `url`; with `create`, make an empty one when there is none.

        `cache` is a directory for what can be rebuilt, shared by all repositories and processes. Raises
        `RepositoryMissing`, `RepositoryIncompatible`, `ConfigError` for a URL that cannot be used.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Give up the local index; may be called twice."""
        raise NotImplementedError

    # Writing

    def writer(self, on_progress: Callable[[int], None] | None = None) -> SnapshotWriter:
        """A new writer. `on_progress` gets the bytes of content done so far, from any thread."""
        raise NotImplementedError

    def put_snapshot(self, snapshot: Snapshot) -> None:
        """Commit a snapshot whose tree a writer has finished: from now on readers see it."""
        raise NotImplementedError

    def put_experiment(self, record: ExperimentRecord) -> None:
        """Write what `init` recorded."""
        raise NotImplementedError

    def put_checkpoint(self, record: CheckpointRecord) -> None:
        """Write a checkpoint, in state stored (after its snapshot) or failed."""
        raise NotImplementedError

    def put_edit(self, experiment_id: ExperimentId, edit_id: str, edit: EndEdit) -> None:
        """Write an edit under an id that the caller chose (`ids.new_id`), so that it can be repeated."""
        raise NotImplementedError

    def put_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Overwrite the sign of life of an experiment; not durable."""
        raise NotImplementedError

    def delete_heartbeat(self, experiment_id: ExperimentId) -> None:
        """Remove the sign of life of an experiment."""
        raise NotImplementedError

    def delete_checkpoint(self, experiment_id: ExperimentId, checkpoint_id: CheckpointId) -> None:
        """Remove a checkpoint's record and then its snapshot; chunks stay until they are collected."""
        raise NotImplementedError

    def delete_experiment(self, experiment_id: ExperimentId) -> None:
        """Remove an experiment with all its checkpoints; chunks stay until they are collected."""
        raise NotImplementedError

    # Reading

    def load_snapshot(self, snapshot_id: SnapshotId) -> Snapshot:
        """The snapshot; raises `NotStored` when it is not in the repository."""
        raise NotImplementedError

    def has_snapshot(self, snapshot_id: SnapshotId) -> bool:
        """Whether the snapshot is in the repository."""
        raise NotImplementedError

    def read_node(self, node_id: bytes) -> bytes:
        """The bytes of a tree node, verified by hash."""
        raise NotImplementedError

    def read_chunk(self, chunk_id: bytes) -> bytes:
        """The plain bytes of a chunk, verified by hash."""
        raise NotImplementedError

    def read_chunks(self, chunk_ids: Sequence[bytes]) -> dict[bytes, bytes]:
        """Several chunks, with as few reads of the store as their places allow."""
        raise NotImplementedError

    def list_experiment_ids(self) -> list[ExperimentId]:
        """Every experiment, in no order."""
        raise NotImplementedError

    def load_experiment(self, experiment_id: ExperimentId) -> ExperimentRecord:
        """The experiment; raises `NotFound`."""
        raise NotImplementedError

    def list_checkpoint_ids(self, experiment_id: ExperimentId) -> list[CheckpointId]:
        """Every checkpoint of an experiment, in no order."""
        raise NotImplementedError

    def load_checkpoint(
        self, experiment_id: ExperimentId, checkpoint_id: CheckpointId
    ) -> CheckpointRecord:
        """The checkpoint; raises `NotFound`."""
        raise NotImplementedError

    def list_edit_ids(self, experiment_id: ExperimentId) -> list[str]:
        """Every edit of an experiment, in no order."""
        raise NotImplementedError

    def load_edit(self, experiment_id: ExperimentId, edit_id: str) -> EndEdit | None:
        """The edit, or None when it is of a kind that this version does not know; raises `NotFound`."""
        raise NotImplementedError

    def list_edits(self, experiment_id: ExperimentId) -> list[EndEdit]:
        """The known edits of an experiment, oldest first."""
        raise NotImplementedError

    def load_heartbeat(self, experiment_id: ExperimentId) -> Heartbeat | None:
        """The latest sign of life, or None when there is none or it cannot be read."""
        raise NotImplementedError

    def iter_chunks(
        self, snapshot: Snapshot, seen: set[bytes] | None = None
    ) -> Iterator[tuple[bytes, int, int]]:
        """(id, plain length, stored length) of every chunk and node of a snapshot, each once.

        What is in `seen` is left out, with all that lies below it, and what is given is added to it.
        """
        raise NotImplementedError

    def total_stored_bytes(self) -> int:
        """Sum of the sizes of all objects in the store."""
        raise NotImplementedError
