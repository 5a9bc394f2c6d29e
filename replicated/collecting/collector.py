"""The steps of a collection, in the order that makes it safe; see "Collecting" in docs/format.md.

1. Finish what an interrupted one has left: packs that are condemned for good.
2. List packs, log and records; mark what they need; the packs of which nothing is needed are candidates.
3. Put a list that condemns them. From now on nobody begins to rely on them.
4. List log and records again, and mark what is new: who began to rely on one of them before is seen now.
5. Put the list of those that really go, which is final.
6. Write the index objects that list them anew, without them.
7. Delete them.

It may be killed anywhere: before step 5 nothing has happened but that chunks in condemned packs may be
stored a second time, and after it step 1 of the next one goes on.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Collection as Members
from dataclasses import dataclass, replace
from typing import Final, Protocol

from replicate.errors import InvalidArgument, RepositoryDamaged, RepositoryUnreachable
from replicate.phrases import plural
from replicate.records import utc_now
from replicated.collecting.marking import Marker
from replicated.collecting.planning import Survey, find_survivors, survey
from replicated.collecting.roots import Roots
from replicated.compaction import IndexChanged, merge
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.condemned import Condemned, encode_condemned
from replicated.format.listing import Section, split_sections
from replicated.keys import (
    HEARTBEAT_PREFIX,
    PACK_PREFIX,
    Announced,
    LogListing,
    checkpoint_key,
    condemned_key,
    experiment_key,
    index_key,
    pack_key,
    parse_snapshot_id,
)
from replicated.repository import Repository
from replicated.store.base import KeyMissing, ObjectInfo

#: A pack that no index object lists may be waiting for its own; an upload lists its packs within minutes.
UNLISTED_AGE_S: Final = 24 * 3600.0
#: While somebody else trains, packs that nothing needs yet may be those of an upload that has not ended. They
#: could be collected safely, but it would have to begin again.
UPLOAD_AGE_S: Final = 6 * 3600.0
#: Who trains has said so within this time.
ALIVE_S: Final = 600.0
#: Packs that are deleted with one call.
_DELETED_AT_ONCE: Final = 500
#: Index objects that are kept in memory, because they are looked at several times.
_KEPT_BYTES: Final = 64 << 20
_TRIES: Final = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CollectReport:
    """What was deleted, or would be."""

    #: Packs that nothing needs, and their sizes.
    packs: int = 0
    size_bytes: int = 0
    #: All other packs.
    kept_packs: int = 0
    kept_bytes: int = 0
    #: The part of `kept_bytes` in chunks that nothing needs, which are in packs with others.
    unneeded_bytes: int = 0
    #: The part of `kept_bytes` in packs that nothing needs, but that may belong to an upload.
    spared_bytes: int = 0
    #: What is announced and not committed: being stored, or given up by a machine that is gone.
    announced: int = 0
    #: Age of the oldest of these, in seconds; 0 when there is none or the store does not tell.
    announced_age_s: float = 0.0


class OnProgress(Protocol):
    """Is told how far it is; raises to stop, which is safe at any time."""

    def __call__(self, step: str, done: int, total: int) -> None:
        """`total` is 0 when it is not known."""
        ...


def _say_nothing(step: str, done: int, total: int) -> None:
    pass


def collect(
    repository: Repository,
    *,
    leased: Iterable[str] = (),
    is_dry_run: bool = False,
    on_progress: OnProgress = _say_nothing,
    random_name: Callable[[], str] = lambda: os.urandom(32).hex(),
    unlisted_age_s: float = UNLISTED_AGE_S,
    upload_age_s: float = 0.0,
) -> CollectReport:
    """Delete the packs that nothing needs. Others may write, read and collect meanwhile.

    `leased`: snapshots that are mounted here. `upload_age_s`: for so long this machine has been storing what
    it stores now; its packs are spared. Nothing was deleted when it raises `RepositoryDamaged` or
    `RepositoryIncompatible` for what it cannot understand, which it names, `InvalidArgument` for a snapshot
    that is mounted and was removed, or `RepositoryUnreachable` where listings lag behind.
    """
    collection = Collection(repository, leased, on_progress, random_name, unlisted_age_s, upload_age_s)
    if not is_dry_run:
        collection.resume()
    collection.plan()
    if not is_dry_run:
        collection.execute()
    return collection.report


class Collection:
    """One run of the collector; not for several threads."""

    def __init__(
        self,
        repository: Repository,
        leased: Iterable[str] = (),
        on_progress: OnProgress = _say_nothing,
        random_name: Callable[[], str] = lambda: os.urandom(32).hex(),
        unlisted_age_s: float = UNLISTED_AGE_S,
        upload_age_s: float = 0.0,
    ) -> None:
        self._repository = repository
        self._store = repository.store
        self._leased = list(leased)
        self._on_progress = on_progress
        self._random_name = random_name
        self._unlisted_age_s = unlisted_age_s
        self._upload_age_s = upload_age_s
        self._roots = Roots(self._store)
        self._marker = self._make_marker()
        self._objects = _IndexObjects(repository)
        self._condemned = _CondemnedPacks(repository)
        #: Packs in the store, by name.
        self._packs: dict[bytes, ObjectInfo] = {}
        self._candidates: set[bytes] = set()
        self._found = Survey()
        self.report = CollectReport()

    def _make_marker(self) -> Marker:
        return Marker(self._repository, lambda done: self._on_progress("marking", done, 0))

    def resume(self) -> None:
        """Delete what an interrupted collection has decided on."""
        listing = self._list()
        self._packs = self._list_packs()
        left = self._condemned.gone.intersection(self._packs)
        if left or self._objects.with_any(self._condemned.gone, listing):
            self._drop(left)

    def plan(self) -> None:
        """Find the packs of which nothing is needed; sets `report`."""
        # Before the log: a pack that is listed nowhere then is not one whose index object came meanwhile.
        self._packs = self._list_packs()
        listing = self._mark()
        condemned, gone = self._condemned.packs, self._condemned.gone
        found = self._found
        unlisted = {
            name
            for name, info in self._packs.items()
            if name not in found.listed
            and name not in condemned
            and (info.age_s or 0.0) > self._unlisted_age_s
        }
        useless = found.useless.intersection(self._packs)
        spared = self._spare(useless)
        # What others have condemned and not deleted, because something relied on it or they were killed.
        again = condemned.difference(gone).intersection(self._packs)
        if again:
            again -= find_survivors(self._sections, self._marker.needs, condemned, again, self._packs.keys())
        left = gone.intersection(self._packs)
        self._candidates = (useless - spared) | unlisted | again
        going = self._candidates | left
        kept = self._packs.keys() - going
        pending = [info for item, infos in listing.new.items() if self._is_pending(item) for info in infos]
        self.report = CollectReport(
            packs=len(going),
            size_bytes=sum(self._packs[name].size for name in going),
            kept_packs=len(kept),
            kept_bytes=sum(self._packs[name].size for name in kept),
            unneeded_bytes=found.unneeded_bytes,
            spared_bytes=sum(self._packs[name].size for name in spared),
            announced=len(pending),
            announced_age_s=max((info.age_s or 0.0 for info in pending), default=0.0),
        )
        for key in sorted(self._roots.orphans):
            _log.warning("%s in %s belongs to no experiment: it keeps nothing", key, self._store.url)

    def execute(self) -> None:
        """Delete what was planned, but for what somebody has begun to rely on; `report` says how much."""
        if not self._candidates:
            return
        self._condemn(Condemned(frozenset(self._candidates)))
        # From here on nobody begins to rely on them, and who did before is seen.
        self._mark()
        survivors = find_survivors(
            self._sections,
            self._marker.needs,
            self._condemned.packs,
            self._candidates,
            self._packs.keys(),
        )
        going = self._candidates - survivors
        if going:
            self._condemn(Condemned(frozenset(going), is_final=True))
            self._drop(going)
        self._report_kept(survivors)

    def _report_kept(self, survivors: Members[bytes]) -> None:
        report = self.report
        size = sum(self._packs[name].size for name in survivors)
        self.report = replace(
            report,
            packs=report.packs - len(survivors),
            size_bytes=report.size_bytes - size,
            kept_packs=report.kept_packs + len(survivors),
            kept_bytes=report.kept_bytes + size,
        )

    def _mark(self) -> LogListing:
        """List log and records, and mark all that they need; the listing of the log."""
        for _ in range(_TRIES):
            listing = self._list()
            roots = self._roots.find(listing)
            self._check_leased()
            self._repository.index.refresh()
            try:
                self._marker.mark(roots)
            except RepositoryDamaged as error:
                # Somebody may have removed it since it was listed, and somebody else collected it.
                key = error.fields.get("key", "")
                if key not in self._roots.records or self._store.exists(key):
                    raise
                self._marker = self._make_marker()
                continue
            self._found = survey(self._sections, self._marker.needs, self._condemned.packs)
            if not self._found.missing_count:
                return listing
            # Somebody has committed after the index objects were listed. Or it is damage.
        missing = plural(self._found.missing_count, "chunk")
        raise RepositoryDamaged(
            f"{missing} that snapshots in {self._store.url} need are in no index object",
            hint="nothing was deleted; `replicate du` says which snapshots are damaged",
        )

    def _list(self) -> LogListing:
        """What the log shows: what is condemned and what index objects list is known then."""
        listing = self._repository.log.list()
        self._condemned.load(listing)
        self._objects.load(listing)
        return listing

    def _sections(self) -> Iterator[Section]:
        """What index objects say of all packs, but for those that are gone."""
        gone = self._condemned.gone
        return (section for section in self._objects.sections() if section.name not in gone)

    def _list_packs(self) -> dict[bytes, ObjectInfo]:
        packs: dict[bytes, ObjectInfo] = {}
        for info in self._store.list(PACK_PREFIX):
            try:
                name = bytes.fromhex(info.key.rpartition("/")[2])
            except ValueError:
                continue
            if pack_key(name) == info.key:
                packs[name] = info
                self._on_progress("listing", len(packs), 0)
        return packs

    def _spare(self, useless: Iterable[bytes]) -> set[bytes]:
        """Those of the packs that may belong to an upload which has not ended."""
        age_s = self._upload_age_s
        # Elsewhere uploads of others take no long time, and are repeated at little cost.
        if self._store.capabilities.has_costly_requests:
            beats = self._store.list(HEARTBEAT_PREFIX)
            if any(info.age_s is not None and info.age_s < ALIVE_S for info in beats):
                age_s = max(age_s, UPLOAD_AGE_S)
        return {name for name in useless if (self._packs[name].age_s or 0.0) < age_s}

    def _is_pending(self, item: Announced) -> bool:
        key = item.record_key
        if item.kind not in ("experiment", "checkpoint", "shard") or self._roots.is_removed(key):
            return False
        return key not in self._roots.records

    def _check_leased(self) -> None:
        """Refuse to collect what is mounted and has been removed: nobody knows what that needs."""
        for snapshot_id in self._leased:
            experiment_id, checkpoint_id = parse_snapshot_id(snapshot_id)
            key = (
                checkpoint_key(experiment_id, checkpoint_id)
                if checkpoint_id
                else experiment_key(experiment_id)
            )
            if key not in self._roots.records:
                raise InvalidArgument(
                    f"a snapshot that was removed from {self._store.url} is still mounted: {snapshot_id}",
                    hint="unmount it first (`replicate umount`); nothing was deleted",
                    fields={"id": snapshot_id},
                )

    def _condemn(self, condemned: Condemned) -> None:
        """Put a list of packs; when this returns, every listing that begins shows it."""
        name = self._random_name()
        data = encode_condemned(condemned, utc_now(), platform.node())
        self._store.put(condemned_key(name), [data])
        if name not in self._list().condemned:
            raise RepositoryUnreachable(
                f"listings of {self._store.url} do not show at once what was put there",
                hint="nothing may be collected in such a store; `replicate doctor` tries it out",
                fields={"key": condemned_key(name)},
            )

    def _drop(self, packs: Members[bytes]) -> None:
        """Take packs that are condemned for good out of the index objects, and delete them."""
        for _ in range(_TRIES):
            affected = self._objects.with_any(self._condemned.gone, self._list())
            if not affected:
                break
            self._on_progress("indexing", 0, len(affected))
            try:
                merge(self._store, self._repository.log, affected, self._condemned.gone)
            except IndexChanged as error:
                _log.info("index objects changed while they were written anew: %s", error)
        else:
            raise RepositoryUnreachable(
                f"index objects of {self._store.url} change all the time",
                hint="run `replicate gc` again later: it goes on where it was",
            )
        names = sorted(packs)
        for start in range(0, len(names), _DELETED_AT_ONCE):
            self._on_progress("deleting", start, len(names))
            self._store.delete(*map(pack_key, names[start : start + _DELETED_AT_ONCE]))
        self._on_progress("deleting", len(names), len(names))
        self._repository.index.refresh()


class _CondemnedPacks:
    """All packs in any list of condemned ones, which stay there for ever."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._known: set[str] = set()
        self.packs: set[bytes] = set()
        #: Those in lists that are final.
        self.gone: set[bytes] = set()

    def load(self, listing: LogListing) -> None:
        """Read the lists that are new; raises `RepositoryDamaged`, also when one has vanished."""
        if vanished := self._known - listing.condemned:
            raise self._damaged(min(vanished), "it is gone")
        for name in sorted(listing.condemned - self._known):
            try:
                condemned = self._repository.log.load_condemned(name)
            except (Malformed, NewerFormat, KeyMissing) as error:
                raise self._damaged(name, str(error)) from error
            self._known.add(name)
            self.packs |= condemned.packs
            if condemned.is_final:
                self.gone |= condemned.packs

    def _damaged(self, name: str, reason: str) -> RepositoryDamaged:
        key = condemned_key(name)
        return RepositoryDamaged(
            f"{key} in {self._repository.url} cannot be read: {reason}",
            hint="nothing was deleted",
            fields={"key": key},
        )


