"""The daemon's end of the wire: decode a request, call the one who knows, encode the answer. No logic.

What is the same for every call, such as how errors travel, is in `answering`. Nothing else here knows grpc.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import grpc

from replicate import wire
from replicate._pb import daemon_pb2 as pb
from replicate._pb import daemon_pb2_grpc as pb_grpc
from replicate._version import __version__
from replicate.access import MAX_BYTES
from replicate.errors import InvalidArgument
from replicate.ids import is_id
from replicate.records import FileChange, FileEntry, utc_now
from replicated.answering import Activity, answering, stream, unary, wanted_unary
from replicated.browse import Browser, file_entry
from replicated.checkout.planning import plan
from replicated.checkout.progress import progress_of
from replicated.checkout.writing import execute
from replicated.collecting.running import Collecting
from replicated.experiments import Experiments
from replicated.intake import Accepted, Intake
from replicated.jobs import Jobs
from replicated.journal import Job, Journal, job_id_of
from replicated.messages import (
    check_experiment_id,
    check_repository,
    decode_capture,
    decode_directory,
    decode_joining,
    decode_mount_options,
    decode_owner,
    decode_target,
    decode_terms,
    encode_captured,
    encode_collecting,
    encode_engine,
    encode_failure,
    encode_list,
    encode_mount,
    encode_probe_step,
    encode_resolution,
    encode_standings,
    encode_usage_report,
    encode_waiting_part,
)
from replicated.mount.engine import choosing
from replicated.mount.life.table import MountTable
from replicated.probe import probe
from replicated.reaching import Access
from replicated.removal import Removal
from replicated.repositories import OpenRepositories
from replicated.snapshot.held import HeldFiles
from replicated.snapshot.spool import Spool
from replicated.standings import Standings
from replicated.tree import diff_trees
from replicated.usage import measure

#: Requests being answered at once; more wait. Captures and checkouts hold one for as long as they take.
MAX_THREADS = 64
#: More than these are refused with RESOURCE_EXHAUSTED instead of being queued without end.
MAX_CONCURRENT_REQUESTS = 1000
#: A request that waits for storing is answered after this long at the latest, and asked again.
MAX_WAIT_S = 5.0

#: In text, as it is on the wire, and with all that is added on the way.
_MAX_METADATA_BYTES = 2 * MAX_BYTES
_BATCH = 500
_PIECE_BYTES = 1 << 20

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that requests are passed on to."""

    home_spool: Spool
    held: HeldFiles
    journal: Journal
    intake: Intake
    jobs: Jobs
    repositories: OpenRepositories
    experiments: Experiments
    browser: Browser
    removal: Removal
    collecting: Collecting
    mounts: MountTable
    access: Access
    standings: Standings
    #: Asks the daemon to stop, at once and without waiting.
    request_stop: Callable[[], None]


class RpcServer:
    """The gRPC server on a Unix socket."""

    def __init__(self, services: Services) -> None:
        self.activity = Activity()
        self._server = grpc.server(
            ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="rpc"),
            maximum_concurrent_rpcs=MAX_CONCURRENT_REQUESTS,
            options=[
                ("grpc.max_receive_message_length", wire.MAX_REQUEST_BYTES),
                # Session tokens travel in it; grpc's own bound is 8 KiB.
                ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
                ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
                ("grpc.max_send_message_length", wire.MAX_REPLY_BYTES),
                # Clients ask during long calls whether we still live; grpc would take that for an attack.
                ("grpc.http2.max_ping_strikes", 0),
            ],
        )
        pb_grpc.add_DaemonServicer_to_server(_Servicer(services, self.activity), self._server)  # type: ignore[no-untyped-call]

    def start(self, socket: str) -> None:
        """Listen on a socket path that nobody else uses (the caller holds the lock of the home)."""
        if not self._server.add_insecure_port(f"unix:{socket}"):
            raise OSError(f"cannot listen on {socket}")
        self._server.start()

    def stop(self, grace_s: float) -> None:
        """Refuse new requests and wait for those being answered, at most this long."""
        self._server.stop(grace_s).wait()


