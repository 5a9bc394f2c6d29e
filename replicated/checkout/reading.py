"""Reads the files of a checkout ahead of their being written, in threads of its own.

One thread fetches in the order in which the files are written, small ones many at once; another one hashes
what is long. What is long is taken from the cache of contents when that has it as a whole. `writing` takes
the parts. Invariant: a file whose parts were all taken is what was saved; and
no more than some batches are in memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Final

from blake3 import blake3

from replicate.errors import InternalError, RepositoryDamaged, RepositoryError
from replicated.cache import ContentCache, PlainFile
from replicated.file_reader import Part
from replicated.tree import Node, Tree

#: Handed over together: enough that the hand-over costs nothing.
BATCH_BYTES: Final = 4 << 20
#: Batches that wait for the writer. Beside them, there is the one that it writes, and what is being fetched.
MAX_BATCHES: Final = 4
#: Files up to this size are read with others, at most so many.
_SMALL_BYTES = 256 << 10
_MAX_SMALL_FILES = 512
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


class ReadAhead:
    """The contents of files, to be taken in the order in which they are named. Taken by one thread.

    Used as a context manager: leaving ends the threads, whatever has been taken.
    """

    def __init__(self, tree: Tree, files: Iterable[Node], content: ContentCache | None = None) -> None:
        self._tree = tree
        self._files = files
        self._content = content
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
        small: list[Node] = []
        small_bytes = 0
        for file in self._files:
            if file.size > _SMALL_BYTES:
                yield from self._read_small(small)
                small, small_bytes = [], 0
                yield from self._read_long(file)
            elif file.size:
                small.append(file)
                small_bytes += file.size
                if small_bytes >= BATCH_BYTES or len(small) == _MAX_SMALL_FILES:
                    yield from self._read_small(small)
                    small, small_bytes = [], 0
        yield from self._read_small(small)

    def _read_small(self, files: list[Node]) -> Iterator[_Batch]:
        """Files that fit into one batch together."""
        if not files:
            return
        try:
            contents = self._tree.read_files(files)
            for file, content in zip(files, contents, strict=True):
                _check(file, content)
        except RepositoryError:
            # One by one, so that those before the damaged one are written, and it is the one that fails.
            for file in files:
                (content,) = self._tree.read_files([file])
                _check(file, content)
                yield _Batch(deque([content]))
        else:
            yield _Batch(deque(contents))

    def _read_long(self, file: Node) -> Iterator[_Batch]:
        whole = blake3()
        parts: list[Part] = []
        size = done = 0
        for part in self._iter_parts(file):
            parts.append(part)
            size += len(part)
            if size >= BATCH_BYTES:
                done += size
                yield self._batch(whole, file, parts, is_last=done == file.size)
                parts, size = [], 0
        if done + size != file.size:
            raise RepositoryDamaged(f"the file is shorter than recorded: {file.size} bytes")
        if parts:
            yield self._batch(whole, file, parts, is_last=True)

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

    def _batch(self, whole: blake3, file: Node, parts: list[Part], is_last: bool) -> _Batch:
        if len(parts) * _MIN_PART_BYTES > sum(map(len, parts)):
            parts = [b"".join(parts)]

        def check() -> None:
            for part in parts:
                whole.update(part)
            if is_last and whole.digest() != file.hash:
                raise _wrong_hash(file)

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
