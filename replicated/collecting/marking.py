"""What trees need: every node and chunk below them.

Nodes are read through the index of the repository, each once, many at a time. What a tree that readers can
see lacks is damage and stops the collector. What a tree lacks that is only announced is passed over: its
writer will find that out too, and store it again before he commits (docs/durability.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from replicate.errors import RepositoryDamaged
from replicated.collecting.planning import Needs
from replicated.collecting.roots import Root
from replicated.format.manifest import DIRECTORY, FILE, DirectoryNode, FileContent
from replicated.idset import IdSet
from replicated.repository import Repository

#: Nodes that are read at once, and trees that are begun at once.
_BATCH: Final = 256


class Marker:
    """Marks trees, again and again; what readers can see is looked at once."""

    def __init__(self, repository: Repository, on_progress: Callable[[int], None]) -> None:
        """`on_progress` gets how many trees are marked, and raises to stop."""
        self._repository = repository
        self._on_progress = on_progress
        self.needs = Needs()
        # Apart from what is needed: a file may hold the bytes of a node, whose children nobody needs.
        self._walked = IdSet()
        self._walked_pending = IdSet()
        self._done = 0

    def mark(self, roots: Sequence[Root]) -> None:
        """Mark all that these trees need; raises `RepositoryDamaged`, which names the record."""
        # What they lacked the last time may be there now, and then it is needed with all below it.
        self._walked_pending = IdSet()
        committed = [root for root in roots if root.is_committed and not root.is_orphan]
        for start in range(0, len(committed), _BATCH):
            batch = committed[start : start + _BATCH]
            try:
                self._walk([root.root.node for root in batch], is_committed=True)
            except RepositoryDamaged:
                # What was walked was not walked to its end: from here on this marker is good for nothing.
                for root in batch:
                    Marker(self._repository, self._on_progress)._mark_alone(root)
                raise
            self._done += len(batch)
            self._on_progress(self._done)
        for root in roots:
            if not root.is_committed or root.is_orphan:
                self._walk([root.root.node], is_committed=False)
                self._done += 1
                self._on_progress(self._done)

    def _mark_alone(self, root: Root) -> None:
        try:
            self._walk([root.root.node], is_committed=True)
        except RepositoryDamaged as error:
            raise RepositoryDamaged(
                f"nobody knows what {root.key} in {self._repository.url} needs: {error.message}",
                hint="nothing was deleted; remove what it belongs to (`replicate rm`) if it cannot be mended",
                fields={**error.fields, "key": root.key},
            ) from error

    def _walk(self, nodes: Iterable[bytes], *, is_committed: bool) -> None:
        walked = self._walked if is_committed else self._walked_pending
        needed = self.needs.committed if is_committed else self.needs.pending
        directories = list(dict.fromkeys(nodes))
        lists: list[bytes] = []

        def need(chunk_id: bytes) -> None:
            if is_committed or chunk_id not in self.needs.committed:
                needed.add(chunk_id)

        def is_new(node: bytes) -> bool:
            return node not in walked and (is_committed or node not in self._walked)

        while directories or lists:
            batch = [node for node in dict.fromkeys(directories[-_BATCH:]) if is_new(node)]
            del directories[-_BATCH:]
            for node, directory in self._read(batch, is_committed=is_committed):
                walked.add(node)
                directories.extend(child.node for child in directory.children)
                for entry in directory.entries:
                    if entry.type == DIRECTORY:
                        directories.append(entry.hash)
                    elif entry.type == FILE:
                        content = FileContent.from_entry(entry.size, entry.hash, entry.content)
                        if content.layout:
                            need(content.layout)
                        if content.node:
                            lists.append(content.node)
                        elif content.size:
                            for chunk_id in content.ids():
                                need(chunk_id)
            for node in batch:
                need(node)
            while lists:
                node = lists.pop()
                need(node)
                if not is_new(node) or not self._is_there([node], is_committed=is_committed):
                    continue
                chunks = self._repository.read_chunk_list(node)
                walked.add(node)
                if chunks.level:
                    lists.extend(chunks.split_ids())
                else:
                    for chunk_id in chunks.split_ids():
                        need(chunk_id)

    def _read(self, nodes: list[bytes], *, is_committed: bool) -> list[tuple[bytes, DirectoryNode]]:
        there = self._is_there(nodes, is_committed=is_committed)
        try:
            directories = self._repository.read_directories(there)
        except RepositoryDamaged:
            # Another collector may have deleted some of them just now.
            there = self._is_there(there, is_committed=is_committed)
            directories = self._repository.read_directories(there)
        return list(zip(there, directories, strict=True))

    def _is_there(self, nodes: list[bytes], *, is_committed: bool) -> list[bytes]:
        """Those of the nodes that can be read; of what readers can see, all of them."""
        if is_committed or not nodes:
            return nodes
        index = self._repository.index
        found = index.locate(nodes)
        if len(found) < len(nodes):
            index.refresh()
            found = index.locate(nodes)
        bases = index.locate({place.base for place in found.values() if place.base})
        return [
            node for node in nodes if node in found and (not found[node].base or found[node].base in bases)
        ]
