"""What is answered to each request of the kernel: the protocol on one side, a `Filesystem` on the other.

Bodies of requests come in, parts of answers go out; whatever is raised becomes an errno in `loop`. May be
used from any thread.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

from replicated.mount.engine.native import answers, protocol
from replicated.mount.engine.native.answers import Answers
from replicated.mount.engine.native.openings import Openings
from replicated.mount.engine.native.protocol import Request
from replicated.mount.errors import Refused
from replicated.mount.filesystem import NAME_MAX, Attributes, Filesystem
from replicated.mount.reading.open_files import Part

#: Entries of a directory that are asked for at once, at most.
_ENTRIES = 256
#: What an entry with its attributes takes at least.
_LEAST_ENTRY_BYTES = 160
#: The kernel may keep the pages of a file over its last close, and need not tell us of each close.
_CACHED = protocol.OPEN_KEEP_CACHE | protocol.OPEN_NOFLUSH


class Operations:
    """Answers requests about one file system.

    `openings` is None when files are not opened at all: the kernel then sends no OPEN but the first.
    """

    def __init__(self, filesystem: Filesystem, packer: Answers, openings: Openings | None) -> None:
        self._filesystem = filesystem
        self._packer = packer
        self._openings = openings
        self._methods: dict[int, Callable[[Request], Sequence[Part]]] = {
            protocol.LOOKUP: self._lookup,
            protocol.GETATTR: self._getattr,
            protocol.READLINK: self._readlink,
            protocol.OPEN: self._open,
            protocol.READ: self._read,
            protocol.STATFS: self._statfs,
            protocol.RELEASE: self._release,
            protocol.GETXATTR: self._getxattr,
            protocol.LISTXATTR: self._listxattr,
            protocol.OPENDIR: self._opendir,
            protocol.READDIR: self._readdir,
            protocol.READDIRPLUS: self._readdirplus,
            protocol.RELEASEDIR: _agree,
            protocol.DESTROY: _agree,
        }

    def knows(self, operation: int) -> bool:
        """Whether there is an answer to this; else it is ENOSYS, and the kernel does without."""
        return operation in self._methods

    def perform(self, request: Request) -> Sequence[Part]:
        """The answer; its parts are good until the next read of the same thread."""
        return self._methods[request.operation](request)

    def undo(self, request: Request, parts: Sequence[Part]) -> None:
        """Take back what an answer promised that the kernel did not take."""
        if request.operation == protocol.OPEN and self._openings is not None:
            handle, _, _ = protocol.OPEN_OUT.unpack(b"".join(parts))
            self._openings.release(handle)

    # -- names ---------------------------------------------------------------------------------------

    def _lookup(self, request: Request) -> Sequence[Part]:
        name = protocol.parse_name(request.body)
        if len(name) > NAME_MAX:
            raise Refused(errno.ENAMETOOLONG)
        try:
            attributes = self._filesystem.lookup(request.inode, name)
        except Refused as refused:
            if refused.errno == errno.ENOENT and self._filesystem.is_immutable:
                return (answers.absent_entry(),)
            raise
        return (self._packer.entry(attributes),)

    def _getattr(self, request: Request) -> Sequence[Part]:
        attributes = self._filesystem.getattr(request.inode)
        if self._openings is not None and self._openings.is_condemned(request.inode):
            # Of no type: the kernel lets nobody use the inode any more.
            attributes = attributes._replace(mode=0)
        return (self._packer.attributes(attributes),)

    def _readlink(self, request: Request) -> Sequence[Part]:
        return (self._filesystem.readlink(request.inode),)

    def _opendir(self, request: Request) -> Sequence[Part]:
        if self._filesystem.is_immutable:
            # No directory needs to be opened, and all listings may be kept.
            raise Refused(errno.ENOSYS)
        flags = 0
        if self._filesystem.is_lasting_directory(request.inode):
            flags = protocol.OPEN_CACHE_DIR | protocol.OPEN_KEEP_CACHE
        return (protocol.OPEN_OUT.pack(0, flags, 0),)

    def _readdir(self, request: Request) -> Sequence[Part]:
        return self._list(request, self._packer.plain_listing)

    def _readdirplus(self, request: Request) -> Sequence[Part]:
        return self._list(request, self._packer.listing)

    def _list(
        self,
        request: Request,
        pack: Callable[[Sequence[tuple[bytes, Attributes, int]], int], tuple[bytes, bool]],
    ) -> Sequence[Part]:
        """As much of a directory as fits into the answer."""
        _, offset, room = protocol.unpack(protocol.READ_IN, request.body)
        parts: list[bytes] = []
        fits = True
        while fits:
            # Not many more than fit: those would be read again for the next answer.
            limit = min(_ENTRIES, room // _LEAST_ENTRY_BYTES + 1)
            entries = self._filesystem.read_entries(request.inode, offset, limit)
            if not entries:
                break
            packed, fits = pack(entries, room)
            parts.append(packed)
            room -= len(packed)
            offset = entries[-1][2]
        return parts

    # -- contents ------------------------------------------------------------------------------------

    def _open(self, request: Request) -> Sequence[Part]:
        if self._openings is None:
            raise Refused(errno.ENOSYS)
        handle, backing_id = self._openings.open(request.inode)
        flags = protocol.OPEN_PASSTHROUGH | protocol.OPEN_NOFLUSH if backing_id else _CACHED
        return (protocol.OPEN_OUT.pack(handle, flags, backing_id),)

    def _read(self, request: Request) -> Sequence[Part]:
        handle, offset, length = protocol.unpack(protocol.READ_IN, request.body)
        return self._filesystem.read(request.inode, handle, offset, length)

    def _release(self, request: Request) -> Sequence[Part]:
        if self._openings is not None:
            (handle,) = protocol.unpack(protocol.RELEASE_IN, request.body)
            self._openings.release(handle)
        return ()

    # -- the rest ------------------------------------------------------------------------------------

    def _statfs(self, request: Request) -> Sequence[Part]:
        return (answers.usage(self._filesystem.usage),)

    def _getxattr(self, request: Request) -> Sequence[Part]:
        (room,) = protocol.unpack(protocol.XATTR_IN, request.body)
        name = protocol.parse_name(request.body, protocol.XATTR_IN.size)
        return _hand_over(self._filesystem.getxattr(request.inode, name), room)

    def _listxattr(self, request: Request) -> Sequence[Part]:
        (room,) = protocol.unpack(protocol.XATTR_IN, request.body)
        names = self._filesystem.listxattr(request.inode)
        return _hand_over(b"".join(name + b"\0" for name in names), room)


def _agree(request: Request) -> Sequence[Part]:
    return ()


def _hand_over(value: bytes, room: int) -> Sequence[Part]:
    """A value of extended attributes if there is room for it; its size when that is asked for."""
    if not room:
        return (protocol.XATTR_OUT.pack(len(value)),)
    if len(value) > room:
        raise Refused(errno.ERANGE)
    return (value,)
