"""Makes plain files in the cache of what is being read, in the background: who reads a file again reads that.

It is told what is read, and decides for which files a copy is worth its place: of a repository that is not
near for those of which much was read; else for those that are read at random, where finding and decoding a
chunk for each few bytes costs most, that the kernel could read by itself, or that are read again and again.
`prefetching` has files completed here as well. Invariants: one file is completed once, whoever asks; at most
one at a time because of what is read; nobody waits for it who has not asked for that.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, Protocol

from replicated.mount.reading.background import Workers
from replicated.mount.reading.open_files import MIN_PLAIN_BYTES, Part, Readable
from replicated.priority import LOWEST_NICENESS

if TYPE_CHECKING:
    from replicated.tree import Node

#: After so many reads at random a file is completed, and of a long one after one for so many bytes: each has
#: fetched a chunk, so that a part of the file was paid for already (measured: 650 µs a read of 4 KiB, and
#: 12 µs in a plain file).
RANDOM_READS: Final = 64
RANDOM_READ_BYTES: Final = 8 << 20
#: After so much of it was read; or less of it, if it was opened so often.
MIN_SHARE: Final = 1 / 2
MIN_SHARE_AGAIN: Final = 1 / 8
OPENS: Final = 2
#: And where it is near, after it was read so often, because the kernel did not keep it.
READ_AGAIN: Final = 3 / 2
#: A file that was read in order is completed when nobody has read it for so long: until then its reader and
#: this would fetch the same bytes.
QUIET_S: Final = 1.0
#: Files of which it is known how they are used, and that wait to be completed.
MAX_WATCHED: Final = 256
MAX_WAITING: Final = 64
#: What could not be completed is not tried again for so long.
RETRY_S: Final = 300.0
_PAUSE_S: Final = 0.2


class PlainBuilder(Protocol):
    """The part of `ContentCache` that makes whole files."""

    def has_plain(self, digest: bytes) -> bool:
        """Whether there is a whole file with this hash."""
        ...

    def build_plain(self, digest: bytes, size: int, parts: Iterable[Part]) -> bool:
        """Make a whole file; False when there is no room for it."""
        ...


class _Use:
    """How a file was used; guarded by the lock of its assembler."""

    __slots__ = ("bytes_read", "is_quiet", "is_wanted", "opens", "random_reads", "read_at", "retry_at")

    def __init__(self) -> None:
        self.opens = 0
        self.bytes_read = 0
        self.random_reads = 0
        self.read_at = 0.0
        #: Whether nobody has it open any more.
        self.is_quiet = False
        #: Whether it waits to be completed, is being completed, or was.
        self.is_wanted = False
        self.retry_at = 0.0


class Assembler:
    """A watcher that completes files. May be used from several threads; its lock is a leaf."""

    def __init__(
        self,
        source: Readable,
        cache: PlainBuilder,
        *,
        is_near: bool,
        is_passthrough: bool,
        on_completed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_completed` is called whenever there is a plain file more."""
        self._source = source
        self._cache = cache
        self._is_near = is_near
        #: May change: it is known only when the mount can be used.
        self.is_passthrough = is_passthrough
        self._on_completed = on_completed
        self._clock = clock
        self._workers = Workers("assemble", capacity=MAX_WAITING, niceness=LOWEST_NICENESS)
        self._lock = threading.Lock()
        #: By hash; those used last come last.
        self._uses: OrderedDict[bytes, _Use] = OrderedDict()
        self._under_way: dict[bytes, Future[bool]] = {}

    def on_open(self, inode: int, node: Node) -> None:
        """See `Watcher.on_open`."""
        if node.size >= MIN_PLAIN_BYTES:
            with self._lock:
                use = self._use(node)
                use.opens += 1
                use.is_quiet = False
                self._consider(node, use)

    def on_read(self, inode: int, node: Node, offset: int, length: int, is_sequential: bool) -> None:
        """See `Watcher.on_read`."""
        if node.size >= MIN_PLAIN_BYTES:
            with self._lock:
                use = self._use(node)
                use.bytes_read += length
                use.random_reads += not is_sequential
                use.read_at = self._clock()
                if not use.is_wanted:
                    self._consider(node, use)

    def on_release(self, inode: int, node: Node) -> None:
        """See `Watcher.on_release`."""
        if node.size >= MIN_PLAIN_BYTES:
            with self._lock:
                self._use(node).is_quiet = True

    def complete(self, node: Node, parts: Iterable[Part] | None = None) -> bool:
        """Make a plain file now, or wait for whoever does; whether there is one.

        `parts` is its content; else it is read. Raises what reading raises, and `Stopped`.
        """
        with self._lock:
            under_way = self._under_way.get(node.hash)
            if under_way is None:
                mine: Future[bool] = Future()
                self._under_way[node.hash] = mine
        if under_way is not None:
            return under_way.result()
        try:
            is_complete = self._cache.has_plain(node.hash)
            if not is_complete and self._build(node, parts):
                is_complete = True
                self._on_completed()
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(is_complete)
        finally:
            with self._lock:
                del self._under_way[node.hash]
        return is_complete

    def close(self) -> None:
        """Stop at the next part of what is being completed; may be called twice."""
        self._workers.close()

    def _use(self, node: Node) -> _Use:
        use = self._uses.get(node.hash)
        if use is None:
            use = self._uses[node.hash] = _Use()
            if len(self._uses) > MAX_WATCHED:
                self._uses.popitem(last=False)
        else:
            self._uses.move_to_end(node.hash)
        return use

    def _consider(self, node: Node, use: _Use) -> None:
        """Have a file completed if that is worth it; the lock is held."""
        if self._is_worth(node, use) and self._clock() >= use.retry_at:
            use.is_wanted = self._workers.submit(lambda: self._complete_later(node, use))

    def _is_worth(self, node: Node, use: _Use) -> bool:
        if _is_random(node, use):
            return True
        is_opened_again = use.opens >= OPENS and use.bytes_read >= node.size * MIN_SHARE_AGAIN
        if self._is_near:
            # Reading its chunks in order costs ten times the processor time of reading a plain file
            # (0.7 and 0.07 s a GB), which is paid once where the kernel keeps what was read.
            return (self.is_passthrough and is_opened_again) or use.bytes_read >= node.size * READ_AGAIN
        return is_opened_again or use.bytes_read >= node.size * MIN_SHARE

    # In the thread of the workers

    def _complete_later(self, node: Node, use: _Use) -> None:
        with self._lock:
            is_busy = not _is_random(node, use) and not use.is_quiet and self._clock() - use.read_at < QUIET_S
        if is_busy:
            self._workers.pause(_PAUSE_S)
            with self._lock:
                use.is_wanted = self._workers.submit(lambda: self._complete_later(node, use))
            return
        is_complete = False
        try:
            is_complete = self.complete(node)
        finally:
            with self._lock:
                # One that is evicted later may be wanted again then.
                use.is_wanted = False
                use.bytes_read = use.random_reads = use.opens = 0
                if not is_complete:
                    use.retry_at = self._clock() + RETRY_S

    def _build(self, node: Node, parts: Iterable[Part] | None) -> bool:
        if parts is None:
            # It is in the cache as a whole, and not a second time as chunks.
            parts = self._source.reader(node).iter_parts(0, node.size, is_cached=False)
        return self._cache.build_plain(node.hash, node.size, self._until_closed(parts))

    def _until_closed(self, parts: Iterable[Part]) -> Iterator[Part]:
        for part in parts:
            self._workers.check()
            yield part


def _is_random(node: Node, use: _Use) -> bool:
    return use.random_reads > max(RANDOM_READS, node.size // RANDOM_READ_BYTES)
