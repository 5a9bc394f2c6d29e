"""Which paths of a project a capture was asked for, and what it left out that the user may not expect.

Filled and asked by `walk` and `capture`; decides nothing about single entries, which is the part of `ignore`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from replicate.errors import PathMissing
from replicated.snapshot.ignore import IGNORE_FILE

_NAMED_IN_WARNING = 3


@dataclass(slots=True)
class Selection:
    """The chosen paths as a tree: everything below, or only the named children."""

    everything: bool = False
    children: dict[bytes, Selection] = field(default_factory=dict)

    @staticmethod
    def of(paths: Iterable[bytes]) -> Selection:
        """The selection of paths relative to the project directory; `PathMissing` when one leaves it."""
        root = Selection()
        for path in paths:
            node = root
            for part in path.split(b"/"):
                if part in (b"", b"."):
                    continue
                if part == b"..":
                    raise PathMissing(f"path is outside the project directory: {os.fsdecode(path)}")
                node = node.children.setdefault(part, Selection())
            node.everything = True
        return root

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole project and nothing was named besides."""
        return self.everything and not self.children

    def below(self, name: bytes) -> Selection:
        """What is chosen in a directory of this one."""
        chosen = self.children.get(name)
        if chosen is None:
            return Selection(self.everything)
        return Selection(chosen.everything or self.everything, chosen.children)


class Omissions:
    """What was left out with a warning, by relative path."""

    def __init__(self) -> None:
        self._special: list[bytes] = []
        self._secrets: list[bytes] = []
        self._mounts: list[bytes] = []
        #: The directories, by relative path, in which something was left out.
        self.directories: set[bytes] = set()

    def add_special(self, path: bytes) -> None:
        """A socket, pipe or device."""
        self._add(self._special, path)

    def add_secret(self, path: bytes) -> None:
        """A file or directory that may hold secrets."""
        self._add(self._secrets, path)

    def add_mount(self, path: bytes) -> None:
        """A mount of a snapshot."""
        self._add(self._mounts, path)

    def warnings(self) -> tuple[str, ...]:
        """Sentences for the user."""
        found = []
        if self._special:
            found.append(
                f"skipped {_count(self._special, 'socket, pipe or device', 'sockets, pipes or devices')}"
            )
        if self._secrets:
            counted = _count(self._secrets, "file that may hold secrets", "files that may hold secrets")
            found.append(f"skipped {counted} (write `!NAME` into {IGNORE_FILE} to save such a file)")
        if self._mounts:
            found.append(f"skipped {_count(self._mounts, 'mount of a snapshot', 'mounts of snapshots')}")
        return tuple(found)

    def _add(self, paths: list[bytes], path: bytes) -> None:
        paths.append(path)
        self.directories.add(path.rpartition(b"/")[0])


def _count(paths: list[bytes], singular: str, plural: str) -> str:
    shown = ", ".join(os.fsdecode(path) for path in sorted(paths)[:_NAMED_IN_WARNING])
    rest = ", …" if len(paths) > _NAMED_IN_WARNING else ""
    return f"{len(paths)} {singular if len(paths) == 1 else plural}: {shown}{rest}"
