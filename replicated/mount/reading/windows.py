"""Guesses from the reads of one file what is read next. Pure: no thread, no clock and no bytes.

`streams` tells it of each read and fetches what it says. The kernel reads ahead in several requests at once,
which arrive in any order, and a file can be read at several places by several readers: each of them is a
`Cursor`. Invariant: nothing is given out while somebody is about to read it for whom it was given out, all
cursors together never have more ahead of them than there is room for, and reads at random make nothing be
read ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

#: What a reader is given ahead at first; it doubles from then on.
FIRST_WINDOW_BYTES: Final = 1 << 20
#: A read that begins so far before, or after, where it was expected still belongs to its cursor.
MAX_BACK_BYTES: Final = 1 << 20
MAX_SKIP_BYTES: Final = 16 << 20
#: Places of one file where it is followed at once; the one that was not used for longest is given up.
MAX_CURSORS: Final = 8
#: A cursor that was not used in so many reads of the file keeps no room for itself that others need.
STALE_READS: Final = 2 * MAX_CURSORS


@dataclass(eq=False, slots=True)
class Cursor:
    """One reader of a file, as far as one can tell."""

    #: Where the furthest read has ended.
    position: int
    #: Where what was given out to be read ahead ends.
    ahead: int
    #: How much is read ahead next; 0: it is not known to go on from read to read.
    window: int = 0
    #: The last read, by its number.
    used_at: int = 0

    @property
    def outstanding(self) -> int:
        """Bytes that were given out and not read."""
        return max(self.ahead - self.position, 0)

    def expects(self, offset: int) -> bool:
        """Whether a read at `offset` may well be its next: kernels read in any order, programs skip.

        Only what has gone on exactly is followed loosely: reads at random are often near each other.
        """
        skip = min(self.outstanding + self.window, MAX_SKIP_BYTES)
        return self.window > 0 and -MAX_BACK_BYTES <= offset - self.position <= skip


class Guess(NamedTuple):
    """What a read means."""

    #: Who reads, which goes on meanwhile.
    cursor: Cursor
    #: Whether it goes on where another has ended, or about there.
    is_sequential: bool
    #: What should be read ahead now; nothing when they are equal.
    start: int
    end: int


class ReadPattern:
    """The reads of a file of `size_bytes`, of which at most `most_bytes` are read ahead of one reader."""

    def __init__(self, size_bytes: int, most_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._most_bytes = most_bytes
        #: Those that were used last are last.
        self._cursors: list[Cursor] = []
        self._read_count = 0

    def follow(self, offset: int, length: int, room_bytes: int) -> Guess:
        """What a read means, when `room_bytes` of this file may be read ahead and not read, in all."""
        self._read_count += 1
        end = min(offset + length, self._size_bytes)
        cursor = self._find(offset)
        if cursor is None:
            cursor = Cursor(position=end, ahead=end, used_at=self._read_count)
            self._cursors.append(cursor)
            del self._cursors[:-MAX_CURSORS]
            return Guess(cursor, False, end, end)
        self._cursors.remove(cursor)
        self._cursors.append(cursor)
        cursor.used_at = self._read_count
        cursor.window = cursor.window or FIRST_WINDOW_BYTES
        cursor.position = max(cursor.position, end)
        self._merge(cursor)
        return Guess(cursor, True, *self._extend(cursor, room_bytes))

    def _extend(self, cursor: Cursor, room_bytes: int) -> tuple[int, int]:
        """The range to read ahead of a cursor now, which may be empty."""
        start = max(cursor.ahead, cursor.position)
        others = [other for other in self._cursors if other.outstanding and other is not cursor]
        if sum(other.outstanding for other in others) + cursor.window > room_bytes:
            for other in others:
                if other.used_at + STALE_READS < self._read_count:
                    other.ahead = other.position
        room_bytes -= sum(other.outstanding for other in others)
        window = min(cursor.window, self._most_bytes, room_bytes)
        # Seldom, and then much: a store takes few large requests better than many small ones.
        if cursor.outstanding > window // 2:
            return start, start
        # Where another one is, what follows was given out already.
        limits = [other.position for other in others if other.outstanding and other.position > start]
        stop = max(start, min(cursor.position + window, self._size_bytes, *limits))
        if stop > start:
            cursor.ahead = stop
            cursor.window = max(cursor.window, min(2 * cursor.window, self._most_bytes))
        return start, stop

    def _find(self, offset: int) -> Cursor | None:
        """The cursor that a read at `offset` belongs to, rather one that it follows exactly."""
        for cursor in reversed(self._cursors):
            if cursor.position == offset:
                return cursor
        for cursor in reversed(self._cursors):
            if cursor.expects(offset):
                return cursor
        return None

    def _merge(self, cursor: Cursor) -> None:
        """Take over the cursors that are where this one is: they are of one reader, or as good as that."""
        for other in self._cursors[:-1]:
            if cursor.position <= other.position <= cursor.ahead or (
                other.outstanding and other.position <= cursor.position <= other.ahead
            ):
                self._cursors.remove(other)
                cursor.position = max(cursor.position, other.position)
                cursor.ahead = max(cursor.ahead, other.ahead)
