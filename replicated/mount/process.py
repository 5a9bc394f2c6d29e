"""The program that serves one mount: `replicated mount-process`, started by `table` or in a foreground.

It opens the repository itself and is independent of the daemon from then on: the daemon may end and
come back. It registers before it mounts, writes `ready` to standard output once the mount can be used,
and takes itself out of the register when it was unmounted or got SIGTERM.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from replicate.errors import ReplicateError
from replicate.ids import SnapshotId, short
from replicated.catalog import Catalog
from replicated.heap import keep_memory
from replicated.mount.filesystem import Filesystem, Usage
from replicated.mount.mountinfo import find_mounted
from replicated.mount.registry import (
    MountInfo,
    Registration,
    remove_registration,
    write_registration,
)
from replicated.mount.repository_view import RepositoryView
from replicated.processes import identify
from replicated.repository import Repository
from replicated.tree import open_tree

_LOG = logging.getLogger(__name__)

READY = b"ready\n"
#: The kernel reads ahead 128 KiB unless told otherwise, which makes eight requests of each one.
_READ_AHEAD_KB = 1024
#: A reader that tries again and again in a damaged file must not fill the disk with complaints.
_MAX_LOG_RECORDS = 1000
_MAX_LOG_BYTES = 1 << 20


def main(argv: Sequence[str]) -> int:
    """Serve one mount until it ends; the exit status. Reasons for a failure go to standard error."""
    options = _parse(argv)
    keep_memory()
    _start_logging()
    try:
        _serve(options)
    except ReplicateError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="replicated mount-process", description=__doc__)
    parser.add_argument("--repository", required=True, help="URL, absolute")
    parser.add_argument("--cache", required=True, type=Path, help="directory of the user's caches")
    parser.add_argument("--register", required=True, type=Path, help="directory of the register")
    parser.add_argument("--name", required=True, help="name in the register")
    parser.add_argument("--experiment", default="", metavar="ID")
    parser.add_argument("--checkpoint", default="", metavar="ID")
    parser.add_argument(
        "--snapshot", action="append", metavar="ID", help="repeatable; none: the whole repository"
    )
    parser.add_argument("--directory", required=True, help="mount point: absolute, without links")
    parser.add_argument("--made-directory", action="store_true", help="remove the mount point after")
    parser.add_argument("--log", type=Path, help="where messages go once it is mounted")
    return parser.parse_args(argv)


def _serve(options: argparse.Namespace) -> None:
    # Imported here, because the import fails where there is no libfuse, and a person shall read why.
    from replicated.mount import fusepy_engine

    process = identify(os.getpid())
    assert process is not None, "this process runs"
    directory = os.fsencode(options.directory)
    shown_id = options.checkpoint or options.experiment
    repository = Repository.open(options.repository, cache=options.cache, create=False)
    try:
        registration = Registration(
            name=options.name,
            info=MountInfo(
                id=shown_id,
                experiment_id=options.experiment,
                repository=options.repository,
                directory=options.directory,
                pid=process.pid,
            ),
            process=process,
            made_directory=options.made_directory,
        )
        filesystem = _open_filesystem(repository, options)
        write_registration(options.register, registration)
        try:
            fusepy_engine.serve(
                filesystem,
                directory,
                source_name=f"replicate:{short(shown_id or repository.id)}",
                on_mounted=lambda: _announce(directory, options.log),
            )
        finally:
            if options.made_directory:
                with suppress(OSError):
                    os.rmdir(directory)
            remove_registration(options.register, options.name)
    finally:
        repository.close()


def _open_filesystem(repository: Repository, options: argparse.Namespace) -> Filesystem:
    if not options.snapshot:
        # Not the daemon's: a catalog has one process that brings it up to date.
        view = RepositoryView(repository, Catalog(repository, options.cache / "mount-catalogs"))
        return Filesystem(view, changing=view.can_change)
    snapshot_ids = [SnapshotId(identifier) for identifier in options.snapshot]
    roots = [repository.load_snapshot(snapshot_id).root for snapshot_id in snapshot_ids]
    # What one snapshot lays over another is counted twice: good enough for `df`.
    usage = Usage(
        size_bytes=sum(root.size_bytes for root in roots),
        entries=1 + sum(root.files + root.directories + root.symlinks for root in roots),
    )
    return Filesystem(open_tree(repository, *snapshot_ids), usage=usage)


def _announce(directory: bytes, log: Path | None) -> None:
    """Tell who started us that the mount can be used, and let go of that one's files."""
    try:
        # Returns when the kernel has our answer to its greeting, and we have answered this.
        os.statvfs(directory)
        _raise_read_ahead(directory)
        if log is not None:
            _redirect(2, log)
        os.write(1, READY)
        _redirect(1, Path(os.devnull))
    except OSError:
        _LOG.exception("mounted, but not usable")
        os.kill(os.getpid(), signal.SIGTERM)


def _raise_read_ahead(directory: bytes) -> None:
    """Let the kernel read ahead as much as fits into one request; only root may."""
    mounted = find_mounted(directory)
    if mounted is not None:
        with suppress(OSError):
            Path(f"/sys/class/bdi/{mounted.device}/read_ahead_kb").write_text(f"{_READ_AHEAD_KB}\n")


def _redirect(descriptor: int, file: Path) -> None:
    """Make a standard descriptor append to `file`, which is put aside first when it has grown big."""
    with suppress(FileNotFoundError):
        if file.is_file() and file.stat().st_size > _MAX_LOG_BYTES:
            file.replace(file.with_name(file.name + ".1"))
    opened = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.dup2(opened, descriptor)
    os.close(opened)


def _start_logging() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s mount %(process)d %(levelname)s %(name)s: %(message)s")
    )
    handler.addFilter(_Bound())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


class _Bound(logging.Filter):
    """Lets a number of records through and then no more."""

    def __init__(self) -> None:
        super().__init__()
        self._passed = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        self._passed += 1
        if self._passed == _MAX_LOG_RECORDS:
            record.msg, record.args = "more than %d messages: silent from here", (_MAX_LOG_RECORDS,)
        return self._passed <= _MAX_LOG_RECORDS
