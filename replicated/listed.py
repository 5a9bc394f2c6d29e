"""Experiments as lists give them: encoded, and looked into only as far as a filter or an order wants.

A list of thousands is read, put in order and sent without an object for every value in it. Made by
`experiments` from what the catalog has ready; `filters` sees a `Listed` as it sees a whole summary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property

from replicate import wire
from replicate._pb import daemon_pb2 as pb
from replicate.records import ProcessIdentity, Status, Value
from replicated.catalog_rows import SummaryRow, seconds_between

#: Gives the status of a run whose end is not recorded, by its id and its process.
Ask = Callable[[str, "ProcessIdentity | None"], Status]


class Listed:
    """One experiment in a list, of which nothing is decoded before it is asked for."""

    def __init__(self, row: SummaryRow, ask: Ask, now: datetime) -> None:
        self._row = row
        self._ask = ask
        self._now = now

    @property
    def id(self) -> str:
        """The complete id."""
        return self._row.id

    @property
    def place(self) -> tuple[int, str]:
        """Where it stands in a list from old to new."""
        return self._row.created_ns, self._row.id

    @cached_property
    def status(self) -> Status:
        """How the run stands."""
        if self._row.is_ended:
            return self._message.status  # type: ignore[return-value]  # written by ourselves
        process = self._row.process
        return self._ask(
            self._row.id, None if process is None else wire.decode_process(pb.Process.FromString(process))
        )

    @cached_property
    def record(self) -> ListedRecord:
        """What `init` recorded."""
        return ListedRecord(self._row.created_ns, lambda: self._message.experiment)

    @property
    def latest(self) -> ListedCheckpoint | None:
        """The latest checkpoint."""
        return ListedCheckpoint(self._message.latest) if self._message.HasField("latest") else None

    @property
    def best(self) -> ListedCheckpoint | None:
        """The best checkpoint."""
        return ListedCheckpoint(self._message.best) if self._message.HasField("best") else None

    def encode(self) -> bytes:
        """As it goes into a `SummaryBatch`."""
        if self._row.is_ended:
            return self._row.summary
        # The encoding of a message is that of its members in a row.
        ending = pb.ExperimentSummary(status=self.status, duration_s=self._duration_s())
        return self._row.summary + ending.SerializeToString()

    def _duration_s(self) -> float:
        if self.status == "running":
            return seconds_between(self._row.created_ns, wire.encode_time(self._now))
        if self._row.latest_ns is None:
            return -1.0
        return seconds_between(self._row.created_ns, self._row.latest_ns)

    @cached_property
    def _message(self) -> pb.ExperimentSummary:
        return pb.ExperimentSummary.FromString(self._row.summary)


class ListedRecord:
    """Of an experiment's record what filters and orders may ask for."""

    def __init__(self, created_ns: int, decode: Callable[[], pb.Experiment]) -> None:
        self._created_ns = created_ns
        self._decode = decode

    @property
    def created(self) -> datetime:
        """When it began."""
        return wire.decode_time(self._created_ns)

    @property
    def name(self) -> str:
        """Its name, or nothing."""
        return self._decode().name

    @property
    def tags(self) -> Sequence[str]:
        """Its tags."""
        return tuple(self._decode().tags)

    @property
    def user(self) -> str:
        """Who began it."""
        return self._decode().user

    @property
    def host(self) -> str:
        """Where it began."""
        return self._decode().host

    @property
    def command(self) -> str:
        """How it was begun."""
        return wire.decode_path(self._decode().command)

    @cached_property
    def params(self) -> Mapping[str, Value]:
        """Its params."""
        return wire.decode_mapping(self._decode().params)


class ListedCheckpoint:
    """Of a checkpoint what filters and orders may ask for."""

    def __init__(self, message: pb.Checkpoint) -> None:
        self._message = message

    @property
    def step(self) -> int:
        """Its step."""
        return self._message.step

    @cached_property
    def metrics(self) -> Mapping[str, Value]:
        """Its metrics."""
        return wire.decode_mapping(self._message.metrics)
