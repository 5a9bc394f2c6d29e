"""Making records visible: announce, make sure that nothing they need is going, commit.

The handshake with collectors, without locks and clocks (docs/durability.md): who publishes puts the
announcement, which names everything that the record needs, and only then reads what is condemned; who
collects puts what he condemns and only then reads the announcements. So at least one of the two sees the
other. A record under its own key is the commit: until then no reader shows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from replicate.errors import ReplicateError, RepositoryDamaged
from replicate.ids import short
from replicate.records import CheckpointRecord, ExperimentRecord
from replicated.format import metadata
from replicated.format.manifest import RootNode
from replicated.format.metadata import Edit
from replicated.founding import forget_segments, load_settings
from replicated.index import Index
from replicated.keys import Announced, LogListing, experiment_key
from replicated.store.base import Store, StoreBusy

#: How long a store may take until its listings show what was put.
LISTING_PATIENCE_S: Final = 10.0
_FIRST_PAUSE_S: Final = 0.1


class RecordRemoved(ReplicateError):
    """What was to be published was removed meanwhile, by another machine: there is no place for it."""


@dataclass(frozen=True, slots=True)
class Publication:
    """A record and what announces it: the same bytes under two keys."""

    announced: Announced
    data: bytes
    #: Whether nobody else publishes other bytes under this key: then nobody need look.
    is_unique: bool = False
    #: Tells those apart who may publish the same record at the same time.
    writer: str = ""

    @property
    def key(self) -> str:
        """The key of the announcement."""
        return self.announced.key_of(self.data, self.writer)


def publish_experiment(record: ExperimentRecord, root: RootNode | None = None) -> Publication:
    """An experiment, with the root of its files if it saved any."""
    announced = Announced("experiment", record.id, record.id)
    return Publication(announced, metadata.encode_experiment(record, root))


def publish_checkpoint(record: CheckpointRecord, root: RootNode | None = None) -> Publication:
    """A checkpoint in state stored or failed, with the root of its files if it saved any."""
    announced = Announced("checkpoint", record.experiment_id, record.id)
    return Publication(announced, metadata.encode_checkpoint(record, root))


def publish_edit(experiment_id: str, edit_id: str, edit: Edit) -> Publication:
    """An edit under an id that the caller chose, so that it can be repeated."""
    return Publication(Announced("edit", experiment_id, edit_id), metadata.encode_edit(edit), is_unique=True)


def publish_removal(experiment_id: str, removed_id: str, at: datetime) -> Publication:
    """That an experiment (its own id) or a checkpoint of it is removed."""
    return Publication(Announced("removal", experiment_id, removed_id), metadata.encode_removal(at))


class Publisher:
    """Publishes into one repository. May be used from several threads; every step may be repeated."""

    def __init__(
        self,
        store: Store,
        index: Index,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._index = index
        self._clock = clock
        self._sleep = sleep

    def publish(self, publication: Publication) -> None:
        """All steps at once, of a record that needs nothing that could go; durable when it returns."""
        self.announce(publication)
        if self._store.capabilities.has_costly_requests:
            # Who looks for what is new has to find it.
            self.settle(publication, 0)
        self.commit(publication)

    def announce(self, publication: Publication) -> None:
        """From now on no collector that begins removes what the record needs."""
        self._store.replace(publication.key, publication.data)

    def settle(self, publication: Publication, generation: int) -> bool:
        """Whether all that was found at this `Index.generation`, or put since, is there to stay.

        Call it after `announce`. When it is not, what the record needs has to be stored again, from the
        beginning, and then this asked again. Raises `StoreBusy` when the announcement itself does not show,
        and `RecordRemoved`.
        """
        key = publication.key
        until = self._clock() + LISTING_PATIENCE_S
        pause_s = _FIRST_PAUSE_S

        def is_there(listing: LogListing) -> bool:
            found = listing.new.get(publication.announced, ())
            return any(info.key == key and info.size == len(publication.data) for info in found)

        # What was put before the announcement shows where that shows.
        while (listing := self._index.refresh_until(is_there)) is None:
            if self._clock() > until:
                raise StoreBusy(
                    f"{self._store.url} does not list what was put there: {key}",
                    hint="`replicate doctor` tries the store out; what is pending is kept",
                    fields={"key": key},
                )
            self._sleep(pause_s)
            pause_s *= 2
            self.announce(publication)  # the store may have lost it
        if self._store.capabilities.has_costly_requests and not listing.is_complete:
            # A bucket that was emptied meanwhile looks like this: nothing is to be put into what is left.
            load_settings(self._store)
        if _shows_removal(listing, publication.announced):
            self.withdraw(publication)
            raise self._removed(publication)
        return self._index.generation == generation

    def withdraw(self, publication: Publication) -> None:
        """Take an announcement back that is not to be committed."""
        self._store.delete(publication.key)

    def commit(self, publication: Publication) -> None:
        """Make the record visible; durable when it returns.

        Raises `RecordRemoved` when somebody has removed it, or its experiment, since it was announced, and
        `RepositoryDamaged` when other bytes are there. Neither leaves an announcement.
        """
        announced = publication.announced
        if announced.kind == "removal":
            return
        is_costly = self._store.capabilities.has_costly_requests
        if not is_costly and self._is_removed(publication):
            self.withdraw(publication)
            raise self._removed(publication)
        try:
            self._store.put(announced.record_key, [publication.data], is_unique=publication.is_unique)
        except RepositoryDamaged:
            self.withdraw(publication)
            raise
        # Who removes announces that, or deletes the announcement, and only then deletes the record: either he
        # finds the record, or this finds what he did. What only this process knows of, nobody can remove; an
        # experiment that is removed at this moment leaves a record behind that nobody is shown.
        if not (is_costly and publication.is_unique) and self._is_removed(publication):
            self._store.delete(announced.record_key, publication.key)
            raise self._removed(publication)
        if not is_costly:
            forget_segments(self._store)
            # Who lists the records themselves needs no announcement of what is there.
            self._store.delete(publication.key)

    def _is_removed(self, publication: Publication) -> bool:
        """Whether somebody has removed what is announced, or its experiment."""
        announced = publication.announced
        if self._store.capabilities.has_costly_requests:
            return _shows_removal(self._index.refresh(), announced)
        if not self._store.exists(publication.key):
            return True
        # Shards and edits of ranks may be faster than the experiment.
        return announced.kind == "checkpoint" and not self._store.exists(
            experiment_key(announced.experiment_id)
        )

    def _removed(self, publication: Publication) -> RecordRemoved:
        announced = publication.announced
        what = "checkpoint" if announced.kind == "shard" else announced.kind
        return RecordRemoved(
            f"{what} {short(announced.id)} was removed from {self._store.url} while it was being stored",
            fields={"id": announced.id},
        )


def _shows_removal(listing: LogListing, announced: Announced) -> bool:
    experiment_id = announced.experiment_id
    removals = {Announced("removal", experiment_id, one) for one in (experiment_id, announced.id)}
    return announced.kind != "removal" and not removals.isdisjoint(listing.new)
