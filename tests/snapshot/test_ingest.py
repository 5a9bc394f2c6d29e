"""From what was captured into a repository: it is what a reader finds, and nothing is done twice."""

import errno
import os
import random
import shutil
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replicate.errors import CaptureFailed, RepositoryFull
from replicate.ids import ExperimentId, SnapshotId, new_id
from replicate.records import ExperimentRecord, utc_now
from replicated.format.condemned import Condemned, encode_condemned
from replicated.format.metadata import Snapshot
from replicated.keys import condemned_key
from replicated.repository import Repository
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
    pack_rows,
    pack_sources,
    unpack_children,
    unpack_rows,
    unpack_sources,
)
from replicated.snapshot.frozen import FrozenFiles
from replicated.snapshot.ingest import ingest
from replicated.snapshot.remembered import Remembered
from replicated.snapshot.treecache import TreeCache
from replicated.store.local import LocalStore
from replicated.tree import open_tree

KINDS = (PACKED, SPOOLED, HELD)


@pytest.fixture
def cache(tmp_path, repository):
    opened = TreeCache(tmp_path / "cache" / "trees", repository.id, repository.url)
    yield opened
    opened.close()


@pytest.fixture
def spool(tmp_path):
    """A new spool directory each time."""
    return lambda: tmp_path / f"spool-{new_id()[:8]}"


def open_held_of(frozen):
    return lambda number: (os.open(frozen.held[number], os.O_RDONLY), number)


def store(repository, frozen, cache=None, on_progress=None, *, open_held=None, flags=bytes(1000)):
    """Ingest and publish; the snapshot."""
    snapshot_id = SnapshotId(new_id())
    with FrozenFiles(frozen.spool, open_held or open_held_of(frozen), flags, lambda _: True) as files:
        root = ingest(
            repository, snapshot_id, frozen.header, iter(frozen.directories), files, cache, on_progress
        ).root
    snapshot = Snapshot(snapshot_id, root)
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
    return snapshot


def stored_bytes(repository):
    return sum(info.size for info in repository.store.list(""))


class Unreadable(FrozenFiles):
    """Nothing may be read."""

    def __init__(self):
        pass

    def open(self, source):
        raise AssertionError(f"it is read: {source}")


def store_unread(repository, frozen, cache, on_progress=None):
    snapshot_id = SnapshotId(new_id())
    root = ingest(
        repository, snapshot_id, frozen.header, iter(frozen.directories), Unreadable(), cache, on_progress
    ).root
    return Snapshot(snapshot_id, root)


def fill(project):
    (project / "a" / "deep").mkdir(parents=True)
    (project / "b").mkdir(mode=0o700)
    (project / "empty directory").mkdir()
    (project / "large").write_bytes(random.Random(1).randbytes(9_000_000))
    (project / "a" / "middle").write_bytes(random.Random(2).randbytes(700_000))
    (project / "a" / "deep" / "text").write_bytes(b"line\n" * 100_000)
    for number in range(50):
        (project / "b" / f"{number}").write_bytes(b"%d" % number * number * 20)
    (project / "b" / "executable").touch(0o755)
    (Path(os.fsdecode(os.fsencode(project) + b"/a/\xff\n"))).write_bytes(b"odd name")
    os.symlink(b"../\xfe", os.fsencode(project) + b"/link")


def forget(repository):
    """Lose all chunks, as when they were collected."""
    for prefix in ("log/index/", "packs/"):
        repository.store.delete(*[info.key for info in repository.store.list(prefix)])


