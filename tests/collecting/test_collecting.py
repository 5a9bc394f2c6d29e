"""What a collection deletes, and what stops it."""

import random

import pytest
from collecting.conftest import Open, all_objects, gc, pack_keys, remove
from repository.conftest import Load, Save
from repository.test_deltas import ONE, OTHER, put

from replicate.errors import InvalidArgument, RepositoryDamaged, RepositoryIncompatible, RepositoryUnreachable
from replicate.ids import CheckpointId, ExperimentId, new_id
from replicate.records import CheckpointRecord, utc_now
from replicated.chunk.codec import hash_chunk
from replicated.compaction import merge
from replicated.format.shards import Shard, encode_shard
from replicated.keys import INDEX_PREFIX, Announced, index_key, shard_key
from replicated.publishing import publish_checkpoint, publish_experiment
from replicated.repository import Repository
from replicated.store.memory import MemoryStore

BIG = random.Random(1).randbytes(400_000)


def test_what_was_removed_is_deleted_and_the_rest_stays(
    repository: Repository, store: MemoryStore, save: Save, load: Load, open_repository: Open
) -> None:
    kept = save(repository, {"a": b"kept", "b/c": BIG[:1000]})
    packs = pack_keys(store)
    removed = save(repository, {"a": BIG})
    size = sum(len(store.get(key)) for key in pack_keys(store) - packs)
    remove(repository, removed)
    before = all_objects(store)
    foreseen = gc(repository, is_dry_run=True)
    assert all_objects(store) == before
    report = gc(repository)
    assert (report.packs, report.size_bytes) == (foreseen.packs, foreseen.size_bytes) == (2, size)
    assert pack_keys(store) == packs
    assert (report.kept_packs, report.kept_bytes) == (2, sum(len(store.get(key)) for key in packs))
    for reader in (repository, open_repository()):
        assert load(reader, kept.id) == {"a": b"kept", "b/c": BIG[:1000]}
    again = save(repository, {"a": BIG})
    assert load(open_repository(), again.id) == {"a": BIG}


def test_with_nothing_to_delete_nothing_is_written(
    repository: Repository, store: MemoryStore, save: Save
) -> None:
    save(repository, {"a": BIG})
    before = all_objects(store)
    assert gc(repository).packs == 0
    assert all_objects(store) == before
    removed = save(repository, {"b": BIG[:50_000]})
    remove(repository, removed)
    assert gc(repository).packs > 0
    before = all_objects(store)
    assert gc(repository).packs == 0
    assert all_objects(store) == before


def test_a_pack_with_something_that_is_needed_stays_as_it_is(
    repository: Repository, store: MemoryStore, save: Save, load: Load
) -> None:
    first = save(repository, {"a": BIG, "b": b"shared" * 1000})
    second = save(repository, {"b": b"shared" * 1000})
    remove(repository, first)
    report = gc(repository)
    assert report.unneeded_bytes >= len(BIG)
    assert load(repository, second.id) == {"b": b"shared" * 1000}


def test_what_is_announced_stays_also_when_nobody_has_committed_it(
    repository: Repository, store: MemoryStore, save: Save
) -> None:
    snapshot = save(repository, {"a": BIG})
    record = repository.load_experiment(ExperimentId(snapshot.id))
    remove(repository, snapshot)
    repository.publisher.announce(publish_experiment(record, snapshot.root))
    packs = pack_keys(store)
    report = gc(repository)
    assert report.announced == 1
    assert pack_keys(store) == packs
    repository.publisher.withdraw(publish_experiment(record, snapshot.root))
    assert gc(repository).packs == len(packs)


