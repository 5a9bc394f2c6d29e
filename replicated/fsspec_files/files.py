"""One file that is open for reading through fsspec, and what it keeps of what was read.

The chunks that were read last are in the memory of the reader. So a file keeps one window only: it spares
small reads the way to the reader, and lets those who read on have more and more in one go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from fsspec.caching import BaseCache, caches
from fsspec.spec import AbstractBufferedFile

from replicated.directories import Node
from replicated.file_reader import FileReader
from replicated.format.manifest import FileContent
from replicated.fsspec_files.failing import os_errors
from replicated.fsspec_files.fetching import Range, read_ranges
from replicated.fsspec_files.opening import opened
from replicated.repository import Repository

if TYPE_CHECKING:
    from replicated.fsspec_files.filesystem import ReplicateFileSystem

#: What is read at first, and at most: a header is cheap, a file fast.
FIRST_WINDOW_BYTES: Final = 128 << 10
MAX_WINDOW_BYTES: Final = 8 << 20


class GrowingWindow(BaseCache):  # type: ignore[misc]  # fsspec has no types
    """Keeps what was read last; whoever reads on gets twice as much with each read. Used by one thread."""

    name = "replicate"

    def __init__(self, blocksize: int, fetcher: Callable[[int, int], bytes], size: int, **_: Any) -> None:
        super().__init__(blocksize, fetcher, size)
        self._data = b""
        self._start = 0
        self._window_bytes = FIRST_WINDOW_BYTES

    def _fetch(self, start: int | None, stop: int | None) -> bytes:
        size: int = self.size
        start = 0 if start is None else start
        stop = size if stop is None else min(stop, size)
        if start >= stop:
            return b""
        end = self._start + len(self._data)
        if self._start <= start and stop <= end:
            return self._data[start - self._start : stop - self._start]
        goes_on = self._start <= start <= end and end > 0
        doubled = min(2 * self._window_bytes, max(self.blocksize, FIRST_WINDOW_BYTES))
        self._window_bytes = doubled if goes_on else FIRST_WINDOW_BYTES
        known = self._data[start - self._start :] if self._start <= start < end else b""
        wanted_stop = min(size, max(stop, start + len(known) + self._window_bytes))
        # Held no longer than needed.
        self._data, self._start = b"", start
        data: bytes = known + self.fetcher(start + len(known), wanted_stop)
        if stop - start >= MAX_WINDOW_BYTES:
            # As large as a window may be: no copy of it is kept.
            self._start = stop
            return data if stop == wanted_stop else data[: stop - start]
        self._data = data
        return data[: stop - start]


caches[GrowingWindow.name] = GrowingWindow


class SnapshotFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """A file of a snapshot. Used by one thread at a time, in any process that has it."""

    DEFAULT_BLOCK_SIZE = MAX_WINDOW_BYTES

    def __init__(
        self,
        fs: ReplicateFileSystem,
        path: str,
        node: Node,
        *,
        block_size: int | str | None = "default",
        cache_type: str = GrowingWindow.name,
        cache_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        assert isinstance(node.content, FileContent), "it is a regular file"
        self._node_content = node.content
        self._reader: tuple[Repository, FileReader] | None = None
        super().__init__(
            fs,
            path,
            "rb",
            block_size,
            cache_type=cache_type,
            cache_options=cache_options,
            size=node.size,
            **options,
        )

    def __reduce__(self) -> tuple[Callable[..., SnapshotFile], tuple[object, ...]]:
        # Older versions of fsspec cannot send files.
        return _reopen, (self.fs, self.path, self.blocksize, self.cache.name, self.loc)

    def _fetch_range(self, start: int, end: int) -> bytes:
        """The bytes between two places, all of them."""
        start, end = max(start, 0), min(end, self.size)
        if start >= end:
            return b""
        with os_errors(self.path):
            repository = opened(self.fs.source).repository
            # After a fork it is another one.
            if self._reader is None or self._reader[0] is not repository:
                self._reader = repository, FileReader(repository, self._node_content)
            return read_ranges(repository, [Range(self._reader[1], start, end)], is_once=False)[0]


def _reopen(
    fs: ReplicateFileSystem, path: str, block_size: int, cache_type: str, position: int
) -> SnapshotFile:
    """A file that was sent here, where it was read to."""
    file: SnapshotFile = fs.open(path, block_size=block_size, cache_type=cache_type)
    file.seek(position)
    return file