@pytest.mark.parametrize(
    "choose",
    [lambda path, size: PACKED, lambda path, size: SPOOLED, lambda path, size: HELD,
     lambda path, size: KINDS[sum(path) % 3]],
)  # fmt: skip
def test_what_was_captured_is_what_is_read(project, repository, freeze, spool, described, choose):
    fill(project)
    frozen = freeze(project, spool(), choose)
    expected = described(project)
    reported = []
    # Only what was frozen counts.
    if choose(b"b/7", 0) != HELD:
        (project / "b" / "7").write_bytes(b"changed")
    snapshot = store(repository, frozen, on_progress=reported.append)
    assert described(open_tree(repository, snapshot.id)) == expected
    assert reported == sorted(reported)
    assert reported[-1] == frozen.size_bytes == snapshot.root.size_bytes
    info = os.stat(project)
    assert (snapshot.root.mode, snapshot.root.mtime_ns) == (stat.S_IMODE(info.st_mode), info.st_mtime_ns)
    kinds = [entry[0] for entry in expected.values()]
    assert (snapshot.root.files, snapshot.root.directories, snapshot.root.symlinks) == tuple(
        map(kinds.count, ("file", "directory", "symlink"))
    )


def test_ingesting_twice_stores_nothing_twice(project, repository, freeze, spool):
    fill(project)
    frozen = freeze(project, spool())
    first = store(repository, frozen)
    stored = stored_bytes(repository)
    again = store(repository, frozen)
    assert again.root == first.root
    assert stored_bytes(repository) - stored < 1000, "the snapshot itself"


def test_nothing_is_visible_before_the_snapshot_is_put(project, repository, freeze, spool):
    fill(project)
    frozen = freeze(project, spool())
    with FrozenFiles(frozen.spool, open_held_of(frozen), b"") as files:
        ingest(repository, SnapshotId("b" * 64), frozen.header, iter(frozen.directories), files, None)
    assert not repository.has_snapshot(SnapshotId("b" * 64))


# What is known already


def test_what_has_not_changed_is_not_read(project, repository, cache, freeze, spool):
    fill(project)
    first = store(repository, freeze(project, spool()), cache)
    again = freeze(project, spool(), cache=cache)
    reported = []
    assert store_unread(repository, again, cache, reported.append).root == first.root
    assert reported[-1] == again.size_bytes


def test_directories_that_have_not_changed_are_not_looked_into(
    project, repository, cache, freeze, spool, monkeypatch
):
    fill(project)
    store(repository, freeze(project, spool()), cache)
    (project / "a" / "deep" / "new").write_bytes(b"x")
    again = freeze(project, spool(), cache=cache)
    unpacked = []
    monkeypatch.setattr(
        "replicated.snapshot.ingest.unpack_rows", lambda data: unpacked.append(data) or unpack_rows(data)
    )
    store(repository, again, cache)
    looked_into = {directory.path for directory in again.directories if directory.rows in unpacked}
    assert looked_into == {b"", b"a", b"a/deep"}


def test_what_has_changed_is_stored(project, repository, cache, freeze, spool, described):
    fill(project)
    store(repository, freeze(project, spool()), cache)
    (project / "a" / "deep" / "text").write_bytes(b"other")
    (project / "b").chmod(0o755)
    (project / "link").unlink()
    shutil.rmtree(project / "empty directory")
    (project / "a" / "another").mkdir()
    again = freeze(project, spool(), cache=cache)
    snapshot = store(repository, again, cache)
    assert described(open_tree(repository, snapshot.id)) == described(project)
    kinds = [entry[0] for entry in described(project).values()]
    root = snapshot.root
    assert (root.files, root.directories, root.symlinks) == tuple(
        map(kinds.count, ("file", "directory", "symlink"))
    )
    assert root.size_bytes == again.size_bytes


def test_file_that_may_change_without_a_new_time_is_not_known(project, repository, cache, freeze, spool):
    (project / "file").write_bytes(b"x")
    store(repository, freeze(project, spool(), is_racy=True), cache)
    frozen = freeze(project, spool(), cache=cache)
    assert [source[0] for source in unpack_sources(frozen.directories[0].sources)] == [PACKED]


def test_cache_is_told_nothing_before_everything_is_stored(
    project, repository, cache, freeze, spool, monkeypatch
):
    fill(project)
    frozen = freeze(project, spool())

    def refuse(self, key, parts, **how):
        raise RepositoryFull("no space")

    monkeypatch.setattr(LocalStore, "put", refuse)
    with pytest.raises(RepositoryFull):
        store(repository, frozen, cache)
    assert cache.load(frozen.header.project_directory) is None
    assert cache.load_tree(b"tree") is None


