import errno
import os
import stat
import threading

import pytest

from replicate.errors import NotFound, RepositoryDamaged
from replicated.directories import FixedListing
from replicated.mount import numbering
from replicated.mount.errors import Refused, errno_for
from replicated.mount.filesystem import ROOT_INODE, Filesystem
from replicated.tree import open_tree

CONTENT = {
    b"file": (b"0123456789", 0o4755, 1_700_000_000_123_456_789),
    b"empty": b"",
    b"link": "sub/deep",
    b"sub": ({b"deep": {b"x": b"x", b"y": b"yy"}, b"void": {}}, 0o700, -5),
}


@pytest.fixture
def tree(memory_tree):
    return memory_tree(CONTENT)


@pytest.fixture
def filesystem(tree):
    return Filesystem(tree)


def refusal(operation, *arguments):
    with pytest.raises(Refused) as raised:
        operation(*arguments)
    return raised.value.errno


def everything(filesystem, inode=ROOT_INODE, path=b""):
    """path → attributes, found by listing directories."""
    found = {}
    for name, attributes, _ in filesystem.readdir(inode):
        if name not in (b".", b".."):
            below = path + b"/" + name
            found[below] = attributes
            if stat.S_ISDIR(attributes.mode):
                found.update(everything(filesystem, attributes.inode, below))
    return found


def test_listing_looking_up_and_asking_agree(filesystem):
    found = everything(filesystem)
    assert len({attributes.inode for attributes in found.values()}) == len(found) == 8
    for path, attributes in found.items():
        assert filesystem.resolve(path) == attributes.inode
        assert filesystem.getattr(attributes.inode) == attributes


def test_numbers_do_not_depend_on_what_was_asked_before(filesystem):
    first = filesystem.lookup(ROOT_INODE, b"file")
    everything(filesystem)
    assert filesystem.lookup(ROOT_INODE, b"file") == first


def test_attributes_are_those_recorded_without_special_bits(filesystem):
    file = filesystem.lookup(ROOT_INODE, b"file")
    assert file.mode == stat.S_IFREG | 0o755
    assert (file.size, file.blocks, file.mtime_ns) == (10, 1, 1_700_000_000_123_456_789)
    assert filesystem.lookup(ROOT_INODE, b"link").mode == stat.S_IFLNK | 0o750
    assert filesystem.lookup(ROOT_INODE, b"link").size == len("sub/deep")
    assert filesystem.lookup(ROOT_INODE, b"sub")[1:] == (stat.S_IFDIR | 0o700, 0, -5, True)


def test_a_listing_can_be_continued_from_every_offset(filesystem):
    whole = list(filesystem.readdir(ROOT_INODE))
    assert [name for name, _, _ in whole] == [b".", b"..", b"empty", b"file", b"link", b"sub"]
    for position, (_, _, offset) in enumerate(whole):
        assert list(filesystem.readdir(ROOT_INODE, offset)) == whole[position + 1 :]


def test_dots_are_the_directory_and_its_parent(filesystem):
    sub = filesystem.resolve(b"/sub")
    deep = filesystem.resolve(b"/sub/deep")
    (_, itself, _), (_, parent, _), *_ = filesystem.readdir(deep)
    assert (itself.inode, parent.inode) == (deep, sub)
    (_, _, _), (_, parent, _), *_ = filesystem.readdir(ROOT_INODE)
    assert parent.inode == ROOT_INODE


def test_what_is_absent_or_of_another_kind_is_refused(filesystem):
    file = filesystem.resolve(b"/file")
    link = filesystem.resolve(b"/link")
    assert refusal(filesystem.lookup, ROOT_INODE, b"no") == errno.ENOENT
    assert refusal(filesystem.lookup, file, b"no") == errno.ENOTDIR
    assert refusal(filesystem.resolve, b"/link/x") == errno.ENOTDIR
    assert refusal(lambda: list(filesystem.readdir(file))) == errno.ENOTDIR
    assert refusal(filesystem.open, ROOT_INODE) == errno.EISDIR
    assert refusal(filesystem.open, link) == errno.ELOOP
    assert refusal(filesystem.readlink, file) == errno.EINVAL
    assert refusal(filesystem.getattr, 10**9) == errno.ESTALE
    assert refusal(filesystem.getattr, 0) == errno.ESTALE
    assert refusal(filesystem.read, file, 77, 0, 1) == errno.EBADF


