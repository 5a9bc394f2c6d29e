"""What was found damaged a moment ago, so that readers that do not give up do not ask for it all the time.

Used by `reader`, which finds it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from replicate.errors import RepositoryDamaged
from replicated.index import Location

#: What was found damaged is not fetched again before.
DAMAGE_KEPT_S: Final = 5.0
MAX_DAMAGES: Final = 1024


class Damage(NamedTuple):
    """A chunk that could not be read."""

    until: float
    #: Where the chunk lay; None when it was in no index. Where it lies by now is another matter.
    place: Location | None
    error: RepositoryDamaged


class Damages:
    """What was found damaged a moment ago. Shared by threads; its lock is a leaf."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        #: By chunk, and the length that it has not, if that is the damage; those found last at the end.
        self._found: OrderedDict[tuple[bytes, int | None], Damage] = OrderedDict()

    def remember(
        self, chunk_id: bytes, place: Location | None, error: RepositoryDamaged, length: int | None = None
    ) -> None:
        """This is what reading a chunk has just ended with.

        With a `length` it was so for those who expect that one, and the chunk itself may be whole.
        """
        with self._lock:
            self._found[chunk_id, length] = Damage(self._clock() + DAMAGE_KEPT_S, place, error)
            self._found.move_to_end((chunk_id, length))
            if len(self._found) > MAX_DAMAGES:
                self._found.popitem(last=False)

    def find(
        self, chunk_ids: Iterable[bytes], expected: Iterable[tuple[bytes, int]]
    ) -> list[tuple[bytes, Damage]]:
        """Those of the chunks that are among them, also for those who expect these lengths of some."""
        if not self._found:
            return []
        with self._lock:
            now = self._clock()
            while self._found and next(iter(self._found.values())).until <= now:
                self._found.popitem(last=False)
            keys: list[tuple[bytes, int | None]] = [(chunk_id, None) for chunk_id in chunk_ids]
            keys += expected
            return [(key[0], self._found[key]) for key in keys if key in self._found]
