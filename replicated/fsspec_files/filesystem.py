"""The file system that fsspec makes for `replicate://` URLs.

`replicate://ID/path` is a file of the snapshot that an id shows, whatever the command line takes as one;
`replicate://` lists experiments. It holds no connection and no file, only which repository is meant, so it
can be sent to other processes; with it goes what the ids meant that were used here, so that all processes of
a job read the same snapshots. May be used from several threads.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final, NoReturn

from fsspec.callbacks import NoOpCallback
from fsspec.config import apply_config
from fsspec.spec import AbstractFileSystem
from fsspec.utils import isfilelike, stringify_path

from replicate.config import find_project, resolve_repository
from replicate.errors import ReplicateError
from replicated.fsspec_files.failing import as_os_error, is_missing, no_file, os_errors, refuse
from replicated.fsspec_files.fetching import Range, iter_parts, read_ranges
from replicated.fsspec_files.files import MAX_WINDOW_BYTES, SnapshotFile
from replicated.fsspec_files.forking import gate
from replicated.fsspec_files.looking import Found, entries, find, look
from replicated.fsspec_files.naming import FRESH_S, Meaning
from replicated.fsspec_files.opening import OpenRepository, Source, forget_names, opened
from replicated.fsspec_files.walking import UNKNOWN, Directory, Listed, walk
from replicated.tree import Tree

#: Ranges that are asked for together are kept in memory when they are no longer than this in all.
_MAX_KEPT_BYTES: Final = 16 << 20
_NO_CALLBACK: Final = NoOpCallback()
#: Repository URLs that do not depend on a project.
_COMPLETE: Final = ("file:///", "s3://", "gs://")


class _OneForEachRepository(type(AbstractFileSystem)):  # type: ignore[misc]  # fsspec has no types
    """Settles which repository is meant before fsspec looks whether it has a file system for it."""

    def __call__(cls, repository: str | None = None, **options: Any) -> Any:
        if repository is not None:
            options["repository"] = repository
        options = apply_config(cls, options)
        chosen = options.get("repository") or ""
        if "cache_bytes" in options and chosen.startswith(_COMPLETE):
            # As it comes from another process, whose project is not here.
            options["repository"] = resolve_repository(chosen, Path("/"))
        else:
            project = find_project(repository=chosen)
            options["repository"] = project.repository
            options.setdefault("cache_bytes", project.cache_size)
        return super().__call__(**options)


class ReplicateFileSystem(AbstractFileSystem, metaclass=_OneForEachRepository):  # type: ignore[misc]
    """The snapshots of one repository, read-only.

    Options: `repository`, a URL (else `REPLICATE_REPOSITORY`, else what replicate.yaml says);
    `cache_bytes`, how much of what is read from a far repository may be kept on the disk of this machine
    (0: none); `environment`, variables for the SDK of a cloud (`AWS_ACCESS_KEY_ID`, …) that go before those
    of each process; `listings_expiry_time`, for how many seconds an id that can come to mean something else,
    such as `latest`, is not looked up again.

    Errors are `OSError`: `FileNotFoundError`, `IsADirectoryError`, `PermissionError`; EIO names damage, EROFS
    answers whoever wants to write, EHOSTUNREACH says that the repository cannot be reached.
    """

    protocol = "replicate"
    root_marker = ""
    blocksize = MAX_WINDOW_BYTES

    def __init__(
        self,
        repository: str,
        cache_bytes: int,
        environment: Mapping[str, str] | None = None,
        listings_expiry_time: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(listings_expiry_time=listings_expiry_time, **options)
        #: Which repository is meant.
        self.source: Final = Source(repository, int(cache_bytes), tuple(sorted((environment or {}).items())))
        self._max_age_s = FRESH_S if listings_expiry_time is None else float(listings_expiry_time)
        #: What names mean that came with this file system from another process.
        self._settled: Mapping[str, Meaning] = {}
        #: What names meant here last.
        self._used: dict[str, Meaning] = {}

    @property
    def fsid(self) -> str:
        """The same for all file systems of one repository."""
        return f"replicate_{self.source.url}"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return stringify_path(path).removeprefix("replicate://").strip("/")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _restore, (type(self), self.storage_options, {**self._used, **self._settled})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReplicateFileSystem) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __dask_tokenize__(self) -> object:
        return self._identity, sorted({**self._used, **self._settled}.items())

    @property
    def _identity(self) -> tuple[object, ...]:
        return type(self).__qualname__, self.source, self._max_age_s

    # Names and lists

    def resolve(self, path: str) -> str:
        """The same path with an id that shows the same for ever, a full one."""
        path = self._strip_protocol(path)
        with os_errors(path):
            reference, slash, rest = path.partition("/")
            return self._meaning(reference).fixed_id + slash + rest if reference else ""

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """See fsspec; files have `blake3`, the hash of their content, links that are followed `islink`."""
        path = self._strip_protocol(path)
        with os_errors(path):
            reference, names = _split(path)
            if not reference:
                return _directory("")
            tree = self._tree(reference)
            if tree is not None:
                return look(tree, names, path)
            if names:
                raise no_file("no files were saved with it", path)
            return _directory(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """See fsspec; reads one directory, and of each link where it leads."""
        path = self._strip_protocol(path)
        with os_errors(path):
            reference, names = _split(path)
            infos: list[dict[str, Any]] = []
            if not reference:
                infos = list(self._list_experiments())
            elif (tree := self._tree(reference)) is not None:
                found = find(tree, names, path)
                if found.node.type == "directory":
                    infos = [info for _, info in entries(tree, found, path)]
                else:
                    infos = [look(tree, names, path)]
            elif names:
                raise no_file("no files were saved with it", path)
        return infos if detail else [info["name"] for info in infos]

    def walk(
        self,
        path: str,
        maxdepth: int | None = None,
        topdown: bool = True,
        on_error: str | Callable[[OSError], Any] = "omit",
        **options: Any,
    ) -> Iterator[tuple[str, Any, Any]]:
        """See fsspec. A link to a directory above it is shown and not gone into.

        What is left out on an error is what is missing: never what is damaged or out of reach.
        """
        if maxdepth is not None and maxdepth < 1:
            raise ValueError("maxdepth must be at least 1")
        detail = options.get("detail", False)
        for directory, directories, files in walk(
            self._strip_protocol(path), self._list_directory, maxdepth, topdown, on_error
        ):
            if detail:
                yield directory, directories, files
            else:
                names = list(directories)
                yield directory, names, list(files)
                # Who is told the names may take some away.
                for gone in directories.keys() - set(names):
                    del directories[gone]

    def exists(self, path: str, **_: Any) -> bool:
        """Whether something is there; raises when that cannot be known."""
        return self._is(path, self._is_there)

    def isdir(self, path: str) -> bool:
        """Whether a directory is there; raises when that cannot be known."""
        return self._is(path, lambda path: self.info(path)["type"] == "directory")

    def isfile(self, path: str) -> bool:
        """Whether a file is there; raises when that cannot be known."""
        return self._is(path, lambda path: self.info(path)["type"] == "file")

    def modified(self, path: str) -> datetime:
        """When a file was changed last before it was saved."""
        nanoseconds = self.info(path).get("mtime_ns")
        if nanoseconds is None:
            return self.created(path)
        return _time(nanoseconds)

    def created(self, path: str) -> datetime:
        """When the snapshot was made that a path is in."""
        path = self._strip_protocol(path)
        reference, _ = _split(path)
        with os_errors(path):
            if not reference:
                raise no_file("the list of experiments has no time", path)
            return _time(opened(self.source).names.created_ns(self._meaning(reference)))

    def checksum(self, path: str) -> int:
        """Another number for every content."""
        return int(self.ukey(path)[:32], 16)

    def ukey(self, path: str) -> str:
        """The hash of the content of a file; of a directory, what is the same as long as that is."""
        info = self.info(path)
        return str(info["blake3"] if "blake3" in info else super().ukey(path))

    def invalidate_cache(self, path: str | None = None) -> None:
        """Look up again what names mean, but those that came with this file system from another process."""
        forget_names(self.source)
        super().invalidate_cache(path)

    # Reading

    def open(self, path: str, mode: str = "rb", *args: Any, **options: Any) -> Any:
        """See fsspec; only for reading."""
        if set(mode) & set("wax+"):
            refuse(path)
        return super().open(path, mode, *args, **options)

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **options: Any) -> SnapshotFile:
        options.pop("size", None)
        with os_errors(path):
            found = self._find_file(path)[1]
        return SnapshotFile(self, path, found.node, block_size=block_size, **options)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """See fsspec."""
        return self._read([path], [start], [end])[0]

    def cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **_: Any,
    ) -> list[Any]:
        """See fsspec; all of it together, in few requests. What lies close is joined, whatever `max_gap`."""
        if not isinstance(paths, list):
            raise TypeError(f"paths must be a list, not {paths!r}")
        starts = list(starts) if _is_listed(starts) else [starts] * len(paths)
        ends = list(ends) if _is_listed(ends) else [ends] * len(paths)
        if not len(starts) == len(ends) == len(paths):
            raise ValueError(f"{len(paths)} paths, {len(starts)} starts and {len(ends)} ends")
        try:
            return list(self._read(paths, starts, ends))
        except OSError:
            if on_error != "return":
                raise
        return [self._read_or_error(*one) for one in zip(paths, starts, ends, strict=True)]

    def cat(self, path: Any, recursive: bool = False, on_error: str = "raise", **options: Any) -> Any:
        """See fsspec; several files in few requests, and of directories only their files."""
        paths = self.expand_path(path, recursive=recursive)
        if len(paths) == 1 and not isinstance(path, list) and paths[0] == self._strip_protocol(path):
            return self.cat_file(paths[0], **options)
        files = [one for one in paths if not (recursive and self.isdir(one))]
        starts, ends = options.get("start"), options.get("end")
        contents = self.cat_ranges(files, starts, ends, on_error="raise" if on_error == "raise" else "return")
        found = dict(zip(files, contents, strict=True))
        if on_error == "omit":
            return {one: data for one, data in found.items() if not isinstance(data, Exception)}
        return found

    def get_file(
        self, rpath: str, lpath: Any, callback: Any = _NO_CALLBACK, outfile: Any = None, **_: Any
    ) -> None:
        """See fsspec; a new file is there whole or not at all, an old one is whole or empty."""
        rpath = self._strip_protocol(rpath)
        if outfile is None and isfilelike(lpath):
            outfile = lpath
        if outfile is not None:
            self._copy_to(rpath, outfile, callback)
        elif self.isdir(rpath):
            os.makedirs(lpath, exist_ok=True)
        else:
            target = os.path.abspath(stringify_path(lpath))
            if os.path.lexists(target):
                # Who has it open means the same file, so it is not replaced.
                with open(target, "wb") as file:
                    self._fill(rpath, file, callback)
                return
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".replicate-", dir=os.path.dirname(target)) as directory:
                part = os.path.join(directory, "part")
                with open(part, "xb") as file:
                    self._copy_to(rpath, file, callback)
                os.replace(part, target)

    # Writing

    def _refuse(self, path: Any, *_: Any, **__: Any) -> NoReturn:
        refuse(path)

    def _refuse_second(self, _: Any, path: Any, *__: Any, **___: Any) -> NoReturn:
        refuse(path)

    mkdir = makedirs = rmdir = rm = rm_file = _rm = pipe = pipe_file = touch = write_text = mv = _refuse
    cp_file = copy = put = put_file = _refuse_second

    # Inside

    def _is(self, path: str, ask: Callable[[str], bool]) -> bool:
        try:
            return ask(self._strip_protocol(path))
        except OSError as error:
            if is_missing(error):
                return False
            raise

    def _is_there(self, path: str) -> bool:
        # A link that leads nowhere is no file.
        return bool(self.info(path)["type"] != "link")

    def _meaning(self, reference: str) -> Meaning:
        meaning = self._settled.get(reference)
        if meaning is None:
            meaning = opened(self.source).names.find(reference, self._max_age_s)
            self._used[reference] = meaning
        return meaning

    def _tree(self, reference: str) -> Tree | None:
        """The files that an id shows; None when none were saved."""
        meaning = self._meaning(reference)
        return self._repository().tree(meaning.snapshot_ids) if meaning.snapshot_ids else None

    def _repository(self) -> OpenRepository:
        return opened(self.source)

    def _find(self, path: str) -> tuple[Tree, Found]:
        """What lies at a path below an id."""
        reference, names = _split(path)
        tree = self._tree(reference)
        if tree is None:
            raise no_file("no files were saved with it", path)
        return tree, find(tree, names, path)

    def _find_file(self, path: str) -> tuple[Tree, Found]:
        """The regular file at a path; raises `IsADirectoryError` for a directory."""
        if not _split(path)[1]:
            self.info(path)  # raises when there is nothing
            raise _is_directory(path)
        tree, found = self._find(path)
        if found.node.type == "directory":
            raise _is_directory(path)
        return tree, found

    def _read(self, paths: Sequence[str], starts: Sequence[Any], ends: Sequence[Any]) -> list[bytes]:
        with gate.passing():
            return self._read_ranges(paths, starts, ends)

    def _read_ranges(self, paths: Sequence[str], starts: Sequence[Any], ends: Sequence[Any]) -> list[bytes]:
        ranges: list[Range] = []
        shown = ""
        try:
            for path, start, end in zip(paths, starts, ends, strict=True):
                shown = path = self._strip_protocol(path)
                tree, found = self._find_file(path)
                begin, stop, _ = slice(start, end).indices(found.node.size)
                ranges.append(Range(tree.reader(found.node), begin, max(begin, stop)))
            shown = shown if len(paths) == 1 else f"{len(paths)} files"
            size_bytes = sum(one.stop - one.start for one in ranges)
            return read_ranges(self._repository().repository, ranges, is_once=size_bytes > _MAX_KEPT_BYTES)
        except ReplicateError as error:
            raise as_os_error(error, shown) from error

    def _read_or_error(self, path: str, start: Any, end: Any) -> bytes | OSError:
        try:
            return self._read([path], [start], [end])[0]
        except OSError as error:
            return error

    def _fill(self, path: str, file: Any, callback: Any) -> None:
        try:
            self._copy_to(path, file, callback)
        except BaseException:
            # What came before the trouble must not pass for the file.
            file.seek(0)
            file.truncate()
            raise

    def _copy_to(self, path: str, file: Any, callback: Any) -> None:
        with os_errors(path):
            tree, found = self._find_file(path)
            whole = Range(tree.reader(found.node), 0, found.node.size)
        callback.set_size(found.node.size)
        parts = iter_parts(self._repository().repository, [whole], is_once=True)
        while True:
            # Not while they are written: that takes long.
            with os_errors(path):
                _, part = next(parts, (0, None))
            if part is None:
                return
            file.write(part)
            callback.relative_update(len(part))

    def _list_experiments(self) -> Iterator[dict[str, Any]]:
        for place in self._repository().names.list_experiments(self._max_age_s):
            yield {**_directory(place.id), "created": _time(place.created_ns)}

    def _list_directory(self, path: str, known: Directory) -> Listed:
        """What a walk finds in a directory."""
        with os_errors(path):
            reference, names = _split(path)
            if not reference:
                return Listed(known, [(UNKNOWN, info) for info in self._list_experiments()])
            tree, found = known
            if tree is None or found is None:
                tree = self._tree(reference)
                if tree is None and names:
                    raise no_file("no files were saved with it", path)
                if tree is None:
                    return Listed(known, ())
                found = find(tree, names, path)
            if found.node.type != "directory":
                return Listed(known, [(UNKNOWN, self.info(path))])
            listed = [(Directory(tree, entry), info) for entry, info in entries(tree, found, path)]
            return Listed(Directory(tree, found), listed)


def _restore(
    cls: type[ReplicateFileSystem], options: Mapping[str, Any], settled: Mapping[str, Meaning]
) -> ReplicateFileSystem:
    """A file system that was sent here, for which names mean what they meant there."""
    if not settled:
        return cls(**options)
    # Of its own: others here are not bound by that.
    restored = cls(**options, skip_instance_cache=True)
    restored._settled = settled
    return restored


def _split(path: str) -> tuple[str, list[bytes]]:
    """The id that a path begins with, and the names after it."""
    reference, _, rest = path.partition("/")
    return reference, [os.fsencode(name) for name in rest.split("/") if name]


def _directory(path: str) -> dict[str, Any]:
    return {"name": path, "size": 0, "type": "directory"}


def _is_directory(path: str) -> IsADirectoryError:
    return IsADirectoryError(errno.EISDIR, "a directory in the snapshot", path)


def _is_listed(values: object) -> bool:
    return isinstance(values, Sequence) or hasattr(values, "__array__")


def _time(nanoseconds: int) -> datetime:
    # Not by a float, which has no room for microseconds of this century and nanoseconds less.
    return _EPOCH + timedelta(microseconds=nanoseconds // 1000)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
