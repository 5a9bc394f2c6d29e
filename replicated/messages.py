"""Requests and answers that are more than records: checked when they come, encoded when they go.

`wire` converts what both ends share; this is the rest, known to the daemon alone. Pure, and without grpc.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path

from replicate import wire
from replicate._pb import daemon_pb2 as pb
from replicate.config import RUNGS
from replicate.errors import InvalidArgument
from replicate.ids import ExperimentId, is_id
from replicate.records import ProcessIdentity
from replicated.admission import DEFAULT_QUEUE_BYTES, DEFAULT_SPOOL_BYTES, Bounds
from replicated.collecting.collector import CollectReport
from replicated.collecting.running import CollectProgress
from replicated.experiments import Resolution
from replicated.format.shards import RankEdit
from replicated.intake import Terms
from replicated.journal import Job
from replicated.listed import Listed
from replicated.mount.engine.choosing import EngineState
from replicated.mount.life.registry import MountInfo
from replicated.mount.options import DEFAULT_TIMEOUT_S, ENGINES, PASSTHROUGH, MountOptions
from replicated.processes import is_alive
from replicated.snapshot.capture import Captured, CaptureRequest
from replicated.standings import Trouble
from replicated.store.probing import Finding
from replicated.usage import Usage, UsageReport

#: A century: what is more is a mistake, and must not overflow the sum.
_MAX_STALL_NS = 100 * 365 * 86400 * 10**9
#: Of a list, in one message: a client begins with the first while the next one is made.
_BATCH_BYTES = 256 << 10
_BATCH_IDS = 5000
#: A day; a reader that waits longer is as good as hanging.
_MAX_TIMEOUT_S = 86400.0


def check_repository(url: str) -> str:
    """The URL of a repository in its absolute form; raises `InvalidArgument` for another."""
    if not url.startswith(("file:///", "s3://", "gs://")):
        raise InvalidArgument(f"not an absolute repository URL: {url!r}")
    return url


def decode_target(message: pb.Target) -> tuple[str, str]:
    """Repository and reference of a request."""
    return check_repository(message.repository), message.id


def check_experiment_id(text: str) -> ExperimentId:
    """A complete id of an experiment; raises `InvalidArgument`."""
    if not is_id(text):
        raise InvalidArgument(f"not a complete experiment id: {text!r}")
    return ExperimentId(text)


def decode_directory(path: bytes) -> Path:
    """An absolute directory; raises `InvalidArgument`."""
    if not path.startswith(b"/") or b"\0" in path:
        raise InvalidArgument(f"not an absolute path: {os.fsdecode(path)!r}")
    return Path(os.fsdecode(path))


def decode_capture(identifier: str, message: pb.Capture) -> CaptureRequest | None:
    """What to freeze for a snapshot; None for nothing. Raises `InvalidArgument` for paths outside."""
    if not message.paths:
        return None
    decode_directory(message.project_directory)
    for path in message.paths:
        if path.startswith(b"/") or b"\0" in path or b".." in path.split(b"/"):
            raise InvalidArgument(f"not a path below the project directory: {os.fsdecode(path)!r}")
    if message.mode not in ("", "auto", "copy"):
        raise InvalidArgument(f"unknown capture mode: {message.mode!r}")
    if message.rung not in ("", *RUNGS):
        raise InvalidArgument(f"unknown rung: {message.rung!r}", hint=f"use one of {', '.join(RUNGS)}")
    return CaptureRequest(
        identifier=identifier,
        project_directory=message.project_directory,
        paths=tuple(message.paths),
        ignore=tuple(os.fsdecode(pattern) for pattern in message.ignore),
        durable=message.mode == "copy",
        mapped=frozenset(message.mapped),
        rung=message.rung,
        warn_above=message.warn_above_bytes,
    )


def decode_terms(
    message: pb.Capture, is_wanted: Callable[[], bool], stall_ns: int = 0, missed_because: str = ""
) -> Terms:
    """What a request says besides the record and the files."""
    return Terms(
        bounds=Bounds(
            queue_bytes=message.queue_limit_bytes or DEFAULT_QUEUE_BYTES,
            spool_bytes=message.spool_limit_bytes or DEFAULT_SPOOL_BYTES,
        ),
        upload_limit=message.upload_limit_bytes_s,
        is_durable=message.mode == "copy",
        stall_ns=min(stall_ns, _MAX_STALL_NS),
        missed_because=missed_because,
        is_wanted=is_wanted,
    )


def encode_captured(captured: Captured, state: str, waiting_because: str) -> pb.CaptureReply:
    """What came of a capture, as the answer to its request."""
    reply = pb.CaptureReply(
        file_count=captured.file_count,
        size_bytes=captured.size_bytes,
        warnings=map(wire.encode_text, captured.warnings),
        state=state,
        waiting_because=wire.encode_text(waiting_because),
    )
    added = captured.unusual
    if added is not None:
        reply.unusual.size_bytes = added.size_bytes
        reply.unusual.file_count = added.file_count
        for one in added.largest:
            reply.unusual.largest.add(path=one.path, size_bytes=one.size_bytes, small_files=one.small_files)
    return reply


def encode_list(found: Sequence[Listed], *, only_ids: bool) -> Iterator[pb.SummaryBatch]:
    """A list as few messages, none of which is too large."""
    if only_ids:
        for start in range(0, len(found), _BATCH_IDS):
            yield pb.SummaryBatch(ids=[listed.id for listed in found[start : start + _BATCH_IDS]])
        return
    batch: list[bytes] = []
    size = 0
    for listed in found:
        data = listed.encode()
        if size + len(data) > _BATCH_BYTES and batch:
            yield pb.SummaryBatch(summaries=batch)
            batch, size = [], 0
        batch.append(data)
        size += len(data)
    if batch:
        yield pb.SummaryBatch(summaries=batch)


def encode_resolution(resolution: Resolution) -> pb.Resolution:
    """What a reference means, as a message."""
    message = pb.Resolution(
        summary=wire.encode_summary(resolution.summary),
        named_experiment=resolution.named_experiment,
        chosen=resolution.chosen,
    )
    if resolution.checkpoint is not None:
        message.checkpoint.CopyFrom(wire.encode_checkpoint(resolution.checkpoint))
    return message


def decode_joining(message: pb.JoinExperimentRequest) -> RankEdit:
    """Who joins an experiment; raises `InvalidArgument`."""
    if not is_id(message.member_id) or not 0 < message.rank < message.world_size <= wire.MAX_WORLD_SIZE:
        raise InvalidArgument(f"not another rank than 0 of {message.world_size}: {message.rank}")
    return RankEdit(
        member_id=message.member_id,
        rank=message.rank,
        world_size=message.world_size,
        attempt=message.attempt,
        status="joined",
        time=wire.decode_time(message.at_ns),
    )


def decode_mount_options(message: pb.MountRequest) -> MountOptions:
    """How to mount; raises `InvalidArgument`."""
    if message.engine not in ("", "auto", *ENGINES):
        raise InvalidArgument(
            f"unknown engine: {message.engine!r}", hint=f"use one of {', '.join(('auto', *ENGINES))}"
        )
    if message.passthrough not in ("", *PASSTHROUGH):
        raise InvalidArgument(f"unknown kind of passthrough: {message.passthrough!r}")
    timeout_s = message.timeout_s or DEFAULT_TIMEOUT_S
    if not 0 < timeout_s <= _MAX_TIMEOUT_S:
        raise InvalidArgument(
            f"not a number of seconds to wait for a read: {timeout_s:g}",
            hint=f"use a number above 0, and not more than {_MAX_TIMEOUT_S:g}",
        )
    if "\0" in message.prefetch:
        raise InvalidArgument(f"not a pattern of file names: {message.prefetch!r}")
    return MountOptions(
        engine=message.engine or "auto",
        passthrough=message.passthrough or "auto",
        allow_other=message.allow_other,
        timeout_s=timeout_s,
        cache_bytes=message.cache_bytes if message.HasField("cache_bytes") else None,
        prefetch=message.prefetch,
        persist=message.persist,
    )


def decode_owner(message: pb.MountRequest) -> ProcessIdentity | None:
    """The process that a mount must not outlive.

    One that cannot be found is none: it may live where its pid means another process, as in a container.
    """
    owner = wire.decode_process(message.owner) if message.HasField("owner") else None
    return owner if owner is not None and is_alive(owner) else None


def encode_mount(info: MountInfo) -> pb.MountInfo:
    """A mount as a message."""
    message = pb.MountInfo(
        id=info.id,
        directory=os.fsencode(info.directory),
        pid=info.pid,
        experiment_id=info.experiment_id,
        repository=info.repository,
        engine=info.engine,
        passthrough=info.passthrough,
        engine_reason=wire.encode_text(info.engine_reason),
        persist=info.persist,
        restarts=info.restarts,
        error=wire.encode_text(info.error),
        is_given_up=info.is_given_up,
    )
    if info.prefetch is not None:
        message.prefetch.CopyFrom(
            pb.PrefetchProgress(
                files_done=info.prefetch.files_done,
                files_total=info.prefetch.files_total,
                bytes_done=info.prefetch.bytes_done,
                bytes_total=info.prefetch.bytes_total,
                is_finished=info.prefetch.is_finished,
                error=wire.encode_text(info.prefetch.error),
            )
        )
    return message


def encode_engine(state: EngineState) -> pb.EngineState:
    """Whether an engine can be used, as a message."""
    return pb.EngineState(
        name=state.name,
        is_usable=state.is_usable,
        detail=wire.encode_text(state.detail),
        hint=wire.encode_text(state.hint),
    )


def encode_failure(job: Job) -> pb.Failure:
    """A job that failed as a message."""
    paths: tuple[str, ...] = ()
    if job.kind == "experiment":
        paths = job.experiment().paths
    elif job.kind == "checkpoint":
        paths = job.checkpoint().paths
    return pb.Failure(
        id=job.subject_id,
        experiment_id=job.experiment_id,
        paths=map(wire.encode_path, paths),
        error=wire.encode_text(job.error),
        at_ns=job.created_ns,
    )


def encode_waiting_part(job: Job) -> pb.WaitingPart:
    """A part of a checkpoint that waits for those of other processes, as a message."""
    return pb.WaitingPart(
        id=job.subject_id, experiment_id=job.experiment_id, waits_for=wire.encode_text(job.waits_for)
    )


def encode_standings(
    captured: Sequence[Job],
    failed: Sequence[Job],
    active_ids: Container[str],
    troubles: Mapping[str, Trouble],
    is_access_missing: Callable[[str], bool],
) -> list[pb.RepositoryStanding]:
    """How it stands with each repository, by URL."""
    standings = {}
    for url in sorted({*troubles, *(job.repository for job in (*captured, *failed))}):
        jobs = [job for job in captured if job.repository == url]
        trouble = troubles.get(url)
        active = sum(job.id in active_ids for job in jobs)
        standings[url] = message = pb.RepositoryStanding(
            repository=url,
            pending=len(jobs) - active,
            active=active,
            bytes_pending=sum(job.size_bytes for job in jobs),
        )
        if trouble is not None:
            message.waiting_because = wire.encode_text(trouble.reason)
            message.waiting_since_ns = trouble.since_ns
            message.retry_at_ns = trouble.retry_at_ns
            if is_access_missing(url):
                message.hint = (
                    "since the daemon was started, no command has told it how to reach the bucket: run"
                    f" `replicate -R {url} flush` where the credentials are set"
                )
    return list(standings.values())


def encode_probe_step(finding: Finding) -> pb.ProbeStep:
    """What was tried of a repository or a store, as a message."""
    return pb.ProbeStep(
        name=finding.name,
        ok=finding.outcome != "fail",
        detail=wire.encode_text(finding.detail),
        hint=wire.encode_text(finding.hint),
        outcome=finding.outcome,
        value=finding.value,
    )


def encode_collecting(event: CollectProgress | CollectReport) -> pb.CollectEvent:
    """How far a collection is, or what it has done."""
    if isinstance(event, CollectReport):
        return pb.CollectEvent(report=pb.CollectReport(**dataclasses.asdict(event)))
    return pb.CollectEvent(step=event.step, done=event.done, total=event.total)


def encode_usage_report(report: UsageReport) -> pb.DiskUsageReply:
    """What `du` found as a message."""
    return pb.DiskUsageReply(
        experiments=map(_encode_usage, report.experiments),
        total=_encode_usage(report.total),
        unreferenced_bytes=report.unreferenced_bytes,
        unreadable=[
            pb.UnreadableSnapshot(
                id=snapshot.id, experiment_id=snapshot.experiment_id, error=wire.encode_text(snapshot.error)
            )
            for snapshot in report.unreadable
        ],
    )


def _encode_usage(usage: Usage) -> pb.DiskUsage:
    return pb.DiskUsage(
        id=usage.id,
        logical_bytes=usage.logical_bytes,
        unique_bytes=usage.unique_bytes,
        stored_bytes=usage.stored_bytes,
        snapshots=usage.snapshots,
        base_bytes=usage.base_bytes,
        metadata_bytes=usage.metadata_bytes,
        encodings=[
            pb.EncodedBytes(encoding=name, plain_bytes=encoded.plain_bytes, stored_bytes=encoded.stored_bytes)
            for name, encoded in usage.encodings.items()
        ],
    )
