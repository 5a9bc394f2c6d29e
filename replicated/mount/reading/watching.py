"""Tells several watchers of a mount what is read. Called by `open_files`, from the threads that read.

Invariant: a watcher that fails is a line in the log, and is told nothing from then on; a reader never
notices.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from replicated.mount.reading.open_files import Watcher
    from replicated.tree import Node

_LOG = logging.getLogger(__name__)


class Watchers:
    """Several watchers as one. May be used from several threads."""

    def __init__(self, *watchers: Watcher) -> None:
        #: Replaced as a whole.
        self._watchers = watchers

    def on_open(self, inode: int, node: Node) -> None:
        """See `Watcher.on_open`."""
        for watcher in self._watchers:
            try:
                watcher.on_open(inode, node)
            except Exception:
                self._drop(watcher)

    def on_read(self, inode: int, node: Node, offset: int, length: int, is_sequential: bool) -> None:
        """See `Watcher.on_read`."""
        for watcher in self._watchers:
            try:
                watcher.on_read(inode, node, offset, length, is_sequential)
            except Exception:
                self._drop(watcher)

    def on_release(self, inode: int, node: Node) -> None:
        """See `Watcher.on_release`."""
        for watcher in self._watchers:
            try:
                watcher.on_release(inode, node)
            except Exception:
                self._drop(watcher)

    def _drop(self, failed: Watcher) -> None:
        """Called while its exception is handled."""
        _LOG.exception("%s has failed, and is told nothing from now on", type(failed).__name__)
        self._watchers = tuple(watcher for watcher in self._watchers if watcher is not failed)
