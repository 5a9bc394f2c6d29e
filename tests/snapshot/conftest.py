"""Captures for tests: without their haste, each content where the test wants it; and real ones."""

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from blake3 import blake3

from replicated.format.manifest import RootNode
from replicated.repository import Repository
from replicated.snapshot.capture import Capturer, CaptureRequest
from replicated.snapshot.entries import (
    HELD,
    KNOWN,
    LINK,
    PACKED,
    SPOOLED,
    CapturedDirectory,
    Header,
    Row,
    SameTree,
    Source,
    pack_children,
    pack_directory,
    pack_header,
    pack_rows,
    pack_sources,
    read_entries,
    unpack_rows,
    unpack_sources,
)
from replicated.snapshot.held import HeldFiles
from replicated.snapshot.spool import Spool
from replicated.snapshot.treecache import RACY_NS, CachedDirectory, CachedTree, TreeCache, smudge
from replicated.snapshot.watch import TreeWatches


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


@dataclass(frozen=True)
class Entry:
    """One captured directory, file or link."""

    path: bytes
    type: str
    mode: int
    mtime_ns: int
    size: int = 0
    target: bytes = b""
    source: Source = ()


class Captures:
    """A capturer with all that it needs, and what it captured in a form that can be compared."""

    def __init__(self, directory: Path, private=()):
        (directory / "spool").mkdir()
        self.spool = Spool(directory / "spool")
        self.held = HeldFiles(self.spool.path)
        self.held.start()
        self.watches = TreeWatches(min_files=1)
        self.watches.start()
        self.cache = TreeCache(directory / "trees", "repository", "url")
        self.capturer = Capturer(self.spool, self.held, self.watches, private)

    def stop(self):
        self.capturer.stop()
        self.held.stop()
        self.watches.stop()
        self.cache.close()

    def capture(self, project, *paths, identifier="a" * 64, repository=None, cached=False, **options):
        """What was captured, and its entries by path."""
        request = CaptureRequest(
            identifier, os.fsencode(project), tuple(map(os.fsencode, paths or (".",))), **options
        )
        captured = self.capturer.capture(request, repository, self.cache if cached else None)
        return captured, self.entries(captured, identifier)

    def records(self, captured, identifier="a" * 64):
        chunks = [captured.entries] if captured.entries else self.spool.read_entries(identifier)
        header, records = read_entries(chunks)
        return header, list(records)

    def entries(self, captured, identifier="a" * 64):
        entries = {}
        for record in self.records(captured, identifier)[1]:
            if isinstance(record, SameTree):
                continue
            entries[record.path] = Entry(record.path, "directory", record.mode, record.mtime_ns)
            sources = unpack_sources(record.sources)
            for row, source in zip(unpack_rows(record.rows), sources, strict=True):
                path = os.path.join(record.path, row.name)
                entries[path] = Entry(
                    path,
                    "symlink" if row.is_link else "file",
                    stat.S_IMODE(row.mode),
                    row.mtime_ns,
                    row.size,
                    source[1] if source[0] == LINK else b"",
                    source,
                )
        return entries

    def content(self, entry, identifier="a" * 64):
        """The bytes that were captured of a file; for a known one what `store` remembered."""
        self.capturer.finish(identifier)
        kind, *about = entry.source
        if not entry.size:
            return b""
        if kind == KNOWN:
            return self._stored[about[0]]
        if kind == HELD:
            return self._read_held(identifier, about[0], entry.size)
        offset = about[0] if kind == PACKED else 0
        with (self.spool.path(identifier) / about[-1]).open("rb") as file:
            file.seek(offset)
            return file.read(entry.size)

    def _read_held(self, identifier, number, size):
        while True:
            opened = self.held.open(identifier, number)
            try:
                data = os.pread(opened.descriptor, size, 0)
            finally:
                os.close(opened.descriptor)
            if opened.slot is None or os.pread(self.held.flags_descriptor, 1, opened.slot) == b"\0":
                return data

    def store(self, captured, identifier="a" * 64, forget=True):
        """Do what an ingest does for the cache: the next capture knows all that this one had."""
        header, records = self.records(captured, identifier)
        entries = self.entries(captured, identifier)
        self._stored = {
            blake3(self.content(entry, identifier)).digest(): self.content(entry, identifier)
            for entry in entries.values()
            if entry.type == "file"
        }
        cached = {}
        for record in reversed(records):
            assert isinstance(record, CapturedDirectory)
            rows = unpack_rows(record.rows)
            sources = [
                (LINK, entry.target)
                if entry.type == "symlink"
                else (KNOWN, blake3(self.content(entry, identifier)).digest(), [])
                for entry in (entries[os.path.join(record.path, row.name)] for row in rows)
            ]
            below = [
                other
                for other in records
                if other.path and os.path.dirname(other.path) == record.path and other is not record
            ]
            totals = [
                sum(not row.is_link for row in rows),
                len(below),
                sum(row.is_link for row in rows),
                sum(row.size for row in rows if not row.is_link),
            ]
            for other in below:
                totals = [a + b for a, b in zip(totals, cached[other.path].totals, strict=True)]
            children = [
                (os.path.basename(other.path), other.mode, other.mtime_ns, cached[other.path].node)
                for other in below
            ]
            packed = pack_rows(rows), pack_sources(sources), pack_children(children)
            node = blake3(repr((packed, record.path)).encode()).digest()
            cached[record.path] = CachedDirectory(
                record.device,
                record.inode,
                smudge(rows, record.listed_ns),
                *packed[1:],
                node,
                tuple(totals),
                1,
            )
        top = records[0]
        root = RootNode(cached[b""].node, top.mode, top.mtime_ns, *cached[b""].totals)
        rows = {
            os.path.join(header.project_directory, path) if path else header.project_directory: row
            for path, row in cached.items()
        }
        self.cache.store(rows.items(), (header.tree_key, CachedTree(identifier, root, 1)))
        if forget:
            self.capturer.forget(identifier)


@pytest.fixture
def captures(tmp_path):
    made = Captures(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def project(tmp_path):
    directory = tmp_path / "project"
    directory.mkdir()
    return directory


@pytest.fixture
def repository(tmp_path):
    opened = Repository.open(f"file://{tmp_path}/repository", cache=tmp_path / "cache", create=True)
    yield opened
    opened.close()


@pytest.fixture
def settle():
    """Waits until the files below a directory are not racy any more: their times are clearly in the past."""

    def wait(directory: Path) -> None:
        paths = [directory, *directory.rglob("*")]
        newest = max(max(path.lstat().st_ctime_ns, path.lstat().st_mtime_ns) for path in paths)
        while time.time_ns() <= newest + RACY_NS:
            os.sched_yield()

    return wait
