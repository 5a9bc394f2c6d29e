"""The read side: what the daemon knows, asked for as plain functions over records.

The command line and the objects of `experiment` are built on this module. It turns arguments into
requests and replies into frozen records: no protobuf message, gRPC type or relative path passes through
in either direction. It decides nothing; whatever needs the repository is answered by the daemon.

In every function `repository` is the absolute URL of `config.find_project`, and `reference` any form of
id that the command line takes: `EXP`, `CKPT`, `latest`, `EXP:best`, `EXP:latest`, `EXP:step=N`,
`EXP:code`. Every function starts the daemon when none runs and raises `ReplicateError` (`NotFound` and
`Ambiguous` for a reference). Functions that return an iterator are generators: nothing is asked before
the first item, and errors are raised there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Literal, get_args

from replicate import connection
from replicate.channel import DaemonInfo, decode_daemon, protocol_error
from replicate.config import absolute_path
from replicate.ids import short
from replicate.lazy import LazyModule
from replicate.records import (
    CheckpointRecord,
    ExperimentSummary,
    FileChange,
    FileEntry,
)

if TYPE_CHECKING:
    from replicate import wire
    from replicate._pb import daemon_pb2 as pb
else:
    wire = LazyModule("replicate.wire")
    pb = LazyModule("replicate._pb.daemon_pb2")

#: How a checkpoint was chosen when the reference left it open; empty when it did not, or none was.
Choice = Literal["", "best", "latest", "code", "step"]
Outcome = Literal["ok", "warn", "fail"]
CheckoutVerb = Literal["create", "replace", "keep", "delete"]

#: `wait_stored` asks for this long at a time: a longer call would hold up `fork` and Ctrl-C.
_WAIT_SLICE_S = 1.0


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a reference means."""

    summary: ExperimentSummary
    #: None when the experiment has no checkpoints, or `:code` was asked for.
    checkpoint: CheckpointRecord | None
    #: The reference named an experiment, so `checkpoint` was chosen for the user (see `chosen`).
    named_experiment: bool
    chosen: Choice = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """A snapshot that will not be stored, and why."""

    id: str
    experiment_id: str
    paths: tuple[str, ...]
    error: str
    at: datetime


@dataclass(frozen=True, slots=True)
class WaitingPart:
    """A checkpoint of several processes that waits for parts of others."""

    id: str
    experiment_id: str
    waits_for: str


