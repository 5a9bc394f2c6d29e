"""What is announced and committed: of one record by several writers, and of what is removed meanwhile."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from replicate.errors import RepositoryDamaged
from replicate.ids import CheckpointId, ExperimentId, new_id
from replicate.records import CheckpointRecord, ExperimentRecord, utc_now
from replicated.collecting.collector import collect
from replicated.format.manifest import RootNode, TreeEntry
from replicated.keys import NEW_PREFIX, checkpoint_key, parse_announced
from replicated.publishing import RecordRemoved, publish_checkpoint
from replicated.record_merging import merge_announced
from replicated.references import iter_chunks
from replicated.repository import Repository
from replicated.store.base import Capabilities
from replicated.store.memory import MemoryStore

NO_ROOT = "the files of rank 1 of 2 did not come within 30 minutes"


class CostlyStore(MemoryStore):
    """Says that each request costs, as a bucket does."""

    @property
    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities, has_costly_requests=True)


@pytest.fixture(params=[MemoryStore, CostlyStore])
def store(request: pytest.FixtureRequest) -> MemoryStore:
    made = request.param()
    assert isinstance(made, MemoryStore)
    return made


@pytest.fixture
def machine(tmp_path: Path, store: MemoryStore) -> Callable[[str], Repository]:
    def open_there(name: str) -> Repository:
        return Repository.open_on(store, cache=tmp_path / name, create=True)

    return open_there


def add_files(repository: Repository, content: bytes) -> tuple[int, RootNode]:
    with repository.writer() as writer:
        generation = repository.index.generation
        root = writer.add_tree([TreeEntry(b"w", "file", 0o644, 0, writer.add_file(content))])
        writer.finish()
    return generation, root


def record_in(repository: Repository, *, world_size: int = 1) -> CheckpointRecord:
    experiment_id = ExperimentId(new_id())
    repository.put_experiment(ExperimentRecord(experiment_id, utc_now()))
    return CheckpointRecord(
        CheckpointId(new_id()),
        experiment_id,
        utc_now(),
        step=1,
        paths=("w",),
        state="stored",
        world_size=world_size,
    )


def read_all(repository: Repository, record: CheckpointRecord) -> int:
    snapshot = repository.load_snapshot(f"{record.experiment_id}/{record.id}")
    return sum(len(repository.read_chunk(chunk.id)) > 0 for chunk in iter_chunks(repository, snapshot))


def test_two_processes_may_announce_one_checkpoint_with_different_bytes(machine, store):
    one, other = machine("one"), machine("other")
    record = record_in(one, world_size=2)
    generation, root = add_files(one, os.urandom(40_000))
    whole = publish_checkpoint(record, root)
    failed = publish_checkpoint(dataclasses.replace(record, state="failed", error=NO_ROOT))
    one.publisher.announce(whole)
    assert one.publisher.settle(whole, generation)
    other.publisher.announce(failed)  # it has given up just now
    assert collect(machine("collector")).packs == 0
    one.publisher.commit(whole)
    with pytest.raises(RepositoryDamaged):
        other.publisher.commit(failed)
    assert read_all(machine("reader"), record)


def test_all_announcements_of_a_record_are_merged_and_removed_with_it(machine, store):
    one = machine("one")
    merged, removed = record_in(one), record_in(one)
    for record in (merged, removed):
        one.put_checkpoint(record)
        one.publisher.announce(publish_checkpoint(dataclasses.replace(record, step=2)))
        one.publisher.announce(publish_checkpoint(dataclasses.replace(record, step=3)))

    def announced(record: CheckpointRecord) -> int:
        found = (parse_announced(info.key) for info in store.list(NEW_PREFIX))
        return sum(item is not None and item.kind == "checkpoint" and item.id == record.id for item in found)

    assert announced(merged) >= 2
    one.delete_checkpoint(removed.experiment_id, removed.id)
    assert announced(removed) == 0
    assert store.exists(checkpoint_key(merged.experiment_id, merged.id))
    merge_announced(one, one.log.list())
    assert announced(merged) == 0


def test_an_announcement_of_others_is_not_taken_for_ones_own(machine, store):
    one = machine("one")
    record = record_in(one)
    ours = publish_checkpoint(dataclasses.replace(record, step=2))
    theirs = publish_checkpoint(dataclasses.replace(record, step=3))
    assert len(ours.data) == len(theirs.data)
    one.publisher.announce(theirs)
    one.publisher.settle(ours, one.index.generation)  # announces it again, because it does not show
    assert {info.key for info in one.log.list().new[ours.announced]} == {ours.key, theirs.key}


@pytest.mark.parametrize("is_committed_before", [False, True], ids=["new", "repeated"])
@pytest.mark.parametrize("what", ["experiment", "checkpoint"])
def test_what_is_removed_on_another_machine_does_not_come_back(machine, store, what, is_committed_before):
    one, other = machine("one"), machine("other")
    record = record_in(one)
    generation, root = add_files(one, os.urandom(40_000))
    publication = publish_checkpoint(record, root)
    if is_committed_before:
        one.publisher.announce(publication)
        one.publisher.commit(publication)  # and killed before its journal knew
    one.publisher.announce(publication)
    assert one.publisher.settle(publication, generation)
    if what == "experiment":
        other.delete_experiment(record.experiment_id)
    else:
        other.delete_checkpoint(record.experiment_id, record.id)
    collect(machine("collector"))
    with pytest.raises(RecordRemoved, match="was removed from"):
        one.publisher.commit(publication)
    assert not list(store.list("checkpoints/"))
    assert not [key for key in (info.key for info in store.list(NEW_PREFIX)) if "/c-" in key]
    collect(machine("next collector"))


def test_what_is_removed_before_it_is_settled_is_not_committed_in_a_bucket(tmp_path):
    store = CostlyStore()
    one = Repository.open_on(store, cache=tmp_path / "one", create=True)
    record = record_in(one)
    publication = dataclasses.replace(publish_checkpoint(record), is_unique=True)
    one.delete_experiment(record.experiment_id)
    with pytest.raises(RecordRemoved):
        one.publisher.publish(publication)
    assert not [info.key for info in store.list(NEW_PREFIX) if "/x-" not in info.key]


def test_processes_that_commit_the_same_bytes_do_not_take_each_other_for_removed(machine, store):
    one, other = machine("one"), machine("other")
    publication = publish_checkpoint(record_in(one, world_size=2))
    ours, theirs = (dataclasses.replace(publication, writer=f"rank {rank} ") for rank in range(2))
    one.publisher.announce(ours)
    other.publisher.announce(theirs)
    one.publisher.commit(ours)
    other.publisher.commit(theirs)
    assert store.exists(publication.announced.record_key)


def test_other_bytes_than_those_that_are_there_leave_no_announcement(machine, store):
    one = machine("one")
    record = record_in(one)
    _, root = add_files(one, b"w" * 400)
    one.put_checkpoint(record, root)
    before = {info.key for info in store.list(NEW_PREFIX)}
    with pytest.raises(RepositoryDamaged):
        one.put_checkpoint(dataclasses.replace(record, state="failed", error="lost"))
    assert {info.key for info in store.list(NEW_PREFIX)} == before
    assert read_all(machine("reader"), record)
