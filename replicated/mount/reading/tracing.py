"""Records in which order the files of a mount are first read, so that the next mount can read them before.

What is recorded lies in the cache, under a key that is made of the data alone: whoever mounts the same
files again, from whatever experiment or checkpoint, finds it, and `selecting` replays it. Invariants: a
record is small, is written as a whole or not at all, and one that is damaged is no record; readers wait
for nothing here.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgpack
import zstandard
from blake3 import blake3

from replicated.mount.reading.background import END_TIMEOUT_S
from replicated.mount.reading.open_files import MIN_PLAIN_BYTES

if TYPE_CHECKING:
    from replicated.tree import Node

_LOG = logging.getLogger(__name__)

#: Of files that are not small it is recorded which of their blocks were read.
BLOCK_BYTES: Final = 1 << 20
#: A record goes no further than this on disk, which is some 400,000 files.
MAX_TRACE_BYTES: Final = 4 << 20
#: What is recorded is on the disk after so long.
SAVE_INTERVAL_S: Final = 30.0
#: A run that read less than this part of what another one had read leaves the record as it is: a look into a
#: README must not cost the order of an epoch.
MIN_SHARE: Final = 0.1
#: Records that are kept, and what they may take together.
MAX_TRACES: Final = 200
MAX_TRACES_BYTES: Final = 64 << 20

#: Touches that are packed together, and that may wait for that.
_PACKED_TOUCHES: Final = 4096
_MAX_PENDING: Final = 1 << 16
#: Files that are not small of which the blocks are told apart; of others, all is taken as read.
_MAX_BLOCKWISE: Final = 1024
_MAGIC: Final = b"replicate trace\x01"
#: After the magic: the bytes of the files that were touched. Each frame has its length before it.
_TOUCHED_BYTES: Final = struct.Struct("<Q")
_FRAME_LENGTH: Final = struct.Struct("<I")
_MAX_FRAME_BYTES: Final = 16 << 20
_CHECKSUM_BYTES: Final = 32
_SUFFIX: Final = ".trace"
#: Inodes that share one page of bits.
_PAGE_BITS: Final = 1 << 12


@dataclass(frozen=True, slots=True)
class Touch:
    """Something that was read for the first time."""

    #: Relative to the top of the mount.
    path: bytes
    #: Which blocks; `count` 0: the whole file.
    first: int
    count: int


def trace_key(root: Node) -> str | None:
    """What the records of a mount with this root lie under; None for one whose content can change."""
    # Views put records of their own there.
    if type(root.content) is not tuple:
        return None
    return blake3(b"".join(root.content)).hexdigest()[:32]


class Trace:
    """A record that was read from the disk."""

    def __init__(self, touched_bytes: int, frames: Sequence[bytes]) -> None:
        self.touched_bytes = touched_bytes
        self.frames = frames

    def __iter__(self) -> Iterator[Touch]:
        """What was touched, in order; a few thousand touches are in memory at once."""
        for frame in self.frames:
            data = zstandard.ZstdDecompressor().decompress(frame, max_output_size=_MAX_FRAME_BYTES)
            for path, first, count in msgpack.unpackb(data):
                yield Touch(path, first, count)


class Traces:
    """The records of a user, in a directory that may be deleted at any time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, key: str) -> Trace | None:
        """The record under a key, if there is one that is whole."""
        try:
            data = self._file(key).read_bytes()
        except OSError:
            return None
        try:
            return _parse(data)
        except ValueError as error:
            _LOG.warning("the record of a mount is given up: %s: %s", error, self._file(key))
            with suppress(OSError):
                self._file(key).unlink()
            return None

    def save(self, key: str, trace: Trace) -> None:
        """Put a record in the place of one that does not say much more; raises `OSError`."""
        earlier = self.load(key)
        if earlier is not None and trace.touched_bytes < MIN_SHARE * earlier.touched_bytes:
            return
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        parts = [_MAGIC, _TOUCHED_BYTES.pack(trace.touched_bytes)]
        for frame in trace.frames:
            parts += [_FRAME_LENGTH.pack(len(frame)), frame]
        data = b"".join(parts)
        temporary = self._file(key).with_suffix(f".{os.urandom(4).hex()}.tmp")
        try:
            # Not synced: one that a power loss damages is no record.
            temporary.write_bytes(data + blake3(data).digest())
            temporary.replace(self._file(key))
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        self._prune()

    def _prune(self) -> None:
        """Remove what was not written for longest, and what somebody left who was killed."""
        found = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                with suppress(OSError):
                    found.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        total_bytes = 0
        for position, (_, size, path) in enumerate(sorted(found, reverse=True)):
            total_bytes += size
            if position >= MAX_TRACES or total_bytes > MAX_TRACES_BYTES:
                with suppress(OSError):
                    os.unlink(path)

    def _file(self, key: str) -> Path:
        return self._directory / (key + _SUFFIX)


