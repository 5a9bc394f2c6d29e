"""Puts chunks that the repository lacks into packs, and packs into the store and the index.

Used by one `SnapshotWriter`. Chunks come from any thread; packs are uploaded by threads of its own: one
where the store is a disk, several where each request waits for a network. There are a few packs at a time at
most: whoever needs one more waits. Index objects are written after the packs that they list, at the end and
after every so much new data, or time, so that an interrupted snapshot goes on where it was. Owner of the
claims: the set of chunks that are on their way.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from replicated.buffers import Buffers
from replicated.chunk.codec import HASH_BYTES, Encoded, encode
from replicated.format.listing import build_index
from replicated.format.pack import DATA_PACK, TREE_PACK, PackBuilder, PackListing, builder_bytes
from replicated.index import Index
from replicated.keys import index_key, levelled_name, pack_key
from replicated.store.base import Capabilities, Store

#: An index object is written once the packs since the last one have so many bytes or chunks.
INDEX_AFTER_BYTES: Final = 256 << 20
INDEX_AFTER_CHUNKS: Final = 1 << 17
#: And where requests are costly, and so most likely slow, once uploading has taken so long since then.
INDEX_AFTER_S: Final = 30.0
#: Packs of a kind that are in memory: one is filled, one is uploaded.
MAX_PACKS: Final = {DATA_PACK: 2, TREE_PACK: 2}
#: Where requests are costly, so many packs are uploaded at a time. More would not make one connection of a
#: gigabit busier, and each takes the memory of a pack.
MAX_UPLOADS: Final = 3


class Chunk(NamedTuple):
    """A chunk that may have to be stored."""

    id: bytes
    plain: bytes | memoryview
    #: As in `codec.encode`: None when it is not known to be a part of a tensor.
    item_bytes: int | None = None
    #: The chunk that it most likely differs little from; b"" when there is none.
    base: bytes = b""


class Stored(NamedTuple):
    """How a chunk was stored."""

    codec: int
    plain_length: int
    stored_length: int


#: Of each kind of pack, what builders fill.
PackMemory: TypeAlias = Mapping[int, Buffers]

#: Encodes chunks one after the other; what it gives is used before the next one is asked for.
Encode: TypeAlias = Callable[[Sequence[Chunk]], Iterator[Encoded]]


@dataclass(slots=True)
class WriteStats:
    """What one writer did so far."""

    #: Content that was looked at.
    bytes_done: int = 0
    #: Chunks and tree nodes that the repository did not have, before and after compression.
    new_chunks: int = 0
    new_plain_bytes: int = 0
    new_stored_bytes: int = 0


class Packer:
    """See the module's text. After an error every further call raises it again."""

    def __init__(
        self,
        store: Store,
        index: Index,
        stats: WriteStats,
        random_name: Callable[[], bytes] = lambda: os.urandom(HASH_BYTES),
        memory: PackMemory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`memory` is borrowed; all of it has been given back when `finish` has returned."""
        self._store = store
        self._index = index
        self._stats = stats
        self._random_name = random_name
        # Leaves: nothing else is locked, and no I/O done, while one of these is held. Who waits for room
        # for another pack keeps `_builders_lock`, because all who come after have to wait for it too.
        self._claims_lock = threading.Lock()
        self._claimed: set[bytes] = set()
        self._builders_lock = threading.Lock()
        self._builders: dict[int, PackBuilder] = {}
        self._is_costly = store.capabilities.has_costly_requests
        self._uploaders = ThreadPoolExecutor(count_uploads(store.capabilities), thread_name_prefix="upload")
        self._memory = make_pack_memory(store.capabilities) if memory is None else memory
        self._clock = clock
        # A leaf as well; guards the two that follow.
        self._unlisted_lock = threading.Lock()
        #: Packs that are whole in the store and that no index object lists yet.
        self._unlisted: list[PackListing] = []
        #: Since when packs are uploaded that may be among them; None while none is.
        self._uploading_since: float | None = None
        self._failure: BaseException | None = None

    def add(
        self, chunks: Sequence[Chunk], kind: int = DATA_PACK, encode: Encode | None = None
    ) -> list[Stored | None]:
        """Store those of the chunks that are new; borrowed for the call.

        How each was stored, None for those that are there, or are being stored, already. `encode` gets
        the new ones; without it each is encoded on its own.
        """
        self.raise_failure()
        try:
            new = self._claim([chunk.id for chunk in chunks])
            positions: list[int] = []
            for position, chunk in enumerate(chunks):
                if chunk.id in new:
                    new.remove(chunk.id)
                    positions.append(position)
            fresh = [chunks[position] for position in positions]
            stored: list[Stored | None] = [None] * len(chunks)
            for position, encoded in zip(positions, (encode or _encode)(fresh), strict=True):
                chunk = chunks[position]
                self._append(kind, chunk.id, encoded, len(chunk.plain))
                stored[position] = Stored(encoded.codec, len(chunk.plain), len(encoded.stored))
        except BaseException as error:
            # Others rely on what this call has claimed.
            self._fail(error)
            raise
        return stored

    def finish(self) -> None:
        """Upload everything, list it in an index object, and end; raises what failed meanwhile."""
        self.raise_failure()
        with self._builders_lock:
            builders = [self._builders.pop(kind) for kind in (DATA_PACK, TREE_PACK) if kind in self._builders]
        for builder in builders:
            self._submit(builder)
        self._uploaders.shutdown()
        self._attempt(lambda: self._write_index(self._take_unlisted()))
        self.raise_failure()

    def stop(self) -> None:
        """Let whatever is waiting or still comes fail soon; may be called at any time, also twice."""
        self._fail(RuntimeError("the writer was abandoned"))

    def abandon(self) -> None:
        """End without writing what is not written yet; may be called at any time, also twice."""
        self.stop()
        self._uploaders.shutdown()

    def raise_failure(self) -> None:
        """Raise what has failed in any thread; nothing can be stored any more then."""
        if self._failure is not None:
            raise self._failure

    def _claim(self, chunk_ids: Iterable[bytes]) -> set[bytes]:
        """Those of the chunks that nobody has stored or is storing; the caller has to store them."""
        with self._claims_lock:
            fresh = set(chunk_ids).difference(self._claimed)
            self._claimed |= fresh
        if not fresh:
            return fresh
        # After claiming: a chunk leaves the claims only once it is in the index.
        missing = self._index.find_missing(fresh)
        with self._claims_lock:
            self._claimed -= fresh - missing
        return missing

    def _append(self, kind: int, chunk_id: bytes, encoded: Encoded, plain_length: int) -> None:
        full = None
        with self._builders_lock:
            builder = self._builders.get(kind)
            if builder is None:
                builder = self._builders[kind] = PackBuilder(kind, self._memory[kind].take())
            builder.add(chunk_id, encoded.codec, encoded.stored, plain_length, encoded.base)
            self._stats.new_chunks += 1
            self._stats.new_plain_bytes += plain_length
            self._stats.new_stored_bytes += len(encoded.stored)
            if builder.is_full:
                full = self._builders.pop(kind)
        if full is not None:
            self._submit(full)

    def _submit(self, builder: PackBuilder) -> None:
        self._uploaders.submit(self._upload_and_release, builder)

    def _upload_and_release(self, builder: PackBuilder) -> None:
        try:
            self._attempt(lambda: self._upload(builder))
        finally:
            self._memory[builder.kind].give_back(builder.memory)

    def _upload(self, builder: PackBuilder) -> None:
        name = self._random_name()
        parts = builder.seal()
        size = sum(map(len, parts))
        with self._unlisted_lock:
            if self._uploading_since is None:
                self._uploading_since = self._clock()
        self._store.put(pack_key(name), parts, is_unique=True)
        with self._unlisted_lock:
            self._unlisted.append(PackListing(name, builder.kind, size, tuple(builder.records)))
            is_due = self._is_index_due()
        if is_due:
            self._write_index(self._take_unlisted())

    def _is_index_due(self) -> bool:
        """Whether what is not listed yet should be; called with the lock held."""
        if (
            sum(listing.size for listing in self._unlisted) >= INDEX_AFTER_BYTES
            or sum(len(listing.records) for listing in self._unlisted) >= INDEX_AFTER_CHUNKS
        ):
            return True
        since = self._uploading_since
        return self._is_costly and since is not None and self._clock() - since >= INDEX_AFTER_S

    def _take_unlisted(self) -> list[PackListing]:
        """What no index object lists yet; the caller writes one."""
        with self._unlisted_lock:
            listings, self._unlisted = self._unlisted, []
            self._uploading_since = None
        return listings

    def _write_index(self, listings: Sequence[PackListing]) -> None:
        if not listings:
            return
        name = levelled_name(0, self._random_name().hex())
        # Whoever publishes the snapshot sees in a listing that it is there.
        self._store.put(index_key(name), [build_index(listings)], is_unique=True, is_checked=False)
        self._index.add(name, listings)
        with self._claims_lock:
            self._claimed.difference_update(
                record.chunk_id for listing in listings for record in listing.records
            )

    def _attempt(self, action: Callable[[], None]) -> None:
        """Do something, unless something has failed before."""
        if self._failure is None:
            try:
                action()
            except BaseException as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error


def make_pack_memory(capabilities: Capabilities) -> PackMemory:
    """Room for as many packs as there may be at a time."""
    counts = {**MAX_PACKS, DATA_PACK: MAX_PACKS[DATA_PACK] - 1 + count_uploads(capabilities)}
    return {kind: Buffers(count, builder_bytes(kind)) for kind, count in counts.items()}


def count_uploads(capabilities: Capabilities) -> int:
    """How many packs are uploaded at a time: one to a disk, which writes them one after the other anyway."""
    return max(1, min(MAX_UPLOADS, capabilities.parallel_requests)) if capabilities.has_costly_requests else 1


def _encode(chunks: Sequence[Chunk]) -> Iterator[Encoded]:
    for chunk in chunks:
        yield encode(chunk.plain, chunk.item_bytes)
