"""The callbacks of libfuse's high-level interface, which speak of paths, as calls of a `Filesystem`.

`mfusepy` and `fusepy` both hand such callbacks to the methods of a class; `Callbacks` comes before that
class and takes its place at the level of the C structures: names stay bytes, and every callback passes one
guard, because an exception that escapes into ctypes reads as success, which is an empty file to the reader
(plain fusepy does that with any OSError without a number). Each call ends in time, whatever the store does.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Final, TypeVar

from replicated.mount.engine.bounded_calls import BoundedCalls, GivenUp
from replicated.mount.engine.libfuse import SUBTYPE
from replicated.mount.errors import errno_for
from replicated.mount.filesystem import BLOCK_SIZE, LINK_COUNT, NAME_MAX, Attributes, Filesystem
from replicated.mount.options import EngineReport, MountOptions
from replicated.mount.reading.open_files import Part

T = TypeVar("T")

#: A day: what is mounted never changes, and the kernel asks again only when it forgot.
LASTING_S: Final = 86400
#: For a view that can change: new experiments show within a second.
PASSING_S: Final = 1
#: Requests that the kernel sends before it waits for answers: read-ahead of several readers.
MAX_BACKGROUND: Final = 64
CONGESTION_THRESHOLD: Final = 48

#: The callbacks that libfuse is given; what is missing it answers itself (ENOSYS or a default).
_CALLBACKS: Final = (
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
#: Entries that are asked for at once; the kernel takes a few more or less in one answer.
_PAGE: Final = 64


class Callbacks:
    """To be inherited from before the `FUSE` of a binding, whose constructor serves the mount."""

    def __init__(self, filesystem: Filesystem, options: MountOptions, library: str, **arguments: Any) -> None:
        """Mount and serve; `arguments` are those of the binding. `library` is the one that it has loaded."""
        self.filesystem = filesystem
        # The same library as the binding's: it is loaded once.
        self._libfuse = ctypes.CDLL(library)
        self._libfuse.fuse_get_context.restype = ctypes.POINTER(ctypes.c_void_p)
        self._libfuse.fuse_get_session.argtypes = (ctypes.c_void_p,)
        self._libfuse.fuse_get_session.restype = ctypes.c_void_p
        self._libfuse.fuse_session_exited.argtypes = (ctypes.c_void_p,)
        self._calls = BoundedCalls(options.timeout_s, self._is_given_up)
        super().__init__(**arguments)

    def _is_given_up(self) -> bool:
        """Whether the reader was interrupted, or the mount ends; asked in the thread of a callback."""
        if self._libfuse.fuse_interrupted():
            return True
        # The first field of the context is the mount.
        mount = self._libfuse.fuse_get_context().contents
        return bool(self._libfuse.fuse_session_exited(self._libfuse.fuse_get_session(mount)))

    def _wrapper(self, func: Callable[..., int], *args: Any) -> int:
        """The guard of every callback: its result, or the negative errno of whatever it raised."""
        try:
            return func(*args) or 0
        except GivenUp:
            return -errno.EINTR
        except BaseException as error:
            return -errno_for(error, func.__name__)

    def _ask(self, function: Callable[[], T]) -> T:
        """What `function` finds, in time."""
        return self._calls.run(function, lambda result: result)

    # -- callbacks -----------------------------------------------------------------------------------

    def readlink(self, path: bytes, buffer: Any, size: int) -> int:
        """The target of a link."""
        target = self._ask(lambda: self.filesystem.readlink(self.filesystem.resolve(path)))
        if len(target) >= size:
            return -errno.ENAMETOOLONG
        ctypes.memmove(buffer, target + b"\0", len(target) + 1)
        return 0

    def open(self, path: bytes, info: Any) -> int:
        """A handle on a file."""
        info.contents.fh = self._calls.run(
            lambda: self.filesystem.open(self.filesystem.resolve(path)),
            lambda handle: handle,
            discard=self.filesystem.release,
        )
        return 0

    def read(self, path: bytes | None, buffer: Any, size: int, offset: int, info: Any) -> int:
        """Bytes of an open file."""
        handle = info.contents.fh
        target = memoryview((ctypes.c_char * size).from_address(ctypes.addressof(buffer.contents))).cast("B")

        def copy(parts: Sequence[Part]) -> int:
            # Some may lie in a buffer of the thread that has read them: they are copied before it goes on.
            written = 0
            for part in parts:
                target[written : written + len(part)] = part
                written += len(part)
            return written

        return self._calls.run(
            lambda: self.filesystem.read(self.filesystem.inode_of(handle), handle, offset, size), copy
        )

    def release(self, path: bytes | None, info: Any) -> int:
        """The end of the use of a handle."""
        self.filesystem.release(info.contents.fh)
        return 0

    def opendir(self, path: bytes, info: Any) -> int:
        """A handle on a directory, which is its number."""
        info.contents.fh = self._ask(lambda: self.filesystem.resolve(path))
        return 0

    def statfs(self, path: bytes, buffer: Any) -> int:
        """The size of the whole."""
        usage = self.filesystem.usage
        # What is free stays 0, as libfuse hands the structure over.
        answer = buffer.contents
        answer.f_bsize = answer.f_frsize = BLOCK_SIZE
        answer.f_blocks = -(-usage.size_bytes // BLOCK_SIZE)
        answer.f_files = usage.entries
        answer.f_namemax = NAME_MAX
        return 0

    def listxattr(self, path: bytes, buffer: Any, size: int) -> int:
        """The names of extended attributes."""
        names = self._ask(lambda: self.filesystem.listxattr(self.filesystem.resolve(path)))
        return _hand_over(b"".join(name + b"\0" for name in names), buffer, size)

    def getxattr(self, path: bytes, name: bytes, buffer: Any, size: int, *_: Any) -> int:
        """The value of an extended attribute."""
        value = self._ask(lambda: self.filesystem.getxattr(self.filesystem.resolve(path), name))
        return _hand_over(value, buffer, size)

    # -- for what differs between versions of libfuse ------------------------------------------------

    def answer_attributes(self, find: Callable[[], int], buffer: Any) -> int:
        """Put the attributes of what `find` finds into the `struct stat` that `buffer` points to."""
        attributes = self._ask(lambda: self.filesystem.getattr(find()))
        ctypes.memset(buffer, 0, ctypes.sizeof(buffer.contents))
        self.fill(buffer.contents, attributes)
        return 0

    def entries(self, inode: int, offset: int) -> Iterator[tuple[bytes, Attributes, int]]:
        """The entries of a directory from `offset` on."""
        while page := self._ask(partial(self.filesystem.read_entries, inode, offset, _PAGE)):
            yield from page
            offset = page[-1][2]

    def fill(self, entry: Any, attributes: Attributes) -> None:
        """Put attributes into a `struct stat`; modification time stands for all three times."""
        entry.st_ino = attributes.inode
        entry.st_mode = attributes.mode
        entry.st_nlink = LINK_COUNT
        entry.st_uid = self.filesystem.uid
        entry.st_gid = self.filesystem.gid
        entry.st_size = attributes.size
        entry.st_blksize = BLOCK_SIZE
        entry.st_blocks = attributes.blocks
        seconds, nanoseconds = divmod(attributes.mtime_ns, 10**9)
        for time in (entry.st_atimespec, entry.st_mtimespec, entry.st_ctimespec):
            time.tv_sec = seconds
            time.tv_nsec = nanoseconds


def implemented(**others: Any) -> SimpleNamespace:
    """What a binding asks for which callbacks it shall set, and for a few settings."""
    return SimpleNamespace(use_ns=True, **dict.fromkeys(_CALLBACKS, True), **others)


def mount_options(filesystem: Filesystem, source_name: str, options: MountOptions) -> dict[str, Any]:
    """The options that libfuse 2 and libfuse 3 both know."""
    timeout = LASTING_S if filesystem.is_immutable else PASSING_S
    chosen: dict[str, Any] = {
        # libfuse would fork otherwise, after our threads have started.
        "foreground": True,
        "fsname": source_name,
        "subtype": SUBTYPE,
        "ro": True,
        "nosuid": True,
        "nodev": True,
        "default_permissions": True,
        # fusermount watches us and unmounts should we be killed.
        "auto_unmount": True,
        # The pages of a file outlive its last close.
        "kernel_cache": True,
        "use_ino": True,
        "entry_timeout": timeout,
        "attr_timeout": timeout,
        "negative_timeout": timeout if filesystem.is_immutable else 0,
    }
    # libfuse refuses what has a value that it does not expect.
    return {**chosen, "allow_other": True} if options.allow_other else chosen


def report(engine: str) -> EngineReport:
    """What an engine over libfuse has to say."""
    return EngineReport(engine, False, "only the native engine lets the kernel read files itself")


def encoded(directory: bytes) -> str:
    """A mount point as a binding takes it that is told to encode it as Latin-1."""
    return directory.decode("latin-1")


def _hand_over(value: bytes, buffer: Any, size: int) -> int:
    """Answer a request for an extended attribute: its size, or the value when the buffer holds it."""
    if not size:
        return len(value)
    if len(value) > size:
        return -errno.ERANGE
    ctypes.memmove(buffer, value, len(value))
    return len(value)
