"""Freeze files: walk the chosen paths and copy them into the spool, each file as it was at one moment.

`Capturer.capture` returns when the daemon owns the bytes, whatever the training script does next. Small
files are read into one packed file, big ones are reflinked where the file system can and copied
otherwise; `fstat` before and after proves that nobody wrote meanwhile, else the file is taken again
and finally refused: never a mixed file. Directories are walked by descriptor and no symlink is ever
followed, so nothing outside the project can get in. Called by `intake`, from several threads at once.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from replicate.errors import CaptureFailed, ChangedWhileReading, PathMissing
from replicated.snapshot.ignore import IGNORE_FILE, IgnoreRules
from replicated.snapshot.spool import PACKED_FILE, EntryWriter, Spool, SpooledEntry

#: Up to here a file is read into the packed file: a spool file of its own costs ten times as much.
SMALL_FILE_BYTES = 1 << 20
#: A file that is written to all the time is taken this often, with growing pauses, 0.3 s in all.
ATTEMPTS = 6
FIRST_PAUSE_S = 0.01

_PACK_BUFFER_BYTES = 4 << 20
_COPY_STEP_BYTES = 64 << 20
_FICLONE = 0x40049409
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_VIRTUAL_ENVIRONMENT_MARK = "pyvenv.cfg"
_NAMED_IN_WARNING = 3


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """What to freeze: `paths` are relative to `project_directory`, "." is all of it."""

    identifier: str
    project_directory: bytes
    paths: tuple[bytes, ...]
    ignore: tuple[str, ...] = ()
    #: Survive a power cut on return (`capture: copy`); else only the death of trainer and daemon.
    durable: bool = False


@dataclass(frozen=True, slots=True)
class Captured:
    """What was frozen."""

    file_count: int
    size_bytes: int
    warnings: tuple[str, ...]


class Capturer:
    """Makes spools; `private` directories (our own state) are never captured."""

    def __init__(self, spool: Spool, private: Iterable[Path]) -> None:
        self._spool = spool
        self._private = frozenset(_identities(private))

    def capture(self, request: CaptureRequest, repository_directory: Path | None) -> Captured:
        """Freeze the paths of a request into the spool.

        Raises `PathMissing`, `ChangedWhileReading` or `CaptureFailed` naming the file; then nothing
        is left in the spool. The repository's own directory is skipped.
        """
        selection = _Selection.of(request.paths)
        skipped = self._private.union(_identities([repository_directory] if repository_directory else []))
        try:
            directory = self._spool.begin(request.identifier)
            walk = _Walk(request, directory, skipped)
            try:
                walk.run(selection)
            finally:
                walk.close()
            self._spool.commit(request.identifier, durable=request.durable)
        except OSError as error:
            self._spool.abandon(request.identifier)
            raise _spool_error(error, self._spool.directory) from error
        except BaseException:
            self._spool.abandon(request.identifier)
            raise
        return Captured(walk.file_count, walk.size_bytes, walk.warnings())

    def forget(self, identifier: str) -> None:
        """Remove what was captured, because it could not be acknowledged."""
        self._spool.remove(identifier)


@dataclass(slots=True)
class _Selection:
    """The chosen paths as a tree: everything below, or only the named children."""

    everything: bool = False
    children: dict[bytes, _Selection] = field(default_factory=dict)

    @staticmethod
    def of(paths: Iterable[bytes]) -> _Selection:
        root = _Selection()
        for path in paths:
            node = root
            for part in path.split(b"/"):
                if part in (b"", b"."):
                    continue
                if part == b"..":
                    raise PathMissing(f"path is outside the project directory: {os.fsdecode(path)}")
                node = node.children.setdefault(part, _Selection())
            node.everything = True
        return root


@dataclass(slots=True)
class _Frame:
    """One open directory of the walk."""

    descriptor: int
    path: bytes
    rules: IgnoreRules
    selection: _Selection
    names: Iterator[bytes]


class _Walk:
    """One capture in progress."""

    def __init__(self, request: CaptureRequest, directory: Path, skipped: frozenset[tuple[int, int]]) -> None:
        self._request = request
        self._spool_directory = directory
        self._skipped = skipped
        self._entries = EntryWriter(directory)
        self._packed = (directory / PACKED_FILE).open("wb", buffering=_PACK_BUFFER_BYTES)
        self._packed_bytes = 0
        self._large_count = 0
        self._reflink_refused: set[int] = set()
        self._copy_buffer: mmap.mmap | None = None
        self._special: list[bytes] = []
        self._secrets: list[bytes] = []
        self._mounts: list[bytes] = []
        self._own_mounts: frozenset[int] | None = None
        self.file_count = 0
        self.size_bytes = 0

    def run(self, selection: _Selection) -> None:
        project = self._request.project_directory
        try:
            descriptor = os.open(project, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise PathMissing(
                f"cannot open the project directory {os.fsdecode(project)}: {error.strerror}"
            ) from error
        info = os.fstat(descriptor)
        self._device = info.st_dev
        self._entries.write(_directory_entry(b"", info))
        rules = IgnoreRules(self._request.ignore)
        stack = [self._enter(descriptor, b"", rules, selection)]
        try:
            while stack:
                frame = stack[-1]
                name = next(frame.names, None)
                if name is None:
                    os.close(stack.pop().descriptor)
                    continue
                below = self._visit(frame, name)
                if below is not None:
                    stack.append(below)
        finally:
            for frame in stack:
                os.close(frame.descriptor)

    def close(self) -> None:
        self._entries.close()
        self._packed.close()

    def warnings(self) -> tuple[str, ...]:
        found = []
        if self._special:
            found.append(
                f"skipped {_count(self._special, 'socket, pipe or device', 'sockets, pipes or devices')}"
            )
        if self._secrets:
            counted = _count(self._secrets, "file that may hold secrets", "files that may hold secrets")
            found.append(f"skipped {counted} (write `!NAME` into {IGNORE_FILE} to save such a file)")
        if self._mounts:
            found.append(f"skipped {_count(self._mounts, 'mount of a snapshot', 'mounts of snapshots')}")
        return tuple(found)

    def _enter(self, descriptor: int, path: bytes, rules: IgnoreRules, selection: _Selection) -> _Frame:
        """Begin with an open directory; takes over the descriptor, also when it raises."""
        try:
            rules = self._with_ignore_file(descriptor, path, rules)
            names = set(selection.children)
            if selection.everything:
                names.update(os.fsencode(name) for name in os.listdir(descriptor))
            return _Frame(descriptor, path, rules, selection, iter(sorted(names)))
        except BaseException:
            os.close(descriptor)
            raise

    def _with_ignore_file(self, descriptor: int, path: bytes, rules: IgnoreRules) -> IgnoreRules:
        try:
            file = os.open(IGNORE_FILE, _OPEN_FLAGS, dir_fd=descriptor)
        except OSError:
            return rules
        with open(file, encoding="utf-8", errors="surrogateescape") as text:
            if not stat.S_ISREG(os.fstat(text.fileno()).st_mode):
                return rules
            return rules.below(os.fsdecode(path), text.read().splitlines())

    def _visit(self, frame: _Frame, name: bytes) -> _Frame | None:
        """Capture one entry; a directory comes back as the frame to go on with."""
        path = frame.path + b"/" + name if frame.path else name
        asked_for = frame.selection.children.get(name)
        for pause in _pauses():
            try:
                info = os.stat(name, dir_fd=frame.descriptor, follow_symlinks=False)
                rules = self._admit(frame, name, path, info, asked_for)
                if rules is None:
                    return None
                if stat.S_ISDIR(info.st_mode):
                    return self._directory(frame, name, path, rules, asked_for)
                if stat.S_ISLNK(info.st_mode):
                    self._symlink(frame, name, path, info)
                    return None
                if not stat.S_ISREG(info.st_mode):
                    self._special.append(path)
                    return None
                if self._file(frame.descriptor, name, path):
                    return None
            except FileNotFoundError:
                if asked_for is not None:
                    raise PathMissing(f"no such file or directory: {os.fsdecode(path)}") from None
                return None  # deleted since the directory was listed
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):  # became another type of file
                    raise self._source_error(error, path) from error
            time.sleep(pause)
        raise ChangedWhileReading(
            f"the file kept changing while it was saved: {os.fsdecode(path)}",
            hint=f"save it when it is not being written, or exclude it in {IGNORE_FILE}",
            fields={"path": os.fsdecode(path)},
        )

    def _admit(
        self, frame: _Frame, name: bytes, path: bytes, info: os.stat_result, asked_for: _Selection | None
    ) -> IgnoreRules | None:
        """The rules that hold for an entry and below it, or None when it is left out."""
        if (info.st_dev, info.st_ino) in self._skipped:
            return None
        is_directory = stat.S_ISDIR(info.st_mode)
        if is_directory and info.st_dev != self._device and info.st_dev in self._mounted_snapshots():
            self._mounts.append(path)
            return None
        if asked_for is not None:
            return frame.rules.with_path_asked_for(os.fsdecode(path)) if asked_for.everything else frame.rules
        decision = frame.rules.decide(os.fsdecode(path), os.fsdecode(name), is_directory)
        if decision == "secret":
            self._secrets.append(path)
        if decision == "keep" and is_directory:
            mark = os.fsencode(_VIRTUAL_ENVIRONMENT_MARK)
            if _exists(name + b"/" + mark, frame.descriptor):
                return None
        return frame.rules if decision == "keep" else None

    def _mounted_snapshots(self) -> frozenset[int]:
        """Devices of our own mounts: to save a mounted snapshot would be to save everything twice."""
        if self._own_mounts is None:
            devices = set()
            with open("/proc/self/mountinfo", "rb") as table:
                for line in table:
                    fields, _, rest = line.partition(b" - ")
                    if rest.startswith(b"fuse.replicate "):
                        major, minor = fields.split()[2].split(b":")
                        devices.add(os.makedev(int(major), int(minor)))
            self._own_mounts = frozenset(devices)
        return self._own_mounts

    def _directory(
        self, frame: _Frame, name: bytes, path: bytes, rules: IgnoreRules, asked_for: _Selection | None
    ) -> _Frame:
        descriptor = os.open(name, _OPEN_FLAGS | os.O_DIRECTORY, dir_fd=frame.descriptor)
        self._entries.write(_directory_entry(path, os.fstat(descriptor)))
        inherited = _Selection(everything=frame.selection.everything)
        selection = asked_for or inherited
        if inherited.everything:
            selection.everything = True
        return self._enter(descriptor, path, rules, selection)

    def _symlink(self, frame: _Frame, name: bytes, path: bytes, info: os.stat_result) -> None:
        target = os.readlink(name, dir_fd=frame.descriptor)
        self._entries.write(
            SpooledEntry(
                path,
                "symlink",
                stat.S_IMODE(info.st_mode),
                info.st_mtime_ns,
                size=len(target),
                target=os.fsencode(target),
            )
        )

    def _file(self, directory: int, name: bytes, path: bytes) -> bool:
        """Capture a regular file; False when it changed meanwhile and is to be taken again."""
        descriptor = os.open(name, _OPEN_FLAGS, dir_fd=directory)
        try:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                return False
            if before.st_size <= SMALL_FILE_BYTES:
                placed = self._pack(descriptor, before)
            else:
                placed = self._copy_large(descriptor, before)
        finally:
            os.close(descriptor)
        if placed is None:
            return False
        source, offset = placed
        self._entries.write(
            SpooledEntry(
                path,
                "file",
                stat.S_IMODE(before.st_mode),
                before.st_mtime_ns,
                size=before.st_size,
                source=source,
                offset=offset,
            )
        )
        self.file_count += 1
        self.size_bytes += before.st_size
        return True

    def _pack(self, descriptor: int, before: os.stat_result) -> tuple[str, int] | None:
        # One byte more than expected shows growth; a larger buffer would cost more than the read.
        data = os.read(descriptor, before.st_size + 1)
        while len(data) < before.st_size:
            more = os.read(descriptor, before.st_size + 1 - len(data))
            if not more:
                break
            data += more
        if len(data) != before.st_size or not _is_same(before, os.fstat(descriptor)):
            return None
        offset = self._packed_bytes
        self._packed.write(data)
        self._packed_bytes += len(data)
        return PACKED_FILE, offset

    def _copy_large(self, descriptor: int, before: os.stat_result) -> tuple[str, int] | None:
        name = f"large-{self._large_count}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        target = os.open(self._spool_directory / name, flags, 0o600)
        try:
            if not self._reflink(descriptor, target, before.st_dev):
                os.ftruncate(target, before.st_size)
                self._copy_data(descriptor, target, before.st_size)
            if os.fstat(target).st_size == before.st_size and _is_same(before, os.fstat(descriptor)):
                self._large_count += 1
                return name, 0
        finally:
            os.close(target)
        os.unlink(self._spool_directory / name)
        return None

    def _reflink(self, source: int, target: int, device: int) -> bool:
        if device in self._reflink_refused:
            return False
        try:
            fcntl.ioctl(target, _FICLONE, source)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise _SpoolFailure(error) from error
            self._reflink_refused.add(device)
            return False
        return True

    def _copy_data(self, source: int, target: int, size: int) -> None:
        """Copy the parts that hold data; holes stay holes."""
        position = 0
        while position < size:
            try:
                start = os.lseek(source, position, os.SEEK_DATA)
                end = min(os.lseek(source, start, os.SEEK_HOLE), size)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return  # only a hole is left
                start, end = position, size  # no holes here: a file system without them
            if start >= size or not self._copy_range(source, target, start, end):
                return
            position = end

    def _copy_range(self, source: int, target: int, start: int, end: int) -> bool:
        """Copy bytes start..end; False when the source ended before."""
        while start < end:
            step = min(end - start, _COPY_STEP_BYTES)
            try:
                copied = os.copy_file_range(source, target, step, start, start)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise _SpoolFailure(error) from error
                copied = self._copy_through_memory(source, target, start, step)
            if copied == 0:
                return False
            start += copied
        return True

    def _copy_through_memory(self, source: int, target: int, start: int, step: int) -> int:
        if self._copy_buffer is None:
            # Page-aligned: reading into memory that is not runs five times slower on some processors.
            self._copy_buffer = mmap.mmap(-1, 1 << 20)
        view = memoryview(self._copy_buffer)[: min(step, len(self._copy_buffer))]
        count = os.preadv(source, [view], start)
        written = 0
        try:
            while written < count:
                written += os.pwrite(target, view[written:count], start + written)
        except OSError as error:
            raise _SpoolFailure(error) from error
        return count

    def _source_error(self, error: OSError, path: bytes) -> Exception:
        if isinstance(error, _SpoolFailure) or error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _spool_error(error, self._spool_directory.parent)
        shown = os.fsdecode(path)
        return CaptureFailed(
            f"cannot read {shown}: {error.strerror}",
            hint=f"make it readable, or exclude it in {IGNORE_FILE}",
            fields={"path": shown, "errno": errno.errorcode.get(error.errno or 0, "")},
        )


class _SpoolFailure(OSError):
    """The write side of a copy failed, not the file of the user."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause.errno, cause.strerror)