def test_checkpoints_and_the_shards_of_several_processes_are_roots(
    repository: Repository, store: MemoryStore, save: Save, load: Load
) -> None:
    experiment = save(repository, {"a": b"experiment"})
    of_checkpoint = save(repository, {"a": BIG[:5000]})
    of_shard = save(repository, {"a": BIG[5000:9000]})
    experiment_id = ExperimentId(experiment.id)
    checkpoint = CheckpointRecord(CheckpointId(new_id()), experiment_id, utc_now(), 1, state="stored")
    repository.put_checkpoint(checkpoint, of_checkpoint.root)
    shard = Shard(experiment_id, CheckpointId(new_id()), 1, 2, root=of_shard.root)
    store.put(shard_key(experiment_id, shard.checkpoint_id, 1), [encode_shard(shard)])
    remove(repository, of_checkpoint)
    remove(repository, of_shard)
    assert gc(repository).packs == 0
    repository.delete_checkpoint(experiment_id, shard.checkpoint_id)
    assert gc(repository).packs == 2
    assert load(repository, publish_id(checkpoint)) == {"a": BIG[:5000]}


def publish_id(checkpoint: CheckpointRecord) -> str:
    return f"{checkpoint.experiment_id}/{checkpoint.id}"


def test_a_file_that_holds_the_bytes_of_a_node_does_not_hide_the_node(
    repository: Repository, save: Save, load: Load
) -> None:
    """The walk must go below a node also when its bytes were met as the content of a file."""
    inner = save(repository, {"x/deep": BIG[:30_000]})
    node = repository.read_node(inner.root.node)
    save(repository, {"bytes of a node": node})
    outer = save(repository, {"y/x/deep": BIG[:30_000]})
    remove(repository, inner)
    gc(repository)
    assert load(repository, outer.id) == {"y/x/deep": BIG[:30_000]}


@pytest.mark.parametrize("what", ["record", "announcement", "index object", "node", "list of condemned"])
def test_what_cannot_be_read_stops_it_and_is_named(
    repository: Repository, store: MemoryStore, save: Save, what: str, open_repository: Open
) -> None:
    save(repository, {"a": BIG[:1000]})
    first = save(repository, {"b": BIG[:2000]})
    remove(repository, first)
    gc(repository)
    removed = save(repository, {"a": BIG})
    remove(repository, removed)
    if what == "announcement":
        key = Announced("checkpoint", new_id(), new_id()).key
        store.replace(key, b"{}")
    else:
        prefix = {
            "record": "experiments/",
            "index object": INDEX_PREFIX,
            "node": "packs/",
            "list of condemned": "log/condemned/",
        }[what]
        for info in store.list(prefix):
            key = info.key
            data = bytearray(store.get(key))
            for position in range(60, len(data), 50):
                data[position] ^= 0xFF
            store.replace(key, bytes(data))
    before = all_objects(store)
    collector = open_repository()
    with pytest.raises(RepositoryDamaged) as raised:
        gc(collector)
    if what != "node":
        assert raised.value.fields["key"] in before
    else:
        assert raised.value.fields["key"].startswith("experiments/")
    assert all_objects(store) == before


@pytest.mark.parametrize("key", ["log/new/q-" + "a" * 64 + "-" + "b" * 64, "log/pinned/1", "log/index/later"])
def test_what_a_newer_version_has_written_stops_it(
    repository: Repository, store: MemoryStore, save: Save, key: str
) -> None:
    remove(repository, save(repository, {"a": BIG}))
    store.replace(key, b"?")
    before = all_objects(store)
    with pytest.raises(RepositoryIncompatible, match=key):
        gc(repository)
    assert all_objects(store) == before


def test_missing_index_object_is_no_reason_to_delete_packs(
    repository: Repository, store: MemoryStore, save: Save, open_repository: Open
) -> None:
    save(repository, {"a": BIG})
    store.delete(next(store.list(INDEX_PREFIX)).key)
    packs = pack_keys(store)
    with pytest.raises(RepositoryDamaged):
        gc(open_repository(), unlisted_age_s=0.0)
    assert pack_keys(store) == packs


def test_packs_that_nothing_lists_go_when_they_are_old(
    repository: Repository, store: MemoryStore, save: Save
) -> None:
    save(repository, {"a": BIG})
    packs = pack_keys(store)
    store.put("packs/" + "ab" + "/" + "ab" * 32, [b"from a writer that died"])
    assert gc(repository).packs == 0
    assert gc(repository, unlisted_age_s=-1.0).packs == 1
    assert pack_keys(store) == packs


