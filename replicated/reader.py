"""Reads chunks and nodes: finds them by the index, fetches, decodes and verifies them.

The one place where bytes come out of packs. Invariant: what leaves has the hash by which it was asked
for, else an error is raised. A chunk that is stored as a difference needs its base, and a base never needs
another chunk. Keeps the chunks that were used last, of all repositories together, up to a number of bytes.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Final, NoReturn, TypeAlias, TypeVar

from replicate.errors import RepositoryDamaged, RepositoryIncompatible
from replicated.chunk.codec import ChunkDamaged, UnknownCodec, decode, hash_chunk
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.manifest import (
    ChunkList,
    DirectoryNode,
    parse_chunk_list,
    parse_directory,
    parse_layout,
)
from replicated.format.pack import parse_pack
from replicated.index import Index, Location
from replicated.packer import pack_key
from replicated.store.base import KeyMissing, Store

#: Chunks in one pack are read together when no more than this lies between them.
MAX_GAP_BYTES: Final = 64 << 10
#: And no more than this at once.
MAX_READ_BYTES: Final = 8 << 20
#: From a local disk, where a read costs little: then large chunks are read one by one, which saves copying
#: them out of what was read, and several threads share the work.
MAX_LOCAL_READ_BYTES: Final = 1 << 20
#: Less than this is decoded where it is asked for, as are small chunks: threads would wait for each other.
MIN_SHARED_BYTES: Final = 1 << 20
MIN_SHARED_CHUNK_BYTES: Final = 32 << 10
#: Threads that read and decode, for all readers of a process.
MAX_DECODERS: Final = 4

T = TypeVar("T")

_Run: TypeAlias = list[tuple[bytes, Location]]

_DAMAGE_HINT = "the rest of the repository can still be read"


class ChunkMemory:
    """The chunks that were read last, by whom and by their ids. Shared by threads; its lock is a leaf."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._chunks: OrderedDict[tuple[object, bytes], bytes] = OrderedDict()
        self._size_bytes = 0

    def recall(self, owner: object, chunk_ids: Iterable[bytes]) -> dict[bytes, bytes]:
        """Those of the chunks that `owner` has read and that are still here."""
        found: dict[bytes, bytes] = {}
        with self._lock:
            for chunk_id in chunk_ids:
                plain = self._chunks.get((owner, chunk_id))
                if plain is not None:
                    self._chunks.move_to_end((owner, chunk_id))
                    found[chunk_id] = plain
        return found

    def remember(self, owner: object, chunks: dict[bytes, bytes]) -> None:
        """Keep chunks that `owner` has read; those that were not used for longest make room."""
        with self._lock:
            for chunk_id, plain in chunks.items():
                if (owner, chunk_id) not in self._chunks:
                    self._chunks[owner, chunk_id] = plain
                    self._size_bytes += len(plain)
            while self._size_bytes > self._limit_bytes and self._chunks:
                _, oldest = self._chunks.popitem(last=False)
                self._size_bytes -= len(oldest)

    def forget(self, owner: object) -> None:
        """Drop what `owner` has read."""
        with self._lock:
            for key in [key for key in self._chunks if key[0] is owner]:
                self._size_bytes -= len(self._chunks.pop(key))


