"""The engine over libfuse 3, through `mfusepy`: for where the native engine cannot be used.

Directories are listed with the attributes of their entries (readdirplus: one request instead of one for
each file). Only mount processes import this module: it loads libfuse.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from replicate.errors import MountFailed
from replicated.mount.engine.callbacks import (
    CONGESTION_THRESHOLD,
    MAX_BACKGROUND,
    Callbacks,
    encoded,
    implemented,
    mount_options,
    report,
)
from replicated.mount.engine.libfuse import choose_library
from replicated.mount.filesystem import Filesystem
from replicated.mount.options import EngineReport, MountOptions

choose_library()
import mfusepy  # noqa: E402  the library that it loads had to be chosen first

_LOG = logging.getLogger(__name__)

#: Each one that waits for the store takes a thread; while all of them do, nothing else is answered.
_MAX_THREADS = 32

# Flags of libfuse's fuse_common.h and fuse.h.
_CAP_READDIRPLUS_AUTO = 1 << 14
_CAP_CACHE_SYMLINKS = 1 << 23
_FILL_DIR_PLUS = 1 << 1


def serve(
    filesystem: Filesystem,
    directory: bytes,
    *,
    source_name: str,
    options: MountOptions,
    on_mounted: Callable[[EngineReport], None],
) -> None:
    """See `Engine.serve`; when it cannot be mounted, libfuse has said why on standard error."""
    _Session(filesystem, directory, source_name, options, on_mounted)


class _Session(Callbacks, mfusepy.FUSE):  # type: ignore[misc]  # mfusepy has no types
    """One mount; the constructor returns when it has ended, as that of the base class does."""

    def __init__(
        self,
        filesystem: Filesystem,
        directory: bytes,
        source_name: str,
        options: MountOptions,
        on_mounted: Callable[[EngineReport], None],
    ) -> None:
        self._on_mounted = on_mounted
        self._was_mounted = False
        # Older versions of libfuse do not know the option.
        threads = {"max_threads": _MAX_THREADS} if mfusepy.fuse_version_minor >= 12 else {}
        try:
            super().__init__(
                filesystem,
                options,
                os.environ.get("FUSE_LIBRARY_PATH") or mfusepy._libfuse._name,
                operations=implemented(init_with_config=self._configure),
                mountpoint=encoded(directory),
                encoding="latin-1",
                raw_fi=True,
                **mount_options(filesystem, source_name, options),
                **threads,
            )
        except RuntimeError as error:
            # Its argument is libfuse's exit status; after a signal that is not 0 either.
            if not self._was_mounted:
                raise MountFailed(f"libfuse gave up with status {error}") from error
            _LOG.debug("the session ended with status %s", error)

    def _configure(self, connection: Any, config: Any) -> None:
        """Set what has no mount option; libfuse calls it once the kernel has said hello."""
        connection.max_background = MAX_BACKGROUND
        connection.congestion_threshold = CONGESTION_THRESHOLD
        # Always with attributes, not only while the kernel guesses that somebody wants them.
        connection.want &= ~_CAP_READDIRPLUS_AUTO
        if self.filesystem.is_immutable:
            connection.want |= connection.capable & _CAP_CACHE_SYMLINKS
        # Calls with a handle need no path, so libfuse need not build one.
        config.nullpath_ok = 1
        self._was_mounted = True
        # The kernel takes requests only after this call has returned.
        threading.Thread(
            target=self._on_mounted, args=(report("mfusepy"),), name="mounted", daemon=True
        ).start()

    # -- callbacks that libfuse 2 has in another form ------------------------------------------------

    def getattr_fuse_3(self, path: bytes | None, buffer: Any, info: Any) -> int:
        # A handle comes only with files that are open, never with directories.
        if path is None:
            return self.answer_attributes(lambda: self.filesystem.inode_of(info.contents.fh), buffer)
        return self.answer_attributes(lambda: self.filesystem.resolve(path), buffer)

    def opendir(self, path: bytes, info: Any) -> int:
        super().opendir(path, info)
        if self.filesystem.is_immutable:
            info.contents.cache_readdir = 1
            info.contents.keep_cache = 1
        return 0

    def readdir_fuse_3(
        self, path: bytes | None, buffer: Any, fill: Any, offset: int, info: Any, flags: int
    ) -> int:
        entry = mfusepy.c_stat()
        reference = ctypes.byref(entry)
        # Offsets are never 0: with 0 libfuse passes no attributes on, and each entry is looked up again.
        for name, attributes, following in self.entries(info.contents.fh, offset):
            self.fill(entry, attributes)
            if fill(buffer, name, reference, following, _FILL_DIR_PLUS):
                break
        return 0
