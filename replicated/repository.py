"""A repository: experiments, checkpoints and the snapshots of their files, in a store.

Writing goes through `writer` (files and trees become chunks in packs) and then the `put_` methods, in
the order packs → index → snapshot → record; reading goes the other way, so a reader never sees a part
of a snapshot. The keys of all objects but packs and index objects are made here. Who runs when is not
decided here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, Protocol, TypeVar

from replicate.errors import (
    InternalError,
    NotFound,
    NotStored,
    RepositoryDamaged,
    RepositoryIncompatible,
    RepositoryMissing,
    RepositoryUnreachable,
)
from replicate.ids import CheckpointId, ExperimentId, SnapshotId, is_id, new_id, short
from replicate.records import CheckpointRecord, ExperimentRecord, utc_now
from replicated.format import metadata
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.manifest import DIRECTORY, FILE, ChunkList, DirectoryNode, FileContent
from replicated.format.metadata import Edit, Heartbeat, Snapshot
from replicated.format.settings import RepositorySettings, decode_settings, encode_settings
from replicated.index import INDEX_PREFIX, Index, Location
from replicated.packer import PACK_PREFIX
from replicated.reader import ChunkMemory, ChunkReader
from replicated.store import open_store
from replicated.store.base import KeyMissing, Store
from replicated.writer import SnapshotWriter, WriteMemories

__all__ = ["Repository", "SnapshotWriter"]

SETTINGS_KEY: Final = "repository.json"
EXPERIMENT_PREFIX: Final = "experiments/"
CHECKPOINT_PREFIX: Final = "checkpoints/"
EDIT_PREFIX: Final = "edits/"
HEARTBEAT_PREFIX: Final = "heartbeats/"
SNAPSHOT_PREFIX: Final = "snapshots/"

#: Chunks and nodes that a reader keeps in memory.
MEMORY_BYTES: Final = 48 << 20
#: Of all repositories that this process has open together.
_MEMORY = ChunkMemory(MEMORY_BYTES)

_ID_NAME = re.compile(r"([0-9a-f]{64})\.json")
_LOOK_UP_BATCH = 500

T = TypeVar("T")


class StoredChunk(NamedTuple):
    """A chunk, or node of a tree, and how it is stored."""

    id: bytes
    plain_length: int
    stored_length: int
    codec: int
    #: Whether it is a node of a tree rather than content of a file.
    is_node: bool
    #: Id of the chunk without which it cannot be decoded, also of one in no snapshot; empty: there is none.
    base: bytes
    #: Name of the pack that it is in.
    pack: bytes


class Seen(Protocol):
    """A set of ids, as `set[bytes]` is one."""

    def __contains__(self, chunk_id: bytes, /) -> bool:
        """Whether it was added."""
        ...

    def add(self, chunk_id: bytes, /) -> object:
        """Add it."""
        ...


class Repository:
    """One open repository. All methods may be called from any thread.

    Every method can raise `RepositoryUnreachable`, every read `RepositoryDamaged` and
    `RepositoryIncompatible`; writes also `RepositoryFull`. All `put_` methods are durable when they
    return and idempotent.
    """

    def __init__(self, store: Store, settings: RepositorySettings, cache: Path) -> None:
        self._store = store
        self._settings = settings
        self._index = Index(cache / "index", settings.id, store)
        self._reader = ChunkReader(store, self._index, _MEMORY)
        self._memories = WriteMemories(settings.chunker)

    @classmethod
    def open(cls, url: str, *, cache: Path, create: bool) -> Repository:
        """Open the repository at `url`; with `create`, make an empty one when there is none.

        `cache` is a directory for what can be rebuilt, shared by all repositories and processes. Raises
        `RepositoryMissing`, `RepositoryIncompatible`, `ConfigError` for a URL that cannot be used.
        """
        return cls.open_on(open_store(url, create=create), cache=cache, create=create)

    @classmethod
    def open_on(cls, store: Store, *, cache: Path, create: bool) -> Repository:
        """The repository in a store that is open already; otherwise like `open`."""
        if create and not store.exists(SETTINGS_KEY):
            _create(store)
        return cls(store, _load_settings(store), cache)

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
    def index(self) -> Index:
        """Which chunk lies where."""
        return self._index

    def close(self) -> None:
        """Give up the local index and what is kept in memory; may be called twice."""
        self._reader.close()
        self._index.close()
        self._memories.close()

    # Writing

    def writer(self, on_progress: Callable[[int], None] | None = None) -> SnapshotWriter:
        """A new writer. `on_progress` gets the bytes of content done so far, from any thread."""
        self._index.refresh()
        return SnapshotWriter(
            self._store, self._index, self._reader, self._settings.chunker, on_progress, self._memories
        )

    def check_writable(self) -> None:
        """Raise `RepositoryUnreachable` if it is known that nothing can be written."""
        root = self._store.capabilities.local_root
        if root is not None and not os.access(root, os.W_OK | os.X_OK):
            raise RepositoryUnreachable(
                f"cannot write to the repository in {root}",
                hint="check its permissions, and whether the file system is mounted read-only",
            )

    def put_snapshot(self, snapshot: Snapshot) -> None:
        """Commit a snapshot whose tree a writer has finished: from now on readers see it."""
        node = [snapshot.root.node]
        if self._index.find_missing(node):
            self._index.refresh()  # another process stored it, and may have made its own index anew
        if self._index.find_missing(node):
            raise InternalError(f"the tree of snapshot {snapshot.id} was not stored before the snapshot")
        self._store.put(_snapshot_key(snapshot.id), [metadata.encode_snapshot(snapshot)])

    def put_experiment(self, record: ExperimentRecord) -> None:
        """Write what `init` recorded."""
        self._store.put(_experiment_key(record.id), [metadata.encode_experiment(record)])

    def put_checkpoint(self, record: CheckpointRecord) -> None:
        """Write a checkpoint, in state stored (after its snapshot) or failed."""
        key = _checkpoint_key(record.experiment_id, record.id)
        self._store.put(key, [metadata.encode_checkpoint(record)])

    def put_edit(self, experiment_id: ExperimentId, edit_id: str, edit: Edit) -> None:
        """Write an edit under an id that the caller chose (`ids.new_id`), so that it can be repeated."""
        self._store.put(_edit_key(experiment_id, edit_id), [metadata.encode_edit(edit)])

    def put_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Overwrite the sign of life of an experiment; not durable."""
        self._store.replace(_heartbeat_key(heartbeat.experiment_id), metadata.encode_heartbeat(heartbeat))

    def delete_heartbeat(self, experiment_id: ExperimentId) -> None:
        """Remove the sign of life of an experiment."""
        self._store.delete(_heartbeat_key(experiment_id))

    def delete_checkpoint(self, experiment_id: ExperimentId, checkpoint_id: CheckpointId) -> None:
        """Remove a checkpoint's record and then its snapshot; chunks stay until they are collected."""
        self._store.delete(
            _checkpoint_key(experiment_id, checkpoint_id), _snapshot_key(SnapshotId(checkpoint_id))
        )

    def delete_experiment(self, experiment_id: ExperimentId) -> None:
        """Remove an experiment with all its checkpoints; chunks stay until they are collected.

        The experiment goes last, so that after an interruption it can be named again. May be repeated.
        """
        checkpoints = self.list_checkpoint_ids(experiment_id)
        self._store.delete(
            _heartbeat_key(experiment_id),
            *(_checkpoint_key(experiment_id, checkpoint) for checkpoint in checkpoints),
            *(_snapshot_key(SnapshotId(checkpoint)) for checkpoint in checkpoints),
            *(_edit_key(experiment_id, edit) for edit in self.list_edit_ids(experiment_id)),
            _experiment_key(experiment_id),
            _snapshot_key(SnapshotId(experiment_id)),
        )

    # Reading

    def load_snapshot(self, snapshot_id: SnapshotId) -> Snapshot:
        """The snapshot; raises `NotStored` when it is not in the repository."""
        try:
            snapshot = self._load(_snapshot_key(snapshot_id), metadata.decode_snapshot)
        except KeyMissing:
            raise NotStored(
                f"the files of {short(snapshot_id)} are not in {self.url}",
                hint="`replicate status` shows what is still being stored",
                fields={"id": snapshot_id},
            ) from None
        self._check_id(_snapshot_key(snapshot_id), snapshot.id, snapshot_id)
        return snapshot

    def has_snapshot(self, snapshot_id: SnapshotId) -> bool:
        """Whether the snapshot is in the repository."""
        return self._store.exists(_snapshot_key(snapshot_id))

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
        self, chunk_ids: Sequence[bytes], lengths: Sequence[int], *, is_once: bool = False
    ) -> dict[bytes, bytes]:
        """Several chunks that should have these lengths, with as few reads of the store as possible.

        Those that are read `is_once` are not kept in memory.
        """
        return self._reader.read_many(chunk_ids, lengths, is_once=is_once)

    def list_snapshot_ids(self) -> list[SnapshotId]:
        """Every snapshot, in no order."""
        names = (info.key.removeprefix(SNAPSHOT_PREFIX) for info in self._store.list(SNAPSHOT_PREFIX))
        return [SnapshotId(name) for name in names if is_id(name)]

    def list_experiment_ids(self) -> list[ExperimentId]:
        """Every experiment, in no order."""
        return [ExperimentId(name) for name in self._list_ids(EXPERIMENT_PREFIX)]

    def load_experiment(self, experiment_id: ExperimentId) -> ExperimentRecord:
        """The experiment; raises `NotFound`."""
        key = _experiment_key(experiment_id)
        try:
            record = self._load(key, metadata.decode_experiment)
        except KeyMissing:
            raise self._not_found("experiment", experiment_id) from None
        self._check_id(key, record.id, experiment_id)
        return record

    def list_checkpoint_ids(self, experiment_id: ExperimentId) -> list[CheckpointId]:
        """Every checkpoint of an experiment, in no order."""
        return [CheckpointId(name) for name in self._list_ids(f"{CHECKPOINT_PREFIX}{experiment_id}/")]

    def load_checkpoint(self, experiment_id: ExperimentId, checkpoint_id: CheckpointId) -> CheckpointRecord:
        """The checkpoint; raises `NotFound`."""
        key = _checkpoint_key(experiment_id, checkpoint_id)
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
            return self._load(_edit_key(experiment_id, edit_id), metadata.decode_edit)
        except KeyMissing:
            raise self._not_found("edit", edit_id) from None

    def list_edits(self, experiment_id: ExperimentId) -> list[Edit]:
        """The known edits of an experiment, oldest first."""
        edits = (self.load_edit(experiment_id, edit_id) for edit_id in self.list_edit_ids(experiment_id))
        return sorted((edit for edit in edits if edit is not None), key=lambda edit: edit.time)

    def load_heartbeat(self, experiment_id: ExperimentId) -> Heartbeat | None:
        """The latest sign of life, or None when there is none or it cannot be read."""
        try:
            return metadata.decode_heartbeat(self._store.get(_heartbeat_key(experiment_id)))
        except (KeyMissing, Malformed, NewerFormat):
            return None

    def iter_chunks(self, snapshot: Snapshot, seen: Seen | None = None) -> Iterator[StoredChunk]:
        """Every chunk and node of a snapshot, each once.

        What is in `seen` is left out, with all that lies below it, and what is given is added to it. Raises
        `RepositoryDamaged` for one that is in no index, or whose base is in none.
        """
        references = self._iter_references(snapshot, set() if seen is None else seen)
        while batch := dict(islice(references, _LOOK_UP_BATCH)):
            places = self._reader.locate(list(batch))
            bases = {place.base for place in places.values() if place.base}
            if self._index.find_missing(bases):
                self._reader.locate(sorted(bases))
            for chunk_id, place in places.items():
                yield StoredChunk(
                    chunk_id,
                    place.plain_length,
                    place.stored_length,
                    place.codec,
                    batch[chunk_id],
                    place.base,
                    place.pack,
                )

    def locate(self, chunk_ids: Sequence[bytes]) -> dict[bytes, Location]:
        """Where these different chunks lie."""
        return self._reader.locate(chunk_ids)

    def _iter_references(self, snapshot: Snapshot, seen: Seen) -> Iterator[tuple[bytes, bool]]:
        """(id, is node) of all nodes and chunks below a snapshot not in `seen`, which they are added to."""
        directories = [snapshot.root.node]
        while directories:
            node_id = directories.pop()
            if node_id in seen:
                continue
            seen.add(node_id)
            yield node_id, True
            node = self.read_directory(node_id)
            directories.extend(child.node for child in node.children)
            for entry in node.entries:
                if entry.type == DIRECTORY:
                    directories.append(entry.hash)
                elif entry.type == FILE:
                    content = FileContent.from_entry(entry.size, entry.hash, entry.content)
                    yield from self._iter_content(content, seen)

    def _iter_content(self, content: FileContent, seen: Seen) -> Iterator[tuple[bytes, bool]]:
        lists: list[bytes] = []
        ids: list[bytes] = []
        if content.layout and content.layout not in seen:
            seen.add(content.layout)
            yield content.layout, True
        if content.node:
            lists.append(content.node)
        elif content.size:
            ids.extend(content.ids())
        while lists or ids:
            for chunk_id in ids:
                if chunk_id not in seen:
                    seen.add(chunk_id)
                    yield chunk_id, False
            ids = []
            if lists and (node_id := lists.pop()) not in seen:
                seen.add(node_id)
                yield node_id, True
                node = self.read_chunk_list(node_id)
                (ids if node.level == 0 else lists).extend(node.split_ids())

    def _list_ids(self, prefix: str) -> list[str]:
        names = (_ID_NAME.fullmatch(info.key.removeprefix(prefix)) for info in self._store.list(prefix))
        return [name.group(1) for name in names if name]

    def _load(self, key: str, decode: Callable[[bytes], T]) -> T:
        return _decode(self._store, key, decode)

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