def test_cache_knows_no_tree_of_which_a_row_was_lost(project, repository, cache, freeze, spool, monkeypatch):
    fill(project)

    def refuse(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def open_refusing(self, generation):
        plain(self, generation)
        self._file.close()
        self._file = type("Full", (), {"write": refuse, "close": lambda self: None})()

    plain = Remembered.__init__
    monkeypatch.setattr(Remembered, "__init__", open_refusing)
    snapshot = store(repository, freeze(project, spool()), cache)
    assert snapshot.root.files > 50
    assert cache.load_tree(b"tree") is None


def test_cache_describes_what_was_stored(project, repository, cache, freeze, spool):
    fill(project)
    frozen = freeze(project, spool())
    snapshot = store(repository, frozen, cache)
    tree = cache.load_tree(b"tree")
    assert (tree.snapshot, tree.root, tree.generation) == (
        snapshot.id, snapshot.root, repository.index.generation
    )  # fmt: skip
    top = frozen.header.project_directory
    root = cache.load(top)
    assert root.node == snapshot.root.node
    assert root.totals == (
        snapshot.root.files, snapshot.root.directories, snapshot.root.symlinks, snapshot.root.size_bytes
    )  # fmt: skip
    for directory in frozen.directories:
        cached = cache.load(os.path.join(top, directory.path) if directory.path else top)
        assert (cached.device, cached.inode, cached.rows) == (
            directory.device, directory.inode, directory.rows
        )  # fmt: skip
        assert {source[0] for source in unpack_sources(cached.sources)} <= {KNOWN, LINK}
        for name, mode, mtime_ns, node in unpack_children(cached.children):
            (child,) = (d for d in frozen.directories if d.path == os.path.join(directory.path, name))
            assert (child.mode, child.mtime_ns) == (mode, mtime_ns)
            assert cache.load(os.path.join(top, child.path)).node == node


def test_part_of_a_directory_is_merged_with_what_is_known(
    project, repository, cache, freeze, spool, described
):
    for name in "abc":
        (project / name).write_bytes(name.encode())
    store(repository, freeze(project, spool()), cache)
    (project / "b").write_bytes(b"changed")
    frozen = freeze(project, spool(), cache=cache, chosen=lambda path: path in (b"b", b"c"), tree_key=b"")
    snapshot = store(repository, frozen, cache)
    assert set(described(open_tree(repository, snapshot.id))) == {b"b", b"c"}
    assert not cache.load(os.fsencode(project)).node, "the directory as a whole is not known"
    whole = freeze(project, spool(), cache=cache)
    assert [source[0] for source in unpack_sources(whole.directories[0].sources)] == [KNOWN] * 3
    snapshot = store_unread(repository, whole, cache)
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
    assert described(open_tree(repository, snapshot.id)) == described(project)


def test_part_of_a_directory_that_has_not_changed_leaves_the_cache_alone(
    project, repository, cache, freeze, spool
):
    for name in "abc":
        (project / name).write_bytes(name.encode())
    store(repository, freeze(project, spool()), cache)
    before = cache.load(os.fsencode(project))
    store(repository, freeze(project, spool(), cache=cache, chosen=lambda path: path == b"b"), cache)
    assert cache.load(os.fsencode(project)) == before


# What the repository has lost


@pytest.mark.parametrize("loss", ["chunks", "index cache"])
def test_known_content_that_is_lost_is_read_from_the_file_again(
    project, repository, cache, freeze, spool, described, loss
):
    fill(project)
    store(repository, freeze(project, spool()), cache)
    frozen = freeze(project, spool(), cache=cache)
    if loss == "chunks":
        forget(repository)
    else:
        repository.index.rebuild()
    stored = stored_bytes(repository)
    snapshot = store_unread(repository, frozen, cache)
    assert (stored_bytes(repository) > stored + 9_000_000) == (loss == "chunks")
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
    assert described(open_tree(repository, snapshot.id)) == described(project)
    assert cache.load(os.fsencode(project)).generation == repository.index.generation


@pytest.mark.parametrize("change", ["content", "gone", "link", "directory is a link"])
def test_known_content_that_is_lost_and_has_changed_is_an_error(
    project, repository, cache, freeze, spool, change
):
    fill(project)
    store(repository, freeze(project, spool()), cache)
    frozen = freeze(project, spool(), cache=cache)
    forget(repository)
    file = project / "a" / "middle"
    if change == "content":
        file.write_bytes(b"x")
    elif change == "gone":
        file.unlink()
    elif change == "link":
        file.rename(project / "elsewhere")
        file.symlink_to(project / "elsewhere")
    else:
        (project / "a").rename(project / "elsewhere")
        (project / "a").symlink_to(project / "elsewhere")
    with pytest.raises(CaptureFailed, match=r"content of a/.* any more, and the file cannot be read again"):
        store_unread(repository, frozen, cache)


def test_known_content_that_is_lost_and_has_changed_unseen_is_an_error(
    project, repository, cache, freeze, spool
):
    (project / "file").write_bytes(b"1" * 1000)
    store(repository, freeze(project, spool()), cache)
    known = cache.load(os.fsencode(project)).sources
    (project / "file").write_bytes(b"2" * 1000)
    frozen = freeze(project, spool())
    (directory,) = frozen.directories
    frozen.directories = [CapturedDirectory(**{**as_dict(directory), "sources": known})]
    forget(repository)
    with pytest.raises(CaptureFailed, match="file has changed without a change of its times"):
        store(repository, frozen)


def as_dict(record):
    return {name: getattr(record, name) for name in record.__slots__}


def confirm(repository, root, project, cache):
    header = Header(os.fsencode(project), b"tree")
    return ingest(
        repository, SnapshotId(new_id()), header, iter([SameTree(root)]), Unreadable(), cache, None
    ).root


@pytest.mark.parametrize("known_by", ["cache", "index", "file"])
def test_same_tree_is_confirmed_or_completed(project, repository, cache, freeze, spool, described, known_by):
    fill(project)
    snapshot = store(repository, freeze(project, spool()), cache)
    if known_by == "index":
        repository.index.rebuild()
    elif known_by == "file":
        forget(repository)
    assert confirm(repository, snapshot.root, project, cache) == snapshot.root
    assert described(open_tree(repository, snapshot.id)) == described(project)
    assert cache.load_tree(b"tree").generation == repository.index.generation
    assert cache.load_tree(b"tree").snapshot != snapshot.id


def test_same_tree_in_condemned_packs_is_stored_again(project, repository, cache, freeze, spool, described):
    fill(project)
    snapshot = store(repository, freeze(project, spool()), cache)
    packs = {info.key for info in repository.store.list("packs/")}
    names = frozenset(bytes.fromhex(key.rpartition("/")[2]) for key in packs)
    for is_final in (False, True):
        data = encode_condemned(Condemned(names, is_final), utc_now(), "elsewhere")
        repository.store.put(condemned_key(new_id()), [data])
        repository.index.refresh()
        if not is_final:
            assert confirm(repository, snapshot.root, project, cache) == snapshot.root
    repository.store.delete(*packs)
    repository.index.refresh()
    assert described(open_tree(repository, snapshot.id)) == described(project)


def test_same_tree_needs_no_cache_while_it_is_there(project, repository, freeze, spool):
    fill(project)
    snapshot = store(repository, freeze(project, spool()))
    assert confirm(repository, snapshot.root, project, None) == snapshot.root
    forget(repository)
    with pytest.raises(CaptureFailed, match=f"does not hold the files of {project} any more"):
        confirm(repository, snapshot.root, project, None)


def test_same_tree_that_is_lost_and_has_changed_is_an_error(project, repository, cache, freeze, spool):
    fill(project)
    snapshot = store(repository, freeze(project, spool()), cache)
    (project / "b" / "7").write_bytes(b"changed")
    forget(repository)
    with pytest.raises(CaptureFailed, match="b/7"):
        confirm(repository, snapshot.root, project, cache)


def test_same_tree_is_not_completed_from_rows_of_another_one(project, repository, cache, freeze, spool):
    fill(project)
    snapshot = store(repository, freeze(project, spool()), cache)
    (project / "b" / "7").write_bytes(b"changed")
    store(repository, freeze(project, spool(), tree_key=b"other"), cache)
    forget(repository)
    with pytest.raises(CaptureFailed, match="they have changed since"):
        confirm(repository, snapshot.root, project, cache)


# Trouble


class Rescued:
    """A held file that somebody writes to while it is read: after some reads there is a copy."""

    def __init__(self, path, copy, good_reads):
        self.path = path
        self.copy = copy
        self.reads_left = good_reads
        self.opened = []

    def __getitem__(self, slot):
        self.reads_left -= 1
        if self.reads_left >= 0:
            return 0
        self.path.write_bytes(b"written over" * 1000)
        return 1

    def open(self, number):
        is_rescued = self.reads_left < 0
        self.opened.append("copy" if is_rescued else "file")
        return os.open(self.copy if is_rescued else self.path, os.O_RDONLY), None if is_rescued else 5


@pytest.mark.parametrize("size", [1000, 300_000, 30_000_000])
@pytest.mark.parametrize("good_reads", [0, 1, 2])
def test_rescued_file_is_read_on_from_its_copy(
    tmp_path, project, repository, freeze, spool, described, size, good_reads
):
    (project / "file").write_bytes(random.Random(size).randbytes(size))
    shutil.copy2(project / "file", tmp_path / "copy")
    expected = described(project)
    frozen = freeze(project, spool(), lambda path, size: HELD)
    rescued = Rescued(project / "file", tmp_path / "copy", good_reads)
    snapshot = store(repository, frozen, open_held=rescued.open, flags=rescued)
    assert described(open_tree(repository, snapshot.id)) == expected
    assert len(rescued.opened) == (2 if rescued.reads_left < 0 else 1)


def test_lost_file_is_an_error(project, repository, freeze, spool):
    (project / "file").write_bytes(b"x")
    frozen = freeze(project, spool(), lambda path, size: HELD)

    def refuse(number):
        raise CaptureFailed("it was lost")

    with pytest.raises(CaptureFailed, match="it was lost"):
        store(repository, frozen, open_held=refuse)


@pytest.mark.parametrize("name", ["packed", "large-0"])
@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_damaged_spool_is_refused(project, repository, freeze, spool, name, damage):
    (project / "large").write_bytes(os.urandom(12_000_000))
    (project / "small").write_bytes(os.urandom(1000))
    frozen = freeze(project, spool())
    file = frozen.spool / name
    if damage == "delete":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    match = str(file) if damage == "delete" else "captured of (large|small) is shorter.*ends at byte"
    with pytest.raises(CaptureFailed, match=match):
        store(repository, frozen)


def test_file_that_gets_shorter_while_it_is_read_is_an_error_and_no_signal(
    project, repository, freeze, spool
):
    (project / "large").write_bytes(os.urandom(40_000_000))
    frozen = freeze(project, spool())
    with pytest.raises(CaptureFailed, match="large is shorter"):
        store(repository, frozen, on_progress=lambda done: os.truncate(frozen.spool / "large-0", 1000))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EACCES])