class _IndexObjects:
    """The index objects of the last listing, and what they list."""

    def __init__(self, repository: Repository) -> None:
        self._store = repository.store
        self._packs: dict[str, frozenset[bytes]] = {}
        self._kept: dict[str, bytes] = {}
        self._listed: list[str] = []

    def load(self, listing: LogListing) -> None:
        """Look at those that are new; raises `RepositoryDamaged` for one that cannot be read."""
        for name in list(self._packs.keys() - listing.index.keys()):
            del self._packs[name]
            self._kept.pop(name, None)
        for name in sorted(listing.index.keys() - self._packs.keys()):
            try:
                self._packs[name] = frozenset(section.name for section in self._read(name))
            except KeyMissing:
                continue  # merged since; what it was merged into is read with the next listing
        self._listed = sorted(self._packs)

    def sections(self) -> Iterator[Section]:
        """All sections, of one object after the other."""
        for name in self._listed:
            try:
                yield from self._read(name)
            except KeyMissing:
                continue

    def with_any(self, packs: Members[bytes], listing: LogListing) -> list[str]:
        """The objects that list any of these packs."""
        return [
            name for name in self._listed if name in listing.index and not self._packs[name].isdisjoint(packs)
        ]

    def _read(self, name: str) -> list[Section]:
        data = self._kept.get(name)
        if data is None:
            data = self._store.get(index_key(name))
            if sum(map(len, self._kept.values())) + len(data) <= _KEPT_BYTES:
                self._kept[name] = data
        try:
            return split_sections(data)
        except (Malformed, NewerFormat) as error:
            key = index_key(name)
            raise RepositoryDamaged(
                f"{key} in {self._store.url} cannot be read, so nobody knows which packs are needed: {error}",
                hint="nothing was deleted",
                fields={"key": key},
            ) from error
