"""Reads files of a mount before anybody asks for them, by a pattern or in the order of an earlier run.

Started by `process` when the mount can be used, in threads of its own; `selecting` says what is read. Where
the repository is not near, that goes into the cache on disk: large files whole, small ones as chunks. Where
it is near, small files are read through the mount itself (`through`), so that the kernel has them.
Invariants: progress says what is done and nothing else; when not everything could be read, or would not
stay, it says why.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from replicate.errors import ReplicateError, RepositoryUnreachable
from replicate.phrases import escape, format_size, plural
from replicated.file_reader import FileReader
from replicated.mount.errors import Refused
from replicated.mount.filesystem import Filesystem
from replicated.mount.life.registry import PrefetchProgress
from replicated.mount.reading.assembling import Assembler
from replicated.mount.reading.background import END_TIMEOUT_S, Stopped, Workers
from replicated.mount.reading.open_files import MIN_PLAIN_BYTES, Part, Readable, Reader
from replicated.mount.reading.selecting import Selection, Wanted
from replicated.mount.reading.through import read_through

if TYPE_CHECKING:
    from replicated.tree import Node

_LOG = logging.getLogger(__name__)

#: Small files that are read together, and threads that do that: requests of a far repository wait for the
#: network, those of a near one for each other.
BATCH_FILES: Final = 512
BATCH_BYTES: Final = 2 << 20
THREADS_FAR: Final = 4
THREADS_NEAR: Final = 2
#: A large file of a far repository is fetched in ranges, several at a time.
RANGE_BYTES: Final = 8 << 20
RANGES_AHEAD: Final = 3
#: What of the cache, and of the memory that is free for the kernel's, may be filled by one mount: more would
#: push out what was read first.
CACHE_SHARE: Final = 0.9
MEMORY_SHARE: Final = 0.5

_PAUSE_S: Final = 0.2
_AVAILABLE: Final = b"MemAvailable:"


class Prefetchable(Readable, Protocol):
    """What files are read from in advance, such as a `Tree`."""

    def read_files(self, nodes: Sequence[Node]) -> list[bytes]:
        """The contents of small files, with few reads of the store."""
        ...


class ChunkCache(Protocol):
    """The part of `ContentCache` that tells which chunks are in it."""

    def recall(self, chunk_ids: Sequence[bytes]) -> Mapping[bytes, bytes]:
        """Those of the chunks that are there."""
        ...


class _Ended(Exception):
    """No more is read, for the reason that the text says."""


class Prefetcher:
    """Reads files of one mount in advance, once.

    `directory` is where it is mounted, `cache_bytes` what the cache may take, 0 without one; `assembler`
    completes files in it.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        source: Prefetchable,
        selection: Selection,
        *,
        assembler: Assembler | None,
        cache: ChunkCache,
        cache_bytes: int,
        is_near: bool,
        directory: bytes,
    ) -> None:
        self._filesystem = filesystem
        self._source = source
        self._selection = selection
        self._assembler = assembler if cache_bytes else None
        self._cache = cache
        self._is_near = is_near
        self._directory = directory
        self._cache_left = int(cache_bytes * CACHE_SHARE)
        self._cache_bytes = cache_bytes
        self._memory_left = int(_available_memory() * MEMORY_SHARE)
        self._workers = Workers("prefetch", THREADS_NEAR if is_near else THREADS_FAR, capacity=8)
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        #: Guards the progress; a leaf.
        self._lock = threading.Lock()
        self._progress = PrefetchProgress()
        self._failures = 0
        self._failure = ""
        self._reason = ""

    @property
    def progress(self) -> PrefetchProgress:
        """How far it has come."""
        return self._progress

    def start(self) -> None:
        """Begin; to be called once, when the mount can be used."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self._progress = replace(self._progress, is_finished=True, error=str(error))

    def close(self) -> None:
        """Stop at once; may be called twice, and without `start`."""
        self._workers.close()
        if self._thread.is_alive():
            self._thread.join(END_TIMEOUT_S)

    # In the thread of this

    def _run(self) -> None:
        reason = ""
        try:
            self._read_all()
        except _Ended as error:
            reason = str(error)
        except Stopped:
            reason = "the mount ended"
        except ReplicateError as error:
            reason = error.message
        except Exception:
            _LOG.exception("reading in advance has failed")
            reason = "it failed, the log says how"
        with self._lock:
            reason = reason or self._reason
            if not reason and self._failures:
                reason = f"{plural(self._failures, 'file')} could not be read: {self._failure}"
            self._progress = replace(self._progress, is_finished=True, error=reason)
        self._workers.close()

    def _read_all(self) -> None:
        if not self._is_near and self._assembler is None:
            raise _Ended("there is no cache to read into: `cache_size` is off")
        self._count()
        batch: list[Wanted] = []
        batch_bytes = 0
        try:
            for wanted in self._selection.iter_wanted(self._filesystem):
                self._check()
                if wanted.size >= MIN_PLAIN_BYTES:
                    self._read_large(wanted)
                    continue
                self._reserve(wanted, is_cached=not self._is_near)
                if batch and (len(batch) == BATCH_FILES or batch_bytes + wanted.size > BATCH_BYTES):
                    self._workers.put(partial(self._read_small, batch))
                    batch, batch_bytes = [], 0
                batch.append(wanted)
                batch_bytes += wanted.size
        finally:
            # Also when it ends early: what was promised before that is read.
            if batch and not self._workers.is_closed:
                self._workers.put(partial(self._read_small, batch))
            self._workers.wait_idle()

    def _count(self) -> None:
        files = size_bytes = 0
        for wanted in self._selection.iter_wanted(self._filesystem):
            files += wanted.files
            size_bytes += wanted.length
            if not files % 256:
                self._check()
                self._advance(files_total=files, bytes_total=size_bytes)
        self._advance(files_total=files, bytes_total=size_bytes)
        if not files:
            raise _Ended(self._selection.why_nothing)

    def _check(self) -> None:
        self._workers.check()
        if self._reason:
            raise _Ended(self._reason)

    def _reserve(self, wanted: Wanted, *, is_cached: bool) -> None:
        """Count on room for something; it ends where there is none left."""
        if is_cached:
            self._cache_left -= wanted.length
            if self._cache_left < 0:
                raise _Ended(
                    f"the cache is full: it may take {format_size(self._cache_bytes)} (`cache_size`)"
                )
        else:
            self._memory_left -= wanted.length
            if self._memory_left < 0:
                raise _Ended("the memory is full: more would push out what was read first")

    def _read_large(self, wanted: Wanted) -> None:
        # The cache takes no file that is larger than half of it.
        fits = wanted.size * 2 <= self._cache_bytes
        if wanted.length == wanted.size and self._assembler is not None and fits:
            self._reserve(wanted, is_cached=True)
            self._attempt([wanted], self._complete)
        elif self._is_near:
            self._reserve(wanted, is_cached=False)
            self._workers.put(partial(self._attempt, [wanted], self._read_through))
        else:
            self._reserve(wanted, is_cached=True)
            self._attempt([wanted], self._fetch)

    def _complete(self, files: Sequence[Wanted]) -> None:
        assert self._assembler is not None, "asked before"
        for wanted in files:
            node = self._filesystem.node_of(wanted.inode)
            parts = None if self._is_near else self._fetch_ahead(node, 0, wanted.size, is_cached=False)
            if not self._assembler.complete(node, parts):
                # There is no room, or another process makes it just now.
                self._check()
                (self._read_through if self._is_near else self._fetch)([wanted])

    def _fetch(self, files: Sequence[Wanted]) -> None:
        """Let the chunks of large files come into the cache."""
        for wanted in files:
            node = self._filesystem.node_of(wanted.inode)
            for _ in self._fetch_ahead(node, wanted.offset, wanted.length, is_cached=True):
                self._check()
            self._check_kept(node, wanted)

    def _fetch_ahead(self, node: Node, offset: int, length: int, *, is_cached: bool) -> Iterator[Part]:
        """The bytes of a file, of which the workers fetch some ranges ahead; see `Reader.iter_parts`."""
        reader = self._source.reader(node)
        end = offset + length
        ahead: deque[_Range] = deque()
        while offset < end or ahead:
            while offset < end and len(ahead) < RANGES_AHEAD:
                fetched = _Range(reader, offset, min(RANGE_BYTES, end - offset), is_cached=is_cached)
                self._workers.put(fetched.fetch)
                ahead.append(fetched)
                offset += fetched.length
            yield from ahead.popleft().wait(self._workers.check)

    # In the threads of the workers

    def _read_small(self, files: Sequence[Wanted]) -> None:
        self._attempt(files, self._read_through if self._is_near else self._fetch_together)

    def _attempt(self, files: Sequence[Wanted], read: Callable[[Sequence[Wanted]], None]) -> None:
        """Read files, and each half by itself where one of them cannot be read."""
        try:
            read(files)
        except _Ended as error:
            self._reason = self._reason or str(error)
        except RepositoryUnreachable as error:
            self._reason = self._reason or error.message
        except (ReplicateError, Refused, OSError) as error:
            self._workers.check()
            if len(files) > 1:
                middle = len(files) // 2
                self._attempt(files[:middle], read)
                self._attempt(files[middle:], read)
                return
            with self._lock:
                self._failures += 1
                self._failure = self._failure or f"{escape(os.fsdecode(files[0].path))}: {error}"
        else:
            self._advance(sum(wanted.files for wanted in files), sum(wanted.length for wanted in files))

    def _fetch_together(self, files: Sequence[Wanted]) -> None:
        self._check()
        nodes = [self._filesystem.node_of(wanted.inode) for wanted in files]
        self._source.read_files(nodes)
        self._check_kept(nodes[-1], files[-1])

    def _check_kept(self, node: Node, wanted: Wanted) -> None:
        """End it when the cache does not keep what was read: it says itself why, in the log."""
        reader = self._source.reader(node)
        if isinstance(reader, FileReader):
            for piece in reader.iter_pieces(wanted.offset, min(wanted.length, 1)):
                if not self._cache.recall([piece.chunk_id]):
                    raise _Ended(f"the cache has no room for {escape(os.fsdecode(wanted.path))}")

    def _read_through(self, files: Sequence[Wanted]) -> None:
        """Read files as everybody does, so that the kernel has them."""
        ranges = [(wanted.path, wanted.offset, wanted.length) for wanted in files]
        read_through(self._directory, ranges, self._check)

    def _advance(
        self, files_done: int = 0, bytes_done: int = 0, *, files_total: int = 0, bytes_total: int = 0
    ) -> None:
        """Add to what is done, and replace totals by larger ones."""
        with self._lock:
            progress = self._progress
            self._progress = replace(
                progress,
                files_done=progress.files_done + files_done,
                bytes_done=progress.bytes_done + bytes_done,
                files_total=max(progress.files_total, files_total),
                bytes_total=max(progress.bytes_total, bytes_total),
            )


class _Range:
    """A range of a file that a worker fetches while another one is used."""

    def __init__(self, reader: Reader, offset: int, length: int, *, is_cached: bool) -> None:
        self._reader = reader
        self._is_cached = is_cached
        self._offset = offset
        self.length = length
        self._came = threading.Event()
        self._parts: list[Part] = []
        self._error: Exception | None = None

    def fetch(self) -> None:
        """Called by a worker."""
        try:
            self._parts = list(self._reader.iter_parts(self._offset, self.length, is_cached=self._is_cached))
        except Exception as error:
            self._error = error
        self._came.set()

    def wait(self, check: Callable[[], None]) -> Sequence[Part]:
        """What was fetched; `check` raises when it will not come any more."""
        while not self._came.wait(_PAUSE_S):
            check()
        if self._error is not None:
            raise self._error
        return self._parts


def _available_memory() -> int:
    """What the kernel could use for files; much, where it does not say."""
    with suppress(OSError, ValueError), open("/proc/meminfo", "rb") as file:
        for line in file:
            if line.startswith(_AVAILABLE):
                return int(line.split()[1]) * 1024
    return 1 << 62