def test_lack_of_means_is_not_taken_for_damage(project, repository, freeze, spool, monkeypatch, number):
    fill(project)
    frozen = freeze(project, spool())

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("replicated.snapshot.frozen.os.open", refuse)
        with pytest.raises(OSError, match=os.strerror(number)):
            store(repository, frozen)
    assert store(repository, frozen).root.files > 50


def test_content_that_the_disk_has_lost_is_not_tried_again(project, repository, freeze, spool, monkeypatch):
    fill(project)
    frozen = freeze(project, spool())

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(CaptureFailed, match="Input/output error"):
        store(repository, frozen)


def test_small_files_are_read_many_at_a_time(project, repository, freeze, spool, monkeypatch):
    for number in range(500):
        (project / f"{number}").write_bytes(random.Random(number).randbytes(3000))
    frozen = freeze(project, spool())
    reads = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: reads.append(arguments) or preadv(*arguments))
    store(repository, frozen)
    assert len(reads) <= 3


def directory(path, rows=b"\x90", sources=b"\x90"):
    return CapturedDirectory(path, 0o40755, 0, 1, 1, 0, True, rows, sources)


FILE_ROW = pack_rows([Row(b"f", 0o100644, 1, 1, 0, 0)])
TWO_ROWS = pack_rows([Row(name, 0o100644, 1, 0, 0, 0) for name in (b"a", b"a")])


