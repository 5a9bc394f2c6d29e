"""A store in a directory of a local (or mounted) file system.

An object's key is its path below the root. Writing goes to a temporary name in `tmp/` first and is
renamed when it is complete and on the disk. After a failed fsync the kernel may have dropped the bytes
and report success the next time, so it is never repeated: the object is given up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from replicate.errors import RepositoryDamaged, RepositoryFull, RepositoryUnreachable
from replicated.file_systems import is_near
from replicated.store.base import (
    Buffer,
    Capabilities,
    KeyMissing,
    ObjectInfo,
    check_key,
    check_prefix,
    is_key,
)

TEMPORARY_DIRECTORY = "tmp"
#: Objects are never changed in place; permissions merely prevent accidents, hashes find them.
OBJECT_MODE = 0o444
#: A temporary file this old has lost its writer. Should the writer be merely frozen, its rename fails
#: and it reports that: nothing depends on the clock being right.
STALE_TEMPORARY_S = 24 * 3600

# Buffers given to one writev; Linux takes at most 1024.
_MAX_VECTORS = 512
#: Of a part of an object that is written around the page cache; a disk takes about as long for less.
MIN_DIRECT_BYTES: Final = 1 << 20
#: What every disk that we know of wants.
DIRECT_ALIGNMENT: Final = 4096
# What open files say that cannot be written in this way, or not from this memory.
_NOT_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Paths that are remembered; there are more keys than that, but few are in use at a time.
_KNOWN_PATHS = 256
# What link(2) says on file systems without hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class LocalStore:
    """A `Store` in the directory `root`, which exists."""

    def __init__(self, root: Path) -> None:
        self._root = os.path.abspath(root)
        self._capabilities = Capabilities(local_root=Path(self._root), is_near=_is_near(self._root))
        # Directories known to be durable: they and all above them were fsynced by this store.
        self._durable: set[str] = {self._root}
        self._durable_lock = threading.Lock()
        # Of keys that were checked: packs are asked for again and again.
        self._paths: dict[str, str] = {}

    @property
    def url(self) -> str:
        """`file://` and the absolute path of the root."""
        return f"file://{self._root}"

    @property
    def capabilities(self) -> Capabilities:
        """Objects are local files, which may still be on a network file system."""
        return self._capabilities

    def put(
        self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
    ) -> None:
        """See `Store.put`."""
        path = self._path(key)
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        with self._explained("write", path):
            directory = os.path.dirname(path)
            self._make_durable(directory)
            if os.path.exists(path):
                self._check_same(key, path, views)
                _sync_directory(directory)
                return
            temporary = self._write_temporary(views, sync=True)
            try:
                if not _move_to_new(temporary, path):
                    self._check_same(key, path, views)
            finally:
                _remove_if_exists(temporary)
            try:
                _sync_directory(directory)
            except OSError:
                # A repeated put must not find the object and believe in it.
                _remove_if_exists(path)
                raise

    def replace(self, key: str, data: bytes) -> None:
        """See `Store.replace`."""
        path = self._path(key)
        with self._explained("write", path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = self._write_temporary([memoryview(data)] if data else [], sync=False)
            try:
                os.rename(temporary, path)
            except OSError:
                _remove_if_exists(temporary)
                raise

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Store.get`."""
        path = self._path(key)
        # Without `_explained`, which takes as long as reading a small file.
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if length is None:
                    length = max(0, os.fstat(descriptor).st_size - offset)
                return _read_range(descriptor, offset, length)
            finally:
                os.close(descriptor)
        except (FileNotFoundError, NotADirectoryError):
            raise KeyMissing(key) from None
        except OSError as error:
            raise self._explain(error, "read", path) from error

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Store.list`. Files that cannot be objects, by name or kind, are passed over."""
        directory, _, _ = check_prefix(prefix).rpartition("/")
        pending = [directory]
        while pending:
            parent = pending.pop()
            path = os.path.join(self._root, parent)
            with self._explained("list", path):
                entries = _scan(path)
            for entry in entries:
                key = f"{parent}/{entry.name}" if parent else entry.name
                if not is_key(key) or key == TEMPORARY_DIRECTORY:
                    continue
                with self._explained("list", entry.path):
                    if entry.is_dir():
                        if key.startswith(prefix) or prefix.startswith(key + "/"):
                            pending.append(key)
                    elif key.startswith(prefix) and entry.is_file():
                        with contextlib.suppress(FileNotFoundError):
                            info = entry.stat()
                            yield ObjectInfo(key, info.st_size, max(0.0, time.time() - info.st_mtime))

    def delete(self, *keys: str) -> None:
        """See `Store.delete`."""
        directories: dict[str, None] = {}
        for path in map(self._path, keys):
            with self._explained("delete", path):
                if _remove_if_exists(path):
                    directories[os.path.dirname(path)] = None
        for directory in directories:
            with self._explained("delete in", directory):
                _sync_directory(directory)

    def exists(self, key: str) -> bool:
        """See `Store.exists`."""
        path = self._path(key)
        with self._explained("read", path):
            try:
                os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def remove_stale_temporaries(self) -> None:
        """Remove what writers that died have left behind; failures do not matter."""
        directory = os.path.join(self._root, TEMPORARY_DIRECTORY)
        oldest = time.time() - STALE_TEMPORARY_S
        with contextlib.suppress(OSError):
            for entry in _scan(directory):
                if entry.stat(follow_symlinks=False).st_mtime < oldest:
                    os.unlink(entry.path)

    def _path(self, key: str) -> str:
        path = self._paths.get(key)
        if path is None:
            if check_key(key) == TEMPORARY_DIRECTORY or key.startswith(TEMPORARY_DIRECTORY + "/"):
                raise ValueError(f"the key is reserved for unfinished objects: {key!r}")
            path = os.path.join(self._root, key)
            if len(self._paths) >= _KNOWN_PATHS:
                self._paths.clear()
            self._paths[key] = path
        return path

    def _write_temporary(self, views: Sequence[memoryview], *, sync: bool) -> str:
        """The path of a new complete file holding `views`; with `sync`, on the disk."""
        directory = os.path.join(self._root, TEMPORARY_DIRECTORY)
        path = os.path.join(directory, os.urandom(16).hex())
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, OBJECT_MODE)
        except FileNotFoundError:
            os.makedirs(directory, exist_ok=True)
            descriptor = os.open(path, flags, OBJECT_MODE)
        try:
            try:
                _write_all(descriptor, _write_directly(descriptor, views) if sync else views)
                expected = sum(view.nbytes for view in views)
                if os.fstat(descriptor).st_size != expected:
                    raise OSError(errno.EIO, "the file is shorter than what was written")
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except BaseException:
            _remove_if_exists(path)
            raise
        return path

    def _make_durable(self, directory: str) -> None:
        """Make a directory below the root, and let it and those above it survive power loss.

        One that exists may have been made a moment before a crash, so existence proves nothing.
        """
        with self._durable_lock:
            if directory in self._durable:
                return
            parent = os.path.dirname(directory)
        self._make_durable(parent)
        try:
            os.mkdir(directory)
        except FileExistsError:
            pass
        _sync_directory(parent)
        with self._durable_lock:
            self._durable.add(directory)

    def _check_same(self, key: str, path: str, views: Sequence[memoryview]) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            same = os.fstat(descriptor).st_size == sum(view.nbytes for view in views)
            offset = 0
            for view in views:
                same = same and _read_range(descriptor, offset, view.nbytes) == view
                offset += view.nbytes
        finally:
            os.close(descriptor)
        if not same:
            raise RepositoryDamaged(
                f"another object is already stored as {key} in {self.url}", fields={"key": key}
            )

    @contextlib.contextmanager
    def _explained(self, action: str, path: str) -> Iterator[None]:
        """Turn errors of the operating system into those of a repository."""
        try:
            yield
        except OSError as error:
            raise self._explain(error, action, path) from error

    @staticmethod
    def _explain(error: OSError, action: str, path: str) -> RepositoryFull | RepositoryUnreachable:
        message = f"cannot {action} {path}: {error.strerror or error}"
        if error.errno in _NO_SPACE:
            return RepositoryFull(
                message, hint="free some space there; what is pending is kept", fields={"path": path}
            )
        return RepositoryUnreachable(
            message, hint="check that the disk is mounted and that you may use it", fields={"path": path}
        )


def _write_directly(descriptor: int, views: Sequence[memoryview]) -> Sequence[memoryview]:
    """Write what can be written around the page cache; what is left.

    What is read again only when somebody looks at it would push out of memory what a training reads all the
    time, and copying it there takes as long as hashing it. Needs aligned memory, as packs have it, and a file
    system that can do it; nothing is lost where it cannot.
    """
    if not views or len(views[0]) < MIN_DIRECT_BYTES or not hasattr(os, "O_DIRECT"):
        return views
    first = views[0]
    size = len(first) - len(first) % DIRECT_ALIGNMENT
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    done = 0
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        while done < size:
            written = os.write(descriptor, first[done:size])
            done += written
            if written % DIRECT_ALIGNMENT:
                break
    except OSError as error:
        if error.errno not in _NOT_DIRECT:
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return [first[done:], *views[1:]]


def _write_all(descriptor: int, views: Sequence[memoryview]) -> None:
    pending = list(views)
    start = 0
    while start < len(pending):
        written = os.writev(descriptor, pending[start : start + _MAX_VECTORS])
        while start < len(pending) and written >= len(pending[start]):
            written -= len(pending[start])
            start += 1
        if written:
            pending[start] = pending[start][written:]


def _read_range(descriptor: int, offset: int, length: int) -> bytes:
    """At most `length` bytes from `offset`; fewer only at the end. One call hands over at most 2 GiB."""
    data = os.pread(descriptor, length, offset)
    if len(data) == length or not data:
        return data
    pieces = [data]
    done = len(data)
    while done < length and (piece := os.pread(descriptor, length - done, offset + done)):
        pieces.append(piece)
        done += len(piece)
    return b"".join(pieces)


def _move_to_new(temporary: str, path: str) -> bool:
    """Give a complete file its name unless that is taken; whether it was free."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Keys of data are random, so nobody comes between these two.
        if os.path.exists(path):
            return False
        os.rename(temporary, path)
    return True


def _is_near(directory: str) -> bool:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        # Whatever is wrong shows when something is read; what is kept costs little.
        return False
    try:
        return is_near(descriptor)
    finally:
        os.close(descriptor)


def _scan(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove_if_exists(path: str) -> bool:
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
