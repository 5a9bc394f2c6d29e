"""The claim of the watches, against a real tree in which anything may happen at any moment of a walk.

A directory that `is_unchanged` is, to the last nanosecond, what the walk of the base found there.
"""

import ctypes
import os
import random
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replicated.snapshot.watch import TreeWatches

KEY = b"key"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Listing:
    """All that `lstat` says of a directory and of what is in it; of directories in it only who they are."""

    directory: tuple[int, ...]
    entries: dict[bytes, tuple[Any, ...]]

    def directories(self) -> list[bytes]:
        return sorted(name for name, about in self.entries.items() if stat.S_ISDIR(about[0]))


def list_directory(directory: bytes | int) -> Listing:
    info = os.stat(directory)
    entries: dict[bytes, tuple[Any, ...]] = {}
    with os.scandir(directory) as found:
        for entry in found:
            about = entry.stat(follow_symlinks=False)
            name = os.fsencode(entry.name)
            entries[name] = (about.st_mode, about.st_dev, about.st_ino, about.st_uid)
            if not stat.S_ISDIR(about.st_mode):
                entries[name] += (about.st_size, about.st_nlink, about.st_mtime_ns, about.st_ctime_ns)
    about = (info.st_dev, info.st_ino, info.st_mode, info.st_uid, info.st_mtime_ns, info.st_ctime_ns)
    return Listing(about, entries)


Found = dict[bytes, Listing]


class Walker:
    """A walk like that of a capture, in steps: by descriptors, and what is unchanged is not listed."""

    def __init__(self, watches: TreeWatches, root: bytes, captures: dict[str, Found]) -> None:
        self.walk = watches.begin(KEY)
        self.root = root
        self.captures = captures
        self.base = captures.get(self.walk.base, {})
        self.found: Found = {}
        self.steps = self._steps()

    def run(self) -> None:
        for _ in self.steps:
            pass

    def commit(self, snapshot: str) -> None:
        self.captures[snapshot] = self.found
        self.walk.commit(snapshot, len(self.found))

    def _steps(self) -> Iterator[None]:
        if self.base and not self.walk.changed:
            self.found = dict(self.base)
        else:
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
            try:
                yield from self._visit(self.root, descriptor, b".")
            finally:
                os.close(descriptor)

    def _visit(self, path: bytes, above: int, name: bytes) -> Iterator[None]:
        is_unchanged = self.walk.is_unchanged(path)
        yield
        if not is_unchanged:
            self.walk.add(path)
            yield
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
        except OSError:
            return  # removed or replaced meanwhile
        try:
            yield
            self.found[path] = self.base[path] if is_unchanged else list_directory(descriptor)
            for below in self.found[path].directories():
                yield
                yield from self._visit(path + b"/" + below, descriptor, below)
        finally:
            os.close(descriptor)


def check_claims(watches: TreeWatches, root: bytes, captures: dict[str, Found]) -> None:
    """What is unchanged is what the walk of the base found there; all is, if nothing changed."""
    walk = watches.begin(KEY)
    try:
        if walk.base:
            base = captures[walk.base]
            now = {path: list_directory(path) for path, *_ in os.walk(root)}
            wrong = [path for path in now if walk.is_unchanged(path) and base.get(path) != now[path]]
            assert not wrong, (walk.base, walk.changed)
            if not walk.changed:
                assert now == base
    finally:
        walk.abandon()


# What happens to a tree