def test_packs_of_an_upload_that_goes_on_are_spared(
    repository: Repository, store: MemoryStore, save: Save
) -> None:
    remove(repository, save(repository, {"a": BIG}))
    report = gc(repository, upload_age_s=60.0)
    assert report.packs == 0
    assert report.spared_bytes > len(BIG)
    assert gc(repository).packs == 2


def test_mounted_snapshots_that_were_removed_stop_it(
    repository: Repository, store: MemoryStore, save: Save
) -> None:
    snapshot = save(repository, {"a": BIG})
    assert gc(repository, leased=[snapshot.id]).packs == 0
    remove(repository, snapshot)
    with pytest.raises(InvalidArgument, match="mounted"):
        gc(repository, leased=[snapshot.id])
    assert gc(repository).packs == 2


def test_checkpoint_whose_experiment_is_gone_does_not_stop_it(
    repository: Repository, store: MemoryStore, save: Save
) -> None:
    """As when a writer is killed right after it has committed what somebody has removed meanwhile."""
    experiment, other = save(repository, {"a": b"1"}), save(repository, {"a": BIG})
    checkpoint = CheckpointRecord(
        CheckpointId(new_id()), ExperimentId(experiment.id), utc_now(), 1, state="stored"
    )
    remove(repository, experiment)
    remove(repository, other)
    gc(repository)
    publication = publish_checkpoint(checkpoint, other.root)
    store.put(publication.announced.record_key, [publication.data])
    remove(repository, save(repository, {"a": BIG[:9000]}))
    assert gc(repository).packs == 2


class LaggingStore(MemoryStore):
    """Shows nothing new below log/condemned/."""

    def list(self, prefix):  # type: ignore[no-untyped-def]
        return (info for info in super().list(prefix) if not info.key.startswith("log/condemned/"))


def test_where_listings_lag_nothing_is_deleted(tmp_path, save: Save) -> None:
    store = LaggingStore()
    repository = Repository.open_on(store, cache=tmp_path / "cache", create=True)
    remove(repository, save(repository, {"a": BIG}))
    packs = pack_keys(store)
    with pytest.raises(RepositoryUnreachable, match="do not show"):
        gc(repository)
    assert pack_keys(store) == packs
    repository.close()


def test_differences_keep_their_bases(
    repository: Repository, store: MemoryStore, save: Save, open_repository: Open
) -> None:
    """A base is in no snapshot that is left, and the difference to it is."""
    put(repository, [(ONE, None)], [(OTHER, ONE)])
    kept, removed = save(repository, {"a": OTHER}), save(repository, {"a": ONE})
    assert len(pack_keys(store)) == 4
    remove(repository, removed)
    assert gc(repository).packs == 1  # the nodes
    reader = open_repository()
    assert reader.read_chunk(hash_chunk(OTHER)) == OTHER
    assert reader.read_chunk(hash_chunk(ONE)) == ONE
    remove(repository, kept)
    gc(repository)
    assert pack_keys(store) == set()


def test_index_object_that_comes_back_misleads_nobody(
    repository: Repository, store: MemoryStore, save: Save, load: Load, open_repository: Open
) -> None:
    """As when a machine was frozen while it merged index objects."""
    save(repository, {"a": b"1"})
    removed = save(repository, {"a": BIG})
    stale = [(info.key, store.get(info.key)) for info in store.list(INDEX_PREFIX)]
    remove(repository, removed)
    gc(repository)
    for key, data in stale:
        store.replace(key, data)
    for writer in (repository, open_repository()):
        again = save(writer, {"a": BIG})
        assert load(open_repository(), again.id) == {"a": BIG}
    report = gc(repository)
    assert report.packs == 0
    names = [info.key.removeprefix(INDEX_PREFIX) for info in store.list(INDEX_PREFIX)]
    merge(store, repository.log, names, ())
    assert load(open_repository(), again.id) == {"a": BIG}
    assert all(store.exists(index_key(name)) is False for name in names)
