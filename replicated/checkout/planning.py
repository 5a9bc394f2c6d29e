"""What a checkout has to do: compares a snapshot with a directory and changes nothing.

Called for every checkout and, alone, for a dry run. Invariant: executing a plan without conflicts only
creates; one with conflicts only replaces what has a name of the snapshot, and deletes what it lists.
"""

from __future__ import annotations

import difflib
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import blake3

from replicate.config import CONFIG_NAMES
from replicate.errors import CheckoutConflict, NotFound
from replicated.checkout.places import (
    OPEN_FILE,
    PIECE_BYTES,
    check_name,
    has_attributes,
    join,
    lstat,
    naming,
    open_directory,
    show,
)
from replicated.tree import Node, Tree

Verb = Literal["create", "replace", "keep", "delete"]

#: Never deleted, wherever they lie: they are not the snapshot's to judge.
PROTECTED_NAMES = frozenset({b".git", b".replicate", *(os.fsencode(name) for name in CONFIG_NAMES)})

_SHOWN_CONFLICTS = 3
#: How many paths are compared to find what somebody meant.
_NEAR_MATCH_PATHS = 50_000


@dataclass(frozen=True, slots=True)
class Action:
    """What is done with one path, relative to the output directory."""

    verb: Verb
    path: bytes
    #: What shall be there; None for what is deleted.
    node: Node | None = None
    #: Of what is replaced: only its mode or time are not right.
    only_attributes: bool = False
    #: A directory on the way to what was asked for: when it is there, it stays as it is.
    passing: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What a checkout would do, in the order in which it is done: each directory before what it holds."""

    #: Absolute.
    output: bytes
    #: The node for the output directory, if it has to be made.
    made_output: Node | None
    actions: tuple[Action, ...]
    #: What exists already where only nothing is right without force.
    conflicts: tuple[bytes, ...]

    @property
    def file_count(self) -> int:
        """How many files are written."""
        return sum(1 for _ in self.files)

    @property
    def size_bytes(self) -> int:
        """How many bytes are written."""
        return sum(node.size for node in self.files)

    @property
    def files(self) -> Iterator[Node]:
        """The files that are written, in this order; without those that only get mode and time."""
        for action in self.actions:
            if action.verb in ("create", "replace") and not action.only_attributes:
                assert action.node is not None, "only what is deleted has no node"
                if action.node.type == "file":
                    yield action.node

    def refuse_conflicts(self) -> None:
        """Raise `CheckoutConflict` if anything is in the way."""
        if not self.conflicts:
            return
        names = ", ".join(show(path) for path in self.conflicts[:_SHOWN_CONFLICTS])
        more = len(self.conflicts) - _SHOWN_CONFLICTS
        raise CheckoutConflict(
            f"{show(self.output)} is not empty: {names}" + (f" and {more} more" if more > 0 else ""),
            hint="use --force to replace what has the same name; the rest stays",
        )


def plan(tree: Tree, output: bytes, *, path: bytes = b"", delete: bool = False) -> Plan:
    """What a checkout of `path` (everything when empty) into the directory `output` has to do.

    `output` may be a link to a directory. With `delete`, what the snapshot does not hold goes, except
    `PROTECTED_NAMES` and other file systems. Nothing is changed. Raises `NotFound` for a path that is
    not in the snapshot, `CheckoutConflict` when `output` cannot be a directory or something protected
    would have to go, and `CheckoutFailed` when something cannot be looked at.
    """
    output = os.path.abspath(output)
    names = _split(path)
    chosen = _find(tree, names)
    directory = _open_output(output)
    planner = _Planner(tree, output, delete)
    try:
        if directory is not None:
            planner.device = os.fstat(directory).st_dev
        planner.run(directory, names, chosen)
    finally:
        if directory is not None:
            os.close(directory)
    return Plan(
        output=output,
        made_output=tree.root if directory is None else None,
        actions=tuple(planner.actions),
        conflicts=tuple(planner.conflicts),
    )


def _open_output(output: bytes) -> int | None:
    """A descriptor of the output directory; None when it is to be made."""
    with naming(output, "open"):
        try:
            return os.open(output, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise CheckoutConflict(
                f"the output directory is not a directory: {show(output)}",
                hint="choose another one with --output-directory",
            ) from None


@dataclass(slots=True)
class _Level:
    """A directory of the snapshot that is being planned, and its counterpart if that is a directory."""

    path: bytes
    descriptor: int | None
    left: Iterator[Node]
    wanted: frozenset[bytes]


class _Planner:
    def __init__(self, tree: Tree, output: bytes, delete: bool) -> None:
        self.actions: list[Action] = []
        self.conflicts: list[bytes] = []
        #: File system of the output; 0 as long as there is none.
        self.device = 0
        self._tree = tree
        self._output = output
        self._delete = delete

    def run(self, directory: int | None, names: Sequence[bytes], chosen: Sequence[Node]) -> None:
        """Plan for the nodes on the way to what was asked for, the last being that itself."""
        opened: list[int] = []
        try:
            path = b""
            for node in chosen[:-1]:
                path = join(path, node.name)
                directory = self._plan_node(path, node, directory, passing=True)
                if directory is not None:
                    opened.append(directory)
            if not names:
                self._conflict_with_content(directory, b"")
                self._plan_below(self._tree.root, b"", directory)
                return
            target = chosen[-1]
            path = join(path, target.name)
            found = lstat(directory, target.name, self._full(path))
            inner = self._plan_node(path, target, directory)
            if target.type == "directory":
                if inner is not None:
                    opened.append(inner)
                    self._conflict_with_content(inner, path)
                elif found is not None:
                    self.conflicts.append(path)
                self._plan_below(target, path, inner)
            elif found is not None:
                self.conflicts.append(path)
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _conflict_with_content(self, directory: int | None, path: bytes) -> None:
        if directory is not None:
            self.conflicts.extend(join(path, name) for name in self._names(directory, path))

    def _plan_below(self, node: Node, path: bytes, descriptor: int | None) -> None:
        """Plan everything below a directory, whose counterpart is open as `descriptor` or not there."""
        # Not recursive: a tree may be deeper than Python's stack.
        levels = [self._enter(node, path, descriptor)]
        try:
            while levels:
                level = levels[-1]
                child = next(level.left, None)
                if child is None:
                    self._plan_deletions(level)
                    levels.pop()
                    # The first one belongs to the caller.
                    if levels and level.descriptor is not None:
                        os.close(level.descriptor)
                    continue
                child_path = join(level.path, child.name)
                inner = self._plan_node(child_path, child, level.descriptor)
                if child.type == "directory":
                    levels.append(self._enter(child, child_path, inner))
        finally:
            for level in levels[1:]:
                if level.descriptor is not None:
                    os.close(level.descriptor)

    def _enter(self, node: Node, path: bytes, descriptor: int | None) -> _Level:
        children = self._tree.children(node)
        for name in children:
            check_name(name, path)
        return _Level(path, descriptor, iter(children.values()), frozenset(children))

    def _plan_node(self, path: bytes, node: Node, parent: int | None, *, passing: bool = False) -> int | None:
        """Plan for one node; a descriptor of its counterpart if both are directories."""
        found = lstat(parent, node.name, self._full(path))
        if found is None or parent is None:
            self.actions.append(Action("create", path, node))
            return None
        if node.type == "directory":
            if stat.S_ISDIR(found.st_mode):
                verb: Verb = "keep" if passing or has_attributes(node, found) else "replace"
                self.actions.append(
                    Action(verb, path, node, only_attributes=verb == "replace", passing=passing)
                )
                return open_directory(parent, node.name, self._full(path))
            if passing:
                self.conflicts.append(path)
            self.actions.append(Action("replace", path, node))
            return None
        if stat.S_ISDIR(found.st_mode):
            self._plan_removal(parent, node.name, path)
            self.actions.append(Action("replace", path, node))
        elif not self._is_same_content(parent, node, found, self._full(path)):
            self.actions.append(Action("replace", path, node))
        elif has_attributes(node, found):
            self.actions.append(Action("keep", path, node))
        else:
            # Another name of the same file may lie elsewhere, and must keep its mode and time.
            self.actions.append(Action("replace", path, node, only_attributes=found.st_nlink == 1))
        return None

    def _is_same_content(self, parent: int, node: Node, found: os.stat_result, full: bytes) -> bool:
        with naming(full, "read"):
            if node.type == "symlink":
                return stat.S_ISLNK(found.st_mode) and os.readlink(node.name, dir_fd=parent) == node.target
            if not stat.S_ISREG(found.st_mode) or found.st_size != node.size:
                return False
            try:
                descriptor = os.open(node.name, OPEN_FILE, dir_fd=parent)
            except PermissionError:
                # It can be replaced all the same.
                return False
            try:
                hasher = blake3.blake3()
                while piece := os.read(descriptor, PIECE_BYTES):
                    hasher.update(piece)
            finally:
                os.close(descriptor)
            return hasher.digest() == node.hash

    def _plan_deletions(self, level: _Level) -> None:
        if not self._delete or level.descriptor is None:
            return
        for name in self._names(level.descriptor, level.path):
            if name not in level.wanted:
                self._plan_deletion(level.descriptor, name, join(level.path, name))

    def _plan_removal(self, parent: int, name: bytes, path: bytes) -> None:
        """Plan that the content of a directory goes, which something else replaces."""
        if not self._plan_deletion(parent, name, path, itself=False):
            raise CheckoutConflict(
                f"a directory is in the way and holds what is never deleted: {show(self._full(path))}",
                hint="move it away, then check out again",
            )

    def _plan_deletion(self, parent: int, name: bytes, path: bytes, *, itself: bool = True) -> bool:
        """Plan that something goes, what is below it first; whether nothing of it has to stay."""
        if name in PROTECTED_NAMES:
            return False
        found = lstat(parent, name, self._full(path))
        if found is None:
            return True
        if found.st_dev != self.device:
            return False
        all_goes = True
        if stat.S_ISDIR(found.st_mode):
            descriptor = open_directory(parent, name, self._full(path))
            try:
                for inner in self._names(descriptor, path):
                    if not self._plan_deletion(descriptor, inner, join(path, inner)):
                        all_goes = False
            finally:
                os.close(descriptor)
        if all_goes and itself:
            self.actions.append(Action("delete", path))
        return all_goes

    def _names(self, descriptor: int, path: bytes) -> list[bytes]:
        with naming(self._full(path), "list"):
            return sorted(os.fsencode(name) for name in os.listdir(descriptor))

    def _full(self, path: bytes) -> bytes:
        return join(self._output, path)


def _split(path: bytes) -> list[bytes]:
    """The names of a path inside the snapshot; `.` and doubled slashes mean nothing."""
    names = [name for name in path.split(b"/") if name not in (b"", b".")]
    if path.startswith(b"/") or b".." in names:
        raise NotFound(
            f"not a path in a snapshot: {show(path)}", hint="give it relative to the project directory"
        )
    return names


def _find(tree: Tree, names: Sequence[bytes]) -> list[Node]:
    """The nodes along a path, from the first name on; raises `NotFound` with what comes near."""
    try:
        return [tree.find(b"/".join(names[: depth + 1])) for depth in range(len(names))]
    except NotFound as error:
        wanted = show(b"/".join(names))
        paths = (show(path) for path, _ in itertools.islice(tree.walk(), _NEAR_MATCH_PATHS))
        near = difflib.get_close_matches(wanted, paths, n=3)
        raise NotFound(
            f"not in the snapshot: {wanted}",
            hint=f"did you mean {' or '.join(near)}?" if near else "`replicate files` lists what is",
        ) from error
