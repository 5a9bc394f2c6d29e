"""What experiments take in the repository, as the daemon measures it: part of the read side, like `query`.

The command line is built on this module. docs/concepts.md defines the figures, and how they add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Final, NamedTuple

from replicate import connection
from replicate.lazy import LazyModule

if TYPE_CHECKING:
    from replicate._pb import daemon_pb2 as pb
else:
    pb = LazyModule("replicate._pb.daemon_pb2")


class EncodedBytes(NamedTuple):
    """Pieces of files that are stored in the same way, before and after."""

    plain_bytes: int
    stored_bytes: int


#: The names that every figure by encoding has, in the order in which they are given.
ENCODINGS: Final = ("raw", "zstd", "planes", "delta")


def _nothing_encoded() -> Mapping[str, EncodedBytes]:
    return dict.fromkeys(ENCODINGS, EncodedBytes(0, 0))


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """What an experiment occupies: as saved, counted once, and as stored; docs/concepts.md defines it all."""

    #: Empty in a total.
    id: str = ""
    snapshots: int = 0
    logical_bytes: int = 0
    unique_bytes: int = 0
    stored_bytes: int = 0
    #: The part of `stored_bytes` for pieces that are in no snapshot here, but that others build upon.
    base_bytes: int = 0
    metadata_bytes: int = 0
    #: By the names of the encodings, all of `ENCODINGS` at least.
    encodings: Mapping[str, EncodedBytes] = field(default_factory=_nothing_encoded)

    @property
    def saved_by_deduplication(self) -> int:
        """Bytes that need not be stored because there are equal ones."""
        return self.logical_bytes - self.unique_bytes

    @property
    def saved_by_compression(self) -> int:
        """Bytes by which what is different is stored in less; negative when bases outweigh it."""
        return self.unique_bytes - self.stored_bytes


@dataclass(frozen=True, slots=True)
class UnreadableSnapshot:
    """A snapshot whose damage keeps it from being counted."""

    id: str
    #: Empty when it is not known.
    experiment_id: str
    error: str


@dataclass(frozen=True, slots=True)
class DiskUsageReport:
    """Disk usage per experiment, and of all of them together (shared data counted once)."""

    experiments: tuple[DiskUsage, ...] = ()
    total: DiskUsage = DiskUsage()
    #: What the repository holds that no readable snapshot needs.
    unreferenced_bytes: int = 0
    unreadable: tuple[UnreadableSnapshot, ...] = ()

    @property
    def repository_bytes(self) -> int:
        """The size of the whole repository."""
        return self.total.stored_bytes + self.total.metadata_bytes + self.unreferenced_bytes


def disk_usage(repository: str, references: Sequence[str] = ()) -> DiskUsageReport:
    """What the experiments occupy; without references, all of the repository.

    Arguments and errors as for the functions of `query`.
    """
    request = pb.DiskUsageRequest(repository=repository, ids=references)
    reply = connection.call("GetDiskUsage", request, pb.DiskUsageReply)
    return DiskUsageReport(
        experiments=tuple(_decode_disk_usage(message) for message in reply.experiments),
        total=_decode_disk_usage(reply.total),
        unreferenced_bytes=reply.unreferenced_bytes,
        unreadable=tuple(
            UnreadableSnapshot(message.id, message.experiment_id, message.error)
            for message in reply.unreadable
        ),
    )


@dataclass(frozen=True, slots=True)
class CollectReport:
    """What `gc` has deleted, or would delete; all but `announced` and the ages are packs and bytes."""

    packs: int
    size_bytes: int
    kept_packs: int
    kept_bytes: int
    #: The part of `kept_bytes` that nothing needs, in packs with what is needed.
    unneeded_bytes: int
    #: The part of `kept_bytes` that nothing needs yet, but that may belong to an upload.
    spared_bytes: int
    #: Experiments and checkpoints that are announced and not committed, and the age of the oldest of them.
    announced: int
    announced_age_s: float


class CollectProgress(NamedTuple):
    """How far a collection is; a total of 0 is not known."""

    step: str
    done: int
    total: int


def collect(repository: str, *, dry_run: bool = False) -> Iterator[CollectProgress | CollectReport]:
    """Delete what nothing needs, or with `dry_run` say how much that is: progress, and at last a report.

    Ending the iteration early ends the work, which is safe. Errors as for the functions of `query`; nothing
    was deleted when the repository is damaged.
    """
    request = pb.CollectRequest(repository=repository, dry_run=dry_run)
    for event in connection.stream("Collect", request, pb.CollectEvent):
        if event.HasField("report"):
            names = (field.name for field in fields(CollectReport))
            yield CollectReport(**{name: getattr(event.report, name) for name in names})
        else:
            yield CollectProgress(event.step, event.done, event.total)


def _decode_disk_usage(message: pb.DiskUsage) -> DiskUsage:
    return DiskUsage(
        id=message.id,
        logical_bytes=message.logical_bytes,
        unique_bytes=message.unique_bytes,
        stored_bytes=message.stored_bytes,
        snapshots=message.snapshots,
        base_bytes=message.base_bytes,
        metadata_bytes=message.metadata_bytes,
        encodings={
            encoded.encoding: EncodedBytes(encoded.plain_bytes, encoded.stored_bytes)
            for encoded in message.encodings
        },
    )
