"""Finds files in a snapshot by their paths, links followed, and says of each what fsspec wants to know.

Invariant: no link leads out of a snapshot, and none leads nowhere for ever.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from replicated.directories import Node
from replicated.fsspec_files.failing import is_missing, no_file, text_of
from replicated.tree import Tree

#: As many as Linux follows.
MAX_LINKS: Final = 40
#: Entries of a directory that are read at once.
_BATCH: Final = 256

_FORMATS: Final = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "symlink": stat.S_IFLNK}


class Found(NamedTuple):
    """A file or directory, and the path on which no link lies."""

    names: tuple[bytes, ...]
    node: Node


def find(tree: Tree, names: Sequence[bytes], path: str) -> Found:
    """What lies at a path from the root of a snapshot; `path` is for errors.

    Raises `FileNotFoundError`, also for what lies outside of the snapshot, `NotADirectoryError`, and
    `OSError` (ELOOP) for links that have no end; besides, what reading raises.
    """
    nodes = [tree.root]
    place: list[bytes] = []
    left = list(reversed(names))
    links = 0
    while left:
        name = left.pop()
        if name in (b"", b"."):
            continue
        if nodes[-1].type != "directory":
            raise NotADirectoryError(errno.ENOTDIR, "not a directory in the snapshot", path)
        if name == b"..":
            if not place:
                raise no_file("it leads out of the snapshot", path)
            place.pop()
            nodes.pop()
            continue
        entry = tree.listing(nodes[-1]).find(name)
        if entry is None:
            raise no_file("not in the snapshot", path)
        node = entry[1]
        if node.type != "symlink":
            place.append(name)
            nodes.append(node)
            continue
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, "it leads through too many links", path)
        if node.target.startswith(b"/"):
            raise no_file("it leads out of the snapshot, by a link", path)
        left.extend(reversed(node.target.split(b"/")))
    return Found(tuple(place), nodes[-1])


def look(tree: Tree, names: Sequence[bytes], path: str) -> dict[str, Any]:
    """The description of what lies at a path; raises as `find`, but not for a link that leads nowhere."""
    names = [name for name in names if name not in (b"", b".")]
    if not names or names[-1] == b"..":
        return describe(path, find(tree, names, path))
    parent = find(tree, names[:-1], path)
    if parent.node.type != "directory":
        raise NotADirectoryError(errno.ENOTDIR, "not a directory in the snapshot", path)
    entry = tree.listing(parent.node).find(names[-1])
    if entry is None:
        raise no_file("not in the snapshot", path)
    return describe(path, _found(tree, parent, entry[1], path), entry[1])


def entries(tree: Tree, directory: Found, path: str) -> Iterator[tuple[Found | None, dict[str, Any]]]:
    """What a directory holds, each with its description; None for a link that leads nowhere.

    `path` is what the directory was asked for by. Raises what reading raises.
    """
    listing = tree.listing(directory.node)
    start = 0
    while batch := listing.entries(start, _BATCH):
        for _, node in batch:
            child_path = f"{path}/{text_of(node.name)}"
            found = _found(tree, directory, node, child_path)
            yield found, describe(child_path, found, node)
        start = batch[-1][0] + 1


def describe(path: str, found: Found | None, node: Node | None = None) -> dict[str, Any]:
    """What fsspec calls the info of a file: of what a link leads to, else of the link itself.

    `node` is the entry of a directory that led there, where that is known.
    """
    shown = found.node if found is not None else node
    assert shown is not None, "something lies at every path that is described"
    info: dict[str, Any] = {
        "name": path,
        "size": shown.size,
        "type": "link" if shown.type == "symlink" else shown.type,
        "mode": _FORMATS[shown.type] | shown.mode,
        "mtime": shown.mtime_ns / 1e9,
        "mtime_ns": shown.mtime_ns,
    }
    if shown.type == "file":
        info["blake3"] = shown.hash.hex()
        # By this name libraries that keep files by their URL see that another one is meant by now.
        info["ETag"] = info["blake3"]
    if node is not None and node.type == "symlink":
        info["islink"] = True
        info["destination"] = text_of(node.target)
    return info


def _found(tree: Tree, directory: Found, node: Node, path: str) -> Found | None:
    """What an entry of a directory is or leads to; None for a link that leads nowhere."""
    names = (*directory.names, node.name)
    if node.type != "symlink":
        return Found(names, node)
    try:
        return find(tree, names, path)
    except OSError as error:
        if is_missing(error):
            return None
        raise
