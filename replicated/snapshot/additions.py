"""What one capture adds to what is to be stored, and where in the project most of it is.

Filled by `freeze` with what neither the repository nor another capture has, and told to the user when it is
unusually much. Small files are counted by directory: of a million of them no single one is worth a line.
"""

from __future__ import annotations

import heapq
from typing import Final, NamedTuple

#: So many places are told.
LARGEST: Final = 5


class Addition(NamedTuple):
    """A big file, or the small files of one directory."""

    size_bytes: int
    #: Relative to the project directory, which itself is b".".
    path: bytes
    #: How many, of a directory; 0 for one big file.
    small_files: int = 0


class Additions:
    """The sums, and the largest parts; sizes are without holes."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.file_count = 0
        #: The smallest first.
        self._largest: list[Addition] = []
        #: Of the directory at hand.
        self._small_files = 0
        self._small_bytes = 0

    @property
    def largest(self) -> list[Addition]:
        """At most `LARGEST` of what was added, the largest first."""
        return sorted(self._largest, reverse=True)

    def add_big(self, path: bytes, size_bytes: int) -> None:
        """Count a file that is worth a line of its own."""
        self.size_bytes += size_bytes
        self.file_count += 1
        self._offer(Addition(size_bytes, path))

    def add_small(self, file_count: int, size_bytes: int) -> None:
        """Count small files of the directory that `end_directory` will name."""
        self.size_bytes += size_bytes
        self.file_count += file_count
        self._small_files += file_count
        self._small_bytes += size_bytes

    def end_directory(self, path: bytes) -> None:
        """All files of a directory have been counted."""
        if self._small_files:
            self._offer(Addition(self._small_bytes, path or b".", self._small_files))
            self._small_files = self._small_bytes = 0

    def _offer(self, addition: Addition) -> None:
        if len(self._largest) < LARGEST:
            heapq.heappush(self._largest, addition)
        else:
            heapq.heappushpop(self._largest, addition)
