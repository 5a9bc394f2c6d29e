"""The mount engine over libfuse 3, through the fusepy API (`mfusepy`).

It translates callbacks of libfuse's high-level interface, which speak of paths, into the operations of
a `Filesystem`. Callbacks are overridden below mfusepy's `Operations`, at the level of the C structures:
names stay bytes, directories are listed with the attributes of their entries (readdirplus: one request
instead of one for each file), and every callback passes one guard, because an exception that escapes
into ctypes reads as success, which is an empty file to the reader.

Only mount processes import this module: it loads libfuse.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from replicate.errors import MountFailed
from replicated.mount.filesystem import BLOCK_SIZE, LINK_COUNT, NAME_MAX, Attributes, Filesystem, errno_for
from replicated.mount.libfuse import SUBTYPE, choose_library

choose_library()
import mfusepy  # noqa: E402  the library that it loads had to be chosen first

_LOG = logging.getLogger(__name__)

#: A day: what is mounted never changes, and the kernel asks again only when it forgot.
_LASTING_S = 86400
#: For a view that can change: new experiments show within a second.
_PASSING_S = 1
#: Requests that the kernel sends before it waits for answers: read-ahead of several readers.
_MAX_BACKGROUND = 64
_CONGESTION_THRESHOLD = 48
#: More do not read faster in one interpreter, and each costs a buffer of 1 MiB.
_MAX_THREADS = 10

# Flags of libfuse's fuse_common.h and fuse.h.
_CAP_READDIRPLUS_AUTO = 1 << 14
_CAP_CACHE_SYMLINKS = 1 << 23
_FILL_DIR_PLUS = 1 << 1

#: The callbacks that libfuse is given; what is missing it answers itself (ENOSYS or a default).
_CALLBACKS = (
    "getattr",
    "getxattr",
    "listxattr",
    "open",
    "opendir",
    "read",
    "readdir",
    "readlink",
    "release",
    "statfs",
)


def serve(
    filesystem: Filesystem,
    directory: bytes,
    *,
    source_name: str,
    on_mounted: Callable[[], None],
) -> None:
    """Mount `filesystem` on `directory` and serve it until it is unmounted or SIGTERM comes.

    `source_name` is what `mount` and `df` show as the device. Must be called in the main thread.
    Raises `MountFailed` when it cannot be mounted; libfuse has then said why on standard error.
    """
    _Session(filesystem, directory, source_name, on_mounted)


class _Session(mfusepy.FUSE):  # type: ignore[misc]  # mfusepy has no types
    """One mount; the constructor returns when it has ended, as that of the base class does."""

    def __init__(
        self,
        filesystem: Filesystem,
        directory: bytes,
        source_name: str,
        on_mounted: Callable[[], None],
    ) -> None:
        self._filesystem = filesystem
        self._on_mounted = on_mounted
        self._was_mounted = False
        timeout = _LASTING_S if filesystem.is_immutable else _PASSING_S
        callbacks = dict.fromkeys(_CALLBACKS, True)
        # Older versions of libfuse do not know the option.
        threads = {"max_threads": _MAX_THREADS} if mfusepy.fuse_version_minor >= 12 else {}
        try:
            super().__init__(
                SimpleNamespace(use_ns=True, init_with_config=self._configure, **callbacks),
                os.fsdecode(directory),
                raw_fi=True,
                # libfuse would fork otherwise, after our threads have started.
                foreground=True,
                fsname=source_name,
                subtype=SUBTYPE,
                ro=True,
                nosuid=True,
                nodev=True,
                default_permissions=True,
                # fusermount3 watches us and unmounts should we be killed.
                auto_unmount=True,
                # The pages of a file outlive its last close.
                kernel_cache=True,
                use_ino=True,
                entry_timeout=timeout,
                attr_timeout=timeout,
                negative_timeout=timeout if filesystem.is_immutable else 0,
                **threads,
            )
        except RuntimeError as error:
            # Its argument is libfuse's exit status; after a signal that is not 0 either.
            if not self._was_mounted:
                raise MountFailed(f"libfuse gave up with status {error}") from error
            _LOG.debug("the session ended with status %s", error)

    def _configure(self, connection: Any, config: Any) -> None:
        """Set what has no mount option; libfuse calls it once the kernel has said hello."""
        connection.max_background = _MAX_BACKGROUND
        connection.congestion_threshold = _CONGESTION_THRESHOLD
        # Always with attributes, not only while the kernel guesses that somebody wants them.
        connection.want &= ~_CAP_READDIRPLUS_AUTO
        if self._filesystem.is_immutable:
            connection.want |= connection.capable & _CAP_CACHE_SYMLINKS
        # Calls with a handle need no path, so libfuse need not build one.
        config.nullpath_ok = 1
        self._was_mounted = True
        # The kernel takes requests only after this call has returned.
        threading.Thread(target=self._on_mounted, name="mounted", daemon=True).start()

    def _wrapper(self, func: Callable[..., int], *args: Any) -> int:
        """The guard of every callback: its result, or the negative errno of whatever it raised."""
        try:
            return func(*args) or 0
        except BaseException as error:
            return -errno_for(error, func.__name__)

    # -- callbacks -----------------------------------------------------------------------------------

    def getattr_fuse_3(self, path: bytes | None, buffer: Any, info: Any) -> int:
        # A handle comes only with files that are open, never with directories.
        inode = (
            self._filesystem.resolve(path)
            if path is not None
            else self._filesystem.inode_of(info.contents.fh)
        )
        ctypes.memset(buffer, 0, ctypes.sizeof(mfusepy.c_stat))
        self._fill(buffer.contents, self._filesystem.getattr(inode))
        return 0

    def readlink(self, path: bytes, buffer: Any, size: int) -> int:
        target = self._filesystem.readlink(self._filesystem.resolve(path))
        if len(target) >= size:
            return -errno.ENAMETOOLONG
        ctypes.memmove(buffer, target + b"\0", len(target) + 1)
        return 0

    def open(self, path: bytes, info: Any) -> int:
        info.contents.fh = self._filesystem.open(self._filesystem.resolve(path))
        return 0

    def read(self, path: bytes | None, buffer: Any, size: int, offset: int, info: Any) -> int:
        data = self._filesystem.read(info.contents.fh, offset, size)
        ctypes.memmove(buffer, data, len(data))
        return len(data)

    def release(self, path: bytes | None, info: Any) -> int:
        self._filesystem.release(info.contents.fh)
        return 0

    def opendir(self, path: bytes, info: Any) -> int:
        info.contents.fh = self._filesystem.resolve(path)
        if self._filesystem.is_immutable:
            info.contents.cache_readdir = 1
            info.contents.keep_cache = 1
        return 0

    def readdir_fuse_3(
        self, path: bytes | None, buffer: Any, fill: Any, offset: int, info: Any, flags: int
    ) -> int:
        entry = mfusepy.c_stat()
        reference = ctypes.byref(entry)
        # Offsets are never 0: with 0 libfuse passes no attributes on, and each entry is looked up again.
        for name, attributes, following in self._filesystem.readdir(info.contents.fh, offset):
            self._fill(entry, attributes)
            if fill(buffer, name, reference, following, _FILL_DIR_PLUS):
                break
        return 0

    def statfs(self, path: bytes, buffer: Any) -> int:
        usage = self._filesystem.usage
        # What is free stays 0, as libfuse hands the structure over.
        answer = buffer.contents
        answer.f_bsize = answer.f_frsize = BLOCK_SIZE
        answer.f_blocks = -(-usage.size_bytes // BLOCK_SIZE)
        answer.f_files = usage.entries
        answer.f_namemax = NAME_MAX
        return 0

    def listxattr(self, path: bytes, buffer: Any, size: int) -> int:
        names = self._filesystem.listxattr(self._filesystem.resolve(path))
        return _hand_over(b"".join(name + b"\0" for name in names), buffer, size)

    def getxattr(self, path: bytes, name: bytes, buffer: Any, size: int, *_: Any) -> int:
        return _hand_over(self._filesystem.getxattr(self._filesystem.resolve(path), name), buffer, size)

    def _fill(self, entry: Any, attributes: Attributes) -> None:
        """Put attributes into a `struct stat`; modification time stands for all three times."""
        entry.st_ino = attributes.inode
        entry.st_mode = attributes.mode
        entry.st_nlink = LINK_COUNT
        entry.st_uid = self._filesystem.uid
        entry.st_gid = self._filesystem.gid
        entry.st_size = attributes.size
        entry.st_blksize = BLOCK_SIZE
        entry.st_blocks = attributes.blocks
        seconds, nanoseconds = divmod(attributes.mtime_ns, 10**9)
        for time in (entry.st_atimespec, entry.st_mtimespec, entry.st_ctimespec):
            time.tv_sec = seconds
            time.tv_nsec = nanoseconds


def _hand_over(value: bytes, buffer: Any, size: int) -> int:
    """Answer a request for an extended attribute: its size, or the value when the buffer holds it."""
    if not size:
        return len(value)
    if len(value) > size:
        return -errno.ERANGE
    ctypes.memmove(buffer, value, len(value))
    return len(value)