class ChunkReader:
    """Verified chunks of one repository. May be used from several threads."""

    def __init__(self, store: Store, index: Index, memory: ChunkMemory) -> None:
        self._store = store
        self._index = index
        self._memory = memory
        #: What the memory knows this reader by: not itself, which it would keep alive.
        self._name = object()
        self._rebuilt = False

    def close(self) -> None:
        """Drop what is kept in memory; may be called twice."""
        self._memory.forget(self._name)

    def read(self, chunk_id: bytes) -> bytes:
        """The plain bytes of one chunk; raises as `read_many`."""
        return self.read_many([chunk_id])[chunk_id]

    def read_many(
        self, chunk_ids: Sequence[bytes], lengths: Sequence[int] | None = None, *, is_once: bool = False
    ) -> dict[bytes, bytes]:
        """Several chunks, with as few reads of the store as their places allow.

        When one has not the length that `lengths` says, that is damage, and none is decoded. Those that are
        read `is_once` are not kept in memory. Raises `RepositoryDamaged` naming the chunk,
        `RepositoryIncompatible`, `RepositoryUnreachable`.
        """
        found = self._memory.recall(self._name, chunk_ids)
        expected = list(zip(chunk_ids, lengths, strict=True)) if lengths is not None else []
        for chunk_id, length in expected:
            if chunk_id in found and len(found[chunk_id]) != length:
                raise self._other_length(chunk_id, len(found[chunk_id]), length)
        missing = [chunk_id for chunk_id in dict.fromkeys(chunk_ids) if chunk_id not in found]
        if missing:
            fetched = self._fetch(missing, expected)
            if not is_once:
                self._memory.remember(self._name, fetched)
            found.update(fetched)
        return found

    def read_directory(self, node: bytes) -> DirectoryNode:
        """A node of a directory, parsed; raises as `read_many`."""
        return self._parse(node, self.read(node), parse_directory)

    def read_directories(self, nodes: Sequence[bytes]) -> list[DirectoryNode]:
        """Several nodes of directories, in this order."""
        found = self.read_many(nodes)
        return [self._parse(node, found[node], parse_directory) for node in nodes]

    def read_chunk_list(self, node: bytes) -> ChunkList:
        """A node of a file's list of chunks, parsed; raises as `read_many`."""
        return self._parse(node, self.read(node), parse_chunk_list)

    def read_layout(self, node: bytes) -> tuple[int, ...]:
        """The lengths in the layout of a gathered file; raises as `read_many`."""
        return self._parse(node, self.read(node), parse_layout)

    def locate(self, chunk_ids: Sequence[bytes]) -> dict[bytes, Location]:
        """Where these different chunks lie; raises `RepositoryDamaged` when one is in no index."""
        locations = self._index.locate(chunk_ids)
        if len(locations) < len(chunk_ids):
            self._index.refresh()
            locations = self._index.locate(chunk_ids)
        for chunk_id in chunk_ids:
            if chunk_id not in locations:
                damaged = ", ".join(sorted(self._index.damaged_objects))
                raise RepositoryDamaged(
                    f"chunk {chunk_id.hex()} is in no index of {self._store.url}",
                    hint=f"damaged index objects: {damaged}" if damaged else _DAMAGE_HINT,
                    fields={"chunk": chunk_id.hex()},
                )
        return locations

    def _parse(self, node: bytes, data: bytes, parse: Callable[[bytes], T]) -> T:
        try:
            return parse(data)
        except Malformed as error:
            raise RepositoryDamaged(
                f"tree node {node.hex()} in {self._store.url} is damaged: {error}",
                hint=_DAMAGE_HINT,
                fields={"chunk": node.hex()},
            ) from error

    def _fetch(self, wanted: list[bytes], expected: Sequence[tuple[bytes, int]]) -> dict[bytes, bytes]:
        """Chunks from the store; those that fail are tried again with an index that is surely right."""
        found = self._read_places(self._locate_expected(wanted, expected))
        failed = [chunk_id for chunk_id in wanted if chunk_id not in found]
        # Making the index anew takes minutes when there are millions of chunks.
        if failed and not self._rebuilt and not self._is_index_right(failed):
            self._rebuilt = True
            self._index.rebuild()
            found.update(self._read_places(self._locate_expected(failed, expected)))
            failed = [chunk_id for chunk_id in failed if chunk_id not in found]
        if failed:
            self._raise_damaged(failed[0])
        return found

    def _locate_expected(
        self, wanted: list[bytes], expected: Sequence[tuple[bytes, int]]
    ) -> dict[bytes, Location]:
        """Where chunks lie; raises `RepositoryDamaged` when one has not the length that is expected."""
        places = self.locate(wanted)
        for chunk_id, length in expected:
            place = places.get(chunk_id)
            if place is not None and place.plain_length != length:
                if self._rebuilt or self._is_index_right([chunk_id]):
                    raise self._other_length(chunk_id, place.plain_length, length)
                self._rebuilt = True
                self._index.rebuild()
                return self._locate_expected(wanted, expected)
        return places

    def _other_length(self, chunk_id: bytes, found: int, expected: int) -> RepositoryDamaged:
        return RepositoryDamaged(
            f"chunk {chunk_id.hex()} in {self._store.url} has {found} bytes where a file says {expected}",
            hint=_DAMAGE_HINT,
            fields={"chunk": chunk_id.hex()},
        )

    def _read_places(self, places: Mapping[bytes, Location]) -> dict[bytes, bytes]:
        """Those chunks that are what they should be."""
        deltas = {chunk_id: place for chunk_id, place in places.items() if place.base}
        others = {chunk_id: place for chunk_id, place in places.items() if not place.base}
        if not deltas:
            return self._read_runs(others)
        needed = {place.base for place in deltas.values()}
        bases = self._memory.recall(self._name, needed)
        # One of another length is none, and may be far longer than what was asked for.
        fitting = {(place.base, place.plain_length) for place in deltas.values()}
        base_places = {
            chunk_id: place
            for chunk_id, place in self._locate_bases(needed.difference(bases)).items()
            if (chunk_id, place.plain_length) in fitting
        }
        # The hash of a delta that was made with a base vouches for the base as well.
        read = self._read_runs({**base_places, **others}, unchecked=base_places.keys() - others.keys())
        found = {chunk_id: read[chunk_id] for chunk_id in others if chunk_id in read}
        bases.update(read)
        found.update(self._read_runs(deltas, bases))
        return found

    def _locate_bases(self, wanted: Collection[bytes]) -> dict[bytes, Location]:
        """Where bases lie; those that are not known, or only as deltas themselves, are left out."""
        places = self._index.locate(wanted)
        if len(places) < len(wanted) or any(place.base for place in places.values()):
            self._index.refresh()
            places = self._index.locate(wanted)
        return {chunk_id: place for chunk_id, place in places.items() if not place.base}

    def _read_runs(
        self,
        places: Mapping[bytes, Location],
        bases: Mapping[bytes, bytes] | None = None,
        unchecked: Collection[bytes] = (),
    ) -> dict[bytes, bytes]:
        is_local = self._store.capabilities.local_root is not None
        runs = list(_join_neighbours(places, MAX_LOCAL_READ_BYTES if is_local else MAX_READ_BYTES))

        def read(run: _Run) -> dict[bytes, bytes]:
            return self._read_run(run, bases or {}, unchecked)

        total_bytes = sum(place.plain_length for place in places.values())
        is_shared = total_bytes > max(MIN_SHARED_BYTES, len(places) * MIN_SHARED_CHUNK_BYTES)
        found: dict[bytes, bytes] = {}
        for chunks in _decoders().map(read, runs) if is_shared and len(runs) > 1 else map(read, runs):
            found.update(chunks)
        return found

    def _read_run(
        self, run: _Run, bases: Mapping[bytes, bytes], unchecked: Collection[bytes]
    ) -> dict[bytes, bytes]:
        """Read neighbours at once; those that are what they should be, or `unchecked`."""
        start = run[0][1].offset
        end = max(place.offset + place.stored_length for _, place in run)
        try:
            data = self._store.get(pack_key(run[0][1].pack), start, end - start)
        except KeyMissing:
            return {}
        found = {}
        for chunk_id, place in run:
            # What was read alone need not be copied.
            offset = place.offset - start
            stored = data if len(run) == 1 else memoryview(data)[offset : offset + place.stored_length]
            try:
                plain = decode(place.codec, stored, place.plain_length, bases.get(place.base))
            except ChunkDamaged:
                continue
            except UnknownCodec as error:
                raise RepositoryIncompatible(
                    f"chunk {chunk_id.hex()} in {self._store.url} was written by a newer version: {error}",
                    hint="upgrade replicate-vcs",
                ) from error
            if chunk_id in unchecked or hash_chunk(plain) == chunk_id:
                found[chunk_id] = plain
        return found

    def _is_index_right(self, chunk_ids: Iterable[bytes]) -> bool:
        """Whether the packs themselves say that these chunks are where the index has them."""
        chunks_by_pack: dict[bytes, dict[bytes, Location]] = {}
        places = self.locate(list(chunk_ids))
        bases = {place.base for place in places.values() if place.base}
        for chunk_id, place in {**places, **self._index.locate(bases)}.items():
            chunks_by_pack.setdefault(place.pack, {})[chunk_id] = place
        for name, expected in chunks_by_pack.items():
            try:
                listing = parse_pack(name, self._store.get(pack_key(name)))
            except (KeyMissing, Malformed, NewerFormat):
                return False
            found = {Location(name, *record[1:]) for record in listing.records if record[0] in expected}
            if not found.issuperset(expected.values()):
                return False
        return True

    def _raise_damaged(self, chunk_id: bytes) -> NoReturn:
        """Say what is wrong with a chunk that could not be read."""
        place = self.locate([chunk_id])[chunk_id]
        if place.base:
            self._check_base(chunk_id, place)
        key = pack_key(place.pack)
        raise RepositoryDamaged(
            f"chunk {chunk_id.hex()} is damaged or missing in {key} of {self._store.url}",
            hint=_DAMAGE_HINT,
            fields={"chunk": chunk_id.hex(), "key": key},
        )

    def _check_base(self, chunk_id: bytes, place: Location) -> None:
        """Raise `RepositoryDamaged` for a chunk if it is its base that cannot be read."""
        base = place.base
        try:
            found = self.locate([base])[base]
            if found.base:
                raise RepositoryDamaged(f"chunk {base.hex()} is a difference itself", hint=_DAMAGE_HINT)
            if found.plain_length != place.plain_length:
                raise RepositoryDamaged(f"chunk {base.hex()} is of another length", hint=_DAMAGE_HINT)
            self.read(base)
        except RepositoryDamaged as error:
            raise RepositoryDamaged(
                f"chunk {chunk_id.hex()} is stored as a difference to one that is not there: {error.message}",
                hint=error.hint,
                fields={"chunk": chunk_id.hex(), "base": base.hex()},
            ) from error


@cache
def _decoders() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MAX_DECODERS, len(os.sched_getaffinity(0))), thread_name_prefix="decode")


# A child has none of its parent's threads.
os.register_at_fork(after_in_child=_decoders.cache_clear)


def _join_neighbours(places: Mapping[bytes, Location], max_read_bytes: int) -> Iterator[_Run]:
    """Chunks in groups that lie so close together in one pack that one read is the cheapest."""
    run: _Run = []
    for item in sorted(places.items(), key=lambda item: item[1]):
        place = item[1]
        if run:
            first, last = run[0][1], run[-1][1]
            gap = place.offset - (last.offset + last.stored_length)
            length = place.offset + place.stored_length - first.offset
            if place.pack != first.pack or gap > MAX_GAP_BYTES or length > max_read_bytes:
                yield run
                run = []
        run.append(item)
    if run:
        yield run
