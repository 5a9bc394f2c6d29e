"""What a walk need not look at: directories that are as in the base, the last capture of a watched tree.

Joins two sources that are of no use alone: the watches know which directories have not changed since the
base, the tree cache what they held when it was stored. That both speak of the same tree is checked by
node ids, from the root down: what is stored under the id that its parent has for it cannot be another
directory, or the same one as another capture saw it. Used by `walk` and `capture`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from replicated.format.manifest import RootNode
from replicated.snapshot.entries import unpack_children, unpack_rows
from replicated.snapshot.treecache import CachedDirectory, TreeCache
from replicated.snapshot.watch import WatchedWalk

# A ctime packs as 0xcf and 8 bytes, that of a smudged row (`treecache.smudge`: 0) as the one byte 0. Searched
# for, since to unpack all rows takes as long as to list the directory: the end of a row that is a zero but
# not the last byte of 8, before the array of 6 that is the next row and its name, or at the very end.
_SMUDGED = re.compile(rb"\x00\x96\xc4(?<!\xcf.{7}\x00\x96\xc4)", re.DOTALL)


class UnchangedChild(NamedTuple):
    """A directory in a directory of the base."""

    name: bytes
    mode: int
    mtime_ns: int
    node: bytes
    cached: CachedDirectory | None


class Base:
    """The tree since whose capture changes are known; with an empty `root_node` there is none."""

    def __init__(
        self,
        watched: WatchedWalk,
        cache: TreeCache | None,
        root: RootNode | None,
        to_list: Iterable[bytes] = (),
    ) -> None:
        """`to_list`: directories, by absolute path, that are to be listed even if they have not changed."""
        self.root_node = root.node if root is not None else b""
        self._watched = watched
        self._cache = cache
        self._to_list = frozenset(to_list)
        #: Directories that changed, by the one they are in: it does not list what the rules leave out.
        self._changed_in: dict[bytes, set[bytes]] = {}
        for path in watched.changed if root is not None else ():
            parent, _, name = path.rpartition(b"/")
            self._changed_in.setdefault(parent, set()).add(name)

    def load(self, path: bytes) -> CachedDirectory | None:
        """What the cache has of a directory, of whatever capture."""
        return self._cache.load(path) if self._cache is not None else None

    def children(
        self, path: bytes, node: bytes, cached: CachedDirectory | None
    ) -> list[UnchangedChild] | None:
        """The directories in a directory that is as it was under this node; None when it must be listed."""
        if not node or cached is None or cached.node != node or path in self._to_list:
            return None
        if not self._watched.is_unchanged(path) or _has_smudged(cached.rows):
            return None
        children = unpack_children(cached.children)
        if not self._changed_in.get(path, set()).issubset(name for name, *_ in children):
            return None
        return [UnchangedChild(*child, self.load(path + b"/" + child[0])) for child in children]


def count_files(cached: CachedDirectory, children: Sequence[UnchangedChild]) -> tuple[int, int]:
    """How many files are directly in a directory of the base, and their bytes."""
    if all(child.cached is not None and child.cached.node == child.node for child in children):
        totals = [child.cached.totals for child in children if child.cached is not None]
        files, _, _, size_bytes = cached.totals
        return files - sum(total[0] for total in totals), size_bytes - sum(total[3] for total in totals)
    sizes = [row.size for row in unpack_rows(cached.rows) if not row.is_link]
    return len(sizes), sum(sizes)


def _has_smudged(rows: bytes) -> bool:
    """Whether a file may have changed after it was captured without a change of its times."""
    return (rows.endswith(b"\x00") and rows[-9:-8] != b"\xcf") or _SMUDGED.search(rows) is not None
