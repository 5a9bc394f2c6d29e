"""A repository: experiments, checkpoints and the snapshots of their files, in a store.

Writing goes through `writer` (files and trees become chunks in packs) and then `publishing`, in the order
packs → index → announcement → record; reading goes the other way, so a reader never sees a part of a
snapshot. Who runs when is not decided here.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from replicate.errors import (
    NotFound,
    NotStored,
    RepositoryDamaged,
    RepositoryUnreachable,
)
from replicate.ids import CheckpointId, ExperimentId, SnapshotId, is_id, short
from replicate.records import CheckpointRecord, ExperimentRecord, utc_now
from replicated.cache import ContentCache
from replicated.format import metadata
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.manifest import ChunkList, DirectoryNode, RootNode
from replicated.format.metadata import Edit, Heartbeat, Snapshot
from replicated.format.settings import RepositorySettings
from replicated.founding import decode_object, forget_segments, found_repository, load_settings
from replicated.index import Index, Location
from replicated.keys import (
    CHECKPOINT_PREFIX,
    EDIT_PREFIX,
    EXPERIMENT_PREFIX,
    HEARTBEAT_PREFIX,
    SETTINGS_KEY,
    SHARD_PREFIX,
    checkpoint_key,
    edit_key,
    experiment_key,
    heartbeat_key,
    id_of_record,
    parse_snapshot_id,
    snapshot_of,
)
from replicated.log import RECENT_S, Log
from replicated.publishing import (
    Publisher,
    publish_checkpoint,
    publish_edit,
    publish_experiment,
    publish_removal,
)
from replicated.reader import ChunkMemory, ChunkReader
from replicated.recent_records import RecentRecords
from replicated.store import open_store
from replicated.store.base import KeyMissing, Store

if TYPE_CHECKING:
    from replicated.writer import SnapshotWriter, WriteMemories

#: Chunks and nodes that a reader keeps in memory.
MEMORY_BYTES: Final = 48 << 20
#: Of all repositories that this process has open together.
_MEMORY = ChunkMemory(MEMORY_BYTES)

#: The clocks of two machines that share a file system may differ by so much, and of one by a tick.
_SETTLED_NS = 2 * 10**9

T = TypeVar("T")


class Repository:
    """One open repository. All methods may be called from any thread.

    Every method can raise `RepositoryUnreachable`, every read `RepositoryDamaged` and
    `RepositoryIncompatible`; writes also `RepositoryFull`. All `put_` methods are durable when they
    return and idempotent.
    """

    def __init__(
        self,
        store: Store,
        settings: RepositorySettings,
        cache: Path,
        content: ContentCache | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        self._store = store
        self._content = None if store.capabilities.is_near else content
        self._settings = settings
        self._log = Log(store)
        self._index = Index(cache / "index", settings.id, store, self._log)
        self._publisher = Publisher(store, self._index)
        self._recent = RecentRecords(store) if store.capabilities.has_costly_requests else None
        memory = _MEMORY if memory_bytes is None else ChunkMemory(memory_bytes)
        self._reader = ChunkReader(store, self._index, memory, self._content)
        #: The bytes of `repository.json`, by which one that was made anew is told from the one before.
        self.identity = b""
        # Guards the memories, which are there once something was written.
        self._lock = threading.Lock()
        self._memories: WriteMemories | None = None

    @classmethod
    def open(
        cls,
        url: str,
        *,
        cache: Path,
        create: bool,
        content: ContentCache | None = None,
        memory_bytes: int | None = None,
    ) -> Repository:
        """Open the repository at `url`; with `create`, make an empty one when there is none.

        `cache` is a directory for what can be rebuilt, shared by all repositories and processes. `content`
        keeps what is read from a store that is not near; it is the caller's and closed by it. Chunks take at
        most `memory_bytes` of memory, else as many as all repositories of the process together.

        Raises `RepositoryMissing`, `RepositoryIncompatible`, `ConfigError` for a URL that cannot be used.
        """
        store = open_store(url, create=create)
        return cls.open_on(store, cache=cache, create=create, content=content, memory_bytes=memory_bytes)

    @classmethod
    def open_on(
        cls,
        store: Store,
        *,
        cache: Path,
        create: bool,
        content: ContentCache | None = None,
        memory_bytes: int | None = None,
    ) -> Repository:
        """The repository in a store that is open already; otherwise like `open`."""
        if create and not store.exists(SETTINGS_KEY):
            found_repository(store)
        settings, identity = load_settings(store)
        opened = cls(store, settings, cache, content, memory_bytes)
        opened.identity = identity
        return opened

    @property
    def id(self) -> str:
        """The random id that it got when it was made."""
        return self._settings.id

    @property
    def url(self) -> str:
        """Where it is."""
        return self._store.url

    @property
    def store(self) -> Store:
        """What holds it."""
        return self._store

    @property
    def content(self) -> ContentCache | None:
        """What keeps contents on this machine's disk; None where the store is as near."""
        return self._content

    @property
    def index(self) -> Index:
        """Which chunk lies where."""
        return self._index

    @property
    def log(self) -> Log:
        """What was written lately."""
        return self._log

    @property
    def publisher(self) -> Publisher:
        """Makes records visible."""
        return self._publisher

    def close(self) -> None:
        """Give up the local index and what is kept in memory; may be called twice."""
        self._reader.close()
        self._index.close()
        with self._lock:
            if self._memories is not None:
                self._memories.close()

    # Writing

    def writer(self, on_progress: Callable[[int], None] | None = None) -> SnapshotWriter:
        """A new writer. `on_progress` gets the bytes of content done so far, from any thread."""
        # Imported here: who only reads begins without all that writing needs.
        from replicated.writer import SnapshotWriter, WriteMemories

        # What others have stored a moment ago would only save space.
        self._index.refresh(RECENT_S if self._store.capabilities.has_costly_requests else 0.0)
        with self._lock:
            self._memories = self._memories or WriteMemories(self._settings.chunker)
            memories = self._memories
        return SnapshotWriter(
            self._store, self._index, self._reader, self._settings.chunker, on_progress, memories
        )

    def check_writable(self) -> None:
        """Raise `RepositoryUnreachable` if it is known that nothing can be written."""
        root = self._store.capabilities.local_root
        if root is not None and not os.access(root, os.W_OK | os.X_OK):
            raise RepositoryUnreachable(
                f"cannot write to the repository in {root}",
                hint="check its permissions, and whether the file system is mounted read-only",
            )

    def put_experiment(self, record: ExperimentRecord, root: RootNode | None = None) -> None:
        """Write what `init` recorded; its files, if it has a `root`, are stored and nothing collects."""
        self._publisher.publish(publish_experiment(record, root))

    def put_checkpoint(self, record: CheckpointRecord, root: RootNode | None = None) -> None:
        """Write a checkpoint, in state stored or failed; its files as for `put_experiment`."""
        self._publisher.publish(publish_checkpoint(record, root))

    def put_edit(self, experiment_id: ExperimentId, edit_id: str, edit: Edit) -> None:
        """Write an edit under an id that the caller chose (`ids.new_id`), so that it can be repeated."""
        self._publisher.publish(publish_edit(experiment_id, edit_id, edit))

    def put_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Overwrite the sign of life of a daemon's runs; not durable."""
        self._store.replace(heartbeat_key(heartbeat.daemon), metadata.encode_heartbeat(heartbeat))

    def delete_heartbeat(self, daemon_id: str) -> None:
        """Remove the sign of life of a daemon's runs."""
        self._store.delete(heartbeat_key(daemon_id))

    def delete_checkpoint(self, experiment_id: ExperimentId, checkpoint_id: CheckpointId) -> None:
        """Remove a checkpoint's record, and so its snapshot; chunks stay until they are collected."""
        self._announce_removal(experiment_id, checkpoint_id)
        self._store.delete(*self._list_announcements(experiment_id, checkpoint_id))
        self._store.delete(
            checkpoint_key(experiment_id, checkpoint_id),
            *self._list_keys(f"{SHARD_PREFIX}{experiment_id}/{checkpoint_id}/"),
        )

    def delete_experiment(self, experiment_id: ExperimentId) -> None:
        """Remove an experiment with all its checkpoints; chunks stay until they are collected.

        The experiment goes last, so that after an interruption it can be named again. May be repeated.
        """
        self._announce_removal(experiment_id, experiment_id)
        self._store.delete(*self._list_announcements(experiment_id))
        self._store.delete(
            *self._list_keys(f"{CHECKPOINT_PREFIX}{experiment_id}/"),
            *self._list_keys(f"{SHARD_PREFIX}{experiment_id}/"),
            *self._list_keys(f"{EDIT_PREFIX}{experiment_id}/"),
            experiment_key(experiment_id),
        )

    def _announce_removal(self, experiment_id: ExperimentId, removed_id: str) -> None:
        """Tell those who do not list all records that one of them is gone."""
        if self._recent is not None:
            self._recent.forget()
        if self._store.capabilities.has_costly_requests:
            self._publisher.announce(publish_removal(experiment_id, removed_id, utc_now()))
        else:
            forget_segments(self._store)

    def _list_announcements(self, experiment_id: ExperimentId, checkpoint_id: str = "") -> list[str]:
        """The keys of what is announced of an experiment, or of a checkpoint of it, but for removals."""
        return [
            info.key
            for item, found in self._log.list().new.items()
            if item.kind != "removal" and item.experiment_id == experiment_id
            if not checkpoint_id or item.id == checkpoint_id
            for info in found
        ]

    def _list_keys(self, prefix: str) -> list[str]:
        return [info.key for info in self._store.list(prefix)]

    # Reading

    def load_snapshot(self, snapshot_id: SnapshotId) -> Snapshot:
        """The snapshot; raises `NotStored` when it is not in the repository."""
        experiment_id, checkpoint_id = parse_snapshot_id(snapshot_id)
        if checkpoint_id is None:
            key = experiment_key(experiment_id)
        else:
            key = checkpoint_key(experiment_id, checkpoint_id)
        try:
            snapshot = self._load(key, metadata.decode_snapshot)
        except KeyMissing:
            snapshot = None
        if snapshot is None:
            identifier = checkpoint_id or experiment_id
            raise NotStored(
                f"the files of {short(identifier)} are not in {self.url}",
                hint="`replicate status` shows what is still being stored",
                fields={"id": identifier},
            )
        self._check_id(key, snapshot.id, snapshot_id)
        return snapshot

    def has_snapshot(self, snapshot_id: SnapshotId) -> bool:
        """Whether the snapshot is in the repository."""
        try:
            self.load_snapshot(snapshot_id)
        except NotStored:
            return False
        return True

    def read_node(self, node_id: bytes) -> bytes:
        """The bytes of a tree node, verified by hash."""
        return self._reader.read(node_id)

    def read_directory(self, node_id: bytes) -> DirectoryNode:
        """A node of a directory, parsed."""
        return self._reader.read_directory(node_id)

    def read_directories(self, node_ids: Sequence[bytes]) -> list[DirectoryNode]:
        """Several nodes of directories in the order given, with few reads of the store."""
        return self._reader.read_directories(node_ids)

    def read_chunk_list(self, node_id: bytes) -> ChunkList:
        """A node of a file's list of chunks, parsed."""
        return self._reader.read_chunk_list(node_id)

    def read_layout(self, node_id: bytes) -> tuple[int, ...]:
        """The lengths in the layout of a gathered file: gap, region, gap, …"""
        return self._reader.read_layout(node_id)

    def read_chunk(self, chunk_id: bytes) -> bytes:
        """The plain bytes of a chunk, verified by hash."""
        return self._reader.read(chunk_id)

    def read_chunks(
        self,
        chunk_ids: Sequence[bytes],
        lengths: Sequence[int],
        *,
        is_once: bool = False,
        is_cached: bool = True,
    ) -> dict[bytes, bytes]:
        """Several chunks that should have these lengths, with as few reads of the store as possible.

        Those that are read `is_once` are not kept in memory, and only where `is_cached` in the cache of
        contents, if there is one.
        """
        return self._reader.read_many(chunk_ids, lengths, is_once=is_once, is_cached=is_cached)

    def list_snapshot_ids(self) -> list[SnapshotId]:
        """What may be a snapshot, in no order: all experiments and checkpoints, also those without files."""
        found = [snapshot_of(experiment_id) for experiment_id in self.list_experiment_ids()]
        for key in self._list_keys(CHECKPOINT_PREFIX):
            experiment_id, _, name = key.removeprefix(CHECKPOINT_PREFIX).partition("/")
            if is_id(experiment_id) and (identifier := id_of_record(name)):
                found.append(snapshot_of(experiment_id, identifier))
        return found

    def experiments_token(self) -> object:
        """What is equal as long as no experiment was added or removed; None where that costs a request."""
        return self._directory_token(EXPERIMENT_PREFIX)

    def details_token(self, experiment_id: ExperimentId) -> object:
        """The same of one experiment, for its checkpoints and edits."""
        checkpoints = self._directory_token(f"{CHECKPOINT_PREFIX}{experiment_id}", may_be_absent=True)
        edits = self._directory_token(f"{EDIT_PREFIX}{experiment_id}", may_be_absent=True)
        return None if checkpoints is None or edits is None else (checkpoints, edits)

    def _directory_token(self, prefix: str, *, may_be_absent: bool = False) -> object:
        root = self._store.capabilities.local_root
        if root is None:
            return None
        try:
            info = os.stat(f"{root}/{prefix}")
        except FileNotFoundError:
            return "absent" if may_be_absent else None
        except OSError:
            return None
        # What changes within the same tick of the clock that stamps directories does not show.
        is_settled = time.time_ns() - info.st_mtime_ns > _SETTLED_NS
        return (info.st_dev, info.st_ino, info.st_mtime_ns) if is_settled else None

    def check_present(self) -> None:
        """Raise `RepositoryMissing` when there is none any more, as where a disk was unmounted."""
        load_settings(self._store)

    def list_experiment_ids(self) -> list[ExperimentId]:
        """Every experiment, in no order."""
        return [ExperimentId(name) for name in self._list_ids(EXPERIMENT_PREFIX)]

    def load_experiment(self, experiment_id: ExperimentId) -> ExperimentRecord:
        """The experiment; raises `NotFound`."""
        key = experiment_key(experiment_id)
        try:
            record = self._load(key, metadata.decode_experiment)
        except KeyMissing:
            raise self._not_found("experiment", experiment_id) from None
        self._check_id(key, record.id, experiment_id)
        return record

    def load_experiment_with_snapshot(
        self, experiment_id: ExperimentId
    ) -> tuple[ExperimentRecord, Snapshot | None]:
        """The experiment and what it says of its files; raises `NotFound`."""

        def decode(data: bytes) -> tuple[ExperimentRecord, Snapshot | None]:
            return metadata.decode_experiment(data), metadata.decode_snapshot(data)

        key = experiment_key(experiment_id)
        try:
            record, snapshot = self._load(key, decode)
        except KeyMissing:
            raise self._not_found("experiment", experiment_id) from None
        self._check_id(key, record.id, experiment_id)
        return record, snapshot

    def list_checkpoint_ids(self, experiment_id: ExperimentId) -> list[CheckpointId]:
        """Every checkpoint of an experiment, in no order."""
        return [CheckpointId(name) for name in self._list_ids(f"{CHECKPOINT_PREFIX}{experiment_id}/")]

    def load_checkpoint(self, experiment_id: ExperimentId, checkpoint_id: CheckpointId) -> CheckpointRecord:
        """The checkpoint; raises `NotFound`."""
        key = checkpoint_key(experiment_id, checkpoint_id)
        try:
            record = self._load(key, metadata.decode_checkpoint)
        except KeyMissing:
            raise self._not_found("checkpoint", checkpoint_id) from None
        self._check_id(key, record.id, checkpoint_id)
        self._check_id(key, record.experiment_id, experiment_id)
        return record

    def list_edit_ids(self, experiment_id: ExperimentId) -> list[str]:
        """Every edit of an experiment, in no order."""
        return self._list_ids(f"{EDIT_PREFIX}{experiment_id}/")

    def load_edit(self, experiment_id: ExperimentId, edit_id: str) -> Edit | None:
        """The edit, or None when it is of a kind that this version does not know; raises `NotFound`."""
        try:
            return self._load(edit_key(experiment_id, edit_id), metadata.decode_edit)
        except KeyMissing:
            raise self._not_found("edit", edit_id) from None

    def list_edits(self, experiment_id: ExperimentId) -> list[Edit]:
        """The known edits of an experiment, oldest first."""
        edits = (self.load_edit(experiment_id, edit_id) for edit_id in self.list_edit_ids(experiment_id))
        return sorted((edit for edit in edits if edit is not None), key=lambda edit: edit.time)

    def list_heartbeats(self, max_age_s: float) -> list[tuple[Heartbeat, float | None]]:
        """The signs of life that can be read, each with its age in seconds where the store tells.

        Those that the store says are older than `max_age_s` are left out, and not read.
        """
        found: list[tuple[Heartbeat, float | None]] = []
        for info in list(self._store.list(HEARTBEAT_PREFIX)):
            if info.age_s is not None and info.age_s > max_age_s:
                continue
            try:
                found.append((metadata.decode_heartbeat(self._store.get(info.key)), info.age_s))
            except (KeyMissing, Malformed, NewerFormat):
                pass  # gone meanwhile, or of another version
        return found

    def locate(self, chunk_ids: Sequence[bytes]) -> dict[bytes, Location]:
        """Where these different chunks lie."""
        return self._reader.locate(chunk_ids)

    def _list_ids(self, prefix: str) -> list[str]:
        names = (id_of_record(info.key.removeprefix(prefix)) for info in self._store.list(prefix))
        return [name for name in names if name]

    def read_record(self, key: str) -> bytes:
        """The bytes of a record, perhaps of a moment ago where requests are costly; raises `KeyMissing`."""
        return self._recent.get(key) if self._recent is not None else self._store.get(key)

    def _load(self, key: str, decode: Callable[[bytes], T]) -> T:
        return decode_object(self.url, key, self.read_record(key), decode)

    def _check_id(self, key: str, found: str, expected: str) -> None:
        if found != expected:
            raise RepositoryDamaged(
                f"{key} in {self.url} is damaged: it holds the record of {short(found)}", fields={"key": key}
            )

    def _not_found(self, what: str, identifier: str) -> NotFound:
        return NotFound(
            f"no {what} {short(identifier)} in {self.url}",
            hint="`replicate ls` shows what there is",
            fields={"id": identifier},
        )
