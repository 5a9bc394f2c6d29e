"""Checkpoints that several processes make together: when they are complete, and when they are given up.

Each rank's daemon stores its part as a shard; whoever sees all of them merges their trees and publishes the
checkpoint. Nothing of it is visible to readers before. What is decided here follows from what lies in the
repository alone, and two daemons that decide at the same time write the same bytes or find what the other one
wrote: what was recorded first counts. Called by `jobs`, in the thread of a worker.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from replicate.errors import NotFound, ReplicateError, RepositoryDamaged, RepositoryUnreachable
from replicate.ids import ExperimentId, short
from replicate.phrases import plural
from replicate.records import CheckpointRecord, Part, SnapshotState
from replicated.format.canonical import Malformed
from replicated.format.manifest import RootNode
from replicated.format.shards import RankEdit, RankStatus, Shard, decode_rank_edit, decode_shard, encode_shard
from replicated.keys import SHARD_PREFIX, Announced, edit_key, shard_key
from replicated.merging import MergeConflict, merge_trees
from replicated.publishing import Publication, publish_checkpoint
from replicated.repository import Repository
from replicated.store.base import KeyMissing

#: How long a checkpoint with files of rank 0, of which nobody said that others add to it, waits for a sign of
#: them: where none has joined, and where some have, or are expected to.
ALONE_AFTER_S: Final = 15.0
ALONE_AMONG_OTHERS_AFTER_S: Final = 60.0
#: How long nothing may be heard before the checkpoint is given up: of a rank that never joined, and of one
#: that joined and has not ended, whose daemon may be storing a large part.
PATIENCE_S: Final = 30 * 60.0
JOINED_PATIENCE_S: Final = 2 * 3600.0
#: Collectors would have to take what is relied on so often in a row.
_MOST_TRIES: Final = 5
#: Ranks named in a sentence; the rest is counted.
_MOST_NAMED: Final = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known of a checkpoint that is not complete."""

    part: Part
    #: Ranks whose shards are in the repository.
    present: frozenset[int]
    #: The newest word of other ranks that have joined in this start of the job.
    members: Mapping[int, RankStatus]
    #: Whether ranks other than 0 have added files to any checkpoint of this start of the job.
    others_add: bool
    #: Seconds since this part was captured, and since anything was heard of the others.
    age_s: float
    quiet_s: float
    #: When this part was captured, for people.
    since: str = ""


class Verdict(NamedTuple):
    """`wait`: look again later; `alone`: it is rank 0's own; `fail`: it is given up."""

    kind: Literal["wait", "alone", "fail"]
    #: What it waits for, or why it is given up.
    text: str = ""


@dataclass(frozen=True, slots=True)
class Settled:
    """What has become of a checkpoint, as far as this part is concerned."""

    state: SnapshotState
    error: str = ""


def judge(situation: Situation) -> Verdict:
    """What to do about a checkpoint of which not all parts are there; at least one is missing."""
    part, members = situation.part, situation.members
    missing = [rank for rank in range(part.world_size) if rank not in situation.present]
    if part.rank == 0:
        dead = any(status in ("failed", "killed") for status in members.values())
        if part.is_detected and not situation.others_add and not situation.present - {0} and not dead:
            return _judge_alone(situation)
        ended = [rank for rank in missing if members.get(rank, "joined") != "joined"]
        if ended:
            how = {members[rank] for rank in ended}
            word = how.pop() if len(how) == 1 else "ended"
            verb = {"stopped": "ended", "killed": "was killed" if len(ended) == 1 else "were killed"}
            return Verdict("fail", f"{name_ranks(ended)} {verb.get(word, word)} without adding its files")
    patience_s = part.patience_s or PATIENCE_S
    if not part.patience_s and (part.rank or all(members.get(rank) == "joined" for rank in missing)):
        patience_s = JOINED_PATIENCE_S
    if part.rank:
        # Rank 0 is to be the first that gives up: it records why, and who is missing.
        patience_s *= 2
    names = f"{name_ranks(missing)} of {part.world_size}"
    if situation.quiet_s >= patience_s:
        return Verdict("fail", f"the files of {names} did not come within {_format_duration(patience_s)}")
    return Verdict("wait", f"waits for {names}" + (f" since {situation.since}" if situation.since else ""))


