"""The log of a repository: what was written since records and index objects were merged, in one listing.

Everything that is new, written by whoever, shows below `log/`: so nobody has to list all there is. The last
listing is kept for those to whom one of a moment ago is good enough.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from replicated.format.condemned import Condemned, decode_condemned
from replicated.keys import LOG_PREFIX, LogListing, condemned_key, read_listing
from replicated.store.base import Store

#: What is this old still counts as new for those who only want to find out about others.
RECENT_S: Final = 30.0


class Log:
    """The log of one repository. May be used from several threads; its lock is a leaf."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._last: LogListing | None = None
        self._listed_at = 0.0

    def recent(self, max_age_s: float) -> LogListing | None:
        """The last listing unless it is older."""
        with self._lock:
            return self._last if self._clock() - self._listed_at < max_age_s else None

    def list(self) -> LogListing:
        """What there is; raises `RepositoryUnreachable`."""
        begun = self._clock()
        # In order, whatever the store: what was merged is gone only where what it was merged into is seen.
        objects = sorted(self._store.list(LOG_PREFIX), key=lambda info: info.key)
        listing = read_listing(objects)
        with self._lock:
            if self._last is None or begun >= self._listed_at:
                self._last, self._listed_at = listing, begun
        return listing

    @property
    def last(self) -> LogListing | None:
        """The last listing, however old."""
        with self._lock:
            return self._last

    def load_condemned(self, name: str) -> Condemned:
        """A list of condemned packs; raises `KeyMissing`, `Malformed`, `NewerFormat`."""
        return decode_condemned(self._store.get(condemned_key(name)))
