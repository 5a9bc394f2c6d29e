"""The chunks that readers of a mount need now, or will: in memory, or on their way there.

`streams` asks for chunks, and says which parts of a file will be needed next; those are fetched by threads of
this module. One for a whole mount, so that what several readers need is fetched once, and one limit holds
for all of them. Invariants: no lock is held while anything is fetched, a reader never waits for room, and an
error reaches those who need the chunk and is forgotten then: whoever asks next tries again.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Final, Protocol

from replicate.errors import ReplicateError, RepositoryUnreachable
from replicated.file_reader import Piece, chunks_of
from replicated.mount.reading.background import Workers

#: Of a near store: two threads do as much as two processors, which decode and hash.
NEAR_THREADS: Final = 2
#: Of a far one, where waiting is most of what they do.
FAR_THREADS: Final = 8
#: Chunks that are fetched together: of a near store as much as `reader` decodes in one thread, of a far one
#: more, because each request costs a round trip.
NEAR_BATCH_BYTES: Final = 1 << 20
FAR_BATCH_BYTES: Final = 2 << 20
#: Who has not read for so long makes room for others.
IDLE_S: Final = 1.0
#: Of the limit, in quarters, what may be read ahead: the rest is for what was just read.
_AHEAD_QUARTERS: Final = 3
#: A reader is told of so much less: what it asks for begins and ends in the middle of chunks.
_SLACK_BYTES: Final = 1 << 20
_MAX_WAITING: Final = 256
#: What is read ahead at once lies in no more pieces: as many as the longest window has tensors of 4 KiB.
#: Of a file that was cut into less, less is read ahead.
_MAX_AHEAD_PIECES: Final = 8192


class Fetcher(Protocol):
    """Knows where the bytes of one file are, and fetches them; may be used from several threads."""

    def iter_pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """Where the bytes lie, in order."""
        ...

    def fetch(self, chunks: Mapping[bytes, int]) -> dict[bytes, bytes]:
        """Chunks with these lengths, verified."""
        ...


class Share:
    """What is read ahead for one reader; guarded by the lock of its supply."""

    def __init__(self) -> None:
        #: Chunks that came and were not needed yet, the oldest first.
        self.chunks: OrderedDict[bytes, bytes] = OrderedDict()
        #: Of these, and of those on their way.
        self.size_bytes = 0
        self.used_at = 0.0
        #: Whether the reader has ended: what is on its way for it is of use to others at best.
        self.is_over = False


class _Batch:
    """Chunks that are fetched together, by whoever begins first."""

    __slots__ = ("chunks", "done", "error", "fetcher", "is_begun", "share", "wanted")

    def __init__(self, fetcher: Fetcher, wanted: dict[bytes, int], share: Share | None) -> None:
        self.fetcher = fetcher
        self.wanted = wanted
        #: For whom it is read ahead; None: somebody waits for all of it.
        self.share = share
        self.is_begun = False
        self.chunks: dict[bytes, bytes] = {}
        #: Raised by those who need what it was raised for.
        self.error: Exception | None = None
        #: Held until the chunks, or the error, are there.
        self.done = threading.Lock()
        self.done.acquire()


class ChunkSupply:
    """Chunks for all readers of a mount. All methods may be called from any thread."""

    def __init__(
        self,
        limit_bytes: int,
        *,
        is_near: bool,
        batch_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`batch_bytes` are fetched together at most, by default what is good where requests cost nothing."""
        self._limit_bytes = limit_bytes
        self._ahead_limit_bytes = limit_bytes * _AHEAD_QUARTERS // 4
        self._batch_bytes = batch_bytes or (NEAR_BATCH_BYTES if is_near else FAR_BATCH_BYTES)
        self._clock = clock
        threads = NEAR_THREADS if is_near else FAR_THREADS
        self._workers = Workers("read-ahead", threads, capacity=_MAX_WAITING)
        #: Guards all that follows; a leaf.
        self._lock = threading.Lock()
        self._coming: dict[bytes, _Batch] = {}
        #: Which share has a chunk that was read ahead and is here.
        self._holders: dict[bytes, Share] = {}
        #: What was needed, that of least use first.
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._shares: set[Share] = set()
        self._ahead_bytes = 0

    def close(self) -> None:
        """End the threads and forget everything; may be called twice."""
        self._workers.close()
        with self._lock:
            for share in list(self._shares):
                self._give_up(share)
            self._kept.clear()
            self._kept_bytes = 0

    def room(self, share: Share) -> int:
        """How many bytes may be read ahead for a reader that is reading now."""
        with self._lock:
            share.used_at = self._clock()
            return max(0, self._ahead_limit_bytes // len(self._shares | {share}) - _SLACK_BYTES)

    def get(self, fetcher: Fetcher, wanted: Mapping[bytes, int]) -> dict[bytes, bytes]:
        """Chunks, given with their lengths; fetched in this thread unless they are here or on their way."""
        found: dict[bytes, bytes] = {}
        while len(found) < len(wanted):
            own, others = self._look_up(fetcher, wanted, found)
            if own is not None:
                # Another reader may have begun it as soon as it was announced.
                self._await(own)
                if own.error is not None:
                    raise own.error
                found.update(own.chunks)
            for batch in others:
                self._await(batch)
                self._take(batch, wanted, found)
                if isinstance(batch.error, RepositoryUnreachable):
                    raise batch.error
            # Any one of the chunks in the batch may be what is damaged: look at those that are needed alone.
        return found

    def begin(self, share: Share, fetcher: Fetcher, offset: int, length: int) -> None:
        """Have a part of a file fetched soon, as far as there is room.

        May fetch a list of chunks itself, so it is called in `do_soon`. Raises nothing: whoever reads there
        will be told.
        """
        try:
            wanted = chunks_of(islice(fetcher.iter_pieces(offset, length), _MAX_AHEAD_PIECES))
        except ReplicateError:
            return
        with self._lock:
            batches = self._claim(share, fetcher, wanted)
        for batch in batches:
            if not self._workers.submit(partial(self._fetch, batch)):
                with self._lock:
                    self._drop(batch)

    def do_soon(self, work: Callable[[], None]) -> None:
        """Have something done by a thread that reads ahead; never, when these have too much to do."""
        self._workers.submit(work)

    def end(self, share: Share) -> None:
        """Nobody needs any more what was read ahead; it is kept as long as there is room."""
        with self._lock:
            share.is_over = True
            self._give_up(share)

    def _look_up(
        self, fetcher: Fetcher, wanted: Mapping[bytes, int], found: dict[bytes, bytes]
    ) -> tuple[_Batch | None, list[_Batch]]:
        """Add what is here to `found`; a batch of what nobody fetches yet, and those that have the rest."""
        missing: dict[bytes, int] = {}
        others: dict[_Batch, None] = {}
        with self._lock:
            for chunk_id, length in wanted.items():
                if chunk_id in found:
                    continue
                batch = self._coming.get(chunk_id)
                if batch is not None:
                    others[batch] = None
                elif chunk_id in self._kept:
                    self._kept.move_to_end(chunk_id)
                    found[chunk_id] = self._kept[chunk_id]
                elif chunk_id in self._holders:
                    found[chunk_id] = self._use(chunk_id)
                else:
                    missing[chunk_id] = length
            if not missing:
                return None, list(others)
            own = _Batch(fetcher, missing, None)
            self._coming.update(dict.fromkeys(missing, own))
        return own, list(others)

    def _await(self, batch: _Batch) -> None:
        """Return when the chunks of a batch, or the error, are there."""
        self._fetch(batch)
        with batch.done:
            pass

    def _fetch(self, batch: _Batch) -> None:
        """Fetch the chunks of a batch, unless somebody has begun to."""
        with self._lock:
            if batch.is_begun:
                return
            batch.is_begun = True
        try:
            batch.chunks = batch.fetcher.fetch(batch.wanted)
        except Exception as error:
            batch.error = error
        finally:
            # Also when this thread shall end: nobody is left waiting, and whoever needs a chunk fetches it.
            with self._lock:
                self._settle(batch)
            batch.done.release()

    def _take(self, batch: _Batch, wanted: Mapping[bytes, int], found: dict[bytes, bytes]) -> None:
        """Add what a batch has brought to `found`."""
        with self._lock:
            for chunk_id in wanted:
                if chunk_id in batch.chunks:
                    found[chunk_id] = batch.chunks[chunk_id]
                    if chunk_id in self._holders:
                        self._use(chunk_id)

    # What follows is called with the lock held.

    def _claim(self, share: Share, fetcher: Fetcher, wanted: Mapping[bytes, int]) -> list[_Batch]:
        """Batches of what is neither here nor on its way, as far as there is room."""
        batches: list[_Batch] = []
        if share.is_over:
            return batches
        size_bytes = 0
        for chunk_id, length in wanted.items():
            if chunk_id in self._coming or chunk_id in self._holders or chunk_id in self._kept:
                continue
            if not self._make_room(share, length):
                break
            if not batches or size_bytes + length > self._batch_bytes:
                batches.append(_Batch(fetcher, {}, share))
                size_bytes = 0
            size_bytes += length
            batches[-1].wanted[chunk_id] = length
            self._coming[chunk_id] = batches[-1]
            self._reserve(share, length)
        return batches

    def _make_room(self, share: Share, length: int) -> bool:
        """Whether so much more can be read ahead, after the readers that have stopped gave up theirs."""
        if self._ahead_bytes + length > self._ahead_limit_bytes:
            idle_since = self._clock() - IDLE_S
            for other in [other for other in self._shares if other.used_at < idle_since]:
                self._give_up(other)
        own_limit_bytes = self._ahead_limit_bytes // len(self._shares | {share})
        while self._ahead_bytes + length > self._ahead_limit_bytes:
            if not share.chunks or share.size_bytes + length <= own_limit_bytes:
                return False
            # What came first and is still here was passed over: the reader has gone on elsewhere.
            self._use(next(iter(share.chunks)))
        self._evict(self._limit_bytes - length)
        return True

    def _settle(self, batch: _Batch) -> None:
        """Put what was fetched where it belongs."""
        share = batch.share
        for chunk_id, length in batch.wanted.items():
            if self._coming.get(chunk_id) is batch:
                del self._coming[chunk_id]
            chunk = batch.chunks.get(chunk_id)
            if share is not None and chunk is not None and not share.is_over:
                share.chunks[chunk_id] = chunk
                self._holders[chunk_id] = share
                continue
            if share is not None:
                self._release(share, length)
            if chunk is not None:
                self._keep(chunk_id, chunk)

    def _drop(self, batch: _Batch) -> None:
        """Let readers do without a batch that no thread has taken."""
        if not batch.is_begun:
            batch.is_begun = True
            self._settle(batch)
            batch.done.release()

    def _use(self, chunk_id: bytes) -> bytes:
        """A chunk that was read ahead, from now on one like others."""
        share = self._holders.pop(chunk_id)
        chunk = share.chunks.pop(chunk_id)
        self._release(share, len(chunk))
        self._keep(chunk_id, chunk)
        return chunk

    def _give_up(self, share: Share) -> None:
        for chunk_id in list(share.chunks):
            self._use(chunk_id)
            if chunk_id in self._kept:
                self._kept.move_to_end(chunk_id, last=False)

    def _reserve(self, share: Share, length: int) -> None:
        self._ahead_bytes += length
        share.size_bytes += length
        self._shares.add(share)

    def _release(self, share: Share, length: int) -> None:
        self._ahead_bytes -= length
        share.size_bytes -= length
        if not share.size_bytes:
            self._shares.discard(share)

    def _keep(self, chunk_id: bytes, chunk: bytes) -> None:
        if chunk_id not in self._kept:
            self._kept[chunk_id] = chunk
            self._kept_bytes += len(chunk)
        self._evict(self._limit_bytes)

    def _evict(self, limit_bytes: int) -> None:
        while self._kept and self._kept_bytes + self._ahead_bytes > limit_bytes:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])