@dataclass(frozen=True, slots=True)
class RepositoryStanding:
    """How it stands with the queue of one repository."""

    repository: str
    pending: int
    active: int
    bytes_pending: int
    #: Why nothing moves, and since when; empty and None: it does.
    waiting_because: str
    waiting_since: datetime | None
    #: What to do about it, if that is known.
    hint: str
    #: When it is tried again; None: it is being tried, or there is nothing to try.
    retry_at: datetime | None


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """The daemon and its queue at one moment."""

    daemon: DaemonInfo
    #: Snapshots that are captured and wait; those being stored now are counted in `active`.
    pending: int
    active: int
    failed: int
    bytes_pending: int
    #: Of the snapshot being stored now; empty and 0 when idle.
    active_id: str
    active_bytes_done: int
    active_bytes_total: int
    bytes_per_second: float
    spool_bytes: int
    failures: tuple[Failure, ...]
    #: The last error of a snapshot that is being retried; empty when nothing is held up.
    waiting_because: str
    mounts: int
    #: Mounts that ended again and again, until nobody tried to mount them any more.
    failed_mounts: int
    #: Kept from changing by a lease until they are stored, in place of a copy.
    leased_files: int
    leased_bytes: int
    #: Checkpoints of several processes of which this machine has stored its part.
    waiting_parts: tuple[WaitingPart, ...] = ()
    #: Those in which something waits or failed, or that were out of reach when they were asked last.
    repositories: tuple[RepositoryStanding, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckoutAction:
    """What a checkout would do with one path; `keep`: it is already as wanted."""

    verb: CheckoutVerb
    path: str


@dataclass(frozen=True, slots=True)
class CheckoutEvent:
    """A report of a running checkout; counts are cumulative."""

    #: In the first event only: what the reference meant.
    resolution: Resolution | None
    files_total: int
    bytes_total: int
    files_done: int
    bytes_done: int
    #: Of a dry run.
    actions: tuple[CheckoutAction, ...]


@dataclass(frozen=True, slots=True)
class RemovedItem:
    """An experiment or checkpoint that was removed, or would be."""

    id: str
    kind: Literal["experiment", "checkpoint"]
    #: Of an experiment: how many checkpoints go with it.
    checkpoint_count: int
    #: Of a checkpoint.
    step: int
    experiment_id: str


@dataclass(frozen=True, slots=True)
class ProbeStep:
    """One thing that was tried on a repository or a store."""

    name: str
    outcome: Outcome
    #: For programs: a word, one of few for each name, or a number; may be empty.
    value: str
    detail: str
    hint: str


def list_experiments(
    repository: str, filters: Sequence[str] = (), sort: str = "", limit: int = 0
) -> Iterator[ExperimentSummary]:
    """The experiments that match all filters; oldest first, or by `sort` (`KEY` or `KEY-desc`).

    `limit` 0 means all. Raises `InvalidArgument` for a filter or key that cannot be understood.
    """
    request = pb.ListExperimentsRequest(repository=repository, filters=filters, sort=sort, limit=limit)
    for message in connection.stream("ListExperiments", request, pb.ExperimentSummary):
        yield wire.decode_summary(message)


def list_summaries(
    repository: str, filters: Sequence[str] = (), sort: str = "", limit: int = 0
) -> Iterator[ExperimentSummary]:
    """As `list_experiments`, but quick, for looking at thousands.

    The records lack what lists do not show: Python and its packages, the system, Git, the version of this
    library and the process.
    """
    request = pb.ListExperimentsRequest(repository=repository, filters=filters, sort=sort, limit=limit)
    for batch in connection.stream("ListSummaries", request, pb.SummaryBatch):
        for summary in batch.summaries:
            yield wire.decode_summary(pb.ExperimentSummary.FromString(summary))


def list_ids(repository: str, filters: Sequence[str] = (), sort: str = "", limit: int = 0) -> Iterator[str]:
    """As `list_experiments`, but only the complete ids."""
    request = pb.ListExperimentsRequest(
        repository=repository, filters=filters, sort=sort, limit=limit, only_ids=True
    )
    for batch in connection.stream("ListSummaries", request, pb.SummaryBatch):
        yield from batch.ids


def resolve(repository: str, reference: str) -> Resolution:
    """The experiment, and the checkpoint if one is meant, that `reference` stands for."""
    return _decode_resolution(connection.call("Resolve", _target(repository, reference), pb.Resolution))


def list_checkpoints(repository: str, reference: str) -> list[CheckpointRecord]:
    """All checkpoints of the experiment, in the order in which they were made."""
    messages = connection.stream("ListCheckpoints", _target(repository, reference), pb.Checkpoint)
    return [wire.decode_checkpoint(message) for message in messages]


def list_files(repository: str, reference: str, path: str = "") -> Iterator[FileEntry]:
    """The entries of a snapshot, sorted by path; with `path` only that file, or what lies below it.

    A checkpoint's files are overlaid on its experiment's. Raises `NotFound` when `path` is not there and
    `NotStored` when the snapshot is not in the repository yet.
    """
    request = pb.ListFilesRequest(target=_target(repository, reference), path=wire.encode_path(path))
    for batch in connection.stream("ListFiles", request, pb.FileBatch):
        for message in batch.entries:
            yield wire.decode_file_entry(message)


def read_file(
    repository: str, reference: str, path: str, offset: int = 0, length: int | None = None
) -> Iterator[bytes]:
    """The bytes of one file from `offset`, at most `length` of them (None: to the end), in pieces.

    Raises `NotFound` or `NotStored` before the first piece. Pieces are not empty.
    """
    for message in connection.stream(
        "ReadFile", _read_request(repository, reference, path, offset, length), pb.FileData
    ):
        if message.data and length != 0:
            yield message.data


def stat_file(repository: str, reference: str, path: str) -> FileEntry:
    """The entry of one regular file; raises `NotFound` when there is none of that path."""
    request = _read_request(repository, reference, path, 0, 0)
    for message in connection.stream("ReadFile", request, pb.FileData):
        return wire.decode_file_entry(message.entry)
    raise protocol_error("ReadFile", "no entry in the reply")


def diff_files(repository: str, left: str, right: str) -> Iterator[FileChange]:
    """The files that differ between two snapshots (content, type, mode or target), sorted by path."""
    request = pb.DiffFilesRequest(left=_target(repository, left), right=_target(repository, right))
    for batch in connection.stream("DiffFiles", request, pb.FileChangeBatch):
        for message in batch.changes:
            yield wire.decode_file_change(message)


def checkout(
    repository: str,
    reference: str,
    output_directory: str | os.PathLike[str],
    *,
    path: str = "",
    force: bool = False,
    delete: bool = False,
    dry_run: bool = False,
    cache_bytes: int | None = None,
) -> Iterator[CheckoutEvent]:
    """Write the files of a snapshot into `output_directory`, reporting as it goes.

    The checkout happens while the events are consumed; leaving early stops it. With `path` only that
    file or directory; `force` replaces files that are in the way (else `CheckoutConflict`, and nothing
    is written); `delete` also removes what is not in the snapshot; `dry_run` only reports actions.
    `cache_bytes` is what the cache on disk may take, as for a mount.
    """
    request = pb.CheckoutRequest(
        target=_target(repository, reference),
        output_directory=wire.encode_path(absolute_path(output_directory)),
        path=wire.encode_path(path),
        force=force,
        delete=delete,
        dry_run=dry_run,
        cache_bytes=cache_bytes,
    )
    for message in connection.stream("Checkout", request, pb.CheckoutEvent):
        yield CheckoutEvent(
            resolution=_decode_resolution(message.resolution) if message.HasField("resolution") else None,
            files_total=message.files_total,
            bytes_total=message.bytes_total,
            files_done=message.files_done,
            bytes_done=message.bytes_done,
            actions=tuple(
                CheckoutAction(_checkout_verb(action.verb), wire.decode_path(action.path))
                for action in message.actions
            ),
        )


def status(repository: str = "") -> DaemonStatus:
    """The daemon, what it has still to store, and what failed. (`connection.probe` starts no daemon.)

    It is all repositories'; that of `repository` is reached from now on as this process would.
    """
    request = pb.GetStatusRequest(repository=repository)
    return _decode_status(connection.call("GetStatus", request, pb.StatusReply))


def check_timeout(timeout_s: object) -> None:
    """Raise `TypeError` or `ValueError` unless it is a number of seconds or None."""
    if timeout_s is not None and (isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float))):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout_s!r}")
    if timeout_s != timeout_s:
        raise ValueError("timeout must not be NaN")


