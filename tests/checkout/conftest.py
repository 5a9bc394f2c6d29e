"""Comparing a directory with the tree that was checked out into it."""

import os
import stat

import pytest

from replicated.checkout import execute, plan


def describe_tree(tree):
    """path → (type, permission bits, mtime, bytes or target); links have no mode worth comparing."""
    described = {}
    for path, node in tree.walk():
        if node.type == "file":
            content = tree.reader(node).pread(0, node.size)
        else:
            content = node.target
        mode = None if node.type == "symlink" else node.mode & 0o777
        described[path] = (node.type, mode, node.mtime_ns, content)
    return described


def describe_directory(top):
    described = {}
    top = os.fsencode(top)
    for directory, directories, files in os.walk(top):
        for name in directories + files:
            path = os.path.join(directory, name)
            info = os.lstat(path)
            mode = stat.S_IMODE(info.st_mode)
            if stat.S_ISLNK(info.st_mode):
                entry = ("symlink", None, info.st_mtime_ns, os.readlink(path))
            elif stat.S_ISDIR(info.st_mode):
                entry = ("directory", mode, info.st_mtime_ns, b"")
            else:
                with open(path, "rb") as file:
                    entry = ("file", mode, info.st_mtime_ns, file.read())
            described[os.path.relpath(path, top)] = entry
    return described


def check_out(tree, output, *, path=b"", force=False, delete=False, on_progress=None):
    steps = plan(tree, os.fsencode(output), path=path, delete=delete)
    if not force:
        steps.refuse_conflicts()
    execute(steps, tree, on_progress)
    return [(action.verb, action.path) for action in steps.actions]


@pytest.fixture(scope="session")
def described():
    """What a tree, or a directory, holds, in a form that can be compared."""
    return lambda thing: describe_tree(thing) if hasattr(thing, "walk") else describe_directory(thing)


@pytest.fixture(scope="session")
def checkout():
    return check_out
