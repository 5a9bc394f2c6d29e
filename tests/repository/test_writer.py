"""Storing files and trees: nothing twice, nothing lost, nothing borrowed for longer than allowed."""

import errno
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replicate.errors import RepositoryFull, RepositoryUnreachable
from replicate.ids import ExperimentId, SnapshotId, new_id
from replicate.records import ExperimentRecord, utc_now
from replicated import contents, packer
from replicated.chunk.cdc import ChunkerParameters, ChunkSizes, Cutter
from replicated.format import pack
from replicated.format.listing import parse_index
from replicated.format.manifest import FileContent, TreeEntry
from replicated.format.metadata import Snapshot
from replicated.index import Index
from replicated.reader import ChunkMemory, ChunkReader
from replicated.repository import Repository
from replicated.store.base import Buffer
from replicated.store.memory import MemoryStore
from replicated.tree import open_tree
from replicated.writer import SnapshotWriter

Save = Callable[[Repository, dict[str, bytes]], Snapshot]
Load = Callable[[Repository, SnapshotId], dict[str, bytes]]

WHOLE_BELOW = ChunkerParameters().whole_below


def data_keys(repository: Repository) -> set[str]:
    return {info.key for info in repository.store.list("") if info.key.startswith(("packs/", "log/index/"))}


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of 200 kB and an index object a megabyte, so that little data makes many."""
    monkeypatch.setattr(pack, "DATA_PACK_BYTES", 200_000)
    monkeypatch.setattr(packer, "INDEX_AFTER_BYTES", 1_000_000)


@pytest.mark.parametrize(
    "size",
    [0, 1, 100, WHOLE_BELOW - 1, WHOLE_BELOW, WHOLE_BELOW + 1, 3_000_000, 30_000_000],
)
@pytest.mark.parametrize("kind", ["random", "text"])
def test_file_of_any_size_is_read_back(repository: Repository, size: int, kind: str) -> None:
    line = b'{"step": 1, "loss": 0.25}\n'
    data = random.Random(size).randbytes(size) if kind == "random" else (line * (size // 20 + 1))[:size]
    with repository.writer() as writer:
        content = writer.add_file(memoryview(data))
        root = writer.add_tree([TreeEntry(b"file", "file", 0o644, 1, content)])
        writer.finish()
        assert writer.stats.bytes_done == size
    assert content.size == size
    assert content.hash == blake3(data).digest()
    if 0 < size < WHOLE_BELOW:
        assert content == FileContent(size, blake3(data).digest())
    snapshot = Snapshot(SnapshotId(new_id()), root)
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
    tree = open_tree(repository, snapshot.id)
    assert tree.reader(tree.find(b"file")).pread(0, size + 1) == data


def test_same_files_again_store_nothing(repository: Repository, save: Save, load: Load) -> None:
    files = {f"d/{n}": random.Random(n).randbytes(n * 50_000) for n in range(12)}
    first = save(repository, files)
    before = data_keys(repository)
    again = save(repository, files)
    assert data_keys(repository) == before
    assert again.root == first.root
    assert load(repository, again.id) == files


def test_equal_content_within_a_snapshot_is_stored_once(repository: Repository) -> None:
    data = random.Random(1).randbytes(2_000_000)
    with repository.writer() as writer:
        contents = {writer.add_file(data) for _ in range(5)}
        assert len(contents) == 1
        assert writer.stats.new_plain_bytes < 2_100_000
        assert writer.stats.bytes_done == 10_000_000


def test_changed_part_of_a_big_file_costs_little(repository: Repository, save: Save) -> None:
    data = random.Random(1).randbytes(20_000_000)
    save(repository, {"model": data})
    with repository.writer() as writer:
        writer.add_file(data[:5_000_000] + b"inserted" + data[5_000_000:])
        assert writer.stats.new_plain_bytes < 3_000_000


def test_writer_that_does_not_finish_leaves_nothing(repository: Repository, save: Save, load: Load) -> None:
    with pytest.raises(KeyboardInterrupt), repository.writer() as writer:
        writer.add_file(b"data" * 1000)
        raise KeyboardInterrupt
    assert data_keys(repository) == set()
    snapshot = save(repository, {"a": b"data" * 1000})
    assert load(repository, snapshot.id) == {"a": b"data" * 1000}


@pytest.mark.usefixtures("small_packs")
def test_interrupted_store_continues_where_it_was(repository: Repository, save: Save, load: Load) -> None:
    data = random.Random(7).randbytes(8_000_000)
    with pytest.raises(KeyboardInterrupt), repository.writer() as writer:
        writer.add_file(data)
        raise KeyboardInterrupt
    with repository.writer() as writer:
        writer.add_file(data)
        assert 0 < writer.stats.new_plain_bytes < 4_000_000
        writer.finish()
    snapshot = save(repository, {"data": data})
    assert load(repository, snapshot.id) == {"data": data}


@pytest.mark.usefixtures("small_packs")
def test_packs_come_before_the_index_objects_that_list_them(tmp_path: Path) -> None:
    order: list[str] = []

    class Recording(MemoryStore):
        def put(self, key: str, parts: Sequence[Buffer], **how: bool) -> None:
            super().put(key, parts, **how)
            order.append(key)

    repository = Repository.open_on(Recording(), cache=tmp_path, create=True)
    with repository.writer() as writer:
        writer.add_tree(
            [TreeEntry(b"a", "file", 0, 0, writer.add_file(random.Random(1).randbytes(5_000_000)))]
        )
        writer.finish()
    listed: set[str] = set()
    for key in order:
        if key.startswith("log/index/"):
            present = order[: order.index(key)]
            for listing in parse(repository, key):
                assert packer.pack_key(listing.name) in present
                listed.add(packer.pack_key(listing.name))
    assert listed == {key for key in order if key.startswith("packs/")}
    assert sum(key.startswith("log/index/") for key in order) > 1
    assert order[-1].startswith("log/index/")
    repository.close()


def parse(repository: Repository, key: str) -> list[pack.PackListing]:
    return parse_index(repository.store.get(key))


def test_data_and_tree_nodes_are_in_packs_of_their_own(repository: Repository, save: Save) -> None:
    save(repository, {"a": b"x" * 1000})
    (key,) = (info.key for info in repository.store.list("log/index/"))
    kinds = {listing.kind: len(listing.records) for listing in parse(repository, key)}
    assert kinds == {pack.DATA_PACK: 1, pack.TREE_PACK: 1}


class FullAfter(MemoryStore):
    """A store in which the Nth pack or index object, and all after it, finds no space."""

    def __init__(self, allowed: int) -> None:
        super().__init__()
        self.allowed = allowed

    def put(self, key: str, parts: Sequence[Buffer], **how: bool) -> None:
        if key.startswith(("packs/", "log/index/")):
            if self.allowed <= 0:
                raise RepositoryFull(f"no space for {key}")
            self.allowed -= 1
        super().put(key, parts, **how)


@pytest.mark.usefixtures("small_packs")
def test_full_store_is_told_at_every_point_and_a_later_try_completes(
    tmp_path: Path, save: Save, load: Load
) -> None:
    files = {"big": random.Random(3).randbytes(2_500_000), "small": b"x" * 100}
    failures = 0
    for allowed in range(100):
        store = FullAfter(allowed)
        repository = Repository.open_on(store, cache=tmp_path / str(allowed), create=True)
        try:
            save(repository, files)
            break
        except RepositoryFull:
            failures += 1
        assert not list(store.list("experiments/"))
        store.allowed = 1000
        assert load(repository, save(repository, files).id) == files
        repository.close()
    repository.close()
    assert failures > 5


@pytest.mark.usefixtures("small_packs")
def test_buffer_may_be_closed_after_the_call_even_if_it_failed(tmp_path: Path) -> None:
    for allowed in (0, 3, 1000):
        repository = Repository.open_on(FullAfter(allowed), cache=tmp_path / str(allowed), create=True)
        with mmap.mmap(-1, 6_000_000) as mapping:
            mapping[:] = random.Random(allowed).randbytes(6_000_000)
            failed = False
            with repository.writer() as writer, memoryview(mapping) as view:
                try:
                    writer.add_file(view)
                    writer.finish()
                except RepositoryFull:
                    failed = True
            assert failed == (allowed < 1000)
        repository.close()


def test_failed_writer_stays_failed(tmp_path: Path) -> None:
    repository = Repository.open_on(FullAfter(0), cache=tmp_path, create=True)
    with repository.writer() as writer:
        writer.add_file(b"x")
        for _ in range(2):
            with pytest.raises(RepositoryFull):
                writer.finish()
        with pytest.raises(RepositoryFull):
            writer.add_file(b"y")
    repository.close()


@given(
    st.integers(0, 300_000),
    st.integers(1, 50_000),
    st.sampled_from([1, 256]),
    st.sampled_from([1, 1000, 100_000]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_content_that_is_read_in_pieces_is_the_content_in_memory(
    monkeypatch: pytest.MonkeyPatch, size: int, read_bytes: int, variety: int, whole_below: int
) -> None:
    monkeypatch.setattr(contents, "_WINDOW_BYTES", 0)
    monkeypatch.setattr(contents, "PIECE_BYTES", 1024)
    sizes = ChunkSizes(64, 256, 1024)
    chunker = ChunkerParameters(whole_below, sizes, sizes)
    data = bytes(random.Random(size).choices(range(variety), k=size))

    def read_into(view: memoryview, offset: int) -> int:
        piece = data[offset : offset + min(len(view), read_bytes)]
        view[: len(piece)] = piece
        return len(piece)

    store = MemoryStore()
    with TemporaryDirectory() as cache, closing(Index(Path(cache), "id", store)) as index:
        with SnapshotWriter(store, index, ChunkReader(store, index, ChunkMemory(1 << 20)), chunker) as writer:
            content = writer.add_content(size, read_into)
            writer.finish()
        assert content.size == size
        assert content.hash == blake3(data).digest()
        reader = ChunkReader(store, index, ChunkMemory(1 << 20))
        chunks = b"".join(reader.read(chunk_id) for chunk_id in chunk_ids(reader, content))
        assert chunks == data
        if size >= whole_below and not content.node:
            cutter = Cutter(sizes)
            assert list(content.lengths or (size,)) == (cutter.cut(memoryview(data), is_last=True) or [0])


def chunk_ids(reader: ChunkReader, content: FileContent) -> Iterator[bytes]:
    pending = [content.node] if content.node else []
    yield from content.ids() if not pending else ()
    while pending:
        chunks = reader.read_chunk_list(pending.pop(0))
        if chunks.level == 0:
            yield from chunks.split_ids()
        else:
            pending = chunks.split_ids() + pending


def test_windows_and_small_files_are_cut_as_if_each_were_alone(repository: Repository) -> None:
    datas = [random.Random(n).randbytes(n * 1_700_000 % 21_000_000) for n in range(14)]
    with repository.writer() as writer:
        together = [writer.add_file(data) for data in datas]
    for data, content in zip(datas, together, strict=True):
        with repository.writer() as writer:
            assert writer.add_file(data) == content
        if content.lengths:
            cutter = Cutter(ChunkerParameters().binary)
            assert list(content.lengths) == cutter.cut(memoryview(data), is_last=True)


@pytest.mark.parametrize("size", [100, 1_000_000, 30_000_000])
@pytest.mark.parametrize("missing", [1, 99])
def test_content_that_ends_early_is_an_error(repository: Repository, size: int, missing: int) -> None:
    def read_into(view: memoryview, offset: int) -> int:
        return min(len(view), size - missing - offset)

    with repository.writer() as writer, pytest.raises(EOFError, match=str(size - missing)):
        writer.add_content(size, read_into)


@pytest.mark.usefixtures("small_packs")
def test_no_more_packs_are_in_memory_than_allowed(tmp_path: Path) -> None:
    made: list[pack.PackBuilder] = []
    alive: list[int] = []

    class Counted(pack.PackBuilder):
        def __init__(self, kind: int, memory: memoryview) -> None:
            super().__init__(kind, memory)
            made.append(self)

    class Slow(MemoryStore):
        def put(self, key: str, parts: Sequence[Buffer], **how: bool) -> None:
            if key.startswith("packs/"):
                # All threads of the writer get as far as they can meanwhile.
                deadline = time.monotonic() + 0.05
                while len(made) < stored[0] + packer.MAX_PACKS[pack.DATA_PACK] + 1:
                    if time.monotonic() > deadline:
                        break
                alive.append(len(made) - stored[0])
                stored[0] += 1
            super().put(key, parts, **how)

    stored = [0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packer, "PackBuilder", Counted)
        repository = Repository.open_on(Slow(), cache=tmp_path, create=True)
        with repository.writer() as writer:
            writer.add_file(random.Random(1).randbytes(4_000_000))
            writer.finish()
        repository.close()
    assert 1 < max(alive) <= packer.MAX_PACKS[pack.DATA_PACK]


def test_progress_rises_to_the_size_of_everything(repository: Repository) -> None:
    seen: list[int] = []
    with repository.writer(seen.append) as writer:
        writer.add_file(random.Random(1).randbytes(20_000_000))
        writer.add_file(b"small")
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert seen[-1] == 20_000_005


def test_known_content_is_contained_and_other_is_not(repository: Repository) -> None:
    sizes = (0, 10, 3_000_000, 15_000_000)
    datas = [random.Random(size).randbytes(size) for size in sizes]
    with repository.writer() as writer:
        contents = [writer.add_file(data) for data in datas]
        writer.finish()
    assert contents[-1].node, "otherwise no list of chunks is tested"
    unknown = bytes(32)
    with repository.writer() as writer:
        assert all(map(writer.contains, contents))
        assert not writer.contains(FileContent(5, unknown))
        assert not writer.contains(FileContent(5, unknown, contents[1].hash + unknown, (2, 3)))
        assert not writer.contains(FileContent(5, unknown, node=unknown))


def test_root_takes_its_attributes_from_an_entry_without_path(repository: Repository) -> None:
    with repository.writer() as writer:
        root = writer.add_tree(
            [TreeEntry(b"", "directory", 0o700, 42), TreeEntry(b"a", "directory", 0o755, 0)]
        )
    assert (root.mode, root.mtime_ns, root.directories, root.files) == (0o700, 42, 1, 0)


def entries(*paths: bytes) -> list[TreeEntry]:
    return [TreeEntry(path, "directory", 0o755, 0) for path in paths]


@pytest.mark.parametrize(
    "wrong",
    [
        entries(b"a/b"),
        entries(b"b", b"a"),
        entries(b"a", b"a"),
        entries(b"a", b"b", b"a/c"),
        entries(b"a", b"a/b", b"a/b"),
        entries(b"/a"),
        entries(b"a", b"a/"),
        entries(b"a", b"a//b"),
        entries(b".."),
        entries(b"a", b"a/.."),
        entries(b"a\0"),
        entries(b"a", b""),
        [TreeEntry(b"", "file", 0o644, 0)],
        [TreeEntry(b"f", "file", 0o644, 0)],
        [TreeEntry(b"f", "symlink", 0o777, 0), *entries(b"f/x")],
        [TreeEntry(b"l", "symlink", 0o777, 0)],
        [TreeEntry(b"d", "directory", 0o20755, 0)],
    ],
)
def test_impossible_trees_are_a_mistake_of_the_caller(repository: Repository, wrong: list[TreeEntry]) -> None:
    with repository.writer() as writer, pytest.raises(ValueError, match=r"."):
        writer.add_tree(wrong)


def test_siblings_are_sorted_by_names_not_by_paths(repository: Repository) -> None:
    paths = [b"a", b"a/x", b"a.b", b"a0"]
    assert paths != sorted(paths)
    with repository.writer() as writer:
        assert writer.add_tree(entries(*paths)).directories == 4


def test_deep_tree_is_stored_and_walked(repository: Repository) -> None:
    paths = [b"/".join([b"d"] * depth) for depth in range(1, 2049)]
    with repository.writer() as writer:
        root = writer.add_tree(entries(*paths))
        writer.finish()
    snapshot = Snapshot(SnapshotId(new_id()), root)
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
    assert [path for path, _ in open_tree(repository, snapshot.id).walk()] == paths


def test_file_of_several_gib_takes_bounded_memory(repository: Repository, tmp_path: Path) -> None:
    size = (2 << 30) + 12_345
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size - 5)
        file.write(b"end")
    peak = 0

    def private_memory() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
        raise AssertionError("the kernel does not say how much memory we use")

    def watch(done: int) -> None:
        nonlocal peak
        peak = max(peak, private_memory())

    before = private_memory()
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping,
        repository.writer(watch) as writer,
    ):
        content = writer.add_file(mapping)
        root = writer.add_tree([TreeEntry(b"sparse", "file", 0o600, 0, content)])
        writer.finish()
        assert writer.stats.new_stored_bytes < 1_000_000
    assert peak - before < 200 << 20
    snapshot = Snapshot(SnapshotId(new_id()), root)
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
    tree = open_tree(repository, snapshot.id)
    reader = tree.reader(tree.find(b"sparse"))
    assert reader.pread(size - 10, 100) == b"\0" * 5 + b"end\0\0"
    assert reader.pread((1 << 31) - 3, 6) == bytes(6)
    assert reader.pread(size, 1) == b""


def test_writer_killed_at_any_write_leaves_a_repository_that_goes_on(tmp_path: Path, load: Load) -> None:
    script = """