class _Servicer(pb_grpc.DaemonServicer):
    """One method a call of protos/daemon.proto, in its order."""

    def __init__(self, services: Services, activity: Activity) -> None:
        self._services = services
        self.activity = activity
        self._started = utc_now()

    def note_access(self, url: str, variables: Mapping[str, str]) -> None:
        """Reach a bucket with these variables from now on; what waits for that is tried at once."""
        services = self._services
        if services.access.note(url, variables) and services.journal.captured(url):
            services.jobs.wake(url)

    @unary
    def Hello(self, request: pb.HelloRequest) -> pb.HelloReply:
        return self._hello()

    @unary
    def Shutdown(self, request: pb.ShutdownRequest) -> pb.ShutdownReply:
        pending = len(self._services.journal.captured())
        self._services.request_stop()
        return pb.ShutdownReply(pending=pending)

    # Writing

    @wanted_unary
    def CreateExperiment(
        self, request: pb.CreateExperimentRequest, is_wanted: Callable[[], bool]
    ) -> pb.CaptureReply:
        record = wire.decode_experiment(request.experiment)
        capture = decode_capture(record.id, request.capture)
        repository = check_repository(request.repository)
        terms = decode_terms(request.capture, is_wanted)
        accepted = self._services.intake.create_experiment(repository, record, capture, terms)
        return self._encode_accepted(repository, accepted)

    @wanted_unary
    def CreateCheckpoint(
        self, request: pb.CreateCheckpointRequest, is_wanted: Callable[[], bool]
    ) -> pb.CaptureReply:
        record = wire.decode_checkpoint(request.checkpoint)
        capture = decode_capture(job_id_of(record), request.capture)
        repository = check_repository(request.repository)
        terms = decode_terms(request.capture, is_wanted, request.stall_ns, request.missed_because)
        accepted = self._services.intake.create_checkpoint(repository, record, capture, terms)
        return self._encode_accepted(repository, accepted)

    def _encode_accepted(self, repository: str, accepted: Accepted) -> pb.CaptureReply:
        waiting_because = self._services.jobs.waiting_because(repository)
        return encode_captured(accepted.captured, accepted.state, waiting_because)

    @unary
    def EndExperiment(self, request: pb.EndExperimentRequest) -> pb.EndExperimentReply:
        identifier = check_experiment_id(request.experiment_id)
        status = wire.decode_end_status(request.status)
        ended = wire.decode_time(request.ended_ns)
        self._services.intake.end_experiment(
            check_repository(request.repository),
            identifier,
            status,
            ended,
            is_exiting=request.is_exiting,
            stall_ns=request.stall_ns,
        )
        jobs = [job for job in self._services.journal.of_experiment(identifier) if job.has_files]
        pending = [job for job in jobs if job.state == "captured"]
        return pb.EndExperimentReply(
            pending=len(pending),
            bytes_pending=sum(job.size_bytes for job in pending),
            failed=sum(job.state == "failed" for job in jobs),
            waiting_because=wire.encode_text(self._services.jobs.waiting_because(request.repository)),
        )

    @unary
    def ResumeExperiment(self, request: pb.ResumeExperimentRequest) -> pb.ExperimentSummary:
        repository, reference = decode_target(request.target)
        resolution = self._services.experiments.resolve(repository, reference)
        self._services.intake.resume_experiment(
            repository,
            resolution.summary.record.id,
            wire.decode_process(request.process),
            wire.decode_time(request.at_ns),
        )
        return wire.encode_summary(self._services.experiments.resolve(repository, reference).summary)

    @unary
    def JoinExperiment(self, request: pb.JoinExperimentRequest) -> pb.JoinExperimentReply:
        self._services.intake.join_experiment(
            check_repository(request.repository),
            check_experiment_id(request.experiment_id),
            decode_joining(request),
            wire.decode_process(request.process),
        )
        return pb.JoinExperimentReply()

    # Reading

    @stream
    def ListExperiments(self, request: pb.ListExperimentsRequest) -> Iterator[pb.ExperimentSummary]:
        summaries = self._services.experiments.list_experiments(
            check_repository(request.repository), request.filters, request.sort, request.limit
        )
        yield from map(wire.encode_summary, summaries)

    @stream
    def ListSummaries(self, request: pb.ListExperimentsRequest) -> Iterator[pb.SummaryBatch]:
        found = self._services.experiments.list_summaries(
            check_repository(request.repository), request.filters, request.sort, request.limit
        )
        yield from encode_list(found, only_ids=request.only_ids)

    @unary
    def Resolve(self, request: pb.Target) -> pb.Resolution:
        return encode_resolution(self._services.experiments.resolve(*decode_target(request)))

    @stream
    def ListCheckpoints(self, request: pb.Target) -> Iterator[pb.Checkpoint]:
        yield from map(
            wire.encode_checkpoint, self._services.experiments.checkpoints(*decode_target(request))
        )

    @stream
    def ListFiles(self, request: pb.ListFilesRequest) -> Iterator[pb.FileBatch]:
        tree = self._services.browser.open(*decode_target(request.target)).tree
        node = tree.find(request.path)
        found: Iterable[FileEntry]
        if node.type == "directory":
            found = (file_entry(path, below) for path, below in tree.walk(request.path))
        else:
            found = [file_entry(request.path, node)]
        for batch in _batches(found):
            yield pb.FileBatch(entries=map(wire.encode_file_entry, batch))

    @stream
    def ReadFile(self, request: pb.ReadFileRequest) -> Iterator[pb.FileData]:
        tree = self._services.browser.open(*decode_target(request.target)).tree
        node = tree.find(request.path)
        if node.type != "file":
            raise InvalidArgument(f"not a file but a {node.type}: {os.fsdecode(request.path)}")
        reader = tree.reader(node)
        yield pb.FileData(entry=wire.encode_file_entry(file_entry(request.path, node)))
        position = request.offset
        end = min(node.size, position + request.length) if request.length else node.size
        while position < end:
            data = reader.pread(position, min(_PIECE_BYTES, end - position))
            position += len(data)
            yield pb.FileData(data=data)

    @stream
    def DiffFiles(self, request: pb.DiffFilesRequest) -> Iterator[pb.FileChangeBatch]:
        left = self._services.browser.open(*decode_target(request.left)).tree
        right = self._services.browser.open(*decode_target(request.right)).tree
        changes = (
            FileChange(
                os.fsdecode(path),
                file_entry(path, before) if before else None,
                file_entry(path, after) if after else None,
            )
            for path, before, after in diff_trees(left, right)
        )
        for batch in _batches(changes):
            yield pb.FileChangeBatch(changes=map(wire.encode_file_change, batch))

    def Checkout(
        self, request: pb.CheckoutRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.CheckoutEvent]:
        """Not decorated: it has to notice that the client has gone, and stop."""
        with answering(self, context, "Checkout"):
            yield from self._checkout(request, context.is_active)

    def _checkout(
        self, request: pb.CheckoutRequest, is_wanted: Callable[[], bool]
    ) -> Iterator[pb.CheckoutEvent]:
        opened = self._services.browser.open(*decode_target(request.target))
        output = decode_directory(request.output_directory)
        steps = plan(opened.tree, os.fsencode(output), path=request.path, delete=request.delete)
        yield pb.CheckoutEvent(
            resolution=encode_resolution(opened.resolution),
            files_total=steps.file_count,
            bytes_total=steps.size_bytes,
        )
        if request.dry_run:
            for batch in _batches(steps.actions):
                actions = [pb.CheckoutAction(verb=action.verb, path=action.path) for action in batch]
                yield pb.CheckoutEvent(actions=actions)
            return
        if not request.force:
            steps.refuse_conflicts()
        cache_bytes = request.cache_bytes if request.HasField("cache_bytes") else None
        with self._services.browser.reading_all(request.target.repository, opened, cache_bytes) as reading:
            tree, content = reading
            done = progress_of(lambda report: execute(steps, tree, report, content), is_wanted)
            for files, size_bytes in done:
                yield pb.CheckoutEvent(files_done=files, bytes_done=size_bytes)

    @unary
    def Mount(self, request: pb.MountRequest) -> pb.MountInfo:
        repository, reference = decode_target(request.target)
        directory = decode_directory(request.directory)
        options = decode_mount_options(request)
        owner = decode_owner(request)
        if not reference:
            self._services.repositories.get(repository)  # tells what is wrong with it better than a mount
            experiment_id = checkpoint_id = ""
            snapshot_ids: Sequence[str] = ()
        else:
            opened = self._services.browser.open(repository, reference)
            checkpoint = opened.resolution.checkpoint
            experiment_id = opened.resolution.summary.record.id
            checkpoint_id = checkpoint.id if checkpoint else ""
            snapshot_ids = opened.snapshot_ids
        info = self._services.mounts.mount(
            repository, experiment_id, checkpoint_id, snapshot_ids, directory, options, owner
        )
        return encode_mount(info)

    @unary
    def ListMounts(self, request: pb.ListMountsRequest) -> pb.MountList:
        return pb.MountList(mounts=map(encode_mount, self._services.mounts.list()))

    @unary
    def Unmount(self, request: pb.UnmountRequest) -> pb.MountList:
        which = request.WhichOneof("which")
        if which is None:
            raise InvalidArgument("say which mount: a directory, an id or all")
        ended = self._services.mounts.unmount(
            directory=decode_directory(request.directory) if which == "directory" else None,
            identifier=request.id,
            everything=request.all,
        )
        return pb.MountList(mounts=map(encode_mount, ended))

    @unary
    def ProbeMounting(self, request: pb.ProbeMountingRequest) -> pb.ProbeMountingReply:
        return pb.ProbeMountingReply(engines=map(encode_engine, choosing.describe()))

    # The queue

    @unary
    def GetStatus(self, request: pb.GetStatusRequest) -> pb.StatusReply:
        return self._status()

    @unary
    def WaitStored(self, request: pb.WaitStoredRequest) -> pb.StatusReply:
        for identifier in request.ids:
            if not is_id(identifier):
                raise InvalidArgument(f"not a complete id: {identifier!r}")
        self._services.jobs.wait(request.ids, min(max(request.timeout_s, 0.0), MAX_WAIT_S))
        return self._status(frozenset(request.ids))

    def _status(self, ids: frozenset[str] = frozenset()) -> pb.StatusReply:
        """The state of the queue, of all jobs or of those that belong to some ids."""
        services = self._services

        def is_meant(job: Job) -> bool:
            return not ids or job.subject_id in ids or job.experiment_id in ids

        captured = [job for job in services.journal.captured() if is_meant(job)]
        failed = [job for job in services.journal.failed() if is_meant(job)]
        progress = services.jobs.progress()
        mounts = services.mounts.list()
        active = [job for job in captured if job.id in progress.active_ids]
        done = progress.bytes_done if any(job.id == progress.active_id for job in active) else 0
        return pb.StatusReply(
            daemon=self._hello(),
            pending=len(captured) - len(active),
            active=len(active),
            failed=len(failed),
            bytes_pending=max(0, sum(job.size_bytes for job in captured if not job.waits_for) - done),
            active_id=progress.active_id,
            active_bytes_done=progress.bytes_done,
            active_bytes_total=progress.bytes_total,
            bytes_per_second=progress.bytes_per_second,
            spool_bytes=services.home_spool.size_bytes(),
            failures=map(encode_failure, failed),
            waiting_because=wire.encode_text(progress.waiting_because),
            mounts=sum(not mount.error for mount in mounts),
            failed_mounts=sum(mount.is_given_up for mount in mounts),
            repositories=encode_standings(
                captured,
                failed,
                progress.active_ids,
                services.standings.troubles(),
                services.access.is_missing,
            ),
            leased_files=services.held.count,
            leased_bytes=services.held.size_bytes,
            waiting_parts=[encode_waiting_part(job) for job in captured if job.waits_for],
        )

    def _hello(self) -> pb.HelloReply:
        return pb.HelloReply(
            protocol=wire.PROTOCOL_VERSION,
            version=__version__,
            pid=os.getpid(),
            started_ns=wire.encode_time(self._started),
        )

    # Keeping house

    @unary
    def Remove(self, request: pb.RemoveRequest) -> pb.RemoveReply:
        repository = check_repository(request.repository)
        removal = self._services.removal
        plan = removal.plan(repository, request.ids, force=request.force or request.dry_run)
        if not request.dry_run:
            removal.remove(repository, plan)
        return pb.RemoveReply(
            items=[
                pb.RemovedItem(
                    id=item.id,
                    kind=item.kind,
                    checkpoint_count=item.checkpoint_count,
                    step=item.step,
                    experiment_id=item.experiment_id,
                )
                for item in plan
            ]
        )

    @unary
    def GetDiskUsage(self, request: pb.DiskUsageRequest) -> pb.DiskUsageReply:
        services = self._services
        repository = check_repository(request.repository)
        return encode_usage_report(
            measure(services.experiments, services.repositories, repository, request.ids)
        )

    def Collect(self, request: pb.CollectRequest, context: grpc.ServicerContext) -> Iterator[pb.CollectEvent]:
        """Not decorated: it has to notice that the client has gone, and stop."""
        with answering(self, context, "Collect"):
            repository = check_repository(request.repository)
            events = self._services.collecting.run(
                repository, is_dry_run=request.dry_run, is_wanted=context.is_active
            )
            yield from map(encode_collecting, events)

    @unary
    def ProbeRepository(self, request: pb.ProbeRequest) -> pb.ProbeReply:
        url = check_repository(request.repository)
        services = self._services
        environment = services.access.environment(url)
        steps = probe(services.repositories, url, is_store=request.store, environment=environment)
        return pb.ProbeReply(steps=map(encode_probe_step, steps))


def _batches(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, _BATCH)):
        yield batch
