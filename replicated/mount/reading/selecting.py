"""Which files of a mount are read in advance: those that a pattern names, or what an earlier run has read.

It looks at names and sizes only, reading is the affair of `prefetching`. Invariant: what is given exists, and
each file, or range of one, is given once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from stat import S_ISDIR, S_ISREG
from typing import Final, NamedTuple, Protocol

import pathspec

from replicate.errors import InvalidArgument, RepositoryDamaged
from replicate.phrases import escape
from replicated.mount.errors import Refused
from replicated.mount.filesystem import Attributes, Filesystem
from replicated.mount.reading.open_files import MIN_PLAIN_BYTES
from replicated.mount.reading.tracing import BLOCK_BYTES, Touch, Trace

#: A mount of a whole repository does not say how many entries it has.
MAX_ENTRIES: Final = 10**8

_WILDCARDS: Final = re.compile(r"[*?\[\\!]")
_HINT: Final = "give one such as `*.safetensors` or `data/train/`"
#: The offset behind `.` and `..`.
_FIRST_ENTRY: Final = 2


class Wanted(NamedTuple):
    """A file, or a range of it, that is to be read."""

    path: bytes
    inode: int
    size: int
    offset: int
    length: int
    #: 0 where another range of the same file came before.
    files: int = 1


class Selection(Protocol):
    """What is to be read."""

    def iter_wanted(self, filesystem: Filesystem) -> Iterator[Wanted]:
        """Files and ranges in the order in which they should be read; may be asked for several times."""
        ...

    @property
    def why_nothing(self) -> str:
        """What a user is told when there is nothing to be read."""
        ...


class Pattern:
    """The files that a pattern names, written as in `.gitignore`: of what is read, not of what is ignored.

    A directory stands for all that is below it. Raises `InvalidArgument`.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        try:
            self._spec = pathspec.GitIgnoreSpec.from_lines([text])
        except ValueError as error:
            raise InvalidArgument(f"not a pattern of files: {escape(text)}", hint=_HINT) from error
        if not any(pattern.include for pattern in self._spec.patterns):
            raise InvalidArgument(f"the pattern names no files: {escape(text)}", hint=_HINT)

    def iter_wanted(self, filesystem: Filesystem) -> Iterator[Wanted]:
        """In the order of the tree, which is that of the packs."""
        for path, found in _walk(filesystem, self._top()):
            if S_ISREG(found.mode) and self._spec.match_file(os.fsdecode(path)):
                yield Wanted(path, found.inode, found.size, 0, found.size)

    @property
    def why_nothing(self) -> str:
        """See `Selection`."""
        return f"no file matches {escape(self._text)}"

    def _top(self) -> bytes:
        """The path that everything that matches is at or below."""
        if "/" not in self._text.rstrip("/"):
            return b""
        parts = self._text.strip("/").split("/")
        literal = next((at for at, part in enumerate(parts) if _WILDCARDS.search(part)), len(parts))
        return os.fsencode("/".join(parts[:literal]))


class Replay:
    """What an earlier run has read, in its order; of a large file of which it read much, all."""

    def __init__(self, trace: Trace | None) -> None:
        """None: there is no record."""
        self._trace = trace

    def iter_wanted(self, filesystem: Filesystem) -> Iterator[Wanted]:
        """See `Selection`."""
        if self._trace is None:
            return
        whole = _find_whole(filesystem, self._trace)
        begun: set[int] = set()
        for touch, found in _iter_touched(filesystem, self._trace):
            inode, size = found.inode, found.size
            # Small ones are recorded once.
            if size < MIN_PLAIN_BYTES:
                yield Wanted(touch.path, inode, size, 0, size)
                continue
            is_first = inode not in begun
            begun.add(inode)
            if touch.count and inode not in whole:
                offset = min(touch.first * BLOCK_BYTES, size)
                length = min(touch.count * BLOCK_BYTES, size - offset)
                yield Wanted(touch.path, inode, size, offset, length, int(is_first))
            elif is_first:
                yield Wanted(touch.path, inode, size, 0, size)

    @property
    def why_nothing(self) -> str:
        """See `Selection`."""
        return "there is no record of an earlier run of these files: this run is recorded for the next one"


def _find_whole(filesystem: Filesystem, trace: Trace) -> set[int]:
    """The large files of which so many blocks were touched that all of it is wanted."""
    touched: dict[int, int] = {}
    whole: set[int] = set()
    for touch, found in _iter_touched(filesystem, (touch for touch in trace if touch.count)):
        touched[found.inode] = touched.get(found.inode, 0) + touch.count * BLOCK_BYTES
        if touched[found.inode] * 2 >= found.size:
            whole.add(found.inode)
    return whole


def _iter_touched(filesystem: Filesystem, touches: Iterable[Touch]) -> Iterator[tuple[Touch, Attributes]]:
    for touch in touches:
        # A record that names what is not there was made by somebody else.
        with suppress(Refused):
            found = filesystem.getattr(filesystem.resolve(touch.path))
            if S_ISREG(found.mode):
                yield touch, found


def _walk(filesystem: Filesystem, top: bytes) -> Iterator[tuple[bytes, Attributes]]:
    """All that is at and below a path, parents first, siblings by name."""
    try:
        found = filesystem.getattr(filesystem.resolve(top))
    except Refused:
        return
    yield top, found
    if not S_ISDIR(found.mode):
        return
    # The same small directory below itself many times over would go on for ever.
    left = filesystem.usage.entries or MAX_ENTRIES
    pending = [(top, filesystem.readdir(found.inode, _FIRST_ENTRY))]
    while pending:
        directory, entries = pending[-1]
        entry = next(entries, None)
        if entry is None:
            pending.pop()
            continue
        left -= 1
        if left < 0:
            raise RepositoryDamaged("a tree has more entries than its snapshot says")
        name, found, _ = entry
        path = directory + b"/" + name if directory else name
        yield path, found
        if S_ISDIR(found.mode):
            pending.append((path, filesystem.readdir(found.inode, _FIRST_ENTRY)))
