"""The chunks of the cache: verified bytes, one after the other in files that are only added to.

Every process writes a file of its own and says in the ledger what lies where. Few bytes wait in memory for
others to come. Invariant: what is recalled has the hash by which it was asked for; what has not is forgotten,
and so fetched anew.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from replicated.cache.disk import BLOCK_BYTES, open_file, whole_blocks
from replicated.cache.ledger import Ledger, OpenFile, Place
from replicated.chunk.codec import MAX_CHUNK_BYTES, hash_chunk

#: A file of chunks: small enough that little goes at once when room is made.
MAX_FILE_BYTES: Final = 32 << 20
MIN_FILE_BYTES: Final = 256 << 10
#: The limit is enough for so many files of chunks, where that makes them smaller.
FILE_PARTS: Final = 32
#: A chunk is not kept when it takes more than this part of the limit: one in so many bytes.
LARGEST_PARTS: Final = 4
#: Written together: what waits for less than this, for not so long, and not more.
MIN_WRITTEN_BYTES: Final = 1 << 20
MIN_WRITTEN_CHUNKS: Final = 64
MAX_WAITING_S: Final = 1.0

# Buffers in one system call; Linux takes at most 1024.
_MAX_BUFFERS = 512
_KEY_BYTES = 8

_log = logging.getLogger(__name__)


class KeptChunks:
    """The chunks of one cache. Thread-safe."""

    def __init__(
        self, ledger: Ledger, limit_bytes: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ledger = ledger
        self._largest_bytes = min(limit_bytes // LARGEST_PARTS, MAX_CHUNK_BYTES)
        size = min(max(limit_bytes // FILE_PARTS, MIN_FILE_BYTES), MAX_FILE_BYTES)
        self._file_bytes = size - size % BLOCK_BYTES
        self._clock = clock
        #: Guards writing; `_waiting` is replaced as a whole, and read without it.
        self._lock = threading.Lock()
        self._waiting: dict[bytes, bytes] = {}
        self._waiting_bytes = 0
        self._waiting_since = 0.0
        self._file: OpenFile | None = None
        self._end = 0
        self._is_closed = False

    def recall(self, chunk_ids: Sequence[bytes]) -> dict[bytes, bytes]:
        """Those that are here."""
        waiting = self._waiting
        found = {chunk_id: waiting[chunk_id] for chunk_id in chunk_ids if chunk_id in waiting}
        ids = {_key(chunk_id): chunk_id for chunk_id in chunk_ids if chunk_id not in found}
        used = []
        for path, places in self._ledger.find_chunks(ids):
            found.update(self._read(path, places, ids))
            used.append(places[0].file)
        self._ledger.touch(used)
        return found

    def remember(self, chunks: Mapping[bytes, bytes]) -> None:
        """Keep chunks that are verified, as far as there is room."""
        with self._lock:
            if self._is_closed:
                return
            if not self._waiting:
                self._waiting_since = self._clock()
            for chunk_id, plain in chunks.items():
                if 0 < len(plain) <= self._largest_bytes and chunk_id not in self._waiting:
                    self._waiting[chunk_id] = plain
                    self._waiting_bytes += len(plain)
            if (
                self._waiting_bytes >= MIN_WRITTEN_BYTES
                or len(self._waiting) >= MIN_WRITTEN_CHUNKS
                or self._clock() >= self._waiting_since + MAX_WAITING_S
            ):
                self._write_waiting()

    def close(self) -> None:
        """Write what waits; may be called twice."""
        with self._lock:
            self._is_closed = True
            self._write_waiting()
            self._leave_file()

    def _read(self, path: str, places: Sequence[Place], ids: Mapping[int, bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        wrong: list[Place] = []
        try:
            descriptor = open_file(path, os.O_RDONLY)
        except OSError as error:
            # Evicted since, or somebody has deleted it.
            if self._ledger.forget_file(places[0].file):
                _log.warning("a file of the content cache is lost: %s", error)
            return found
        try:
            for place in places:
                plain = _pread(descriptor, place)
                chunk_id = ids[place.key]
                if plain is not None and hash_chunk(plain) == chunk_id:
                    found[chunk_id] = plain
                else:
                    wrong.append(place)
        finally:
            os.close(descriptor)
        # What is forgotten already was in a file that was evicted while it was read here.
        if wrong and (count := self._ledger.forget_chunks(wrong)):
            _log.warning("%d damaged chunks in the content cache are fetched anew: %s", count, path)
        return found

    # With the lock held

    def _write_waiting(self) -> None:
        pending = list(self._waiting.items())
        while pending:
            file = self._file_for(len(pending[0][1]))
            if file is None:
                break
            count, left_bytes = 0, file.room_bytes - self._end
            while count < len(pending) and len(pending[count][1]) <= left_bytes:
                left_bytes -= len(pending[count][1])
                count += 1
            if not self._write(file, pending[:count]):
                self._leave_file()
                break
            del pending[:count]
        # Only now, so that they are found all the time.
        self._waiting = {}
        self._waiting_bytes = 0

    def _file_for(self, size: int) -> OpenFile | None:
        """A file with room for so much: ours, one that another process has left off, or a new one."""
        if self._file is not None and self._file.room_bytes - self._end >= size:
            return self._file
        self._leave_file()
        if size <= self._file_bytes:
            self._file = self._ledger.reopen(self._file_bytes, size)
        if self._file is None:
            self._file = self._ledger.create(max(self._file_bytes, whole_blocks(size)))
        if self._file is not None:
            self._end = self._file.end
        return self._file

    def _write(self, file: OpenFile, chunks: Sequence[tuple[bytes, bytes]]) -> bool:
        """Keep chunks for which the file has room; whether that went well."""
        places = []
        end = self._end
        for chunk_id, plain in chunks:
            places.append(Place(file.id, end, len(plain), _key(chunk_id)))
            end += len(plain)
        try:
            _pwrite(file.descriptor, [plain for _, plain in chunks], self._end)
        except OSError as error:
            self._ledger.pause(error)
            return False
        self._end = end
        return self._ledger.add_chunks(file, places)

    def _leave_file(self) -> None:
        if self._file is not None:
            self._ledger.close_chunks(self._file)
            self._file = None


def _key(chunk_id: bytes) -> int:
    """What the ledger knows a chunk by."""
    return int.from_bytes(chunk_id[:_KEY_BYTES], "big", signed=True)


def _pread(descriptor: int, place: Place) -> bytes | None:
    """What lies in a place; None when it cannot be read."""
    if not 0 < place.length <= MAX_CHUNK_BYTES or place.offset < 0:
        return None
    try:
        return os.pread(descriptor, place.length, place.offset)
    except OSError:
        return None


def _pwrite(descriptor: int, buffers: Sequence[bytes], offset: int) -> None:
    """Write all the buffers, one after the other."""
    for start in range(0, len(buffers), _MAX_BUFFERS):
        pending: list[bytes | memoryview] = list(buffers[start : start + _MAX_BUFFERS])
        while pending:
            written = os.pwritev(descriptor, pending, offset)
            offset += written
            while pending and written >= len(pending[0]):
                written -= len(pending.pop(0))
            if written:
                pending[0] = memoryview(pending[0])[written:]
