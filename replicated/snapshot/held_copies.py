"""Copies of held files in the spools of their snapshots: `held-<n>`, `held-<n>.tmp` while one is being made.

Called by `held`, which sees to it that one thread at a time works on the copies of a file. Nothing is flushed
here: a copy survives the end of the daemon, and that of the machine once the spool is synced.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from replicated.snapshot.entries import held_name

#: A snapshot, and the number of the held file in it.
Owner: TypeAlias = "tuple[str, int]"

_TEMPORARY_SUFFIX: Final = ".tmp"


class HeldCopies:
    """The copies below `spool_path(snapshot)`; these directories are made when the first copy is."""

    def __init__(self, spool_path: Callable[[str], Path]) -> None:
        self._spool_path = spool_path

    def open_parent(self, owner: Owner) -> int:
        """Open the directory that the spool directory of an owner is, or would be, in."""
        return os.open(self._spool_path(owner[0]).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def begin(self, owner: Owner) -> tuple[Path, int]:
        """Make an empty file for a copy: its path, and an open descriptor."""
        path = self._path(owner, _TEMPORARY_SUFFIX)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        return path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def give(self, path: Path, owner: Owner, *, is_temporary: bool) -> Path:
        """Make the complete copy at `path` that of an owner too; the name of a temporary one is gone then."""
        own = self._path(owner)
        own.parent.mkdir(mode=0o700, exist_ok=True)
        if is_temporary:
            path.rename(own)
        else:
            own.unlink(missing_ok=True)
            os.link(path, own)
        return own

    def find(self, owner: Owner) -> Path | None:
        """The complete copy of an owner."""
        path = self._path(owner)
        return path if path.exists() else None

    def _path(self, owner: Owner, suffix: str = "") -> Path:
        snapshot, number = owner
        return self._spool_path(snapshot) / (held_name(number) + suffix)
