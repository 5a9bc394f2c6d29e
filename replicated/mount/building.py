"""Puts a mount together: what is shown, what its bytes are read through, and what learns from its readers.

Called by `process` alone, which has it served by an engine. Everything that a mount opens is opened here, and
closed here in reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from replicate.ids import SnapshotId
from replicated.cache import DEFAULT_CACHE_BYTES, ContentCache
from replicated.format.manifest import RootNode
from replicated.mount.filesystem import Filesystem, Usage
from replicated.mount.options import EngineReport, MountOptions
from replicated.mount.reading.assembling import Assembler
from replicated.mount.reading.open_files import OpenFiles
from replicated.mount.reading.scanning import SmallFiles
from replicated.mount.reading.tracing import Recorder, Traces, trace_key
from replicated.mount.reading.watching import Watchers
from replicated.repository import Repository
from replicated.tree import Tree, overlay_roots

if TYPE_CHECKING:
    from replicated.mount.reading.prefetching import Prefetcher
    from replicated.mount.repository_view import RepositoryView

#: Of the memory of a mount process, what nodes and chunks that were read last may take.
_MEMORY_BYTES: Final = 8 << 20
_TRACE: Final = "trace"


class MountedFiles:
    """The snapshots of a repository, later ones laid over earlier ones, as a file system; without any, all.

    A context manager: entering opens the repository at `url`, leaving closes everything. `cache` is the
    directory of the user's caches, `directory` where it will be mounted. Entering raises `NotStored`,
    `InvalidArgument` for a pattern that is none, and what opening a repository raises.
    """

    def __init__(
        self,
        url: str,
        snapshot_ids: Sequence[SnapshotId],
        *,
        cache: Path,
        directory: bytes,
        options: MountOptions,
    ) -> None:
        self._url = url
        self._snapshot_ids = snapshot_ids
        self._cache_directory = cache
        self._directory = directory
        self._options = options
        self._stack = ExitStack()
        self._assembler: Assembler | None = None
        self._is_passthrough = False
        #: What reads in advance, if that was asked for.
        self.prefetcher: Prefetcher | None = None

    def __enter__(self) -> MountedFiles:
        with ExitStack() as stack:
            limit = self._options.cache_bytes
            cache_bytes = DEFAULT_CACHE_BYTES if limit is None else limit
            cache = ContentCache(self._cache_directory / "content", cache_bytes)
            stack.callback(cache.close)
            self.repository = Repository.open(
                self._url,
                cache=self._cache_directory,
                create=False,
                content=cache,
                memory_bytes=_MEMORY_BYTES,
            )
            stack.callback(self.repository.close)
            capabilities = self.repository.store.capabilities
            is_near = capabilities.is_near
            request_bytes = capabilities.max_read_bytes if capabilities.has_costly_requests else None
            snapshots = [self.repository.load_snapshot(snapshot_id) for snapshot_id in self._snapshot_ids]
            roots = [snapshot.root for snapshot in snapshots]
            source = self._open_source(roots)
            files = OpenFiles(source, cache=cache, is_near=is_near, request_bytes=request_bytes)
            stack.callback(files.close)
            self.filesystem = self._show(source, roots, files)
            self.filesystem.backing_directory = self._cache_directory
            small_files = SmallFiles(source.read_files, self.filesystem.following, is_near=is_near)
            stack.callback(small_files.close)
            watchers: list[Assembler | Recorder] = []
            if cache_bytes:
                self._assembler = Assembler(
                    source, cache, is_near=is_near, is_passthrough=False, on_completed=files.look_again
                )
                stack.callback(self._assembler.close)
                watchers.append(self._assembler)
            traces = Traces(self._cache_directory / "traces")
            key = trace_key(source.root)
            # What a pattern has read through the mount itself is not the order of any reader.
            is_hidden = is_near and self._options.prefetch not in ("", _TRACE)
            if key is not None and not is_hidden:
                recorder = Recorder(
                    self.filesystem.path_of,
                    lambda node: self._is_passthrough and cache.has_plain(node.hash),
                    partial(traces.save, key),
                )
                stack.callback(recorder.close)
                watchers.append(recorder)
            files.watch(Watchers(*watchers), small_files)
            if self._options.prefetch:
                self.prefetcher = self._make_prefetcher(source, traces, key, cache, cache_bytes, is_near)
                stack.callback(self.prefetcher.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def begin(self, report: EngineReport) -> None:
        """It can be used now: read in advance what should be."""
        self._is_passthrough = report.passthrough
        if self._assembler is not None:
            self._assembler.is_passthrough = report.passthrough
        if self.prefetcher is not None:
            self.prefetcher.start()

    def _open_source(self, roots: Sequence[RootNode]) -> Tree | RepositoryView:
        if roots:
            return overlay_roots(self.repository, roots)
        # Imported here: mounts of snapshots begin without it.
        from replicated.catalog import Catalog
        from replicated.mount.repository_view import RepositoryView

        # Not the daemon's: a catalog has one process that brings it up to date.
        return RepositoryView(
            self.repository, Catalog(self.repository, self._cache_directory / "mount-catalogs")
        )

    def _show(self, source: Tree | RepositoryView, roots: Sequence[RootNode], files: OpenFiles) -> Filesystem:
        if not isinstance(source, Tree):
            return Filesystem(source, files=files, changing=source.can_change, extended=source.extended)
        # What one snapshot lays over another is counted twice: good enough for `df`.
        usage = Usage(
            size_bytes=sum(root.size_bytes for root in roots),
            entries=1 + sum(root.files + root.directories + root.symlinks for root in roots),
        )
        return Filesystem(source, files=files, usage=usage)

    def _make_prefetcher(
        self,
        source: Tree | RepositoryView,
        traces: Traces,
        key: str | None,
        cache: ContentCache,
        cache_bytes: int,
        is_near: bool,
    ) -> Prefetcher:
        from replicated.mount.reading.prefetching import Prefetcher
        from replicated.mount.reading.selecting import Pattern, Replay

        if self._options.prefetch == _TRACE:
            selection: Pattern | Replay = Replay(traces.load(key) if key is not None else None)
        else:
            selection = Pattern(self._options.prefetch)
        return Prefetcher(
            self.filesystem,
            source,
            selection,
            assembler=self._assembler,
            cache=cache,
            cache_bytes=cache_bytes,
            is_near=is_near,
            directory=self._directory,
        )
