"""Bring one captured snapshot into the repository: chunks, nodes, and what the next capture may rely on.

Directories come before what they hold and are closed after it, so each is made into a node once all
below it are. What the repository has is not read: a content that is known is looked up only when its
directory was stored under another index, and a directory that is as it was stored costs no work at all.
May be repeated from the start at any time. Called by `store_process`, one snapshot at a time a
repository; puts nothing that a reader sees.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple, cast

from replicate.errors import CaptureFailed, RepositoryDamaged
from replicate.ids import SnapshotId
from replicated.contents import FindBases, PendingContent
from replicated.format.canonical import Malformed
from replicated.format.manifest import EMPTY_HASH, MAX_DEPTH, FileContent, RootNode
from replicated.format.metadata import Snapshot
from replicated.references import iter_chunks
from replicated.repository import Repository
from replicated.snapshot.entries import (
    KNOWN,
    LINK,
    CapturedDirectory,
    Header,
    Row,
    SameTree,
    Source,
    pack_children,
    unpack_children,
    unpack_rows,
    unpack_sources,
)
from replicated.snapshot.frozen import FrozenFiles, open_unchanged
from replicated.snapshot.keyframes import Keyframes
from replicated.snapshot.remembered import Remembered
from replicated.snapshot.store_channel import StoredTree
from replicated.snapshot.treecache import CachedDirectory, CachedTree, TreeCache
from replicated.writer import SnapshotWriter

#: Later than any listing: rows that come from the cache were judged when they went there.
_NEVER_RACY_NS: Final = 1 << 80
_EMPTY = FileContent(0, EMPTY_HASH)
_LOOK_UP_BATCH: Final = 500


def ingest(
    repository: Repository,
    snapshot_id: SnapshotId,
    header: Header,
    records: Iterator[CapturedDirectory | SameTree],
    files: FrozenFiles,
    cache: TreeCache | None,
    on_progress: Callable[[int], None] | None = None,
    *,
    keyframes: Keyframes | None = None,
    experiment: str = "",
) -> StoredTree:
    """Store what was captured; what is to be announced and committed (`publishing`).

    When this returns, all chunks are durable and indexed, and nothing is visible to readers yet.
    `on_progress` gets the bytes of content done so far, known ones too. With `keyframes`, tensors may be
    stored as differences to those of earlier snapshots of the `experiment`. Raises `RepositoryError`s and
    `OSError` (retry), and `CaptureFailed` when what was captured is gone or damaged (final).
    """
    with repository.writer(on_progress) as writer:
        # The writer has just brought the index up to date.
        generation = repository.index.generation
        with Remembered(generation) as remembered:
            if keyframes is not None:
                keyframes.forget()  # what an ingest has left that failed
                # Elsewhere reading the chunks before costs more than it saves.
                if repository.store.capabilities.local_root is None:
                    keyframes = None
            series = _Series(keyframes, experiment, generation)
            trees = _Trees(repository, generation, writer, header, files, cache, remembered, series)
            try:
                root = trees.store(snapshot_id, records)
            except (ValueError, Malformed) as error:
                raise CaptureFailed(f"what was captured is not a tree: {error}") from error
            writer.finish()
            if keyframes is not None:
                keyframes.save()
            if cache is not None:
                tree = (header.tree_key, CachedTree(snapshot_id, root, generation))
                remembered.tell(cache, tree if header.tree_key else None)
    return StoredTree(generation, root)


class _Series(NamedTuple):
    """Finds what the tensors of a file may be stored as differences to."""

    keyframes: Keyframes | None
    experiment: str
    generation: int

    def finder(self, path: bytes) -> FindBases | None:
        """For a file at `path`; None when it is to be stored on its own."""
        keyframes = self.keyframes
        if keyframes is None:
            return None
        return lambda layout: keyframes.series(self.experiment, path, layout, self.generation)


@dataclass(slots=True)
class _Totals:
    """What lies below a directory."""

    files: int = 0
    directories: int = 0
    symlinks: int = 0
    size_bytes: int = 0

    def add(self, other: tuple[int, int, int, int]) -> None:
        self.files += other[0]
        self.directories += other[1]
        self.symlinks += other[2]
        self.size_bytes += other[3]

    def as_tuple(self) -> tuple[int, int, int, int]:
        return self.files, self.directories, self.symlinks, self.size_bytes


@dataclass(slots=True)
class _Open:
    """A directory whose directories are still coming."""

    record: CapturedDirectory
    cached: CachedDirectory | None
    #: Files and links are those of `cached`, which was stored under the present index.
    is_same: bool
    #: Of its files and links; not looked at while `is_same`.
    rows: list[Row] = field(default_factory=list)
    #: The content of each file and the target of each link, in the order of the rows.
    contents: list[PendingContent | FileContent | bytes] = field(default_factory=list)
    children: list[tuple[bytes, int, int, bytes]] = field(default_factory=list)
    below: _Totals = field(default_factory=_Totals)


class _Trees:
    """Makes the records of one capture into nodes."""

    def __init__(
        self,
        repository: Repository,
        generation: int,
        writer: SnapshotWriter,
        header: Header,
        files: FrozenFiles,
        cache: TreeCache | None,
        remembered: Remembered,
        series: _Series,
    ) -> None:
        self._repository = repository
        self._generation = generation
        self._writer = writer
        self._header = header
        self._files = files
        self._cache = cache
        self._remembered = remembered
        self._series = series

    def store(self, snapshot_id: SnapshotId, records: Iterator[CapturedDirectory | SameTree]) -> RootNode:
        first = next(records, None)
        if first is None:
            raise ValueError("nothing was captured")
        if isinstance(first, SameTree):
            return self._confirm(snapshot_id, first.root)
        return self._build(first, records)

    def _build(self, first: CapturedDirectory, records: Iterator[CapturedDirectory | SameTree]) -> RootNode:
        if first.path:
            raise ValueError("the project directory itself is missing")
        path: list[bytes] = []
        opened = [self._begin(first)]
        for record in records:
            if isinstance(record, SameTree):
                raise ValueError("a directory and a whole tree")
            *parents, name = record.path.split(b"/")
            while path[: len(parents)] != parents or len(path) > len(parents):
                if not path:
                    raise ValueError(f"a directory comes before the one it is in: {record.path!r}")
                self._close(path.pop(), opened)
            if len(opened) > MAX_DEPTH:
                raise ValueError(f"directories are nested deeper than {MAX_DEPTH}: {name!r}")
            path.append(name)
            opened.append(self._begin(record))
        while path:
            self._close(path.pop(), opened)
        (root,) = opened
        node, totals = self._finish(root)
        return RootNode(node, stat.S_IMODE(first.mode), first.mtime_ns, *totals)

    def _begin(self, record: CapturedDirectory) -> _Open:
        """Store the files of a directory, unless they are those that it had when it was stored before."""
        cached = self._cache.load(self._absolute(record.path)) if self._cache is not None else None
        if cached is not None and cached.generation != self._generation:
            cached = None
        if cached is not None and (record.rows, record.sources) == (cached.rows, cached.sources):
            return _Open(record, cached, is_same=True)
        opened = _Open(record, cached, is_same=False)
        sources = self._unpack(opened)
        known = frozenset(unpack_sources(cached.sources)) if cached is not None else frozenset()
        to_look_up = [
            (row, _known_content(row, source))
            for row, source in zip(opened.rows, sources, strict=True)
            if source[0] == KNOWN and source not in known and row.size
        ]
        missing = self._find_missing([content for _, content in to_look_up])
        opened.contents = [
            self._store_one(record.path, row, source, missing)
            for row, source in zip(opened.rows, sources, strict=True)
        ]
        return opened

    def _unpack(self, opened: _Open) -> tuple[Source, ...]:
        opened.rows = unpack_rows(opened.record.rows)
        sources = unpack_sources(opened.record.sources)
        if len(sources) != len(opened.rows):
            raise ValueError(f"not as many contents as files: {opened.record.path!r}")
        return sources

    def _find_missing(self, contents: list[FileContent]) -> frozenset[FileContent]:
        """Those of the contents that the repository does not have."""
        named = {chunk_id for content in contents if not content.node for chunk_id in content.named_ids()}
        missing = self._repository.index.find_missing(named)
        return frozenset(
            content
            for content in contents
            if (not self._contains(content) if content.node else not missing.isdisjoint(content.named_ids()))
        )

    def _contains(self, content: FileContent) -> bool:
        try:
            return self._writer.contains(content)
        except RepositoryDamaged:
            return False  # the user's file may still be as it was

    def _store_one(
        self, directory: bytes, row: Row, source: Source, missing: frozenset[FileContent]
    ) -> PendingContent | FileContent | bytes:
        if row.is_link != (source[0] == LINK):
            raise ValueError(f"a link without target, or a target without link: {row.name!r}")
        if row.is_link:
            return cast("bytes", source[1])
        if not row.size:
            return _EMPTY
        path = os.path.join(directory, row.name)
        if source[0] != KNOWN:
            with _named(path), self._files.open(source) as read_into:
                return self._writer.begin_content(row.size, read_into, self._series.finder(path))
        content = _known_content(row, source)
        if content not in missing:
            self._writer.add_known(row.size)
            return content
        with _named(path), open_unchanged(self._header.project_directory, path, row) as read_into:
            found = self._writer.add_content(row.size, read_into)
        if found.hash != content.hash:
            shown = os.fsdecode(path)
            raise CaptureFailed(
                f"the repository does not hold the content of {shown} any more, and the file has changed"
                " without a change of its times",
                fields={"path": shown},
            )
        return found

    def _close(self, name: bytes, opened: list[_Open]) -> None:
        """Add the innermost directory to the one that holds it."""
        done = opened.pop()
        node, totals = self._finish(done)
        parent = opened[-1]
        parent.children.append((name, done.record.mode, done.record.mtime_ns, node))
        parent.below.add(totals)
        parent.below.directories += 1

    def _finish(self, done: _Open) -> tuple[bytes, tuple[int, int, int, int]]:
        """The node of a directory and what is below it."""
        children = pack_children(done.children)
        cached = done.cached
        if done.is_same:
            assert cached is not None, "it is the same as something"
            if cached.node and cached.children == children:
                self._writer.add_known(cached.totals[3] - done.below.size_bytes)
                return cached.node, cached.totals
            sources = self._unpack(done)
            done.contents = [
                self._store_one(done.record.path, row, source, frozenset())
                for row, source in zip(done.rows, sources, strict=True)
            ]
        contents = [
            content.result() if isinstance(content, PendingContent) else content for content in done.contents
        ]
        node = self._store_node(done, contents)
        for row in done.rows:
            done.below.add((0, 0, 1, 0) if row.is_link else (1, 0, 0, row.size))
        totals = done.below.as_tuple()
        self._remember(done, contents, children, node, totals)
        return node, totals

    def _store_node(self, done: _Open, contents: Sequence[FileContent | bytes]) -> bytes:
        builder = self._writer.new_directory()
        entries: list[tuple[bytes, Row | tuple[int, int], FileContent | bytes]] = [
            (row.name, row, content) for row, content in zip(done.rows, contents, strict=True)
        ]
        entries += [(name, (mode, mtime_ns), node) for name, mode, mtime_ns, node in done.children]
        entries.sort(key=lambda entry: entry[0])
        for name, about, content in entries:
            if not isinstance(about, Row):
                mode, mtime_ns = about
                builder.add_directory(name, stat.S_IMODE(mode), mtime_ns, cast("bytes", content))
            elif isinstance(content, FileContent):
                builder.add_file(name, stat.S_IMODE(about.mode), about.mtime_ns, content)
            else:
                builder.add_symlink(name, stat.S_IMODE(about.mode), about.mtime_ns, content)
        return builder.finish()

    # For the next capture

    def _remember(
        self,
        done: _Open,
        contents: Sequence[FileContent | bytes],
        children: bytes,
        node: bytes,
        totals: tuple[int, int, int, int],
    ) -> None:
        path = self._absolute(done.record.path)
        if done.record.is_complete:
            self._remembered.add(path, done.record, done.rows, contents, children, node, totals)
        else:
            self._remembered.add_part(path, done.record, done.cached, done.rows, contents)

    def _absolute(self, path: bytes) -> bytes:
        project_directory = self._header.project_directory
        return os.path.join(project_directory, path) if path else project_directory

    # A tree that has not changed

    def _confirm(self, snapshot_id: SnapshotId, root: RootNode) -> RootNode:
        """Make sure that the repository still has a tree."""
        tree = self._cache.load_tree(self._header.tree_key) if self._cache is not None else None
        is_surely_there = tree is not None and tree.root == root and tree.generation == self._generation
        if is_surely_there or self._is_whole(Snapshot(id=snapshot_id, root=root)):
            self._writer.add_known(root.size_bytes)
            return root
        records = self._recall(root)
        found = self._build(next(records), records)
        if found != root:
            raise CaptureFailed(
                "the repository does not hold the files any more, and they have changed since"
            )
        return root

    def _is_whole(self, snapshot: Snapshot) -> bool:
        """Whether all of it is there to stay: what is in condemned packs can be read, but not relied on."""
        chunks = iter_chunks(self._repository, snapshot)
        try:
            while batch := [chunk.id for chunk in islice(chunks, _LOOK_UP_BATCH)]:
                if self._repository.index.find_missing(batch):
                    return False
        except RepositoryDamaged:
            return False
        return True

    def _recall(self, root: RootNode) -> Iterator[CapturedDirectory]:
        """The tree as the cache has it: what of it the repository has lost may still be with the user."""
        pending = [(b"", root.mode, root.mtime_ns)]
        while pending:
            path, mode, mtime_ns = pending.pop()
            cached = self._cache.load(self._absolute(path)) if self._cache is not None else None
            if cached is None:
                shown = os.fsdecode(self._absolute(path))
                raise CaptureFailed(f"the repository does not hold the files of {shown} any more")
            yield CapturedDirectory(
                path=path,
                mode=mode,
                mtime_ns=mtime_ns,
                device=cached.device,
                inode=cached.inode,
                listed_ns=_NEVER_RACY_NS,
                is_complete=True,
                rows=cached.rows,
                sources=cached.sources,
            )
            pending += [
                (os.path.join(path, name), mode, mtime_ns)
                for name, mode, mtime_ns, _ in reversed(unpack_children(cached.children))
            ]


def _known_content(row: Row, source: Source) -> FileContent:
    _, digest, packed = source
    return FileContent.from_entry(row.size, digest, packed)


@contextmanager
def _named(path: bytes) -> Iterator[None]:
    """Say which file it is of which the content is short."""
    try:
        yield
    except EOFError as error:
        shown = os.fsdecode(path)
        raise CaptureFailed(
            f"what was captured of {shown} is shorter than the file was: {error}", fields={"path": shown}
        ) from error