def read(filesystem, inode, handle, offset, length):
    return b"".join(filesystem.read(inode, handle, offset, length))


def test_reads_are_cut_at_the_end_of_the_file(filesystem):
    file = filesystem.resolve(b"/file")
    handle = filesystem.open(file)
    assert read(filesystem, file, handle, 0, 100) == b"0123456789"
    assert read(filesystem, file, handle, 8, 100) == b"89"
    assert read(filesystem, file, handle, 3, 2) == b"34"
    assert read(filesystem, file, handle, 10, 1) == b""
    assert read(filesystem, file, handle, 10**12, 1) == b""
    filesystem.release(handle)
    assert refusal(filesystem.read, file, handle, 0, 1) == errno.EBADF


def test_an_engine_that_opens_nothing_reads_without_a_handle(filesystem):
    assert read(filesystem, filesystem.resolve(b"/file"), 0, 3, 4) == b"3456"


class Short:
    def pread(self, offset, length):
        return b"0" * (length - 1)


def test_a_short_read_is_damage_and_not_an_end(tree):
    tree.readers[b"file"] = Short()
    filesystem = Filesystem(tree)
    file = filesystem.resolve(b"/file")
    with pytest.raises(RepositoryDamaged):
        filesystem.read(file, filesystem.open(file), 0, 5)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "pack"),
        TimeoutError(),
        OSError("no errno"),
        NotFound("x"),
        RepositoryDamaged("x"),
        MemoryError(),
        KeyboardInterrupt(),
        SystemExit(0),
    ],
)
def test_whatever_goes_wrong_inside_is_an_input_output_error(error):
    assert errno_for(error, "read") == errno.EIO


def test_a_refusal_keeps_its_errno():
    assert errno_for(Refused(errno.ENOENT), "lookup") == errno.ENOENT


def test_links_and_hashes_can_be_read(filesystem, tree):
    assert filesystem.readlink(filesystem.resolve(b"/link")) == b"sub/deep"
    file = filesystem.resolve(b"/file")
    assert filesystem.listxattr(file) == [b"user.replicate.hash"]
    assert filesystem.getxattr(file, b"user.replicate.hash") == tree.find(b"file").hash.hex().encode()
    assert refusal(filesystem.getxattr, file, b"user.other") == errno.ENODATA
    assert filesystem.listxattr(ROOT_INODE) == []
    assert refusal(filesystem.getxattr, ROOT_INODE, b"user.replicate.hash") == errno.ENODATA


def test_directories_at_hand_are_bounded_and_numbers_survive(memory_tree, monkeypatch):
    monkeypatch.setattr(numbering, "_RECENT_DIRECTORIES", 3)
    tree = memory_tree({b"%d" % top: {b"%d" % i: {b"x": b""} for i in range(5)} for top in range(8)})
    filesystem = Filesystem(tree)
    found = everything(filesystem)
    assert len(filesystem._inodes._recent) <= 3
    assert everything(filesystem) == found
    assert all(filesystem.getattr(a.inode) == a for a in found.values())


def test_a_directory_that_nobody_could_number_is_damage(tree):
    tree.listing = lambda node: Claimed((), (1 << 63) - 1)
    with pytest.raises(RepositoryDamaged, match="impossible length"):
        Filesystem(tree).lookup(ROOT_INODE, b"x")


class Claimed(FixedListing):
    """Entries, and a number of them that somebody wrote."""

    def __init__(self, nodes, claimed):
        super().__init__(nodes)
        self._claimed = claimed

    def __len__(self):
        return self._claimed


