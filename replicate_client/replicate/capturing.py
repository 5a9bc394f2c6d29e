"""What `init` and `checkpoint` have in common: what is to be frozen, and what is said of what came of it.

Called by `beginning` and `run`. Asks nobody; looks only at this process: its environment and its mappings.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from replicate import notices
from replicate.config import RUNG_VARIABLE, RUNGS, ProjectConfig
from replicate.errors import CaptureFailed, InvalidArgument, PathMissing, ReplicateError
from replicate.lazy import LazyModule
from replicate.mappings import find_shared_mappings
from replicate.phrases import format_size, plural
from replicate.records import SnapshotState

if TYPE_CHECKING:
    from replicate import wire
    from replicate._pb import daemon_pb2 as pb
else:
    wire = LazyModule("replicate.wire")
    pb = LazyModule("replicate._pb.daemon_pb2")


def encode_capture(project: ProjectConfig, paths: Sequence[str], ignore: Sequence[str]) -> pb.Capture:
    """What to freeze; raises `InvalidArgument` when the environment asks for a rung that does not exist."""
    if not paths:
        return pb.Capture()
    directory = wire.encode_path(os.path.normpath(project.directory))
    return pb.Capture(
        project_directory=directory,
        paths=[wire.encode_path(path) for path in paths],
        ignore=[wire.encode_path(pattern) for pattern in (*project.ignore, *ignore)],
        mode=project.capture,
        mapped=find_shared_mappings(directory),
        rung=chosen_rung(),
        queue_limit_bytes=project.queue_limit,
        spool_limit_bytes=project.spool_limit,
        upload_limit_bytes_s=project.upload_limit,
        warn_above_bytes=project.warn_above,
    )


def decode_state(state: str) -> SnapshotState:
    """The state of a snapshot, checked."""
    return wire.decode_word(state, get_args(SnapshotState), "state")


def tell_reply(reply: pb.CaptureReply, kind: Literal["experiment", "checkpoint"], *, quiet: bool) -> None:
    """Say what a person should know of a capture; `quiet` silences what was skipped by rule, not trouble."""
    if not quiet:
        for warning in reply.warnings:
            notices.warn_once(warning)
    if reply.HasField("unusual"):
        # Once for each kind: a model of this size is saved again and again.
        notices.warn_once(_describe_unusual(reply.unusual, kind), about=f"size of {kind}")
    if reply.waiting_because:
        notices.warn_once(f"what is captured waits to be stored: {reply.waiting_because}")


def _describe_unusual(added: pb.Additions, kind: str) -> str:
    total = f"{format_size(added.size_bytes)} in {plural(added.file_count, 'file')}"
    largest = ", ".join(
        f"{wire.decode_path(one.path)} ({format_size(one.size_bytes)}"
        + (f" in {plural(one.small_files, 'small file')})" if one.small_files else ")")
        for one in added.largest
    )
    return (
        f"this {kind} saves unusually much that is new, {total}, most of it in {largest}; leave out what is"
        " not meant with `ignore` in replicate.yaml or a .replicateignore file, or set `warn_above` in"
        " replicate.yaml to a larger size or `off`"
    )


def error_for_users(error: ReplicateError) -> Exception:
    """The daemon's error as the exception that Python has for it."""
    if isinstance(error, PathMissing):
        return FileNotFoundError(errno.ENOENT, error.message)
    if isinstance(error, CaptureFailed) and error.fields.get("errno") in ("EACCES", "EPERM"):
        number = errno.EACCES if error.fields["errno"] == "EACCES" else errno.EPERM
        return PermissionError(number, error.message, error.fields.get("path"))
    return error


def chosen_rung() -> str:
    """The only rung that the environment allows, empty for all of them; raises `InvalidArgument`."""
    rung = os.environ.get(RUNG_VARIABLE, "")
    if rung not in ("", *RUNGS):
        raise InvalidArgument(
            f"{RUNG_VARIABLE} must be one of {', '.join(RUNGS)}, or not set: {rung!r}",
            fields={"variable": RUNG_VARIABLE},
        )
    return rung
