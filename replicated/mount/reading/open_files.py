"""The files of a mount that are being read, and where their bytes come from.

`filesystem` says which node an inode is; an engine asks for bytes through it. A file that lies in the cache
as a whole is read there, what `SmallFiles` has fetched is taken from it, the rest comes from the repository.
All methods may be called from any thread. Invariant: what `read` returns is what was saved, whole, or it
raises.
"""

from __future__ import annotations

import errno
import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from replicate.errors import RepositoryDamaged
from replicated.file_reader import Part
from replicated.mount.errors import Refused
from replicated.mount.reading.plain_reading import PlainFile, PlainReader
from replicated.mount.reading.streams import Stream, read_parts
from replicated.mount.reading.supply import ChunkSupply, Fetcher

if TYPE_CHECKING:
    from replicated.tree import Node

__all__ = ["OpenFiles", "Part", "PlainFile", "PlainFiles", "Readable", "Reader", "SmallFiles", "Watcher"]

_LOG = logging.getLogger(__name__)

#: What chunks that were read, or are read ahead, may take of the memory. More of it makes nothing faster that
#: comes from a local disk; of a far store it is what can be on its way at a time.
NEAR_MEMORY_BYTES: Final = 8 << 20
FAR_MEMORY_BYTES: Final = 16 << 20
#: Where requests are costly: large ones, of which some are on their way while others are read.
COSTLY_MEMORY_BYTES: Final = 48 << 20
#: No more is fetched in one of them: a quarter of what is read ahead.
COSTLY_BATCH_BYTES: Final = 8 << 20
#: Files from this size on are looked for in the cache as a whole; smaller ones may be fetched with others.
MIN_PLAIN_BYTES: Final = 1 << 20
#: Files that nobody has open, of which it is remembered how they were read.
MAX_IDLE_FILES: Final = 64
#: Of these, those that stay open in the cache, which cannot evict them meanwhile.
MAX_IDLE_PLAIN: Final = 8
#: What small files may take that are read piece by piece.
MAX_CONTENT_BYTES: Final = 4 << 20


class Reader(Fetcher, Protocol):
    """Reads one file; may be used from several threads."""

    def iter_parts(self, offset: int, length: int, *, is_cached: bool = True) -> Iterator[Part]:
        """The bytes from `offset`, fewer than `length` only at the end of the file; no part is empty.

        What has to be fetched goes to the cache of chunks only where `is_cached`.
        """
        ...


class Readable(Protocol):
    """What makes readers."""

    def reader(self, node: Node) -> Reader:
        """Something that reads the bytes of a file and verifies them."""
        ...


class PlainFiles(Protocol):
    """The whole files of the cache."""

    def open_plain(self, digest: bytes, size: int) -> PlainFile | None:
        """The file with this content, or None when there is none; whoever gets it closes it."""
        ...


class SmallFiles(Protocol):
    """Contents of small files that were fetched before they were asked for."""

    def take(self, inode: int, node: Node) -> bytes | None:
        """The whole content of a file, or None; waits for it when it is on its way."""
        ...


class Watcher(Protocol):
    """Is told what is read, by the threads that read: every method returns at once and raises nothing."""

    def on_open(self, inode: int, node: Node) -> None:
        """A file was opened; of an engine that opens nothing, read for the first time for a while."""
        ...

    def on_read(self, inode: int, node: Node, offset: int, length: int, is_sequential: bool) -> None:
        """These bytes of a file are about to be read; `is_sequential`: they follow what was read before."""
        ...

    def on_release(self, inode: int, node: Node) -> None:
        """The last handle of a file was given back, or it was not read for a while."""
        ...


class _File:
    """A file that is open or was read lately; one for each inode."""

    __slots__ = ("content", "handles", "inode", "is_asked_for", "node", "plain", "plain_asked", "stream")

    def __init__(self, inode: int, node: Node) -> None:
        self.inode = inode
        self.node = node
        self.handles = 0
        self.stream: Stream | None = None
        self.plain: PlainReader | None = None
        #: At which state of the cache it was looked for there; 0: never.
        self.plain_asked = 0
        #: All of it, when it was fetched with others and is not read at once.
        self.content: bytes | None = None
        #: Whether `SmallFiles` was asked.
        self.is_asked_for = False


