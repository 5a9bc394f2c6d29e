"""Mounting, listing and unmounting: asked of the daemon as plain functions over records.

As in `query`, `repository` is an absolute URL, `reference` any form of id that the command line takes, and
every function starts the daemon when none runs and raises `ReplicateError`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from replicate import connection
from replicate.config import absolute_path
from replicate.lazy import LazyModule
from replicate.records import ProcessIdentity

if TYPE_CHECKING:
    from replicate import wire
    from replicate._pb import daemon_pb2 as pb
else:
    wire = LazyModule("replicate.wire")
    pb = LazyModule("replicate._pb.daemon_pb2")


@dataclass(frozen=True, slots=True)
class PrefetchProgress:
    """How far the reading in advance of a mount has come."""

    files_done: int
    files_total: int
    bytes_done: int
    bytes_total: int
    is_finished: bool
    #: Why it ended early, or how many files could not be read.
    error: str


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One mount, as far as it goes: see `error`."""

    #: Of the checkpoint, else of the experiment that is mounted; empty: the whole repository.
    id: str
    #: Absolute.
    directory: str
    #: 0 while it cannot be used.
    pid: int
    experiment_id: str
    repository: str
    #: What serves it, and whether the kernel reads cached files itself.
    engine: str = ""
    passthrough: bool = False
    #: Why it is not faster than that.
    engine_reason: str = ""
    #: Whether it comes back after a restart of the machine.
    persist: bool = False
    #: How often it was mounted again after its process had died.
    restarts: int = 0
    #: Why it cannot be used at present; empty: it can.
    error: str = ""
    #: Nobody tries any more to mount it again.
    is_given_up: bool = False
    #: None when nothing is read in advance.
    prefetch: PrefetchProgress | None = None


@dataclass(frozen=True, slots=True)
class MountChoices:
    """How to mount; what is left out is chosen by the daemon."""

    #: `native`, `mfusepy` or `fusepy`; empty: the best that can be used here.
    engine: str = ""
    #: None: decided by what is mounted.
    passthrough: bool | None = None
    #: Whether other users may look.
    allow_other: bool = False
    #: Seconds until a read that is not answered fails; 0: the default.
    timeout_s: float = 0.0
    #: Bytes that the cache on disk may take; 0: nothing is cached. None: the default.
    cache_bytes: int | None = None
    #: Which files are read in advance: empty for none, a pattern, or `trace`.
    prefetch: str = ""
    #: Whether the mount comes back after a restart of the machine.
    persist: bool = False
    #: The mount ends with this process at the latest.
    owner: ProcessIdentity | None = None


@dataclass(frozen=True, slots=True)
class EngineState:
    """Whether one way to mount can be used here."""

    name: str
    is_usable: bool
    #: What it can do, or why it cannot be used.
    detail: str
    #: What to do about it; empty: nothing.
    hint: str


def mount(
    repository: str,
    reference: str,
    directory: str | os.PathLike[str],
    choices: MountChoices | None = None,
) -> MountInfo:
    """Mount a snapshot read-only; returns when the mount can be used. An empty reference mounts all.

    Raises `MountFailed` naming what is wrong with the directory or with FUSE.
    """
    chosen = choices or MountChoices()
    request = pb.MountRequest(
        target=pb.Target(repository=repository, id=reference),
        directory=wire.encode_path(absolute_path(directory)),
        engine=chosen.engine,
        passthrough={None: "", True: "on", False: "off"}[chosen.passthrough],
        allow_other=chosen.allow_other,
        timeout_s=chosen.timeout_s,
        cache_bytes=chosen.cache_bytes,
        prefetch=wire.encode_text(chosen.prefetch),
        persist=chosen.persist,
        owner=wire.encode_process(chosen.owner) if chosen.owner is not None else None,
    )
    return _decode_mount(connection.call("Mount", request, pb.MountInfo))


def list_mounts() -> list[MountInfo]:
    """The mounts of this user, also those that have lost their process (see `error`)."""
    return _decode_mounts(connection.call("ListMounts", pb.ListMountsRequest(), pb.MountList))


def unmount(
    *, directory: str | os.PathLike[str] | None = None, id: str | None = None, all: bool = False
) -> list[MountInfo]:
    """Unmount by directory, by the id of what is mounted (or a prefix), or everything; returns what went.

    Exactly one argument must be given. Raises `NotFound` when nothing is mounted there, `MountFailed`
    when files are in use.
    """
    if (directory is not None) + (id is not None) + all != 1:
        raise TypeError("give exactly one of directory, id and all")
    if directory is not None:
        request = pb.UnmountRequest(directory=wire.encode_path(absolute_path(directory)))
    elif id is not None:
        request = pb.UnmountRequest(id=id)
    else:
        request = pb.UnmountRequest(all=True)
    return _decode_mounts(connection.call("Unmount", request, pb.MountList))


def probe_mounting() -> list[EngineState]:
    """The ways to mount, in the order in which they are tried, and whether they can be used here."""
    reply = connection.call("ProbeMounting", pb.ProbeMountingRequest(), pb.ProbeMountingReply)
    return [EngineState(one.name, one.is_usable, one.detail, one.hint) for one in reply.engines]


def _decode_mount(message: pb.MountInfo) -> MountInfo:
    return MountInfo(
        id=message.id,
        directory=wire.decode_path(message.directory),
        pid=message.pid,
        experiment_id=message.experiment_id,
        repository=message.repository,
        engine=message.engine,
        passthrough=message.passthrough,
        engine_reason=message.engine_reason,
        persist=message.persist,
        restarts=message.restarts,
        error=message.error,
        is_given_up=message.is_given_up,
        prefetch=_decode_progress(message.prefetch) if message.HasField("prefetch") else None,
    )


def _decode_progress(message: pb.PrefetchProgress) -> PrefetchProgress:
    return PrefetchProgress(
        files_done=message.files_done,
        files_total=message.files_total,
        bytes_done=message.bytes_done,
        bytes_total=message.bytes_total,
        is_finished=message.is_finished,
        error=message.error,
    )


def _decode_mounts(message: pb.MountList) -> list[MountInfo]:
    return [_decode_mount(mount) for mount in message.mounts]