@dataclass
class Tree:
    """A real tree, a place beside it, and what somebody does there; what cannot be done is left undone."""

    top: bytes
    opened: list[int] = field(default_factory=list)

    @property
    def root(self) -> bytes:
        return self.top + b"/tree"

    def write(self, path: bytes, content: bytes) -> None:
        with suppress(OSError), open(path, "wb") as file:
            file.write(content)

    def append(self, path: bytes, content: bytes) -> None:
        with suppress(OSError), open(path, "ab") as file:
            file.write(content)

    def overwrite(self, path: bytes, content: bytes) -> None:
        with suppress(OSError), open(path, "r+b") as file:
            file.write(content)

    def truncate(self, path: bytes, _: bytes) -> None:
        with suppress(OSError):
            os.truncate(path, 1)

    def replace_file(self, path: bytes, content: bytes) -> None:
        self.write(self.top + b"/new", content)
        with suppress(OSError):
            os.replace(self.top + b"/new", path)

    def unlink(self, path: bytes, _: bytes) -> None:
        with suppress(OSError):
            os.unlink(path)

    def make_directory(self, path: bytes, _: bytes) -> None:
        with suppress(OSError):
            os.mkdir(path)

    def make_deep(self, path: bytes, content: bytes) -> None:
        with suppress(OSError):
            os.makedirs(path + b"/a/b/a")
        self.write(path + b"/a/b/a/f", content)

    def remove_directory(self, path: bytes, _: bytes) -> None:
        with suppress(OSError):
            os.rmdir(path)

    def remove_tree(self, path: bytes, _: bytes) -> None:
        if path != self.root:
            shutil.rmtree(path, ignore_errors=True)

    def change_mode(self, path: bytes, content: bytes) -> None:
        with suppress(OSError):
            os.chmod(path, 0o700 + len(content) % 8, follow_symlinks=os.path.isdir(path))

    def change_times(self, path: bytes, content: bytes) -> None:
        with suppress(OSError):
            os.utime(path, ns=(0, 10**18 + len(content)), follow_symlinks=False)

    def change_attribute(self, path: bytes, content: bytes) -> None:
        with suppress(OSError):
            os.setxattr(path, b"user.test", content, follow_symlinks=False)

    def link_to_directory(self, path: bytes, _: bytes) -> None:
        with suppress(OSError):
            os.symlink(self.top + b"/outside", self.top + b"/link")
            os.rename(self.top + b"/link", path)

    def open(self, path: bytes, _: bytes) -> None:
        with suppress(OSError):
            self.opened.append(os.open(path, os.O_WRONLY | os.O_NOFOLLOW))

    def write_through_descriptor(self, _: bytes, content: bytes) -> None:
        if self.opened:
            os.write(self.opened[len(content) % len(self.opened)], content + b".")

    def copy_tree(self, path: bytes, _: bytes) -> None:
        with suppress(OSError, shutil.Error):
            shutil.copytree(self.top + b"/template", path, symlinks=True)

    def rename(self, path: bytes, to: bytes) -> None:
        if self.root not in (path, to):
            with suppress(OSError):
                os.rename(path, to)

    def exchange(self, path: bytes, with_: bytes) -> None:
        if self.root not in (path, with_):
            _libc.renameat2(
                _AT_FDCWD, ctypes.c_char_p(path), _AT_FDCWD, ctypes.c_char_p(with_), _RENAME_EXCHANGE
            )

    def close(self) -> None:
        for descriptor in self.opened:
            os.close(descriptor)
        shutil.rmtree(self.top)


def make_tree() -> Tree:
    tree = Tree(os.fsencode(tempfile.mkdtemp(prefix="w")))
    for place in (b"/tree", b"/outside", b"/template"):
        for path in (b"", b"/a", b"/b", b"/a/a", b"/a/b", b"/b/a"):
            os.mkdir(tree.top + place + path)
            tree.write(tree.top + place + path + b"/f", place + path)
    return tree


#: What is done to one path.
DEEDS: tuple[Callable[[Tree, bytes, bytes], None], ...] = (
    Tree.write,
    Tree.append,
    Tree.overwrite,
    Tree.truncate,
    Tree.replace_file,
    Tree.unlink,
    Tree.make_directory,
    Tree.make_directory,
    Tree.make_deep,
    Tree.remove_directory,
    Tree.remove_tree,
    Tree.change_mode,
    Tree.change_times,
    Tree.change_attribute,
    Tree.link_to_directory,
    Tree.open,
    Tree.write_through_descriptor,
    Tree.copy_tree,
)
MOVES: tuple[Callable[[Tree, bytes, bytes], None], ...] = (Tree.rename, Tree.exchange)

# Directories at first, and files at first: most deeds find something to be done to.
directories = st.lists(st.sampled_from([b"a", b"b"]), max_size=3)
names = st.sampled_from([b"a", b"b", b"f", b"f"])
paths_below = st.tuples(directories, names).map(lambda path: b"/".join([*path[0], path[1]]))
places = st.sampled_from([b"tree", b"tree", b"tree", b"tree", b"outside"])
contents = st.binary(max_size=3)


@pytest.fixture(scope="module", autouse=True)
def stop_watching() -> Iterator[None]:
    yield
    while _started:
        _started.pop().stop()


_started: list[TreeWatches] = []


def start_watches() -> TreeWatches:
    watches = TreeWatches(min_files=0)
    watches.start()
    _started.append(watches)
    return watches


