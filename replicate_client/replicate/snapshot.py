"""The files of an experiment or checkpoint as users hold them: open, list, check out, mount.

Base of `Experiment` and `Checkpoint`; asks the daemon through `query`. Reading waits until a snapshot that
is captured is stored. Mounts in places that were chosen here end with the process.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from replicate import mounts, notices, query
from replicate.config import find_project
from replicate.environment import identify_process
from replicate.errors import (
    CheckoutConflict,
    ConfigError,
    InvalidArgument,
    NotFound,
    NotStored,
    ReplicateError,
)
from replicate.home import find_home
from replicate.ids import new_id, short
from replicate.mounts import MountChoices
from replicate.phrases import format_size, plural
from replicate.records import FileEntry

#: The first read of a file asks for this much; reading on doubles it: a header is cheap, a file fast.
_FIRST_FETCH_BYTES = 128 << 10
_MAX_FETCH_BYTES = 8 << 20
#: As many as Linux follows.
_MAX_LINKS = 40

_Result = TypeVar("_Result")


class Snapshot:
    """Something with saved files.

    The files of a checkpoint lie over those that `init` saved. Where an experiment is meant, its best
    checkpoint is taken, else its latest. Every method waits until the files are stored and raises
    `NotStored` when they never will be, `NotFound` when none were saved.
    """

    #: URL of the repository.
    _repository: str
    #: Whether there is anything in the repository.
    _is_recorded = True

    def _reference(self) -> str:
        """An id whose files do not change any more."""
        raise NotImplementedError

    def open(self, path: str | os.PathLike[str]) -> io.BufferedReader:
        """A saved file for reading bytes: seekable, and only what is read is fetched.

        `path` is relative to the project directory; links are followed within the snapshot. Raises
        `FileNotFoundError` when it was not saved, `IsADirectoryError` for a directory.
        """
        name = os.fsdecode(path)

        def begin() -> io.BufferedReader:
            reference = self._reference()
            entry = _find_file(self._repository, reference, name)
            return io.BufferedReader(_SavedFile(self._repository, reference, entry), _FIRST_FETCH_BYTES)

        return _when_stored(begin)

    def files(self) -> list[FileEntry]:
        """All saved files, directories and links, sorted by path."""
        return _when_stored(lambda: list(query.list_files(self._repository, self._reference())))

    def checkout(
        self,
        dir: str | os.PathLike[str],
        quiet: bool = False,
        *,
        path: str = "",
        force: bool = False,
    ) -> None:
        """Write the files into a directory; with `path` only that file or directory.

        Files that are in the way and differ raise `CheckoutConflict`, unless `force` replaces them.
        """

        def write() -> tuple[int, int]:
            files = size_bytes = 0
            events = query.checkout(
                self._repository,
                self._reference(),
                dir,
                path=path,
                force=force,
                cache_bytes=_cache_size(),
            )
            for event in events:
                files, size_bytes = event.files_done, event.bytes_done
            return files, size_bytes

        try:
            files, size_bytes = _when_stored(write)
        except CheckoutConflict as error:
            raise CheckoutConflict(error.message, hint=_for_python(error.hint), fields=error.fields) from None
        if not quiet:
            notices.say(f"wrote {plural(files, 'file')} ({format_size(size_bytes)}) to {os.fspath(dir)}")

    def mount(
        self, dir: str | os.PathLike[str] | None = None, *, engine: str = "", prefetch: str = ""
    ) -> Mount:
        """Mount the files read-only; use it with `with`, which gives the directory, or `unmount` it.

        Without `dir` a place is chosen, and the mount ends with this process at the latest, however that
        ends. `engine` is what serves it (`native`, `mfusepy` or `fusepy`; the best by default). `prefetch`
        says which files are read in advance: a pattern as in `.gitignore`, such as `*.safetensors`, `**` for
        all, or `trace` for those that were read in the last mount of the same files, in that order.
        Raises `MountFailed` saying what is in the way.
        """
        return _when_stored(lambda: Mount(self._repository, self._reference(), dir, engine, prefetch))


class Mount:
    """A mounted snapshot: a path, and a context manager that unmounts at the end."""

    def __init__(
        self,
        repository: str,
        reference: str,
        directory: str | os.PathLike[str] | None = None,
        engine: str = "",
        prefetch: str = "",
    ) -> None:
        self._pid = os.getpid()
        self._is_mounted = False
        for name, value in (("engine", engine), ("prefetch", prefetch)):
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string, not {value!r}")
        if directory is not None:
            _check_directory(directory)
        # The daemon makes the directory and removes it at the end.
        chosen = (
            directory if directory is not None else find_home().mounts / f"{short(reference)}-{new_id()[:8]}"
        )
        choices = MountChoices(
            engine=engine,
            prefetch=prefetch,
            cache_bytes=_cache_size(),
            # A process that is killed cannot unmount any more.
            owner=identify_process() if directory is None else None,
        )
        self.path = Path(mounts.mount(repository, reference, chosen, choices).directory)
        self._is_mounted = True
        if directory is None:
            _end_with_process(self)

    def unmount(self) -> None:
        """Unmount; harmless when it is not mounted any more. Raises `MountFailed` while files are open."""
        if self._is_mounted:
            try:
                mounts.unmount(directory=self.path)
            except NotFound:
                pass
            self._is_mounted = False

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: object = None, *_: object) -> None:
        # A forked child that leaves the block must not take the mount away from its parent.
        if self._pid != os.getpid():
            return
        try:
            self.unmount()
        except ReplicateError as error:
            # Not in place of what the block has raised.
            if kind is None:
                raise
            notices.say(f"{error.message}: it stays mounted")

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"<Mount {self.path}{'' if self._is_mounted else ' (unmounted)'}>"


class _SavedFile(io.RawIOBase):
    """One file of a snapshot, fetched in pieces as it is read. Used by one thread at a time."""

    def __init__(self, repository: str, reference: str, entry: FileEntry) -> None:
        self._repository = repository
        self._reference = reference
        self._size = entry.size
        self._position = 0
        self._piece = b""
        self._piece_start = 0
        self._fetch_bytes = _FIRST_FETCH_BYTES
        self.name = entry.path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}.get(whence)
        if base is None:
            raise ValueError(f"invalid whence: {whence!r}")
        if base + offset < 0:
            raise ValueError(f"negative seek position: {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        if not self._piece_start <= self._position < self._piece_start + len(self._piece):
            self._fetch(wanted)
        begin = self._position - self._piece_start
        data = self._piece[begin : begin + wanted]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        data = b"".join(query.read_file(self._repository, self._reference, self.name, self._position))
        self._position += len(data)
        return data

    def _fetch(self, wanted: int) -> None:
        goes_on = self._position == self._piece_start + len(self._piece) and self._piece
        self._fetch_bytes = min(2 * self._fetch_bytes, _MAX_FETCH_BYTES) if goes_on else _FIRST_FETCH_BYTES
        length = max(wanted, self._fetch_bytes)
        pieces = query.read_file(self._repository, self._reference, self.name, self._position, length)
        self._piece = b"".join(pieces)
        self._piece_start = self._position
        if len(self._piece) < wanted:
            raise OSError(f"the daemon sent less of the file than it has: {self.name}")


def _cache_size() -> int | None:
    """What may be kept on this machine, as the project of the working directory says; else the default."""
    try:
        return find_project().cache_size
    except ConfigError:
        # Of no importance to who reads a snapshot that was found already.
        return None


def _find_file(repository: str, reference: str, path: str) -> FileEntry:
    """The entry of the regular file that `path` leads to in a snapshot, as a file system would find it."""
    if not path or os.path.isabs(path):
        raise _no_file(path, "not a path relative to the project directory")
    try:
        return query.stat_file(repository, reference, "/".join(reversed(_components(path))))
    except (NotFound, InvalidArgument):
        # Raises what is wrong with the snapshot itself; otherwise it is the path.
        next(query.list_files(repository, reference), None)
    left = _components(path)
    found: list[str] = []
    links = 0
    entry: FileEntry | None = None
    while left:
        name = left.pop()
        if name == "..":
            if not found:
                raise _no_file(path, "it leads out of the snapshot")
            found.pop()
            entry = None
            continue
        found.append(name)
        try:
            entry = _entry(repository, reference, "/".join(found))
        except NotFound:
            raise _no_file(path, "not in the snapshot") from None
        if entry is not None and entry.type == "symlink":
            links += 1
            if links > _MAX_LINKS:
                raise _no_file(path, "it leads through too many links")
            if os.path.isabs(entry.target):
                raise _no_file(path, "it leads out of the snapshot")
            found.pop()
            left.extend(_components(entry.target))
            entry = None
        elif entry is not None and left:
            raise _no_file(path, f"not a directory in the snapshot, {'/'.join(found)}")
    if entry is None:
        raise IsADirectoryError(errno.EISDIR, "a directory in the snapshot", path)
    return entry


def _components(path: str) -> list[str]:
    """The names in a path, the last one first."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _entry(repository: str, reference: str, path: str) -> FileEntry | None:
    """The entry of a file or link; None for a directory. Raises `NotFound`."""
    first = next(query.list_files(repository, reference, path), None)
    return first if first is not None and first.path == path else None


