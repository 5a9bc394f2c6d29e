"""How a mount is to be made, and what became of that: said once for users, daemon, process and engines.

Nothing here does anything: `table` passes the options to a mount process, which hands them to an engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: What `--engine` takes; `auto` is the first that can be used here.
ENGINES: Final = ("native", "mfusepy", "fusepy")
#: What `--passthrough` takes; `auto` decides by what is mounted.
PASSTHROUGH: Final = ("auto", "on", "off")
#: A request that has not been answered for so long is answered with EIO.
DEFAULT_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What whoever mounts can choose."""

    #: `auto`, or one of `ENGINES`: then no other is tried.
    engine: str = "auto"
    #: One of `PASSTHROUGH`; `on` fails where it is not possible.
    passthrough: str = "auto"
    #: Whether other users, root among them, may look.
    allow_other: bool = False
    #: Seconds until a read that is not answered fails with EIO.
    timeout_s: float = DEFAULT_TIMEOUT_S
    #: Bytes that the cache on disk may take; 0: nothing is cached. None: the default.
    cache_bytes: int | None = None
    #: Which files are read in advance: empty for none, a pattern, or `trace`.
    prefetch: str = ""
    #: Whether the mount comes back when the machine was restarted.
    persist: bool = False


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What serves a mount, as users are shown it."""

    #: One of `ENGINES`.
    engine: str
    #: Whether files that lie in the cache as a whole are read by the kernel itself.
    passthrough: bool
    #: Why it is not better than that; empty when it is the best there is.
    reason: str = ""