class Claims(RuleBasedStateMachine):
    """Deeds of others in a tree, between walks and between the steps of several walks at once."""

    @initialize()
    def begin(self) -> None:
        self.tree = make_tree()
        self.watches = start_watches()
        self.captures: dict[str, Found] = {}
        self.walkers: list[Walker] = []
        self.made = 0
        self.walk_all_at_once()
        # Else nothing would be claimed.
        assert self.watches.watch_count

    def teardown(self) -> None:
        if hasattr(self, "tree"):
            for walker in self.walkers:
                walker.steps.close()
                walker.walk.abandon()
            self.watches.stop()
            _started.remove(self.watches)
            self.tree.close()

    @rule(deed=st.sampled_from(DEEDS), place=places, path=paths_below, content=contents)
    def change(
        self, deed: Callable[[Tree, bytes, bytes], None], place: bytes, path: bytes, content: bytes
    ) -> None:
        deed(self.tree, self.tree.top + b"/" + place + b"/" + path, content)

    @rule(
        deed=st.sampled_from([Tree.change_mode, Tree.change_times, Tree.change_attribute]), content=contents
    )
    def change_root(self, deed: Callable[[Tree, bytes, bytes], None], content: bytes) -> None:
        deed(self.tree, self.tree.root, content)

    @rule(
        deed=st.sampled_from(MOVES),
        places=st.tuples(places, places),
        paths=st.tuples(paths_below, paths_below),
    )
    def move(
        self,
        deed: Callable[[Tree, bytes, bytes], None],
        places: tuple[bytes, bytes],
        paths: tuple[bytes, bytes],
    ) -> None:
        first, second = (
            self.tree.top + b"/" + place + b"/" + path for place, path in zip(places, paths, strict=True)
        )
        deed(self.tree, first, second)

    @rule()
    def walk_all_at_once(self) -> None:
        walker = self._begin_walk()
        walker.run()
        self._commit(walker)

    @rule()
    def begin_walk(self) -> None:
        if len(self.walkers) < 3:
            self.walkers.append(self._begin_walk())

    @precondition(lambda self: self.walkers)
    @rule(which=st.integers(0, 2), steps=st.integers(1, 6))
    def go_on(self, which: int, steps: int) -> None:
        walker = self.walkers[which % len(self.walkers)]
        for _ in range(steps):
            next(walker.steps, None)

    @precondition(lambda self: self.walkers)
    @rule(which=st.integers(0, 2), is_good=st.booleans())
    def end_walk(self, which: int, is_good: bool) -> None:
        walker = self.walkers.pop(which % len(self.walkers))
        walker.run()
        if is_good:
            self._commit(walker)
        else:
            walker.walk.abandon()

    @invariant()
    def all_claims_hold(self) -> None:
        check_claims(self.watches, self.tree.root, self.captures)

    def _begin_walk(self) -> Walker:
        return Walker(self.watches, self.tree.root, self.captures)

    def _commit(self, walker: Walker) -> None:
        self.made += 1
        walker.commit(f"{self.made}")


class ClaimsSeldomChecked(Claims):
    """As above, but events may wait in the queue for long."""

    @invariant()
    def all_claims_hold(self) -> None:
        pass

    @rule()
    def check(self) -> None:
        check_claims(self.watches, self.tree.root, self.captures)

    def teardown(self) -> None:
        try:
            if hasattr(self, "tree"):
                check_claims(self.watches, self.tree.root, self.captures)
        finally:
            super().teardown()


TestClaims = Claims.TestCase
TestClaims.settings = settings(stateful_step_count=50)
TestClaimsSeldomChecked = ClaimsSeldomChecked.TestCase
TestClaimsSeldomChecked.settings = settings(stateful_step_count=50)


@pytest.mark.parametrize("seed", range(4))
def test_claims_hold_while_others_change_the_tree_at_full_speed(seed: int) -> None:
    tree = make_tree()
    watches = start_watches()
    captures: dict[str, Found] = {}
    errors: list[BaseException] = []

    def change(number: int) -> None:
        chosen = random.Random(1000 * seed + number)
        mine = Tree(tree.top)

        def path() -> bytes:
            place = chosen.choice([b"/tree/", b"/tree/", b"/tree/", b"/outside/"])
            above = chosen.choices([b"a", b"b"], k=chosen.randint(0, 3))
            return tree.top + place + b"/".join([*above, chosen.choice([b"a", b"b", b"f"])])

        try:
            for _ in range(400):
                if chosen.random() < 0.3:
                    chosen.choice(MOVES)(mine, path(), path())
                else:
                    chosen.choice(DEEDS)(mine, path(), bytes(chosen.randint(0, 3)))
        except BaseException as error:
            errors.append(error)
            raise
        finally:
            for descriptor in mine.opened:
                os.close(descriptor)

    def walk(number: int) -> None:
        try:
            while any(changer.is_alive() for changer in changers):
                walker = Walker(watches, tree.root, captures)
                try:
                    walker.run()
                    walker.commit(f"{number}-{len(captures)}")
                except OSError:
                    walker.walk.abandon()  # a directory went while it was listed
        except BaseException as error:
            errors.append(error)
            raise

    try:
        for _ in range(5):
            changers = [threading.Thread(target=change, args=(number,)) for number in range(2)]
            walkers = [threading.Thread(target=walk, args=(number,)) for number in range(2)]
            for thread in changers + walkers:
                thread.start()
            for thread in changers + walkers:
                thread.join()
            assert not errors
            check_claims(watches, tree.root, captures)
            walker = Walker(watches, tree.root, captures)
            walker.run()
            walker.commit("last")
            assert watches.watch_count
            check_claims(watches, tree.root, captures)
    finally:
        tree.close()