def _create(store: Store) -> None:
    """Make an empty repository, unless somebody else does at the same moment."""
    _refuse_headless(store)
    settings = RepositorySettings(id=new_id(), created=utc_now())
    try:
        store.put(SETTINGS_KEY, [encode_settings(settings)])
    except RepositoryDamaged:
        # Another one is there by now; whether it is good shows when it is loaded.
        pass


def _refuse_headless(store: Store) -> None:
    """Raise `RepositoryDamaged` when there are objects but not the one that says what they are."""
    for prefix in (SNAPSHOT_PREFIX, EXPERIMENT_PREFIX, INDEX_PREFIX, PACK_PREFIX):
        if next(store.list(prefix), None) is not None:
            raise RepositoryDamaged(
                f"{SETTINGS_KEY} is missing in {store.url}, though there are objects below {prefix}",
                hint="put it back from a copy; without it nothing is written there",
                fields={"key": SETTINGS_KEY},
            )


def _load_settings(store: Store) -> RepositorySettings:
    try:
        return _decode(store, SETTINGS_KEY, decode_settings)
    except KeyMissing:
        _refuse_headless(store)
        raise RepositoryMissing(
            f"no repository at {store.url}: there is no {SETTINGS_KEY}",
            hint="check the URL; the first `replicate.init` there makes a repository",
        ) from None