def _directory_entry(path: bytes, info: os.stat_result) -> SpooledEntry:
    return SpooledEntry(path, "directory", stat.S_IMODE(info.st_mode), info.st_mtime_ns)


def _is_same(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_size, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )


def _pauses() -> Iterator[float]:
    return (FIRST_PAUSE_S * 2**attempt for attempt in range(ATTEMPTS - 1))


def _exists(path: bytes, directory: int) -> bool:
    try:
        os.stat(path, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return True


def _identities(directories: Iterable[Path]) -> Iterator[tuple[int, int]]:
    for directory in directories:
        try:
            info = os.stat(directory)
        except OSError:
            continue
        yield info.st_dev, info.st_ino


def _count(paths: list[bytes], singular: str, plural: str) -> str:
    shown = ", ".join(os.fsdecode(path) for path in paths[:_NAMED_IN_WARNING])
    rest = ", …" if len(paths) > _NAMED_IN_WARNING else ""
    return f"{len(paths)} {singular if len(paths) == 1 else plural}: {shown}{rest}"


def _spool_error(error: OSError, directory: Path) -> CaptureFailed:
    try:
        status = os.statvfs(directory)
        free = f" ({status.f_bavail * status.f_frsize >> 20} MiB free)"
    except OSError:
        free = ""
    return CaptureFailed(
        f"cannot write to the spool {directory}: {error.strerror}{free}",
        hint="free some space, or set REPLICATE_HOME to a larger disk",
    )
