"""Reads chunks and nodes: finds them by the index, fetches, decodes and verifies them.

The one place where bytes come out of packs. Invariant: what leaves has the hash by which it was asked
for, else an error is raised. A chunk that is stored as a difference needs its base, and a base never needs
another chunk. Keeps the chunks that were used last, of all repositories together, up to a number of bytes;
what comes from a store that is not near goes to the cache of contents as well, and is looked for there first.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Final, TypeAlias, TypeVar

from replicate.errors import RepositoryDamaged, RepositoryIncompatible
from replicated.cache import ContentCache
from replicated.chunk.codec import ChunkDamaged, UnknownCodec, decode, hash_chunk
from replicated.damages import Damages
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
from replicated.keys import pack_key
from replicated.neighbours import MAX_WINDOWS, WINDOW_BYTES, Window, plan_windows, read_nodes
from replicated.store.base import KeyMissing, Store

#: From a store that is near, where a read costs little: then large chunks are read one by one, which saves
#: copying them out of what was read (a fifth of what reading raw chunks takes), and several threads share the
#: work.
MAX_NEAR_READ_BYTES: Final = 256 << 10
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

    def __init__(
        self,
        store: Store,
        index: Index,
        memory: ChunkMemory,
        content: ContentCache | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`content` keeps what was read on this machine's disk; None where the store is as near."""
        self._store = store
        self._content = content
        #: What is read around a node where each request costs; 0: nothing.
        self._window_bytes = WINDOW_BYTES if store.capabilities.has_costly_requests else 0
        self._damages = Damages(clock)
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
        self,
        chunk_ids: Sequence[bytes],
        lengths: Sequence[int] | None = None,
        *,
        is_once: bool = False,
        is_cached: bool = True,
    ) -> dict[bytes, bytes]:
        """Several chunks, with as few reads of the store as their places allow.

        When one has not the length that `lengths` says, that is damage, and none is decoded. Those that are
        read `is_once` are not kept in memory, and only where `is_cached` in the cache of contents. What was
        damaged a moment ago still is. Raises `RepositoryDamaged` naming the chunk, `RepositoryIncompatible`,
        `RepositoryUnreachable`.
        """
        found = self._recall(chunk_ids, is_once=is_once)
        expected: list[tuple[bytes, int]] = []
        for chunk_id, length in zip(chunk_ids, lengths, strict=True) if lengths is not None else ():
            if chunk_id not in found:
                expected.append((chunk_id, length))
            elif len(found[chunk_id]) != length:
                raise self._other_length(chunk_id, len(found[chunk_id]), length)
        missing = [chunk_id for chunk_id in dict.fromkeys(chunk_ids) if chunk_id not in found]
        if missing:
            self._refuse_damaged(missing, expected)
            found.update(self._fetch(missing, expected, is_once=is_once, is_cached=is_cached))
        return found

    def read_directory(self, node: bytes) -> DirectoryNode:
        """A node of a directory, parsed; raises as `read_many`."""
        return self._parse(node, self._read_nodes([node])[node], parse_directory)

    def read_directories(self, nodes: Sequence[bytes]) -> list[DirectoryNode]:
        """Several nodes of directories, in this order."""
        found = self._read_nodes(nodes)
        return [self._parse(node, found[node], parse_directory) for node in nodes]

    def read_chunk_list(self, node: bytes) -> ChunkList:
        """A node of a file's list of chunks, parsed; raises as `read_many`."""
        return self._parse(node, self._read_nodes([node])[node], parse_chunk_list)

    def read_layout(self, node: bytes) -> tuple[int, ...]:
        """The lengths in the layout of a gathered file; raises as `read_many`."""
        return self._parse(node, self._read_nodes([node])[node], parse_layout)

    def locate(self, chunk_ids: Sequence[bytes]) -> dict[bytes, Location]:
        """Where these different chunks lie; raises `RepositoryDamaged` when one is in no index."""
        locations = self._index.locate(chunk_ids)
        if len(locations) < len(chunk_ids):
            self._index.refresh()
            locations = self._index.locate(chunk_ids)
        for chunk_id in chunk_ids:
            if chunk_id not in locations:
                damaged = ", ".join(sorted(self._index.damaged_objects))
                error = RepositoryDamaged(
                    f"chunk {chunk_id.hex()} is in no index of {self._store.url}",
                    hint=f"damaged index objects: {damaged}" if damaged else _DAMAGE_HINT,
                    fields={"chunk": chunk_id.hex()},
                )
                self._damages.remember(chunk_id, None, error)
                raise error
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

    def _read_nodes(self, nodes: Sequence[bytes]) -> dict[bytes, bytes]:
        """As `read_many`; where requests are costly, the nodes beside them come with them and are kept."""
        if not self._window_bytes:
            return self.read_many(nodes)
        found = self._recall(nodes, is_once=False)
        missing = [node for node in dict.fromkeys(nodes) if node not in found]
        # What was damaged a moment ago is not fetched again in this way either.
        if missing and not self._damages.find(missing, ()):
            found.update(self._read_around(missing))
            missing = [node for node in missing if node not in found]
        if missing:
            found.update(self.read_many(missing))
        return found

    def _read_around(self, nodes: Sequence[bytes]) -> dict[bytes, bytes]:
        """Those of the nodes that are found together with what lies around them."""
        windows = plan_windows(self.locate(nodes), self._window_bytes)
        if not windows or len(windows) > MAX_WINDOWS:
            return {}

        def read(window: Window) -> dict[bytes, bytes]:
            try:
                return read_nodes(window, self._store.get(pack_key(window.pack), window.start, window.length))
            except KeyMissing:
                return {}

        found: dict[bytes, bytes] = {}
        for others in map(read, windows) if len(windows) == 1 else self._fetchers().map(read, windows):
            found.update(others)
        wanted = {node: found.pop(node) for node in nodes if node in found}
        # Last what is wanted: should there be no room for all, that stays.
        self._remember(found | wanted, is_once=False, is_cached=True)
        return wanted

    def _fetchers(self) -> ThreadPoolExecutor:
        return _make_fetchers(self._store.capabilities.parallel_requests)

    def _recall(self, chunk_ids: Sequence[bytes], *, is_once: bool) -> dict[bytes, bytes]:
        """Those of the chunks that need not be fetched."""
        found = self._memory.recall(self._name, chunk_ids)
        if self._content is not None and len(found) < len(chunk_ids):
            kept = self._content.recall([chunk_id for chunk_id in chunk_ids if chunk_id not in found])
            if not is_once:
                self._memory.remember(self._name, kept)
            found.update(kept)
        return found

    def _refuse_damaged(self, wanted: Sequence[bytes], expected: Sequence[tuple[bytes, int]]) -> None:
        """Raise what was said a moment ago of one of these chunks, unless it lies elsewhere by now."""
        for chunk_id, damage in self._damages.find(wanted, expected):
            if self._index.locate([chunk_id]).get(chunk_id) == damage.place:
                error = damage.error
                # A new one, because each that is raised says where.
                raise RepositoryDamaged(error.message, hint=error.hint, fields=error.fields)

    def _remember(self, chunks: dict[bytes, bytes], *, is_once: bool, is_cached: bool) -> None:
        """Keep chunks that were fetched."""
        if not is_once:
            self._memory.remember(self._name, chunks)
        if self._content is not None and is_cached:
            self._content.remember(chunks)

    def _fetch(
        self, wanted: list[bytes], expected: Sequence[tuple[bytes, int]], *, is_once: bool, is_cached: bool
    ) -> dict[bytes, bytes]:
        """Chunks from the store, which are kept, also when others are damaged."""
        found = self._fetch_whole(wanted, expected)
        self._remember(found, is_once=is_once, is_cached=is_cached)
        for chunk_id in wanted:
            if chunk_id not in found:
                place = self.locate([chunk_id])[chunk_id]
                error = self._explain(chunk_id, place)
                self._damages.remember(chunk_id, place, error)
                raise error
        return found

    def _fetch_whole(self, wanted: list[bytes], expected: Sequence[tuple[bytes, int]]) -> dict[bytes, bytes]:
        """Those that are whole; what fails is tried again, at last with an index that is surely right."""
        found = self._read_places(self._locate_expected(wanted, expected))
        failed = [chunk_id for chunk_id in wanted if chunk_id not in found]
        if failed:
            # What was hit on its way here is right the second time, and what was moved is found.
            self._index.refresh()
            found.update(self._read_places(self._locate_expected(failed, expected)))
            failed = [chunk_id for chunk_id in failed if chunk_id not in found]
        # Making the index anew takes minutes when there are millions of chunks.
        if failed and not self._rebuilt and not self._is_index_right(failed):
            self._rebuilt = True
            self._index.rebuild()
            found.update(self._read_places(self._locate_expected(failed, expected)))
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
                    error = self._other_length(chunk_id, place.plain_length, length)
                    self._damages.remember(chunk_id, place, error, length)
                    raise error
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
        bases = self._recall(list(needed), is_once=False)
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
        capabilities = self._store.capabilities
        is_near = capabilities.is_near
        # What goes beyond a request by less than a gap is not worth another one: ranges of files begin and
        # end within chunks, so what they need is nearly always a little longer than they are.
        longest = capabilities.max_read_bytes + max(0, capabilities.max_gap_bytes)
        if is_near:
            longest = MAX_NEAR_READ_BYTES
        runs = list(_join_neighbours(places, capabilities.max_gap_bytes, longest))

        def read(run: _Run) -> dict[bytes, bytes]:
            return self._read_run(run, bases or {}, unchecked)

        total_bytes = sum(place.plain_length for place in places.values())
        is_much = total_bytes > max(MIN_SHARED_BYTES, len(places) * MIN_SHARED_CHUNK_BYTES)
        parts: Iterable[dict[bytes, bytes]] = map(read, runs)
        if len(runs) > 1 and (is_much or not is_near):
            parts = (_decoders() if is_near else self._fetchers()).map(read, runs)
        found: dict[bytes, bytes] = {}
        for chunks in parts:
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

    def _explain(self, chunk_id: bytes, place: Location) -> RepositoryDamaged:
        """What is wrong with a chunk that could not be read."""
        if place.base and (error := self._explain_base(chunk_id, place)):
            return error
        key = pack_key(place.pack)
        return RepositoryDamaged(
            f"chunk {chunk_id.hex()} is damaged or missing in {key} of {self._store.url}",
            hint=_DAMAGE_HINT,
            fields={"chunk": chunk_id.hex(), "key": key},
        )

    def _explain_base(self, chunk_id: bytes, place: Location) -> RepositoryDamaged | None:
        """What is wrong with a chunk if it is its base that cannot be read."""
        base = place.base
        try:
            found = self.locate([base])[base]
            if found.base:
                raise RepositoryDamaged(f"chunk {base.hex()} is a difference itself", hint=_DAMAGE_HINT)
            if found.plain_length != place.plain_length:
                raise RepositoryDamaged(f"chunk {base.hex()} is of another length", hint=_DAMAGE_HINT)
            self.read(base)
        except RepositoryDamaged as error:
            return RepositoryDamaged(
                f"chunk {chunk_id.hex()} is stored as a difference to one that is not there: {error.message}",
                hint=error.hint,
                fields={"chunk": chunk_id.hex(), "base": base.hex()},
            )
        return None


@cache
def _make_fetchers(count: int) -> ThreadPoolExecutor:
    """Threads that wait for stores with so many parallel requests, for all readers of a process."""
    return ThreadPoolExecutor(count, thread_name_prefix="fetch")


@cache
def _decoders() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MAX_DECODERS, len(os.sched_getaffinity(0))), thread_name_prefix="decode")


# A child has none of its parent's threads.
os.register_at_fork(after_in_child=_make_fetchers.cache_clear)
os.register_at_fork(after_in_child=_decoders.cache_clear)


def _join_neighbours(
    places: Mapping[bytes, Location], max_gap_bytes: int, max_read_bytes: int
) -> Iterator[_Run]:
    """Chunks in groups that lie so close together in one pack that one read is the cheapest."""
    run: _Run = []
    for item in sorted(places.items(), key=lambda item: item[1]):
        place = item[1]
        if run:
            first, last = run[0][1], run[-1][1]
            gap = place.offset - (last.offset + last.stored_length)
            length = place.offset + place.stored_length - first.offset
            if place.pack != first.pack or gap > max_gap_bytes or length > max_read_bytes:
                yield run
                run = []
        run.append(item)
    if run:
        yield run
