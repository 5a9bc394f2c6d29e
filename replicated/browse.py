"""The files behind an id: resolve it, check that its snapshots are stored, open the tree.

What `files`, `cat`, `diff`, `checkout` and `mount` have in common. A checkpoint's files are laid over
those that `init` saved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from replicate.errors import NotFound, NotStored, RepositoryDamaged
from replicate.ids import SnapshotId, short
from replicate.records import FileEntry, SnapshotState
from replicated.cache import DEFAULT_CACHE_BYTES, ContentCache
from replicated.experiments import Experiments, Resolution
from replicated.keys import snapshot_of
from replicated.repositories import OpenRepositories
from replicated.repository import Repository
from replicated.tree import Node, Tree, open_tree


@dataclass(frozen=True, slots=True)
class Opened:
    """A reference and the files that it stands for."""

    resolution: Resolution
    snapshot_ids: tuple[SnapshotId, ...]
    tree: Tree


class Browser:
    """Opens the trees of any repository. Thread-safe."""

    def __init__(self, experiments: Experiments, repositories: OpenRepositories, cache: Path) -> None:
        """`cache` is the directory of the user's caches."""
        self._experiments = experiments
        self._repositories = repositories
        self._cache = cache

    def open(self, repository: str, reference: str) -> Opened:
        """The files that a reference stands for.

        Raises what resolving raises, `NotFound` when no files were saved, and `NotStored` when they are
        still being stored (field `state` "captured", field `id` what to wait for) or never will be.
        """
        resolution = self._experiments.resolve(repository, reference)
        identifiers = tuple(snapshot_ids(resolution))
        return Opened(resolution, identifiers, open_tree(self._repositories.get(repository), *identifiers))

    @contextmanager
    def reading_all(
        self, repository: str, opened: Opened, cache_bytes: int | None
    ) -> Iterator[tuple[Tree, ContentCache | None]]:
        """The files of a reference for one who reads all of them, and the cache that has some as a whole.

        Where the repository is not near, they are read through the cache of contents, which may take
        `cache_bytes` (None: the default); elsewhere there is none.
        """
        known = self._repositories.get(repository)
        if known.store.capabilities.is_near:
            yield opened.tree, None
            return
        limit_bytes = DEFAULT_CACHE_BYTES if cache_bytes is None else cache_bytes
        with (
            closing(ContentCache(self._cache / "content", limit_bytes)) as content,
            closing(
                Repository.open_on(known.store, cache=self._cache, create=False, content=content)
            ) as cached,
        ):
            yield open_tree(cached, *opened.snapshot_ids), content


def file_entry(path: bytes, node: Node) -> FileEntry:
    """A node of a tree as users see it."""
    return FileEntry(
        path=os.fsdecode(path),
        type=node.type,
        mode=node.mode,
        size=node.size,
        mtime_ns=node.mtime_ns,
        hash=node.hash.hex(),
        target=os.fsdecode(node.target),
    )


def snapshot_ids(resolution: Resolution) -> Iterator[SnapshotId]:
    """The snapshots that show what a reference means, later ones laid over earlier ones.

    Raises `NotFound` when no files were saved, `NotStored` and `RepositoryDamaged`.
    """
    summary, checkpoint = resolution.summary, resolution.checkpoint
    if summary.state == "failed" and not summary.record.paths:
        # Only a record that cannot be read is both: nobody knows whether there are files.
        raise RepositoryDamaged(
            f"experiment {short(summary.record.id)}: {summary.error}",
            hint="its checkpoints and other experiments are not affected; see `replicate show`",
            fields={"id": summary.record.id},
        )
    has_own_files = checkpoint is not None and bool(checkpoint.paths)
    if summary.record.paths and not (summary.state == "failed" and has_own_files):
        _check_stored(summary.record.id, "experiment", summary.state, summary.error)
        yield snapshot_of(summary.record.id)
    if checkpoint is not None and checkpoint.state == "failed" and not checkpoint.paths:
        raise RepositoryDamaged(
            f"checkpoint {short(checkpoint.id)}: {checkpoint.error}",
            hint="other checkpoints are not affected; see `replicate show`",
            fields={"id": checkpoint.id},
        )
    if checkpoint is not None and checkpoint.paths:
        _check_stored(checkpoint.id, "checkpoint", checkpoint.state, checkpoint.error)
        yield snapshot_of(summary.record.id, checkpoint.id)
    elif not summary.record.paths:
        named = short(checkpoint.id if checkpoint else summary.record.id)
        raise NotFound(
            f"no files were saved with {named}",
            hint="give `path` to init() or checkpoint() to save files",
            fields={"id": checkpoint.id if checkpoint else summary.record.id},
        )


def _check_stored(identifier: str, kind: str, state: SnapshotState, error: str) -> None:
    if state == "captured":
        raise NotStored(
            f"the files of {kind} {short(identifier)} are still being stored",
            hint=f"`replicate flush {short(identifier)}` waits for them",
            fields={"state": state, "id": identifier},
        )
    if state == "failed":
        raise NotStored(
            f"the files of {kind} {short(identifier)} were not stored: {error}",
            hint="its params and metrics are there: `replicate show`",
            fields={"state": state, "id": identifier},
        )