def _decode(store: Store, key: str, decode: Callable[[bytes], T]) -> T:
    """A decoded object; raises `KeyMissing`, `RepositoryDamaged`, `RepositoryIncompatible`."""
    data = store.get(key)
    try:
        return decode(data)
    except Malformed as error:
        raise RepositoryDamaged(
            f"{key} in {store.url} is damaged: {error}",
            hint="the rest of the repository can still be read",
            fields={"key": key},
        ) from error
    except NewerFormat as error:
        raise RepositoryIncompatible(
            f"{key} in {store.url} was written by a newer version: {error}",
            hint="upgrade replicate-vcs; nothing was changed",
            fields={"key": key},
        ) from error


def _experiment_key(experiment_id: ExperimentId) -> str:
    return f"{EXPERIMENT_PREFIX}{experiment_id}.json"


def _checkpoint_key(experiment_id: ExperimentId, checkpoint_id: CheckpointId) -> str:
    return f"{CHECKPOINT_PREFIX}{experiment_id}/{checkpoint_id}.json"


def _edit_key(experiment_id: ExperimentId, edit_id: str) -> str:
    return f"{EDIT_PREFIX}{experiment_id}/{edit_id}.json"


def _heartbeat_key(experiment_id: ExperimentId) -> str:
    return f"{HEARTBEAT_PREFIX}{experiment_id}.json"


def _snapshot_key(snapshot_id: SnapshotId) -> str:
    return f"{SNAPSHOT_PREFIX}{snapshot_id}"