def _parse(data: bytes) -> Trace:
    """Raises `ValueError`."""
    if not data.startswith(_MAGIC):
        raise ValueError("of another version")
    end = len(data) - _CHECKSUM_BYTES
    offset = len(_MAGIC) + _TOUCHED_BYTES.size
    if end < offset or blake3(data[:end]).digest() != data[end:]:
        raise ValueError("damaged")
    (touched_bytes,) = _TOUCHED_BYTES.unpack_from(data, len(_MAGIC))
    frames = []
    while offset < end:
        (length,) = _FRAME_LENGTH.unpack_from(data, offset)
        offset += _FRAME_LENGTH.size
        frames.append(data[offset : offset + length])
        offset += length
    return Trace(touched_bytes, frames)


class _Blocks:
    """Which blocks of a file were touched, and the touch that grows while it is read on."""

    __slots__ = ("bits", "growing", "next_block")

    def __init__(self, size: int) -> None:
        self.bits = bytearray((size // BLOCK_BYTES >> 3) + 1)
        self.growing: list[int] | None = None
        self.next_block = 0


class Recorder:
    """A watcher that records what is touched. May be used from several threads.

    `path_of` gives the path of an inode, `is_whole` says of a file that is not small whether the kernel may
    read all of it without telling, `save` is given the record again and again, from a thread of this.
    """

    def __init__(
        self,
        path_of: Callable[[int], bytes],
        is_whole: Callable[[Node], bool],
        save: Callable[[Trace], None],
    ) -> None:
        self._path_of = path_of
        self._is_whole = is_whole
        self._save = save
        #: Guards what follows; a leaf.
        self._changed = threading.Condition(threading.Lock())
        self._seen: dict[int, bytearray] = {}
        self._blocks: dict[int, _Blocks] = {}
        #: Inode, first block, number of blocks.
        self._pending: list[list[int]] = []
        self._touched_bytes = 0
        self._is_full = False
        self._is_closed = False
        self._thread: threading.Thread | None = None
        #: Only the thread of this touches these, and `close` after that has ended.
        self._frames: list[bytes] = []
        self._frame_bytes = 0
        self._saved_bytes = 0

    def on_open(self, inode: int, node: Node) -> None:
        """See `Watcher.on_open`."""
        if node.size >= MIN_PLAIN_BYTES and not self._is_seen(inode) and self._is_whole(node):
            with self._changed:
                self._touch_file(inode, node)

    def on_read(self, inode: int, node: Node, offset: int, length: int, is_sequential: bool) -> None:
        """See `Watcher.on_read`."""
        if self._is_seen(inode):
            return
        with self._changed:
            blocks = self._blocks.get(inode)
            is_blockwise = blocks is not None or (
                node.size >= MIN_PLAIN_BYTES and len(self._blocks) < _MAX_BLOCKWISE
            )
            if not is_blockwise:
                self._touch_file(inode, node)
                return
            if blocks is None:
                blocks = self._blocks[inode] = _Blocks(node.size)
            last = min(offset + max(length, 1), node.size) - 1
            for block in range(offset // BLOCK_BYTES, last // BLOCK_BYTES + 1):
                self._touch_block(inode, blocks, block)

    def on_release(self, inode: int, node: Node) -> None:
        """See `Watcher.on_release`."""

    def close(self) -> None:
        """Write what was recorded, unless that takes long; may be called twice."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            # It may wait for a store that does not answer, to find a path.
            thread.join(END_TIMEOUT_S)

    def _is_seen(self, inode: int) -> bool:
        page = self._seen.get(inode // _PAGE_BITS)
        bit = inode % _PAGE_BITS
        return page is not None and bool(page[bit >> 3] >> (bit & 7) & 1)

    # Up to the next heading: with the lock held

    def _touch_file(self, inode: int, node: Node) -> None:
        if not self._is_seen(inode):
            page = self._seen.setdefault(inode // _PAGE_BITS, bytearray(_PAGE_BITS >> 3))
            bit = inode % _PAGE_BITS
            page[bit >> 3] |= 1 << (bit & 7)
            self._add([inode, 0, 0], node.size)

    def _touch_block(self, inode: int, blocks: _Blocks, block: int) -> None:
        mask = 1 << (block & 7)
        if blocks.bits[block >> 3] & mask:
            return
        blocks.bits[block >> 3] |= mask
        if blocks.growing is not None and block == blocks.next_block:
            blocks.growing[2] += 1
            self._touched_bytes += BLOCK_BYTES
        else:
            blocks.growing = [inode, block, 1]
            self._add(blocks.growing, BLOCK_BYTES)
        blocks.next_block = block + 1

    def _add(self, touch: list[int], touched_bytes: int) -> None:
        if self._is_full or self._is_closed:
            return
        self._pending.append(touch)
        self._touched_bytes += touched_bytes
        self._is_full = len(self._pending) >= _MAX_PENDING
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="trace", daemon=True)
            # What can be started no more now may be at the next touch.
            with suppress(RuntimeError):
                thread.start()
                self._thread = thread
        elif len(self._pending) == _PACKED_TOUCHES:
            self._changed.notify()

    # In the thread

    def _run(self) -> None:
        save_at = time.monotonic() + SAVE_INTERVAL_S
        is_last = False
        while not is_last:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_closed or len(self._pending) >= _PACKED_TOUCHES,
                    save_at - time.monotonic(),
                )
                is_last = self._is_closed
                pending, self._pending = self._pending, []
                # What was packed cannot grow any more.
                for blocks in self._blocks.values():
                    blocks.growing = None
                touched_bytes = self._touched_bytes
            self._pack(pending)
            if is_last or time.monotonic() >= save_at:
                save_at = time.monotonic() + SAVE_INTERVAL_S
                if touched_bytes > self._saved_bytes:
                    self._write(touched_bytes)

    def _pack(self, pending: Sequence[Sequence[int]]) -> None:
        for start in range(0, len(pending), _PACKED_TOUCHES):
            touches = []
            for inode, first, count in pending[start : start + _PACKED_TOUCHES]:
                # One whose directory cannot be read now is left out.
                with suppress(Exception):
                    touches.append((self._path_of(inode), first, count))
            frame = zstandard.compress(msgpack.packb(touches))
            if self._frame_bytes + len(frame) > MAX_TRACE_BYTES:
                with self._changed:
                    self._is_full = True
                return
            self._frames.append(frame)
            self._frame_bytes += len(frame)

    def _write(self, touched_bytes: int) -> None:
        try:
            self._save(Trace(touched_bytes, self._frames))
            self._saved_bytes = touched_bytes
        except OSError as error:
            _LOG.warning("what was read is not recorded: %s", error)
