"""Reads the files of a checkout ahead of their being written, in threads of its own.

One thread reads in the order in which the files are written, small ones many at once; another one hashes
what is long. From a store where each request waits for a network, several more fetch what comes next: groups
of small files, and ranges of long ones. What is long is taken from the cache of contents when that has it as
a whole. `writing` takes the parts. Invariant: a file whose parts were all taken is what was saved; and no
more than some batches are in memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Final, NamedTuple, TypeAlias

from blake3 import blake3

from replicate.errors import InternalError, RepositoryDamaged, RepositoryError
from replicated.cache import ContentCache, PlainFile
from replicated.file_reader import FileReader, Part
from replicated.tree import Node, Tree

#: Handed over together: enough that the hand-over costs nothing.
BATCH_BYTES: Final = 4 << 20
#: Batches that wait for the writer. Beside them, there is the one that it writes, and what is being fetched.
MAX_BATCHES: Final = 4
#: Files up to this size are read with others, at most so many.
_SMALL_BYTES = 256 << 10
_MAX_SMALL_FILES = 512
#: What is fetched at a time where requests are costly: so many ranges of so many bytes at most, and of small
#: files more together. With what was fetched but not decoded they take twice as much memory.
MAX_RANGES: Final = 4
MAX_RANGE_BYTES: Final = 8 << 20
_MAX_FETCHED_FILES = 4096
#: Parts that are smaller than this on average are joined: a call for each would cost more.
_MIN_PART_BYTES = 64 << 10
#: What is read at once of a file in the cache.
_PLAIN_PART_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Batch:
    """Parts of one long file, or of several files."""

    parts: deque[Part]
    #: Done when the parts have been hashed; fails when they end a file that has another hash.
    checked: Future[None] | None = None


#: Fetches some of what will be written: contents of small files, or parts of a long one.
_Fetch: TypeAlias = Callable[[], Iterable[Part]]


class _Step(NamedTuple):
    """What is fetched together, and how that becomes batches; the latter in order and in one thread."""

    fetch: _Fetch
    batches: Callable[[_Fetch], Iterator[_Batch]]


class ReadAhead:
    """The contents of files, to be taken in the order in which they are named. Taken by one thread.

    Used as a context manager: leaving ends the threads, whatever has been taken.
    """

    def __init__(self, tree: Tree, files: Iterable[Node], content: ContentCache | None = None) -> None:
        self._tree = tree
        self._files = files
        self._content = content
        capabilities = tree.capabilities
        is_costly = capabilities.has_costly_requests
        #: Steps that are fetched at a time by threads of their own; 0: each by the thread that reads.
        self._fetcher_count = min(MAX_RANGES, capabilities.parallel_requests) if is_costly else 0
        self._range_bytes = min(MAX_RANGE_BYTES, capabilities.max_read_bytes)
        self._batches: SimpleQueue[_Batch | BaseException] = SimpleQueue()
        #: One for each batch that may still be read.
        self._room = threading.Semaphore(MAX_BATCHES)
        self._is_stopped = False
        self._current = _Batch(deque())
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="checkout-hash")
        self._thread = threading.Thread(target=self._run, name="checkout-read", daemon=True)

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_stopped = True
        self._room.release()
        self._thread.join()
        self._hashing.shutdown(cancel_futures=True)

    def parts(self, file: Node) -> Iterator[Part]:
        """The content of the next file, in parts; raises what reading it raised.

        `RepositoryDamaged` after the last part means that the content is not what was saved.
        """
        left = file.size
        while left > 0:
            if not self._current.parts:
                self._take()
            part = self._current.parts.popleft()
            left -= len(part)
            yield part
        if self._current.checked is not None:
            self._current.checked.result()

    def _take(self) -> None:
        """Wait for the next batch, and until the last one is hashed, so that not too many are kept."""
        if self._current.checked is not None:
            self._current.checked.result()
        batch = self._batches.get()
        if isinstance(batch, BaseException):
            raise batch
        self._current = batch
        self._room.release()

    # In the thread that reads

    def _run(self) -> None:
        try:
            for batch in self._iter_batches():
                self._room.acquire()
                if self._is_stopped:
                    return
                self._batches.put(batch)
            self._batches.put(InternalError("a file was asked for that was not named before"))
        except BaseException as error:
            self._batches.put(error)

    def _iter_batches(self) -> Iterator[_Batch]:
        if not self._fetcher_count:
            for step in self._iter_steps():
                yield from step.batches(step.fetch)
            return
        with ThreadPoolExecutor(self._fetcher_count, thread_name_prefix="checkout-fetch") as fetchers:
            ahead: deque[tuple[_Step, Future[Iterable[Part]]]] = deque()
            try:
                for step in self._iter_steps():
                    if len(ahead) == self._fetcher_count:
                        first, fetched = ahead.popleft()
                        yield from first.batches(fetched.result)
                    ahead.append((step, fetchers.submit(step.fetch)))
                while ahead:
                    first, fetched = ahead.popleft()
                    yield from first.batches(fetched.result)
            finally:
                for _, future in ahead:
                    future.cancel()

    def _iter_steps(self) -> Iterator[_Step]:
        """Everything, in order; small files are fetched together."""
        most_bytes = self._range_bytes if self._fetcher_count else BATCH_BYTES
        most_files = _MAX_FETCHED_FILES if self._fetcher_count else _MAX_SMALL_FILES
        small: list[Node] = []
        small_bytes = 0
        for file in self._files:
            if file.size > _SMALL_BYTES:
                yield from self._small_steps(small)
                small, small_bytes = [], 0
                yield from self._long_steps(file)
            elif file.size:
                small.append(file)
                small_bytes += file.size
                if small_bytes >= most_bytes or len(small) == most_files:
                    yield from self._small_steps(small)
                    small, small_bytes = [], 0
        yield from self._small_steps(small)

    def _small_steps(self, files: list[Node]) -> Iterator[_Step]:
        """Files that fit into one batch together."""
        if files:
            yield _Step(partial(self._read_small, files), partial(self._batch_small, files))

    def _read_small(self, files: list[Node]) -> list[Part]:
        contents = self._tree.read_files(files)
        for file, content in zip(files, contents, strict=True):
            _check(file, content)
        return list(contents)

    def _batch_small(self, files: list[Node], fetch: _Fetch) -> Iterator[_Batch]:
        try:
            contents = fetch()
        except RepositoryError:
            # One by one, so that those before the damaged one are written, and it is the one that fails.
            for file in files:
                yield _Batch(deque(self._read_small([file])))
        else:
            yield _Batch(deque(contents))

    def _long_steps(self, file: Node) -> Iterator[_Step]:
        """A long file: in ranges where several are fetched at a time, unless the cache has it."""
        batches = _LongFile(file, self._hashing).batches
        length = file.size
        if not self._fetcher_count or (self._content is not None and self._content.has_plain(file.hash)):
            yield _Step(partial(self._iter_parts, file), partial(batches, length))
            return
        reader = _SharedReader(self._tree, file)
        for offset in range(0, file.size, self._range_bytes):
            length = min(self._range_bytes, file.size - offset)
            yield _Step(partial(reader.read, offset, length), partial(batches, length))

    def _iter_parts(self, file: Node) -> Iterator[Part]:
        """The content of a long file: as far as the cache has it from there, else from the repository."""
        done = 0
        plain = None if self._content is None else self._content.open_plain(file.hash, file.size)
        if plain is not None:
            with plain:
                # Hashed before anything is written, for then the repository can still be asked.
                if _has_hash(plain, file.hash):
                    for part in _iter_plain(plain):
                        yield part
                        done += len(part)
        if done < file.size:
            yield from self._tree.reader(file).iter_parts(done, file.size - done)


class _SharedReader:
    """A reader of a file that is made by the first of the threads that read ranges of it."""

    def __init__(self, tree: Tree, file: Node) -> None:
        self._tree = tree
        self._file = file
        self._lock = threading.Lock()
        self._reader: FileReader | None = None

    def read(self, offset: int, length: int) -> list[Part]:
        """A range of the file."""
        # The others would fetch the same list of chunks: they wait until it is there.
        with self._lock:
            reader = self._reader = self._reader or self._tree.reader(self._file)
        return list(reader.iter_parts(offset, length))


class _LongFile:
    """A long file whose parts come one after the other, and are hashed in that order by another thread."""

    def __init__(self, file: Node, hashing: ThreadPoolExecutor) -> None:
        self._file = file
        self._hashing = hashing
        self._whole = blake3()
        self._done = 0

    def batches(self, length: int, fetch: _Fetch) -> Iterator[_Batch]:
        """Batches of the next `length` bytes; raises `RepositoryDamaged` when they end too early."""
        parts: list[Part] = []
        size = 0
        end = self._done + length
        for part in fetch():
            parts.append(part)
            size += len(part)
            if size >= BATCH_BYTES:
                yield self._batch(parts, size)
                parts, size = [], 0
        if self._done + size != end:
            raise RepositoryDamaged(f"the file is shorter than recorded: {self._file.size} bytes")
        if parts:
            yield self._batch(parts, size)

    def _batch(self, parts: list[Part], size: int) -> _Batch:
        self._done += size
        is_last = self._done == self._file.size
        if len(parts) * _MIN_PART_BYTES > size:
            parts = [b"".join(parts)]

        def check() -> None:
            for part in parts:
                self._whole.update(part)
            if is_last and self._whole.digest() != self._file.hash:
                raise _wrong_hash(self._file)

        return _Batch(deque(parts), self._hashing.submit(check))


def _has_hash(plain: PlainFile, digest: bytes) -> bool:
    whole = blake3()
    for part in _iter_plain(plain):
        whole.update(part)
    return whole.digest() == digest


def _iter_plain(plain: PlainFile) -> Iterator[Part]:
    """A file of the cache in parts; ends early when somebody changes it."""
    for offset in range(0, plain.size, _PLAIN_PART_BYTES):
        part = memoryview(bytearray(min(_PLAIN_PART_BYTES, plain.size - offset)))
        try:
            length = plain.read_into(part, offset)
        except OSError:
            return
        if length < len(part) or not plain.is_intact():
            return
        yield part


def _check(file: Node, content: bytes) -> None:
    """Raise `RepositoryDamaged` when the content of a file is not what was saved."""
    if len(content) != file.size:
        raise RepositoryDamaged(f"the file is shorter than recorded: {file.size} bytes")
    if blake3(content).digest() != file.hash:
        raise _wrong_hash(file)


def _wrong_hash(file: Node) -> RepositoryDamaged:
    return RepositoryDamaged(f"the content does not have the recorded hash {file.hash.hex()}")
