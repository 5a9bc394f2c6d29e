"""A capture without its haste: the entries of a directory, with each content where the test wants it."""

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from replicated.snapshot.entries import (
    HELD,
    LINK,
    PACKED,
    SPOOLED,
    CapturedDirectory,
    Header,
    Row,
    Source,
    pack_directory,
    pack_header,
    pack_rows,
    pack_sources,
    unpack_rows,
    unpack_sources,
)
from replicated.snapshot.treecache import TreeCache


@dataclass
class Frozen:
    """The records of a directory, and what they refer to, in a spool directory."""

    header: Header
    directories: list[CapturedDirectory]
    spool: Path
    #: The files of the sources that are held, by number.
    held: list[Path] = field(default_factory=list)

    @property
    def entries(self) -> bytes:
        return pack_header(self.header) + b"".join(map(pack_directory, self.directories))

    @property
    def size_bytes(self) -> int:
        return sum(
            row.size
            for directory in self.directories
            for row in unpack_rows(directory.rows)
            if not row.is_link
        )


#: Which kind of source a file has, by its path and size.
Choose = Callable[[bytes, int], int]


def choose_by_size(path: bytes, size: int) -> int:
    return PACKED if size <= 1 << 20 else SPOOLED


@pytest.fixture
def freeze():
    """Freezes a directory; with a cache, what that knows is not read."""

    def freeze_directory(
        project: Path,
        spool: Path,
        choose: Choose = choose_by_size,
        cache: TreeCache | None = None,
        chosen: Callable[[bytes], bool] | None = None,
        tree_key: bytes = b"tree",
        is_racy: bool = False,
    ) -> Frozen:
        spool.mkdir(exist_ok=True)
        top = os.fsencode(project)
        frozen = Frozen(Header(top, tree_key), [], spool)
        # Unless a test is about that, long after the last change.
        listed_ns = time.time_ns() + (0 if is_racy else 10**9)
        _freeze(frozen, top, b"", choose, cache, chosen, listed_ns)
        return frozen

    return freeze_directory


def _freeze(frozen, top, path, choose, cache, chosen, listed_ns):
    directory = os.path.join(top, path) if path else top
    info = os.stat(directory)
    rows: list[Row] = []
    sources: list[Source] = []
    below = []
    known = cache.load(directory) if cache is not None else None
    known_rows = (
        dict(zip(unpack_rows(known.rows), unpack_sources(known.sources), strict=True)) if known else {}
    )
    for name in sorted(os.listdir(directory)):
        full = os.path.join(directory, name)
        relative = os.path.join(path, name)
        about = os.lstat(full)
        if stat.S_ISDIR(about.st_mode):
            below.append(relative)
            continue
        if chosen is not None and not chosen(relative):
            continue
        row = Row(name, about.st_mode, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        rows.append(row)
        if row in known_rows:
            sources.append(known_rows[row])
        else:
            sources.append(_source(frozen, full, relative, row, choose))
    frozen.directories.append(
        CapturedDirectory(
            path=path,
            mode=info.st_mode,
            mtime_ns=info.st_mtime_ns,
            device=info.st_dev,
            inode=info.st_ino,
            listed_ns=listed_ns,
            is_complete=chosen is None,
            rows=pack_rows(rows),
            sources=pack_sources(sources),
        )
    )
    for relative in below:
        _freeze(frozen, top, relative, choose, cache, chosen, listed_ns)


def _source(frozen, full, relative, row, choose):
    if row.is_link:
        return LINK, os.readlink(full)
    kind = choose(relative, row.size)
    with open(full, "rb") as file:
        data = file.read()
    if kind == PACKED:
        with (frozen.spool / "packed").open("ab") as packed:
            offset = packed.tell()
            packed.write(data)
        return PACKED, offset, "packed"
    if kind == SPOOLED:
        name = f"large-{len(list(frozen.spool.iterdir()))}"
        (frozen.spool / name).write_bytes(data)
        return SPOOLED, name
    frozen.held.append(Path(os.fsdecode(full)))
    return HELD, len(frozen.held) - 1