def wait_stored(
    ids: Iterable[str] = (),
    timeout_s: float | None = None,
    on_progress: Callable[[DaemonStatus], None] | None = None,
    repository: str = "",
) -> DaemonStatus:
    """Wait until the snapshots with these complete ids are stored or failed; without ids, all of them.

    An experiment's id stands for its own files and its checkpoints. `on_progress` is called about every
    second with the status then; it counts only what is waited for. `repository` as for `status`. Raises
    `TimeoutError` after `timeout_s`; what failed is in the `failures` of the result and raises nothing here.
    """
    wanted = tuple(ids)
    check_timeout(timeout_s)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        left_s = _WAIT_SLICE_S if deadline is None else max(0.0, deadline - time.monotonic())
        slice_s = min(_WAIT_SLICE_S, left_s)
        request = pb.WaitStoredRequest(ids=wanted, timeout_s=slice_s, repository=repository)
        reply = _decode_status(connection.call("WaitStored", request, pb.StatusReply))
        if on_progress is not None:
            on_progress(reply)
        if reply.pending + reply.active == 0:
            return reply
        if left_s == 0:
            waits = "; ".join(f"{short(part.id)} {part.waits_for}" for part in reply.waiting_parts[:3])
            raise TimeoutError(f"not everything is stored after {timeout_s:g} s" + (waits and f": {waits}"))


