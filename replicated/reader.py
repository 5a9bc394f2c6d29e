"""Reads chunks and nodes: finds them by the index, fetches, decodes and verifies them.

The one place where bytes come out of packs. Invariant: what leaves has the hash by which it was asked
for, else an error is raised. Keeps the chunks that were used last, of all repositories together, up to a
number of bytes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

from replicate.errors import RepositoryDamaged, RepositoryIncompatible
from replicated.chunk.codec import ChunkDamaged, UnknownCodec, decode, hash_chunk
from replicated.format.canonical import Malformed
from replicated.format.manifest import (
    ChunkList,
    DirectoryNode,
    parse_chunk_list,
    parse_directory,
    parse_layout,
)
from replicated.index import Index, Location
from replicated.packer import pack_key
from replicated.store.base import KeyMissing, Store

#: Chunks in one pack are read together when no more than this lies between them.
MAX_GAP_BYTES: Final = 64 << 10
#: And no more than this at once.
MAX_READ_BYTES: Final = 8 << 20

T = TypeVar("T")

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

    def read_many(self, chunk_ids: Sequence[bytes]) -> dict[bytes, bytes]:
        """Several chunks, with as few reads of the store as their places allow.

        Raises `RepositoryDamaged` naming the chunk, `RepositoryIncompatible`, `RepositoryUnreachable`.
        """
        found = self._memory.recall(self._name, chunk_ids)
        missing = [chunk_id for chunk_id in dict.fromkeys(chunk_ids) if chunk_id not in found]
        if missing:
            fetched = self._fetch(missing)
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

    def _fetch(self, wanted: list[bytes]) -> dict[bytes, bytes]:
        """Chunks from the store; those that fail are tried again with an index that is surely right."""
        found: dict[bytes, bytes] = {}
        failed: list[bytes] = []
        for run in _join_neighbours(self.locate(wanted)):
            failed.extend(self._read_run(run, found))
        if failed and not self._rebuilt:
            self._rebuilt = True
            self._index.rebuild()
            failed = [
                chunk_id
                for run in _join_neighbours(self.locate(failed))
                for chunk_id in self._read_run(run, found)
            ]
        if failed:
            location = self.locate(failed[:1])[failed[0]]
            key = pack_key(location.pack)
            raise RepositoryDamaged(
                f"chunk {failed[0].hex()} is damaged or missing in {key} of {self._store.url}",
                hint=_DAMAGE_HINT,
                fields={"chunk": failed[0].hex(), "key": key},
            )
        return found

    def _read_run(self, run: Sequence[tuple[bytes, Location]], found: dict[bytes, bytes]) -> list[bytes]:
        """Read neighbours at once into `found`; the ids of those that are not what they should be."""
        start = run[0][1].offset
        end = max(location.offset + location.stored_length for _, location in run)
        try:
            data = self._store.get(pack_key(run[0][1].pack), start, end - start)
        except KeyMissing:
            return [chunk_id for chunk_id, _ in run]
        failed = []
        for chunk_id, location in run:
            offset = location.offset - start
            stored = data[offset : offset + location.stored_length]
            try:
                plain = decode(location.codec, stored, location.plain_length)
            except ChunkDamaged:
                failed.append(chunk_id)
                continue
            except UnknownCodec as error:
                raise RepositoryIncompatible(
                    f"chunk {chunk_id.hex()} in {self._store.url} was written by a newer version: {error}",
                    hint="upgrade replicate-vcs",
                ) from error
            if hash_chunk(plain) == chunk_id:
                found[chunk_id] = plain
            else:
                failed.append(chunk_id)
        return failed


def _join_neighbours(locations: dict[bytes, Location]) -> Iterator[list[tuple[bytes, Location]]]:
    """Chunks in groups that lie so close together in one pack that one read is the cheapest."""
    run: list[tuple[bytes, Location]] = []
    for item in sorted(locations.items(), key=lambda item: item[1]):
        location = item[1]
        if run:
            first, last = run[0][1], run[-1][1]
            gap = location.offset - (last.offset + last.stored_length)
            length = location.offset + location.stored_length - first.offset
            if location.pack != first.pack or gap > MAX_GAP_BYTES or length > MAX_READ_BYTES:
                yield run
                run = []
        run.append(item)
    if run:
        yield run