import os, random, sys
from datetime import datetime, timezone
from pathlib import Path
from replicate.records import ExperimentRecord
from replicated import contents, packer
from replicated.format import pack
from replicated.format.manifest import TreeEntry
from replicated.repository import Repository
pack.DATA_PACK_BYTES, packer.INDEX_AFTER_BYTES = 200_000, 500_000
allowed, root = int(sys.argv[1]), Path(sys.argv[2])
link = os.link
def die(*arguments):
    global allowed
    allowed -= 1
    if allowed < 0:
        os.kill(os.getpid(), 9)
    link(*arguments)
os.link = die
repository = Repository.open(f"file://{root}/repository", cache=root / "cache", create=True)
with repository.writer() as writer:
    content = writer.add_file(random.Random(1).randbytes(1_500_000))
    tree = writer.add_tree([TreeEntry(b"file", "file", 0o644, 0, content)])
    writer.finish()
repository.put_experiment(ExperimentRecord("ab" * 32, datetime(2026, 1, 1, tzinfo=timezone.utc)), tree)
"""
    snapshot_id = SnapshotId("ab" * 32)
    data = random.Random(1).randbytes(1_500_000)
    for allowed in range(0, 40, 2):
        command = [sys.executable, "-c", script, str(allowed), str(tmp_path)]
        done = subprocess.run(command, check=False)
        assert done.returncode in (0, -9)
        if (tmp_path / "repository" / "repository.json").exists():
            repository = Repository.open(
                f"file://{tmp_path}/repository", cache=tmp_path / "cache", create=False
            )
            assert repository.has_snapshot(snapshot_id) == (done.returncode == 0)
            if done.returncode == 0:
                assert load(repository, snapshot_id) == {"file": data}
                repository.close()
                return
            repository.close()
    pytest.fail("it never completed, though every try had more writes than the one before")


def test_failing_disk_is_reported_with_its_reason(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> Iterator[None]:
        raise OSError(errno.EIO, "Input/output error")

    with repository.writer() as writer:
        writer.add_file(b"x")
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(RepositoryUnreachable, match="Input/output error"):
            writer.finish()
