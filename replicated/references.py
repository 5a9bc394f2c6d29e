"""What a snapshot refers to: every chunk and node below it, and how each is stored.

Used by `usage`, and by `snapshot/ingest` to look whether all of a snapshot is there. Invariant: what was seen
is not walked again, so that a tree which holds the same nodes many times over costs no more than they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, Protocol

from replicated.format.manifest import DIRECTORY, FILE, FileContent
from replicated.format.metadata import Snapshot
from replicated.repository import Repository

_LOOK_UP_BATCH = 500


class StoredChunk(NamedTuple):
    """A chunk, or node of a tree, and how it is stored."""

    id: bytes
    plain_length: int
    stored_length: int
    codec: int
    #: Whether it is a node of a tree rather than content of a file.
    is_node: bool
    #: Id of the chunk without which it cannot be decoded, also of one in no snapshot; empty: there is none.
    base: bytes
    #: Name of the pack that it is in.
    pack: bytes


class Seen(Protocol):
    """A set of ids, as `set[bytes]` is one."""

    def __contains__(self, chunk_id: bytes, /) -> bool:
        """Whether it was added."""
        ...

    def add(self, chunk_id: bytes, /) -> object:
        """Add it."""
        ...


def iter_chunks(
    repository: Repository, snapshot: Snapshot, seen: Seen | None = None
) -> Iterator[StoredChunk]:
    """Every chunk and node of a snapshot, each once.

    What is in `seen` is left out, with all that lies below it, and what is given is added to it. Raises
    `RepositoryDamaged` for one that is in no index, or whose base is in none.
    """
    references = _iter_references(repository, snapshot, set() if seen is None else seen)
    while batch := dict(islice(references, _LOOK_UP_BATCH)):
        places = repository.locate(list(batch))
        bases = {place.base for place in places.values() if place.base}
        if repository.index.find_missing(bases):
            repository.locate(sorted(bases))
        for chunk_id, place in places.items():
            yield StoredChunk(
                chunk_id,
                place.plain_length,
                place.stored_length,
                place.codec,
                batch[chunk_id],
                place.base,
                place.pack,
            )


def _iter_references(repository: Repository, snapshot: Snapshot, seen: Seen) -> Iterator[tuple[bytes, bool]]:
    """(id, is node) of all nodes and chunks below a snapshot not in `seen`, which they are added to."""
    directories = [snapshot.root.node]
    while directories:
        node_id = directories.pop()
        if node_id in seen:
            continue
        seen.add(node_id)
        yield node_id, True
        node = repository.read_directory(node_id)
        directories.extend(child.node for child in node.children)
        for entry in node.entries:
            if entry.type == DIRECTORY:
                directories.append(entry.hash)
            elif entry.type == FILE:
                content = FileContent.from_entry(entry.size, entry.hash, entry.content)
                yield from _iter_content(repository, content, seen)


def _iter_content(repository: Repository, content: FileContent, seen: Seen) -> Iterator[tuple[bytes, bool]]:
    lists: list[bytes] = []
    ids: list[bytes] = []
    if content.layout and content.layout not in seen:
        seen.add(content.layout)
        yield content.layout, True
    if content.node:
        lists.append(content.node)
    elif content.size:
        ids.extend(content.ids())
    while lists or ids:
        for chunk_id in ids:
            if chunk_id not in seen:
                seen.add(chunk_id)
                yield chunk_id, False
        ids = []
        if lists and (node_id := lists.pop()) not in seen:
            seen.add(node_id)
            yield node_id, True
            node = repository.read_chunk_list(node_id)
            (ids if node.level == 0 else lists).extend(node.split_ids())
