"""Where one user's state lies: the only place that knows the names inside `REPLICATE_HOME`.

Used by the library (to find the socket) and by the daemon (which owns everything else). With
`REPLICATE_HOME` set, all of it lies in that one directory; otherwise in the XDG directories.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from replicate.errors import ConfigError, DaemonUnavailable
from replicate.phrases import escape, is_text

PRIVATE_MODE = 0o700


@dataclass(frozen=True, slots=True)
class Home:
    """The directories of one user's state."""

    #: Journal and spool: must survive a restart of the machine.
    state: Path
    #: Catalogs and chunk indexes: can be deleted at any time while no daemon runs.
    cache: Path
    #: Socket, lock and the list of mounts: private to the user.
    run: Path
    logs: Path

    @property
    def journal(self) -> Path:
        """The daemon's database of what was asked of it and what became of it."""
        return self.state / "journal.db"

    @property
    def spool(self) -> Path:
        """Captured files that are not stored yet."""
        return self.state / "spool"

    @property
    def socket(self) -> Path:
        """The Unix socket on which the daemon listens."""
        return self.run / "replicated.sock"

    @property
    def lock(self) -> Path:
        """Held with flock by the one daemon of this home, and holding its pid."""
        return self.run / "replicated.lock"

    @property
    def mounts(self) -> Path:
        """One JSON file a mount process, and mount points that we chose ourselves."""
        return self.run / "mounts"

    @property
    def lasting_mounts(self) -> Path:
        """One JSON file a mount that comes back after a restart of the machine."""
        return self.state / "mounts"

    @property
    def log_file(self) -> Path:
        """The daemon's log, rotated."""
        return self.logs / "replicated.log"


def find_home() -> Home:
    """The home chosen by `REPLICATE_HOME`, else by the XDG variables; nothing is created.

    Raises `ConfigError` naming the variable that cannot be used.
    """
    root = chosen_root()
    if root is not None:
        return _home_in(root)
    user = Path.home()
    state = (_xdg_directory("XDG_STATE_HOME") or user / ".local" / "state") / "replicate"
    cache = (_xdg_directory("XDG_CACHE_HOME") or user / ".cache") / "replicate"
    runtime = _xdg_directory("XDG_RUNTIME_DIR")
    run = runtime / "replicate" if runtime and runtime.is_dir() else state / "run"
    return Home(state, cache, run, state / "logs")


@lru_cache
def _home_in(root: Path) -> Home:
    return Home(root / "state", root / "cache", root / "run", root / "logs")


def chosen_root() -> Path | None:
    """`REPLICATE_HOME` as an absolute path, None when it is not set; raises `ConfigError`."""
    chosen = _checked_variable("REPLICATE_HOME")
    return _absolute(chosen) if chosen else None


@lru_cache
def _absolute(chosen: str) -> Path:
    # Remembered: a process that works in another directory later still means the same home.
    try:
        return Path(chosen).expanduser().absolute()
    except FileNotFoundError:
        raise ConfigError(
            f"REPLICATE_HOME is relative and the working directory does not exist any more: {chosen}",
            hint="set it to an absolute path",
        ) from None


def _xdg_directory(variable: str) -> Path | None:
    """What the variable says; the specification wants relative paths to be ignored."""
    path = Path(_checked_variable(variable))
    return path if path.is_absolute() else None


def _checked_variable(variable: str) -> str:
    value = os.environ.get(variable, "")
    if not is_text(value):
        raise ConfigError(
            f"{variable} is not UTF-8: {escape(value)}", hint="choose a directory with such a path"
        )
    return value


def make_private(directory: Path) -> None:
    """Make a directory that only this user can enter, or check that an existing one is such.

    Raises `DaemonUnavailable` when it is a link, belongs to somebody else or lets others in: whoever
    can write there could put a socket of their own in place of ours.
    """
    try:
        # Private as well: the parent of the run directory is the state directory, which must be.
        directory.parent.mkdir(mode=PRIVATE_MODE, parents=True, exist_ok=True)
        try:
            directory.mkdir(mode=PRIVATE_MODE)
        except FileExistsError:
            pass
        check_private(directory)
    except OSError as error:
        raise DaemonUnavailable(
            f"cannot use the directory {directory}: {error.strerror}",
            hint="set REPLICATE_HOME to a directory that you can write to",
        ) from error


def check_private(directory: Path) -> None:
    """Raise `DaemonUnavailable` unless `directory` is ours alone; `FileNotFoundError` when missing."""
    info = os.lstat(directory)
    if not stat.S_ISDIR(info.st_mode):
        raise DaemonUnavailable(f"refusing {directory}: it is not a directory (a link is not followed)")
    if info.st_uid != os.getuid():
        raise DaemonUnavailable(f"refusing {directory}: it is owned by uid {info.st_uid}, not by you")
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise DaemonUnavailable(
            f"refusing {directory}: its mode is {stat.S_IMODE(info.st_mode):04o}, it must be 0700",
            hint=f"chmod 700 {directory}",
        )
