"""Doing what a checkout planned.

Every file appears whole, verified and with its mode and time, or not at all: it is written under another
name beside its place. What is written is not forced to the disk: a checkout can be repeated.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from replicated.cache import ContentCache
from replicated.checkout.places import (
    OPEN_DIRECTORY,
    OPEN_FILE,
    PERMISSION_BITS,
    join,
    naming,
)
from replicated.checkout.planning import Action, Plan
from replicated.checkout.reading import ReadAhead
from replicated.file_reader import Part
from replicated.sparse import write_sparse
from replicated.tree import Node, Tree

#: Called with the files and bytes written so far.
OnProgress = Callable[[int, int], None]

_TEMPORARY_PREFIX = b".replicate-tmp-"
_OWNER_BITS = 0o700


def execute(
    plan: Plan, tree: Tree, on_progress: OnProgress | None = None, content: ContentCache | None = None
) -> None:
    """Do what was planned; whole files that `content` has are taken from there.

    Raises `CheckoutFailed` naming the path (what was done before stays, the path itself is as it was),
    `RepositoryDamaged` and other `RepositoryError`s.
    """
    _Executor(plan, tree, on_progress or (lambda files, size: None), content).run()


@dataclass(slots=True)
class _Place:
    """A directory below the output that is open, and what it shall be like when it is left."""

    name: bytes
    descriptor: int
    #: The mode it had, if it had to be changed so that files can be written.
    mode_before: int | None
    #: What gives it mode and time in the end; None to leave them alone.
    node: Node | None


class _Executor:
    def __init__(self, plan: Plan, tree: Tree, on_progress: OnProgress, content: ContentCache | None) -> None:
        self._plan = plan
        self._tree = tree
        self._on_progress = on_progress
        self._content = content
        self._files_done = 0
        self._bytes_done = 0
        #: The open directories from the output directory down to where we are.
        self._places: list[_Place] = []

    def run(self) -> None:
        output = self._plan.output
        try:
            self._open_output()
            with ReadAhead(self._tree, self._plan.files, self._content) as ahead:
                for action in self._plan.actions:
                    parent = self._go_to(action.path)
                    with naming(self._full(action.path)):
                        self._act(action, parent, ahead)
            with naming(output):
                while self._places:
                    self._leave()
        finally:
            # Only after a failure is anything left: then modes are given back as far as that goes.
            while self._places:
                with suppress(OSError):
                    self._leave()

    def _open_output(self) -> None:
        output = self._plan.output
        made = self._plan.made_output
        with naming(output):
            if made is not None:
                os.makedirs(os.path.dirname(output), exist_ok=True)
                os.mkdir(output, _OWNER_BITS)
            descriptor = os.open(output, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._places.append(_Place(b"", descriptor, _make_writable(descriptor), made))

    def _go_to(self, path: bytes) -> int:
        """Leave and enter directories until the one that holds `path` is open; its descriptor."""
        wanted = path.split(b"/")[:-1]
        here = [place.name for place in self._places[1:]]
        common = 0
        while common < min(len(wanted), len(here)) and wanted[common] == here[common]:
            common += 1
        with naming(self._full(b"/".join(here))):
            while len(self._places) > common + 1:
                self._leave()
        # Only for deletions: what is written into was entered when its own action was done.
        for depth in range(common, len(wanted)):
            with naming(self._full(b"/".join(wanted[: depth + 1]))):
                self._enter(wanted[depth], None)
        return self._places[-1].descriptor

    def _enter(self, name: bytes, node: Node | None) -> None:
        descriptor = os.open(name, OPEN_DIRECTORY, dir_fd=self._places[-1].descriptor)
        self._places.append(_Place(name, descriptor, _make_writable(descriptor), node))

    def _leave(self) -> None:
        """Close the innermost directory; all that it holds has been done."""
        place = self._places.pop()
        try:
            if place.node is not None:
                os.fchmod(place.descriptor, place.node.mode & PERMISSION_BITS)
                os.utime(place.descriptor, ns=(place.node.mtime_ns, place.node.mtime_ns))
            elif place.mode_before is not None:
                os.fchmod(place.descriptor, place.mode_before)
        finally:
            os.close(place.descriptor)

    def _act(self, action: Action, parent: int, ahead: ReadAhead) -> None:
        node = action.node
        if node is None:
            _delete(parent, action.path.rpartition(b"/")[2])
        elif node.type == "directory":
            if action.verb != "keep" and not action.only_attributes:
                if action.verb == "replace":
                    _delete(parent, node.name)
                os.mkdir(node.name, _OWNER_BITS, dir_fd=parent)
            self._enter(node.name, None if action.passing and action.verb == "keep" else node)
        elif action.only_attributes:
            if not _set_attributes(parent, node):
                # Not what was planned, so it is not among what is read ahead.
                with ReadAhead(self._tree, [node], self._content) as alone:
                    self._put(parent, node, alone)
        elif action.verb != "keep":
            self._put(parent, node, ahead)

    def _put(self, parent: int, node: Node, ahead: ReadAhead) -> None:
        """Make a file or link under another name, and give it its own once it is complete."""
        temporary = _TEMPORARY_PREFIX + secrets.token_hex(8).encode()
        try:
            if node.type == "symlink":
                os.symlink(node.target, temporary, dir_fd=parent)
                _set_link_time(parent, temporary, node)
            else:
                self._write_file(parent, temporary, node, ahead.parts(node))
            try:
                os.rename(temporary, node.name, src_dir_fd=parent, dst_dir_fd=parent)
            except IsADirectoryError:
                # What it held was deleted before, as planned.
                os.rmdir(node.name, dir_fd=parent)
                os.rename(temporary, node.name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=parent)
            raise
        if node.type == "file":
            self._files_done += 1
            self._on_progress(self._files_done, self._bytes_done)

    def _write_file(self, parent: int, name: bytes, node: Node, parts: Iterator[Part]) -> None:
        descriptor = os.open(
            name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent
        )
        try:
            offset = 0
            for part in parts:
                write_sparse(descriptor, part, offset)
                offset += len(part)
                self._bytes_done += len(part)
                self._on_progress(self._files_done, self._bytes_done)
            os.ftruncate(descriptor, node.size)
            os.fchmod(descriptor, node.mode & PERMISSION_BITS)
            os.utime(descriptor, ns=(node.mtime_ns, node.mtime_ns))
        finally:
            os.close(descriptor)

    def _full(self, path: bytes) -> bytes:
        return join(self._plan.output, path)


def _make_writable(descriptor: int) -> int | None:
    """Let the owner write into an open directory; the mode it had, if that was changed."""
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if mode & _OWNER_BITS == _OWNER_BITS or os.fstat(descriptor).st_uid != os.geteuid():
        return None
    os.fchmod(descriptor, mode | _OWNER_BITS)
    return mode


def _set_attributes(parent: int, node: Node) -> bool:
    """Give an existing file or link mode and time; False when it has another name and must be replaced."""
    if node.type == "symlink":
        _set_link_time(parent, node.name, node)
        return True
    descriptor = os.open(node.name, OPEN_FILE, dir_fd=parent)
    try:
        found = os.fstat(descriptor)
        if found.st_nlink != 1 or not stat.S_ISREG(found.st_mode):
            return False
        os.fchmod(descriptor, node.mode & PERMISSION_BITS)
        os.utime(descriptor, ns=(node.mtime_ns, node.mtime_ns))
        return True
    finally:
        os.close(descriptor)


def _set_link_time(parent: int, name: bytes, node: Node) -> None:
    os.utime(name, ns=(node.mtime_ns, node.mtime_ns), dir_fd=parent, follow_symlinks=False)


def _delete(parent: int, name: bytes) -> None:
    """Remove a file, a link or an empty directory; it may be gone already."""
    try:
        if stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
            os.rmdir(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