class OpenFiles:
    """Reads the files of a source.

    `is_near` says that what is not in memory costs a read of a local disk and no request over a network;
    `memory_bytes` is what chunks may take of the memory, by default what is good for that. Where requests are
    costly, `request_bytes` says how much is worth fetching in one.
    """

    def __init__(
        self,
        source: Readable,
        *,
        cache: PlainFiles | None = None,
        small_files: SmallFiles | None = None,
        watcher: Watcher | None = None,
        memory_bytes: int | None = None,
        is_near: bool = True,
        request_bytes: int | None = None,
    ) -> None:
        self._source = source
        self._cache = cache
        self._small_files = small_files
        self._watcher = watcher
        self._is_near = is_near
        if memory_bytes is None:
            far_bytes = FAR_MEMORY_BYTES if request_bytes is None else COSTLY_MEMORY_BYTES
            memory_bytes = NEAR_MEMORY_BYTES if is_near else far_bytes
        batch_bytes = None if request_bytes is None else min(request_bytes, COSTLY_BATCH_BYTES)
        self._supply = ChunkSupply(memory_bytes, is_near=is_near, batch_bytes=batch_bytes)
        #: Counts what was added to the cache as a whole.
        self._cache_state = 1
        #: Guards what follows and the members of files; never held while anything is read.
        self._lock = threading.Lock()
        self._handles: dict[int, _File] = {}
        self._next_handle = itertools.count(1)
        self._open: dict[int, _File] = {}
        #: Those that nobody has open; of an engine that opens nothing, all. Those used last come last.
        self._idle: OrderedDict[int, _File] = OrderedDict()
        self._content_bytes = 0

    def watch(self, watcher: Watcher | None, small_files: SmallFiles | None) -> None:
        """Tell `watcher` from now on, and ask `small_files`, which need these files themselves."""
        self._watcher = watcher
        self._small_files = small_files

    def open(self, inode: int, node: Node) -> int:
        """A handle, never 0, that must be given back with `release`."""
        with self._lock:
            file = self._open.get(inode) or self._idle.pop(inode, None) or _File(inode, node)
            file.handles += 1
            self._open[inode] = file
            handle = next(self._next_handle)
            self._handles[handle] = file
        if self._watcher is not None:
            self._watcher.on_open(inode, node)
        if not self._is_near and node.size >= MIN_PLAIN_BYTES and file.stream is None:
            self._supply.do_soon(partial(self._begin_ends, file))
        return handle

    def read(self, handle: int, offset: int, length: int) -> Sequence[Part]:
        """`length` bytes from `offset` in parts, fewer only at the end of the file."""
        return self._read(self._opened(handle), offset, length)

    def read_unopened(self, inode: int, node: Node, offset: int, length: int) -> Sequence[Part]:
        """As `read`, for an engine that opens nothing."""
        dropped = None
        is_new = False
        with self._lock:
            file = self._open.get(inode) or self._idle.get(inode)
            if file is None:
                is_new = True
                file = self._idle[inode] = _File(inode, node)
                dropped = self._drop_oldest()
            elif not file.handles:
                self._idle.move_to_end(inode)
        if dropped is not None:
            self._end(dropped)
            if self._watcher is not None:
                self._watcher.on_release(dropped.inode, dropped.node)
        if is_new and self._watcher is not None:
            self._watcher.on_open(inode, node)
        return self._read(file, offset, length)

    def backing(self, node: Node) -> PlainFile | None:
        """The whole file in the cache, for the kernel to read by itself; whoever gets it closes it."""
        if self._cache is None or not node.hash:
            return None
        return self._cache.open_plain(node.hash, node.size)

    def look_again(self) -> None:
        """Files were added to the cache as a whole: what is open may be read there from now on."""
        self._cache_state += 1

    def inode_of(self, handle: int) -> int:
        """The file that a handle is open on."""
        return self._opened(handle).inode

    def release(self, handle: int) -> None:
        """End the use of a handle."""
        dropped = None
        with self._lock:
            file = self._handles.pop(handle, None)
            if file is None:
                return
            file.handles -= 1
            is_last = not file.handles
            if is_last:
                del self._open[file.inode]
                self._forget_content(file)
                file.plain, file.plain_asked = None, 0
                # Who opens a file again soon goes on where it was; of small ones there is nothing to know.
                if file.stream is not None:
                    self._idle[file.inode] = file
                    dropped = self._drop_oldest()
        if dropped is not None:
            self._end(dropped)
        if is_last and self._watcher is not None:
            self._watcher.on_release(file.inode, file.node)

    def close(self) -> None:
        """End the threads that read ahead; may be called twice."""
        self._supply.close()
        with self._lock:
            for files in (self._open, self._idle):
                for file in files.values():
                    file.plain = None

    def _opened(self, handle: int) -> _File:
        try:
            return self._handles[handle]
        except KeyError:
            raise Refused(errno.EBADF) from None

    def _drop_oldest(self) -> _File | None:
        """Forget an idle file when there are many; the lock is held."""
        if len(self._idle) <= MAX_IDLE_FILES:
            return None
        dropped = self._idle.popitem(last=False)[1]
        self._forget_content(dropped)
        return dropped

    def _forget_content(self, file: _File) -> None:
        """The lock is held."""
        if file.content is not None:
            self._content_bytes -= len(file.content)
            file.content = None

    @staticmethod
    def _end(file: _File) -> None:
        if file.stream is not None:
            file.stream.close()

    # -- reading -------------------------------------------------------------------------------------

    def _read(self, file: _File, offset: int, length: int) -> Sequence[Part]:
        node = file.node
        length = min(length, node.size - offset)
        if length <= 0:
            return ()
        if node.size >= MIN_PLAIN_BYTES:
            plain = self._plain(file)
            if plain is not None:
                self._tell(file, offset, length, is_sequential=True)
                parts = plain.read(offset, length)
                if parts is not None:
                    return parts
                self._distrust(file, plain)
        elif length == node.size:
            return self._read_whole(file)
        stream = file.stream or self._begin_stream(file)
        guess = stream.guess(offset, length)
        self._tell(file, offset, length, is_sequential=guess.is_sequential)
        if node.size < MIN_PLAIN_BYTES:
            content = self._content(file, offset + length)
            if content is not None:
                return (memoryview(content)[offset : offset + length],)
        return stream.read(offset, length, guess)

    def _read_whole(self, file: _File) -> Sequence[Part]:
        """A small file, all at once: nothing of it needs to be remembered."""
        node = file.node
        self._tell(file, 0, node.size, is_sequential=True)
        content = self._content(file, node.size)
        if content is not None:
            return (content,)
        reader = self._source.reader(node)
        parts = read_parts(reader.iter_pieces(0, node.size), reader.fetch)
        if sum(map(len, parts)) != node.size:
            raise RepositoryDamaged(f"the chunks of a file do not have its {node.size} bytes")
        return parts

    def _tell(self, file: _File, offset: int, length: int, *, is_sequential: bool) -> None:
        if self._watcher is not None:
            self._watcher.on_read(file.inode, file.node, offset, length, is_sequential)

    def _begin_stream(self, file: _File) -> Stream:
        stream = Stream(self._source.reader(file.node), file.node.size, self._supply, is_near=self._is_near)
        with self._lock:
            # Of two threads the first one has made it.
            file.stream = file.stream or stream
            return file.stream

    def _begin_ends(self, file: _File) -> None:
        if self._plain(file) is None:
            self._begin_stream(file).begin_ends()

    def _plain(self, file: _File) -> PlainReader | None:
        """The file in the cache as a whole, if it is there."""
        state = self._cache_state
        plain = file.plain
        if self._cache is not None and plain is None and file.plain_asked != state:
            found = self._cache.open_plain(file.node.hash, file.node.size)
            with self._lock:
                file.plain_asked = state
                plain = file.plain
                if plain is None and found is not None:
                    plain = file.plain = PlainReader(found)
                    found = None
                if plain is not None:
                    self._close_idle_plain()
            if found is not None:
                # Of two threads the first one has opened it.
                found.close()
        return plain

    def _close_idle_plain(self) -> None:
        """Close what is open in the cache for files that were not read for longest; the lock is held."""
        using = [file for file in self._idle.values() if file.plain is not None]
        for file in using[:-MAX_IDLE_PLAIN]:
            file.plain, file.plain_asked = None, 0

    def _distrust(self, file: _File, plain: PlainReader) -> None:
        """Read the file from the repository until there is another one in the cache."""
        _LOG.warning("a file of the cache was changed, and is not read any more: %s", file.node.hash.hex())
        with self._lock:
            if file.plain is plain:
                file.plain = None

    def _content(self, file: _File, end: int) -> bytes | None:
        """All of a small file that was fetched with others, which will now be read up to `end`."""
        content = file.content
        if content is None and not file.is_asked_for and self._small_files is not None:
            file.is_asked_for = True
            content = self._take(self._small_files, file)
            if content is None or len(content) != file.node.size:
                return None
            if end < file.node.size:
                self._hold_content(file, content)
        elif content is not None and end == file.node.size:
            with self._lock:
                self._forget_content(file)
        return content

    def _take(self, small_files: SmallFiles, file: _File) -> bytes | None:
        try:
            return small_files.take(file.inode, file.node)
        except Exception:
            # What was only to make it faster must not cost a reader anything.
            _LOG.exception("fetching small files together has failed, and is not tried any more")
            self._small_files = None
            return None

    def _hold_content(self, file: _File, content: bytes) -> None:
        with self._lock:
            # Of one that was given back meanwhile nobody would ever forget it.
            is_known = (self._open.get(file.inode) or self._idle.get(file.inode)) is file
            has_room = self._content_bytes + len(content) <= MAX_CONTENT_BYTES
            if is_known and has_room and file.content is None:
                file.content = content
                self._content_bytes += len(content)
