"""The engine over libfuse 2, through plain `fusepy`: the last resort, and what its users know.

Libfuse 2 has no readdirplus and reads 128 KiB at a time: the same files, more slowly. Only mount processes
import this module: it loads libfuse.
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
from replicated.mount.engine.libfuse import OLD_LIBRARY
from replicated.mount.filesystem import Filesystem
from replicated.mount.options import EngineReport, MountOptions

# It would run ldconfig or a compiler to find the library.
os.environ["FUSE_LIBRARY_PATH"] = OLD_LIBRARY
import fuse

_LOG = logging.getLogger(__name__)


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


class _Session(Callbacks, fuse.FUSE):  # type: ignore[misc]  # fusepy has no types
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
        try:
            super().__init__(
                filesystem,
                options,
                OLD_LIBRARY,
                # With the flags, libfuse builds no paths for calls with a handle.
                operations=implemented(init=True, flag_nullpath_ok=1, flag_nopath=1),
                mountpoint=encoded(directory),
                encoding="latin-1",
                raw_fi=True,
                max_background=MAX_BACKGROUND,
                congestion_threshold=CONGESTION_THRESHOLD,
                **mount_options(filesystem, source_name, options),
            )
        except RuntimeError as error:
            # Its argument is libfuse's exit status; after a signal that is not 0 either.
            if not self._was_mounted:
                raise MountFailed(f"libfuse gave up with status {error}") from error
            _LOG.debug("the session ended with status %s", error)

    def init(self, connection: Any) -> int:
        """Libfuse calls it once the kernel has said hello."""
        self._was_mounted = True
        # The kernel takes requests only after this call has returned.
        threading.Thread(
            target=self._on_mounted, args=(report("fusepy"),), name="mounted", daemon=True
        ).start()
        return 0

    # -- callbacks that libfuse 3 has in another form ------------------------------------------------

    def getattr(self, path: bytes, buffer: Any) -> int:
        return self.answer_attributes(lambda: self.filesystem.resolve(path), buffer)

    def fgetattr(self, path: bytes | None, buffer: Any, info: Any) -> int:
        return self.answer_attributes(lambda: self.filesystem.inode_of(info.contents.fh), buffer)

    def readdir(self, path: bytes | None, buffer: Any, fill: Any, offset: int, info: Any) -> int:
        entry = fuse.c_stat()
        reference = ctypes.byref(entry)
        for name, attributes, following in self.entries(info.contents.fh, offset):
            self.fill(entry, attributes)
            if fill(buffer, name, reference, following):
                break
        return 0