@pytest.mark.parametrize("claimed", [(1 << 63) - (1 << 33), 1 << 62, (1 << 40) + 1])
def test_a_directory_that_claims_all_numbers_leaves_them_to_others(tree, claimed):
    listing = tree.listing
    tree.listing = lambda node: Claimed((), claimed) if node.name == b"deep" else listing(node)
    filesystem = Filesystem(tree)
    deep = filesystem.resolve(b"/sub/deep")
    with pytest.raises(RepositoryDamaged, match="impossible length"):
        filesystem.lookup(deep, b"x")
    assert filesystem.resolve(b"/sub/void")
    assert refusal(filesystem.resolve, b"/sub/void/x") == errno.ENOENT
    assert refusal(filesystem.resolve, b"/file/x") == errno.ENOTDIR


@pytest.mark.parametrize("claimed", [1, 3])
def test_a_directory_that_changes_its_length_although_it_cannot_is_damage(memory_tree, monkeypatch, claimed):
    monkeypatch.setattr(numbering, "_RECENT_DIRECTORIES", 1)
    tree = memory_tree({b"a": {b"x": b"", b"y": b""}, b"b": {b"z": b""}})
    filesystem = Filesystem(tree)
    x, z = filesystem.resolve(b"/a/x"), filesystem.resolve(b"/b/z")
    listing = tree.listing
    tree.listing = lambda node: Claimed((), claimed) if node.name == b"a" else listing(node)
    with pytest.raises(RepositoryDamaged, match=f"another length than before: {claimed}, not 2"):
        filesystem.getattr(x)
    assert filesystem.path_of(z) == b"b/z"


def test_directories_that_are_listed_in_order_are_loaded_in_advance(memory_tree):
    tree = memory_tree({b"%03d" % n: {b"x": b"1"} for n in range(300)})
    loaded = []
    tree.preload = lambda nodes: loaded.append([node.name for node in nodes])
    filesystem = Filesystem(tree)
    inodes = [a.inode for name, a, _ in filesystem.readdir(ROOT_INODE) if name[0] != ord(".")]
    for inode in reversed(inodes):
        filesystem.read_entries(inode, 0, 10)
    assert loaded == [], "nobody can tell which comes next"
    for inode in inodes:
        filesystem.read_entries(inode, 0, 10)
    assert len(loaded) < 20
    assert set().union(*loaded) >= {b"%03d" % n for n in range(10, 300)}
    assert max(map(len, loaded)) <= 64


def test_many_threads_see_the_same_numbers(memory_tree):
    tree = memory_tree({b"%d" % top: {b"%d" % i: b"" for i in range(30)} for top in range(30)})
    filesystem = Filesystem(tree)
    seen = []
    start = threading.Barrier(8)

    def look():
        start.wait()
        seen.append(everything(filesystem))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert all(found == seen[0] for found in seen)
    assert len({attributes.inode for attributes in seen[0].values()}) == 30 * 31


@pytest.fixture
def changing(tree):
    """A file system whose root can change: assign to the dictionary."""
    entries = dict(tree.children(tree.root))
    listing = tree.listing
    tree.listing = lambda node: (
        FixedListing(entries[name] for name in sorted(entries)) if node is tree.root else listing(node)
    )
    return Filesystem(tree, changing=lambda node: node is tree.root), entries


def test_what_comes_and_goes_keeps_its_number(changing, memory_tree):
    filesystem, entries = changing
    before = {name: a.inode for name, a, _ in filesystem.readdir(ROOT_INODE)}
    deep = filesystem.resolve(b"/sub/deep")
    entries[b"a new one"] = memory_tree({b"a new one": b"1"}).find(b"a new one")
    del entries[b"link"]
    after = {name: a.inode for name, a, _ in filesystem.readdir(ROOT_INODE)}
    assert set(after) == (set(before) | {b"a new one"}) - {b"link"}
    assert all(after[name] == inode for name, inode in before.items() if name in after)
    assert after[b"a new one"] not in before.values()
    assert refusal(filesystem.getattr, before[b"link"]) == errno.ESTALE
    assert filesystem.resolve(b"/sub/deep") == deep