@pytest.mark.parametrize(
    "records",
    [
        [],
        [directory(b"a")],
        [directory(b""), directory(b"a/b")],
        [directory(b""), directory(b"a"), directory(b"a")],
        [directory(b""), directory(b"")],
        [directory(b""), directory(b"..")],
        [directory(b""), directory(b"a"), directory(b"b"), directory(b"a/c")],
        [directory(b"", FILE_ROW)],
        [directory(b"", FILE_ROW, pack_sources([(9, 1)]))],
        [directory(b"", FILE_ROW, pack_sources([(LINK, b"target")]))],
        [directory(b"", FILE_ROW, pack_sources([(KNOWN, b"short", ())]))],
        [directory(b"", TWO_ROWS, pack_sources([(PACKED, 0, "packed")] * 2))],
        [directory(b"", TWO_ROWS, pack_sources([(PACKED, 0, "packed")]))],
        [directory(b"", b"garbage")],
        [directory(b"", FILE_ROW, pack_sources([(PACKED, 0, "packed")])), directory(b"f")],
        [directory(b""), SameTree(None)],
    ],
)
def test_impossible_captures_are_refused(repository, tmp_path, records):
    (tmp_path / "packed").write_bytes(b"x" * 100)
    with FrozenFiles(tmp_path, lambda number: (-1, None), b"") as files, pytest.raises(CaptureFailed):
        ingest(repository, SnapshotId("b" * 64), Header(b"/", b""), iter(records), files, None)


