"""The cache of contents: what is kept on this machine's disk of what was read, within a number of bytes.

Used by `reader` for the chunks of stores that are not near, by mounts and checkouts for whole files. Several
processes share one directory; what is in it survives them and may be deleted at any time. Nothing depends on
it: trouble is a miss and a line in the log. Invariant: bytes that leave here were verified, and nothing in
the directory is above the limit, however many processes there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from replicated.cache.chunks import KeptChunks
from replicated.cache.ledger import Ledger
from replicated.cache.plain import PlainFile, PlainFiles

#: What may be kept when nothing else is configured.
DEFAULT_CACHE_BYTES: Final = 10 * 10**9


class ContentCache:
    """Chunks and plain files on disk. Thread-safe; after `close`, as if nothing were there."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        """`directory` is the caches' alone. With a limit of 0, nothing is read from it and nothing kept."""
        self._ledger: Ledger | None = None
        if limit_bytes <= 0:
            return
        self._ledger = Ledger(directory, limit_bytes)
        self._chunks = KeptChunks(self._ledger, limit_bytes)
        self._plain = PlainFiles(self._ledger, limit_bytes)

    def recall(self, chunk_ids: Sequence[bytes]) -> dict[bytes, bytes]:
        """Those of the chunks that are here, verified by hash. What is damaged is missing, and forgotten."""
        return {} if self._ledger is None else self._chunks.recall(chunk_ids)

    def remember(self, chunks: Mapping[bytes, bytes]) -> None:
        """Keep chunks that are verified, as far as there is room; those used longest ago make some."""
        if self._ledger is not None:
            self._chunks.remember(chunks)

    def has_plain(self, digest: bytes) -> bool:
        """Whether there is a whole plain file of this hash, as far as the cache knows."""
        return self._ledger is not None and self._plain.has(digest)

    def open_plain(self, digest: bytes, size: int) -> PlainFile | None:
        """The whole plain file of this hash and size, if there is one; the caller closes it."""
        return None if self._ledger is None else self._plain.open(digest, size)

    def build_plain(self, digest: bytes, size: int, parts: Iterable[bytes | memoryview]) -> bool:
        """Make a whole plain file of its parts; whether there is one now.

        Not when there is no room, when it is longer than half of the limit, when somebody else is making it,
        or when the parts have not this hash and size. Parts are asked for only when there is room for all;
        whatever they raise passes. Returns when the file is on the disk.
        """
        return self._ledger is not None and self._plain.build(digest, size, parts)

    def close(self) -> None:
        """Write down what is still in memory; may be called twice. Plain files that are open stay so."""
        if self._ledger is not None:
            self._chunks.close()
            self._ledger.close()
