"""A set of very many ids in little memory: ten bytes each, where a set of Python's takes a hundred.

For looks at a whole repository (`usage`), which may have ten million chunks. Ids are hashes, so their first
ten bytes stand for them: two of ten million share these by chance once in 10^10 repositories. What was added
since the last `keep` can be taken back, and takes ten bytes more until then. Not for several threads at once.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import Final

#: The first bytes of an id choose a bucket, the others are in it. At ten million ids a bucket has 150, so
#: that putting one into the middle moves a kilobyte.
_BUCKET_BYTES: Final = 2
_KEY_BYTES: Final = 8
_USED_BYTES: Final = _BUCKET_BYTES + _KEY_BYTES


class IdSet:
    """Ids of chunks and nodes; see the module's text."""

    def __init__(self) -> None:
        #: Sorted.
        self._buckets: list[array[int] | None] = [None] * (1 << 8 * _BUCKET_BYTES)
        self._count = 0
        #: What was added since the last `keep`, one after the other.
        self._added = bytearray()

    def __len__(self) -> int:
        return self._count

    def __contains__(self, identifier: bytes) -> bool:
        bucket = self._buckets[int.from_bytes(identifier[:_BUCKET_BYTES], "big")]
        if bucket is None:
            return False
        key = int.from_bytes(identifier[_BUCKET_BYTES:_USED_BYTES], "big")
        position = bisect_left(bucket, key)
        return position < len(bucket) and bucket[position] == key

    def add(self, identifier: bytes) -> bool:
        """Whether the id is new."""
        number = int.from_bytes(identifier[:_BUCKET_BYTES], "big")
        key = int.from_bytes(identifier[_BUCKET_BYTES:_USED_BYTES], "big")
        bucket = self._buckets[number]
        if bucket is None:
            self._buckets[number] = array("Q", (key,))
        else:
            position = bisect_left(bucket, key)
            if position < len(bucket) and bucket[position] == key:
                return False
            bucket.insert(position, key)
        self._count += 1
        self._added += identifier[:_USED_BYTES]
        return True

    def keep(self) -> None:
        """Let what was added so far stay."""
        self._added.clear()

    def undo(self) -> None:
        """Take back what was added since the last `keep`."""
        for start in range(0, len(self._added), _USED_BYTES):
            used = self._added[start : start + _USED_BYTES]
            bucket = self._buckets[int.from_bytes(used[:_BUCKET_BYTES], "big")]
            assert bucket is not None
            del bucket[bisect_left(bucket, int.from_bytes(used[_BUCKET_BYTES:], "big"))]
            self._count -= 1
        self._added.clear()