def remove(
    repository: str, references: Sequence[str], *, dry_run: bool = False, force: bool = False
) -> list[RemovedItem]:
    """Remove experiments (with their checkpoints) and checkpoints; all of them or, on an error, none.

    `force` also removes running experiments. Space is freed later.
    """
    request = pb.RemoveRequest(repository=repository, ids=references, dry_run=dry_run, force=force)
    reply = connection.call("Remove", request, pb.RemoveReply)
    return [
        RemovedItem(
            id=item.id,
            kind="experiment" if item.kind == "experiment" else "checkpoint",
            checkpoint_count=item.checkpoint_count,
            step=item.step,
            experiment_id=item.experiment_id,
        )
        for item in reply.items
    ]


def probe_repository(repository: str) -> list[ProbeStep]:
    """Try what the daemon needs of a repository, step by step; failures are in the steps."""
    return _probe(pb.ProbeRequest(repository=repository))


def probe_store(url: str) -> list[ProbeStep]:
    """Try what a store really does, also where no repository is; failures are in the steps."""
    return _probe(pb.ProbeRequest(repository=url, store=True))


def _probe(request: pb.ProbeRequest) -> list[ProbeStep]:
    reply = connection.call("ProbeRepository", request, pb.ProbeReply)
    return [
        ProbeStep(step.name, _decode_outcome(step.outcome), step.value, step.detail, step.hint)
        for step in reply.steps
    ]


def _target(repository: str, reference: str) -> pb.Target:
    return pb.Target(repository=repository, id=reference)


def _read_request(
    repository: str, reference: str, path: str, offset: int, length: int | None
) -> pb.ReadFileRequest:
    if offset < 0 or (length is not None and length < 0):
        raise ValueError(f"offset and length must not be negative: {offset}, {length}")
    return pb.ReadFileRequest(
        target=_target(repository, reference),
        path=wire.encode_path(path),
        offset=offset,
        # On the wire 0 means "to the end"; one byte is the least that can be asked for.
        length=0 if length is None else max(length, 1),
    )


def _decode_resolution(message: pb.Resolution) -> Resolution:
    return Resolution(
        summary=wire.decode_summary(message.summary),
        checkpoint=wire.decode_checkpoint(message.checkpoint) if message.HasField("checkpoint") else None,
        named_experiment=message.named_experiment,
        chosen=_choice(message.chosen),
    )


def _decode_status(message: pb.StatusReply) -> DaemonStatus:
    return DaemonStatus(
        daemon=decode_daemon(message.daemon),
        pending=message.pending,
        active=message.active,
        failed=message.failed,
        bytes_pending=message.bytes_pending,
        active_id=message.active_id,
        active_bytes_done=message.active_bytes_done,
        active_bytes_total=message.active_bytes_total,
        bytes_per_second=message.bytes_per_second,
        spool_bytes=message.spool_bytes,
        failures=tuple(
            Failure(
                id=failure.id,
                experiment_id=failure.experiment_id,
                paths=tuple(wire.decode_path(path) for path in failure.paths),
                error=failure.error,
                at=wire.decode_time(failure.at_ns),
            )
            for failure in message.failures
        ),
        waiting_because=message.waiting_because,
        mounts=message.mounts,
        failed_mounts=message.failed_mounts,
        leased_files=message.leased_files,
        leased_bytes=message.leased_bytes,
        waiting_parts=tuple(
            WaitingPart(part.id, part.experiment_id, part.waits_for) for part in message.waiting_parts
        ),
        repositories=tuple(map(_decode_standing, message.repositories)),
    )


def _decode_standing(message: pb.RepositoryStanding) -> RepositoryStanding:
    since_ns, retry_at_ns = message.waiting_since_ns, message.retry_at_ns
    return RepositoryStanding(
        repository=message.repository,
        pending=message.pending,
        active=message.active,
        bytes_pending=message.bytes_pending,
        waiting_because=message.waiting_because,
        waiting_since=wire.decode_time(since_ns) if since_ns else None,
        hint=message.hint,
        retry_at=wire.decode_time(retry_at_ns) if retry_at_ns else None,
    )


def _choice(word: str) -> Choice:
    return wire.decode_word(word, get_args(Choice), "choice")


def _checkout_verb(word: str) -> CheckoutVerb:
    return wire.decode_word(word, get_args(CheckoutVerb), "verb")


def _decode_outcome(word: str) -> Outcome:
    return wire.decode_word(word, get_args(Outcome), "outcome")