def _judge_alone(situation: Situation) -> Verdict:
    """Of a checkpoint of rank 0 when no other rank has ever added files, and none is known to have died."""
    part = situation.part
    is_among_others = bool(situation.members) or part.is_expected
    statuses = situation.members.values()
    if len(statuses) == part.world_size - 1 and all(status == "stopped" for status in statuses):
        return Verdict("alone")  # they have ended well, and will add nothing any more
    patience_s = ALONE_AMONG_OTHERS_AFTER_S if is_among_others else ALONE_AFTER_S
    if situation.age_s >= patience_s:
        return Verdict("alone")
    return Verdict("wait", f"waits to see whether other ranks of {part.world_size} add files to it")


def name_ranks(ranks: list[int]) -> str:
    """Some ranks as a sentence calls them, for example `ranks 1, 2 and 3`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    named, left = ranks[:_MOST_NAMED], len(ranks) - _MOST_NAMED
    if left > 0:
        return f"ranks {', '.join(map(str, named))} and {left} more"
    return f"ranks {', '.join(map(str, named[:-1]))} and {named[-1]}"


def _format_duration(seconds: float) -> str:
    if seconds >= 120:
        return plural(round(seconds / 60), "minute")
    return f"{seconds:g} s"


def publish_shard(record: CheckpointRecord, root: RootNode | None) -> Publication:
    """What one rank adds to a checkpoint; the record may be one whose files could not be captured."""
    part = record.part
    assert part is not None, "only a checkpoint of several processes has shards"
    shard = Shard(
        experiment_id=record.experiment_id,
        checkpoint_id=record.id,
        rank=part.rank,
        world_size=part.world_size,
        paths=record.paths,
        root=root,
        error=record.error,
        checkpoint=None if part.rank else _as_stored(record),
    )
    return Publication(Announced("shard", record.experiment_id, record.id, part.rank), encode_shard(shard))


def _as_stored(record: CheckpointRecord) -> CheckpointRecord:
    size = record.part.world_size if record.part is not None else 1
    return dataclasses.replace(
        record, state="stored", error="", waits_for="", part=None, paths=(), world_size=size
    )


class Parts:
    """What one worker knows of the checkpoints of several processes in its repository."""

    def __init__(self) -> None:
        #: Edits of ranks by experiment and id; None for edits of other types.
        self._edits: dict[str, dict[str, RankEdit | None]] = {}
        #: Starts of jobs, by experiment and attempt, of which it is known whether other ranks add files.
        self._others_add: dict[tuple[str, str], bool] = {}

    def is_alone(
        self, repository: Repository, record: CheckpointRecord, earlier: list[CheckpointRecord]
    ) -> bool:
        """Whether it is settled that rank 0 alone makes the checkpoints of this start of its job.

        `earlier`: those of this experiment that this daemon has stored, newest last.
        """
        part = record.part
        assert part is not None
        if part.rank or not part.is_detected:
            return False
        run = (record.experiment_id, part.attempt)
        if run not in self._others_add:
            for before in reversed(earlier):
                if before.part is not None and before.part.attempt == part.attempt and before.part.rank == 0:
                    found = find_record(repository, before)
                    if found is not None and found.state == "stored" and found.created == before.created:
                        self._others_add[run] = found.world_size > 1
                        break
        if self._others_add.get(run) is not False:
            return False
        # Some other rank may have changed its mind.
        ranks = (
            _rank_of(info.key) for info in repository.store.list(f"{SHARD_PREFIX}{record.experiment_id}/")
        )
        if any(ranks):
            self._others_add[run] = True
        return not self._others_add[run]

    def look(
        self,
        repository: Repository,
        record: CheckpointRecord,
        describe: Callable[[frozenset[int]], tuple[float, float, str]],
    ) -> Settled | str:
        """What has become of a checkpoint whose part of this rank is in the repository, or what it waits for.

        `describe` gives, for the ranks whose parts are there, `age_s`, `quiet_s` and `since`.
        """
        part = record.part
        assert part is not None
        # First: what a rank adds is there before it says that it has ended.
        members = self._read_members(repository, record.experiment_id, part.attempt) if part.rank == 0 else {}
        present = list_ranks(repository, record)
        if len(present) == part.world_size:
            self._others_add[record.experiment_id, part.attempt] = True
            settled = self._complete(repository, record)
            if settled is not None:
                return settled
        found = find_record(repository, record)
        if found is not None:
            return adopt(record, found)
        run = (record.experiment_id, part.attempt)
        if present - {0}:
            self._others_add[run] = True
        age_s, quiet_s, since = describe(present)
        situation = Situation(part, present, members, self._others_add.get(run, False), age_s, quiet_s, since)
        verdict = judge(situation)
        if verdict.kind == "wait":
            return verdict.text
        if part.rank:
            # Nobody else knows what was to be recorded.
            _delete_shards(repository, record, {part.rank})
            return Settled("failed", verdict.text)
        if verdict.kind == "alone":
            self._others_add[run] = False
            shard = _load_shard(repository, record, 0)
            single = dataclasses.replace(
                _as_stored(record),
                world_size=1,
                paths=record.paths,
                state="failed" if shard.error else "stored",
                error=shard.error,
            )
            return self._publish(repository, record, lambda: (single, shard.root, None), {0})
        failed = dataclasses.replace(
            _as_stored(record), state="failed", error=verdict.text, paths=record.paths
        )
        return self._publish(repository, record, lambda: (failed, None, None), {0})

    def _complete(self, repository: Repository, record: CheckpointRecord) -> Settled | None:
        """Publish a checkpoint of which all parts are there; None when somebody else is faster."""
        part = record.part
        assert part is not None
        try:
            shards = {rank: _load_shard(repository, record, rank) for rank in range(part.world_size)}
        except KeyMissing:
            return None
        ranks = set(shards)
        told = shards[0].checkpoint
        assert told is not None, "checked when it was read"
        paths = tuple(dict.fromkeys(path for rank in sorted(shards) for path in shards[rank].paths))
        whole = dataclasses.replace(told, paths=paths, world_size=part.world_size)
        reason = _find_fault(shards)
        roots = {rank: shard.root for rank, shard in shards.items() if shard.root is not None}

        def make() -> tuple[CheckpointRecord, RootNode | None, int | None]:
            failure = reason
            if not failure and roots:
                repository.index.refresh()
                generation = repository.index.generation
                try:
                    with repository.writer() as writer:
                        root = merge_trees(repository, writer, roots)
                        writer.finish()
                    return whole, root, generation
                except MergeConflict as error:
                    failure = error.message
            if failure:
                return dataclasses.replace(whole, state="failed", error=failure), None, None
            return whole, None, None

        return self._publish(repository, record, make, ranks)

    def _publish(
        self,
        repository: Repository,
        record: CheckpointRecord,
        make: Callable[[], tuple[CheckpointRecord, RootNode | None, int | None]],
        ranks: set[int],
    ) -> Settled:
        """Publish the record of a checkpoint, and take away the shards that it was made of.

        `make` gives the record, the root of its tree, and the generation of the index under which that is.
        """
        publisher = repository.publisher
        assert record.part is not None
        writer = f"rank {record.part.rank} "
        for _ in range(_MOST_TRIES):
            made, root, generation = make()
            publication = dataclasses.replace(publish_checkpoint(made, root), writer=writer)
            publisher.announce(publication)
            if generation is None or publisher.settle(publication, generation):
                break
        else:
            raise RepositoryUnreachable(
                f"what {short(record.id)} relies on in {repository.url} is collected again and again"
            )
        try:
            publisher.commit(publication)
        except RepositoryDamaged:
            found = find_record(repository, record)
            if found is None:
                raise
            return adopt(record, found)
        _delete_shards(repository, record, ranks)
        return Settled(made.state, made.error)

    def _read_members(
        self, repository: Repository, experiment_id: ExperimentId, attempt: str
    ) -> dict[int, RankStatus]:
        """The newest word of each other rank of this start of the job."""
        known = self._edits.setdefault(experiment_id, {})
        for edit_id in repository.list_edit_ids(experiment_id):
            if edit_id not in known:
                try:
                    known[edit_id] = decode_rank_edit(repository.store.get(edit_key(experiment_id, edit_id)))
                except (KeyMissing, Malformed):
                    continue
        edits = [edit for edit in known.values() if edit is not None and edit.attempt == attempt]
        return {edit.rank: edit.status for edit in sorted(edits, key=lambda edit: edit.time)}


def find_record(repository: Repository, record: CheckpointRecord) -> CheckpointRecord | None:
    """What is recorded of a checkpoint, if anything is."""
    try:
        return repository.load_checkpoint(record.experiment_id, record.id)
    except NotFound:
        return None


def adopt(record: CheckpointRecord, found: CheckpointRecord, *, is_stored: bool = True) -> Settled:
    """What a record that is there already means for a part of its checkpoint.

    `is_stored`: the part is in the repository, and may so be in the checkpoint.
    """
    part = record.part
    assert part is not None
    if part.rank == 0 and found.created != record.created:
        return Settled(
            "failed",
            "an earlier start of the job has recorded this checkpoint already: give another step, or set"
            " REPLICATE_ATTEMPT to another word in all ranks",
        )
    if found.state == "failed":
        return Settled("failed", found.error)
    if part.rank and (found.world_size != part.world_size or not is_stored):
        return Settled(
            "failed",
            f"the checkpoint was recorded without the files of rank {part.rank}: if rank 0 does not wait for"
            " them, give rank= and world_size= in its call, too",
        )
    return Settled("stored")


def list_ranks(repository: Repository, record: CheckpointRecord) -> frozenset[int]:
    """The ranks whose parts of a checkpoint are in the repository."""
    prefix = f"{SHARD_PREFIX}{record.experiment_id}/{record.id}/"
    ranks = (_rank_of(info.key) for info in repository.store.list(prefix))
    size = record.part.world_size if record.part is not None else 0
    return frozenset(rank for rank in ranks if rank is not None and rank < size)


def _rank_of(key: str) -> int | None:
    name = key.rpartition("/")[2]
    number = name.removesuffix(".json")
    return int(number) if name != number and number.isascii() and number.isdecimal() else None


def _load_shard(repository: Repository, record: CheckpointRecord, rank: int) -> Shard:
    """A shard; raises `KeyMissing` when it is gone."""
    key = shard_key(record.experiment_id, record.id, rank)
    try:
        shard = decode_shard(repository.store.get(key))
    except Malformed as error:
        raise RepositoryDamaged(
            f"{key} in {repository.url} is damaged: {error}", fields={"key": key}
        ) from error
    if (shard.experiment_id, shard.checkpoint_id, shard.rank) != (record.experiment_id, record.id, rank):
        raise RepositoryDamaged(f"{key} in {repository.url} is damaged: it is another shard")
    return shard


def _find_fault(shards: Mapping[int, Shard]) -> str:
    """Why these shards cannot become a checkpoint; empty when they can."""
    sizes = {shard.world_size for shard in shards.values()}
    if len(sizes) > 1:
        return f"ranks disagree on how many they are: {', '.join(map(str, sorted(sizes)))}"
    errors = [f"rank {rank}: {shards[rank].error}" for rank in sorted(shards) if shards[rank].error]
    return "; ".join(errors)


def _delete_shards(repository: Repository, record: CheckpointRecord, ranks: set[int]) -> None:
    """Take away shards, and what announces them; best effort, because nobody looks at them any more."""
    shards = [Announced("shard", record.experiment_id, record.id, rank) for rank in sorted(ranks)]
    try:
        new = repository.log.list().new
        announced = [info.key for shard in shards for info in new.get(shard, ())]
        repository.store.delete(*(shard.record_key for shard in shards), *announced)
    except ReplicateError as error:
        _log.warning("the shards of %s stay in the repository: %s", short(record.id), error)