# Any tree, changed in any way

_names = st.sampled_from(["a", "b", "c", "d"])
_contents = st.one_of(
    st.binary(max_size=20),
    st.integers(1, 3).map(lambda n: random.Random(n).randbytes(n * 100_000)),
    st.just("target"),
)
_trees = st.recursive(_contents, lambda below: st.dictionaries(_names, below, max_size=3), max_leaves=8)


def write_tree(path, content):
    """Make a path what `content` says, leaving alone what is so already."""
    is_right = {dict: path.is_dir, bytes: path.is_file, str: path.is_symlink}[type(content)]
    if os.path.lexists(path) and (path.is_symlink() or not is_right()):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if isinstance(content, dict):
        path.mkdir(exist_ok=True)
        for name in os.listdir(path):
            if name not in content:
                other = path / name
                shutil.rmtree(other) if other.is_dir() and not other.is_symlink() else other.unlink()
        for name, below in content.items():
            write_tree(path / name, below)
    elif isinstance(content, str):
        path.symlink_to(content)
    elif not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


@given(st.lists(st.dictionaries(_names, _trees, max_size=4), min_size=2, max_size=4), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_whatever_is_known_a_snapshot_is_the_directory(
    tmp_path_factory, freeze, described, states, is_lost_meanwhile
):
    top = tmp_path_factory.mktemp("tree")
    repository = Repository.open(f"file://{top}/repository", cache=top / "cache", create=True)
    cache = TreeCache(top / "cache" / "trees", repository.id, repository.url)
    for number, state in enumerate(states):
        write_tree(top / "project", state)
        frozen = freeze(top / "project", top / f"spool-{number}", cache=cache)
        if is_lost_meanwhile:
            forget(repository)
        snapshot = store(repository, frozen, cache)
        assert described(open_tree(repository, snapshot.id)) == described(top / "project")
        root = snapshot.root
        assert root.size_bytes == frozen.size_bytes
        assert root.files + root.directories + root.symlinks == len(described(top / "project"))
        alone = Repository.open(f"file://{top}/{number}", cache=top / "other", create=True)
        assert store(alone, freeze(top / "project", top / f"alone-{number}")).root == root
        alone.close()
    cache.close()
    repository.close()
    shutil.rmtree(top)
