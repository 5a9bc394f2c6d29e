"""Makes one tree of the trees that the processes of a distributed job have stored.

Directories of the same path are merged, with the mode of the lowest rank and the latest time; a file or link
may be in several trees if it is the same everywhere. The result depends on nothing but the trees, so that
whoever merges them gets the same root. Only directories that are in several trees are read. For `parts`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from replicate.errors import ReplicateError, RepositoryDamaged
from replicated.directories import Node, layers_of
from replicated.format.manifest import MAX_DEPTH, FileContent, RootNode
from replicated.repository import Repository
from replicated.tree import Tree, overlay_roots
from replicated.writer import SnapshotWriter

_WORDS: Final = {"file": "a file", "directory": "a directory", "symlink": "a link"}


class MergeConflict(ReplicateError):
    """Two ranks have saved different things under one path."""


@dataclass(slots=True)
class _Layer:
    """The tree of one rank."""

    rank: int
    tree: Tree


@dataclass(slots=True)
class _Repeated:
    """What is in more than one tree, and must be counted once: how often it is there beyond that."""

    files: int = 0
    directories: int = 0
    symlinks: int = 0
    size_bytes: int = 0


def merge_trees(repository: Repository, writer: SnapshotWriter, roots: Mapping[int, RootNode]) -> RootNode:
    """The root of the merged tree of some ranks, at least one; its nodes are stored by the `writer`.

    Raises `MergeConflict`, which names the path and the ranks.
    """
    first = roots[min(roots)]
    if len(roots) == 1:
        return first
    layers = [_Layer(rank, overlay_roots(repository, [roots[rank]])) for rank in sorted(roots)]
    merge = _Merge(writer)
    node = merge.directory([(layer, layer.tree.root) for layer in layers], b"", 0)
    return RootNode(
        node=node,
        mode=first.mode,
        mtime_ns=max(root.mtime_ns for root in roots.values()),
        files=sum(root.files for root in roots.values()) - merge.repeated.files,
        directories=sum(root.directories for root in roots.values()) - merge.repeated.directories,
        symlinks=sum(root.symlinks for root in roots.values()) - merge.repeated.symlinks,
        size_bytes=sum(root.size_bytes for root in roots.values()) - merge.repeated.size_bytes,
    )


class _Merge:
    def __init__(self, writer: SnapshotWriter) -> None:
        self._writer = writer
        self.repeated = _Repeated()

    def directory(self, found: Sequence[tuple[_Layer, Node]], path: bytes, depth: int) -> bytes:
        """The node of a directory that is in several trees."""
        if depth > MAX_DEPTH:
            raise RepositoryDamaged(f"directories are nested too deeply: {os.fsdecode(path[:100])}…")
        children: dict[bytes, list[tuple[_Layer, Node]]] = {}
        for layer, node in found:
            for name, child in layer.tree.children(node).items():
                children.setdefault(name, []).append((layer, child))
        builder = self._writer.new_directory()
        for name in sorted(children):
            nodes = children[name]
            first = nodes[0][1]
            below = path + b"/" + name if path else name
            _check_same(nodes, below)
            if first.type == "directory":
                is_same = len({_node_id(node) for _, node in nodes}) == 1
                node_id = _node_id(first) if is_same else self.directory(nodes, below, depth + 1)
                if is_same and len(nodes) > 1:
                    self._count_repeated(nodes[0], len(nodes) - 1, below)
                self.repeated.directories += len(nodes) - 1
                mtime_ns = max(node.mtime_ns for _, node in nodes)
                builder.add_directory(name, first.mode, mtime_ns, node_id)
            elif first.type == "symlink":
                self.repeated.symlinks += len(nodes) - 1
                builder.add_symlink(name, first.mode, first.mtime_ns, first.target)
            else:
                assert isinstance(first.content, FileContent)
                self.repeated.files += len(nodes) - 1
                self.repeated.size_bytes += (len(nodes) - 1) * first.size
                builder.add_file(name, first.mode, first.mtime_ns, first.content)
        return builder.finish()

    def _count_repeated(self, found: tuple[_Layer, Node], times: int, path: bytes) -> None:
        """Count what lies below a directory that is the same in several trees."""
        layer, _ = found
        for _, node in layer.tree.walk(path):
            if node.type == "directory":
                self.repeated.directories += times
            elif node.type == "symlink":
                self.repeated.symlinks += times
            else:
                self.repeated.files += times
                self.repeated.size_bytes += times * node.size


def _check_same(nodes: Sequence[tuple[_Layer, Node]], path: bytes) -> None:
    (first_layer, first), *others = nodes
    for layer, node in others:
        ranks = f"ranks {first_layer.rank} and {layer.rank}"
        name = path.decode("utf-8", "backslashreplace")
        if node.type != first.type:
            raise MergeConflict(
                f"{ranks} have saved different things as {name}: {_WORDS[first.type]} and {_WORDS[node.type]}"
            )
        if node.type != "directory" and (node.size, node.hash) != (first.size, first.hash):
            raise MergeConflict(f"{ranks} have saved different contents as {name}")


def _node_id(node: Node) -> bytes:
    """The id of the node of a directory of one tree."""
    return layers_of(node)[0]
