"""Nodes of trees that lie beside one that is wanted: found in what was read of a pack around it.

Whoever opens a file in a bucket needs the root of a tree, then a directory, then a list of chunks, and each
would cost a request. They were written one after the other, so a part of the pack around one of them nearly
always holds the others. Used by `reader`, which fetches the part. Invariants: what is given has the hash
under which it is given; and work and memory are bounded by the size of the part, whatever lies there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from replicated.chunk.codec import ChunkDamaged, UnknownCodec, decode, hash_chunk
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.pack import ENTRY, ENTRY_MAGIC, Record, scan_entries, scan_pack
from replicated.index import Location

#: What is read of a pack around a node: as much as a connection of 100 MB/s brings while the first byte of
#: another request is waited for (20 ms). The nodes of ten thousand files fit into it.
WINDOW_BYTES: Final = 2 << 20
#: Windows that are read for nodes that are wanted together; for more of them only the nodes are read.
MAX_WINDOWS: Final = 4
#: Compressed nodes may become so many times as long as the window; more is not looked at.
_MAX_EXPANSION: Final = 4
#: Where an entry may begin is tried so often, so that bytes which only look like beginnings cost little.
_MAX_BEGINNINGS: Final = 64


class Window(NamedTuple):
    """A part of a pack that holds a node that is wanted."""

    pack: bytes
    start: int
    length: int
    #: The place of the node.
    wanted: Location


def plan_windows(places: Mapping[bytes, Location], window_bytes: int) -> list[Window]:
    """Parts of packs that hold these nodes and those beside them; a node too long for it is left out."""
    windows: list[Window] = []
    for place in sorted(places.values(), key=lambda place: (place.pack, -place.offset)):
        end = place.offset + place.stored_length
        if place.base or place.stored_length + ENTRY.size > window_bytes:
            continue
        last = windows[-1] if windows else None
        if last is not None and last.pack == place.pack and place.offset - ENTRY.size >= last.start:
            continue
        # What a node needs was written before it: lists of chunks, then directories, and the root last. A
        # pack that is not longer is read whole.
        start = max(0, end - window_bytes)
        windows.append(Window(place.pack, start, window_bytes, place))
    return windows


def read_nodes(window: Window, data: bytes) -> dict[bytes, bytes]:
    """The nodes in a window, by the hashes that they have; damaged ones are left out."""
    nodes: dict[bytes, bytes] = {}
    left = _MAX_EXPANSION * window.length
    for record in _find_records(window, data):
        left -= record.plain_length
        if left < 0:
            break
        if record.base:
            continue
        stored = memoryview(data)[record.offset : record.offset + record.stored_length]
        try:
            plain = decode(record.codec, stored, record.plain_length, None)
        except (ChunkDamaged, UnknownCodec):
            continue
        if hash_chunk(plain) == record.chunk_id:
            nodes[record.chunk_id] = plain
    return nodes


def _find_records(window: Window, data: bytes) -> Iterable[Record]:
    """The entries in a window, with offsets from its beginning."""
    if window.start == 0:
        try:
            return list(scan_pack(data))
        except (Malformed, NewerFormat):
            return ()
    wanted = window.wanted.offset - window.start
    for begin in _find_beginnings(data, wanted - ENTRY.size):
        records = list(scan_entries(data, begin))
        # Bytes that only look like the beginning of an entry do not lead to one that is known to be there.
        if any(record.offset == wanted for record in records):
            return records
    return ()


def _find_beginnings(data: bytes, last: int) -> Iterator[int]:
    position = -1
    for _ in range(_MAX_BEGINNINGS):
        position = data.find(ENTRY_MAGIC, position + 1, last + len(ENTRY_MAGIC))
        if position < 0:
            return
        yield position
    yield last