def _no_file(path: str, why: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, why, path)


def _for_python(hint: str) -> str:
    """What the daemon advises to users of the command line, for those of the library."""
    if "--force" in hint:
        return "force=True replaces what has the same name (the rest stays); or choose another directory"
    return "choose another directory" if "--" in hint else hint


def _when_stored(read: Callable[[], _Result]) -> _Result:
    """What `read` gives, once the snapshots that it needs are stored."""
    awaited: set[str] = set()
    while True:
        try:
            return read()
        except NotStored as error:
            identifier = error.fields.get("id", "")
            if error.fields.get("state") != "captured" or identifier in awaited:
                raise
        query.wait_stored([identifier])
        awaited.add(identifier)


_mounts: list[Mount] = []


def _end_with_process(mount: Mount) -> None:
    if not _mounts:
        atexit.register(_unmount_all)
    _mounts.append(mount)


def _unmount_all() -> None:
    for mount in _mounts:
        try:
            mount.__exit__()
        except ReplicateError as error:
            notices.warn_once(str(error))


def _check_directory(directory: str | os.PathLike[str]) -> None:
    """Raise `ValueError` for what cannot be the name of a directory."""
    name = os.fspath(directory)
    if not name:
        raise ValueError('the directory must not be empty; "." is the working directory')
    try:
        is_name = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise ValueError(f"no directory can have this name: {name!r}")