def test_what_replaces_something_is_another_object(changing, memory_tree):
    filesystem, entries = changing
    old = filesystem.resolve(b"/file")
    handle = filesystem.open(old)
    entries[b"file"] = memory_tree({b"file": b"other bytes"}).find(b"file")
    new = filesystem.lookup(ROOT_INODE, b"file")
    assert (new.inode != old, new.size) == (True, 11)
    assert [n for n, _, _ in filesystem.readdir(ROOT_INODE)].count(b"file") == 1
    # Who has it open still reads what it was.
    assert read(filesystem, old, handle, 0, 100) == b"0123456789"


def test_objects_belong_to_the_user_who_mounts(filesystem):
    assert (filesystem.uid, filesystem.gid) == (os.getuid(), os.getgid())


def test_entries_are_read_in_lots_of_any_size(filesystem):
    whole = list(filesystem.readdir(ROOT_INODE))
    for limit in range(1, len(whole) + 2):
        found, offset = [], 0
        while lot := filesystem.read_entries(ROOT_INODE, offset, limit):
            assert len(lot) <= limit
            found += lot
            offset = lot[-1][2]
        assert found == whole


def test_following_gives_the_regular_files_after_one_in_the_order_of_the_listing(memory_tree):
    tree = memory_tree({b"d": {b"%03d" % n: {} if n % 3 == 0 else b"x" for n in range(400)}})
    filesystem = Filesystem(tree)
    files = [
        (a.inode, n) for n, a, _ in filesystem.readdir(filesystem.resolve(b"/d")) if stat.S_ISREG(a.mode)
    ]
    first = filesystem.resolve(b"/d/001")
    followers = filesystem.following(first, 1000)
    assert [(inode, node.name) for inode, node in followers] == files[1:]
    assert filesystem.following(first, 5) == followers[:5]
    assert filesystem.following(filesystem.resolve(b"/d/398"), 5) == []


def test_only_what_can_change_is_not_lasting(changing):
    filesystem, _ = changing
    assert not filesystem.is_immutable
    assert not filesystem.is_lasting_directory(ROOT_INODE)
    assert not filesystem.getattr(ROOT_INODE).is_lasting
    sub = filesystem.lookup(ROOT_INODE, b"sub")
    assert not sub.is_lasting
    assert filesystem.getattr(sub.inode) == sub
    assert filesystem.is_lasting_directory(sub.inode)
    assert filesystem.lookup(sub.inode, b"void").is_lasting
    assert not any(a.is_lasting for _, a, _ in filesystem.readdir(ROOT_INODE))
    assert [a.is_lasting for _, a, _ in filesystem.readdir(sub.inode)] == [False, False, True, True]


def test_in_a_snapshot_everything_lasts(filesystem):
    assert filesystem.is_immutable
    assert filesystem.is_lasting_directory(ROOT_INODE)
    assert all(attributes.is_lasting for attributes in everything(filesystem).values())


@pytest.mark.proves("S-20")
def test_a_directory_of_several_snapshots_is_listed_in_an_order_that_stays(snapshots):
    below, _ = snapshots.add({b"d": {b"%02d" % n: b"1" for n in range(0, 40, 2)}, b"only": b"1"})
    above, _ = snapshots.add({b"d": {b"%02d" % n: b"22" for n in range(0, 40, 3)}})
    filesystem = Filesystem(open_tree(snapshots.repository, below, above))
    found = everything(filesystem)
    sizes = {int(path[3:]): a.size for path, a in found.items() if path.startswith(b"/d/")}
    assert sizes == {n: 2 if n % 3 == 0 else 1 for n in range(40) if n % 2 == 0 or n % 3 == 0}
    assert len({attributes.inode for attributes in found.values()}) == len(found)
    whole = list(filesystem.readdir(filesystem.resolve(b"/d")))
    for position, (_, _, offset) in enumerate(whole):
        assert list(filesystem.readdir(filesystem.resolve(b"/d"), offset)) == whole[position + 1 :]
    again = Filesystem(open_tree(snapshots.repository, below, above))
    assert everything(again) == found
