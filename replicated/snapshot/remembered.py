"""What an ingest learns about the directories that it stores, for the tree cache, until it may be told.

The cache may say that a content is in the repository only once it is, so everything waits here, in a file
when it is much, until the writer has finished. Used by `ingest`. Losing it costs time, never a snapshot.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

import msgpack

from replicated.format.manifest import FileContent
from replicated.snapshot.entries import (
    KNOWN,
    LINK,
    CapturedDirectory,
    Row,
    Source,
    pack_children,
    pack_rows,
    pack_sources,
    unpack_rows,
    unpack_sources,
)
from replicated.snapshot.treecache import CachedDirectory, CachedTree, TreeCache, smudge

#: So much is kept in memory.
_MEMORY_BYTES: Final = 8 << 20
_MAX_ROW_BYTES: Final = 1 << 30
_NO_CHILDREN: Final = pack_children([])

_log = logging.getLogger(__name__)


class Remembered:
    """Rows for the cache, in the order in which they were added; a context manager."""

    def __init__(self, generation: int) -> None:
        self._generation = generation
        self._file = tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)  # noqa: SIM115 (__exit__)
        self._packer = msgpack.Packer(use_bin_type=True)
        self._is_lost = False

    def __enter__(self) -> Remembered:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(
        self,
        path: bytes,
        record: CapturedDirectory,
        rows: Sequence[Row],
        contents: Sequence[FileContent | bytes],
        children: bytes,
        node: bytes,
        totals: tuple[int, int, int, int],
    ) -> None:
        """Remember a directory with the contents of its files and the targets of its links."""
        self._write(
            path,
            CachedDirectory(
                device=record.device,
                inode=record.inode,
                rows=smudge(rows, record.listed_ns),
                sources=pack_sources(list(map(_source_of, contents))),
                children=children,
                node=node,
                totals=totals,
                generation=self._generation,
            ),
        )

    def add_part(
        self,
        path: bytes,
        record: CapturedDirectory,
        cached: CachedDirectory | None,
        rows: Sequence[Row],
        contents: Sequence[FileContent | bytes],
    ) -> None:
        """Remember some files of a directory, of which others were not looked at.

        `cached` is what is known of it already, under the present index. A row with a node describes a
        whole directory, so this one gets none.
        """
        new = {
            row.name: (row, _source_of(content))
            for row, content in zip(unpack_rows(smudge(rows, record.listed_ns)), contents, strict=True)
        }
        old: dict[bytes, tuple[Row, Source]] = {}
        if cached is not None and (cached.device, cached.inode) == (record.device, record.inode):
            pairs = zip(unpack_rows(cached.rows), unpack_sources(cached.sources), strict=True)
            old = {row.name: (row, source) for row, source in pairs}
        merged = old | new
        if merged == old:
            return
        in_order = [merged[name] for name in sorted(merged)]
        self._write(
            path,
            CachedDirectory(
                device=record.device,
                inode=record.inode,
                rows=pack_rows([row for row, _ in in_order]),
                sources=pack_sources([source for _, source in in_order]),
                children=_NO_CHILDREN,
                node=b"",
                totals=(0, 0, 0, 0),
                generation=self._generation,
            ),
        )

    def tell(self, cache: TreeCache, tree: tuple[bytes, CachedTree] | None) -> None:
        """Put everything into the cache, and `tree` by its key; all that is in it is stored by now."""
        if not self._is_lost:
            cache.store(self._read(), tree)

    def _write(self, path: bytes, directory: CachedDirectory) -> None:
        if self._is_lost:
            return
        try:
            self._file.write(self._packer.pack((path, tuple(directory))))
        except OSError as error:
            # Without one row the others are of no use: the tree would be taken for what it was before.
            _log.warning("the tree cache will not know what is stored now: %s", error)
            self._is_lost = True

    def _read(self) -> Iterator[tuple[bytes, CachedDirectory]]:
        self._file.seek(0)
        rows: Any = msgpack.Unpacker(
            cast("Any", self._file), raw=False, use_list=False, max_buffer_size=_MAX_ROW_BYTES
        )
        for path, directory in rows:
            yield path, CachedDirectory._make(directory)


def _source_of(content: FileContent | bytes) -> Source:
    if isinstance(content, FileContent):
        return KNOWN, content.hash, content.packed()
    return LINK, content
