"""What was recorded is found in few requests where requests cost, whoever merges and removes meanwhile."""

import random
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import msgpack
import pytest
import zstandard
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from replicate.errors import RepositoryDamaged, RepositoryMissing
from replicate.ids import CheckpointId, ExperimentId, new_id
from replicate.records import CheckpointRecord, ExperimentRecord
from replicated import record_merging
from replicated.catalog import Catalog
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.manifest import RootNode
from replicated.format.metadata import EndEdit
from replicated.format.segment import (
    HEADER,
    SegmentRecord,
    build_segment,
    parse_header,
    parse_segment,
)
from replicated.keys import Announced, level_of, parse_announced, segment_key
from replicated.publishing import publish_checkpoint
from replicated.record_merging import merge_announced, merge_records, merge_segments
from replicated.repository import Repository
from replicated.store.memory import MemoryStore

TIME = datetime(2026, 5, 1, tzinfo=timezone.utc)
ROOT = RootNode(bytes(32), 0o755, 0)


class FarStore(MemoryStore):
    """A store whose requests are counted, and said to be costly."""

    def __init__(self):
        super().__init__()
        self.requests = []

    @property
    def capabilities(self):
        return replace(super().capabilities, has_costly_requests=True, is_near=False)

    def _note(self, *request):
        self.requests.append(request)

    def put(self, key, parts, **how):
        self._note("put", key)
        super().put(key, parts, **how)

    def replace(self, key, data):
        self._note("put", key)
        super().replace(key, data)

    def get(self, key, offset=0, length=None):
        self._note("get", key)
        return super().get(key, offset, length)

    def list(self, prefix):
        self._note("list", prefix)
        return super().list(prefix)


@pytest.fixture
def store():
    return FarStore()


@pytest.fixture
def repository(store, tmp_path):
    opened = Repository.open_on(store, cache=tmp_path / "cache", create=True)
    yield opened
    opened.close()


@pytest.fixture
def catalog(repository, tmp_path):
    made = Catalog(repository, tmp_path / "catalogs")
    yield made
    made.close()


def put_run(repository, number, checkpoints=3, *, tags=()):
    experiment = ExperimentRecord(
        ExperimentId(new_id()), TIME + timedelta(minutes=number), name=f"run {number}", tags=tags
    )
    repository.put_experiment(experiment)
    for step in range(checkpoints):
        repository.put_checkpoint(
            CheckpointRecord(
                CheckpointId(new_id()), experiment.id, TIME, step, metrics={"loss": step}, state="stored"
            )
        )
    repository.put_edit(experiment.id, new_id(), EndEdit("stopped", TIME))
    return experiment.id


def shown(catalog):
    catalog.refresh()
    return {entry.record.id: (entry.checkpoint_count, entry.end_status) for entry in catalog.entries()}


def test_new_records_are_found_with_one_listing_and_a_request_each(repository, store, catalog):
    first = put_run(repository, 1)
    assert shown(catalog) == {first: (3, "stopped")}
    store.requests.clear()
    assert shown(catalog) == {first: (3, "stopped")}
    assert store.requests == [("list", "log/")]
    second = put_run(repository, 2, 1)
    store.requests.clear()
    assert shown(catalog) == {first: (3, "stopped"), second: (1, "stopped")}
    assert sorted(kind for kind, _ in store.requests) == ["get", "get", "get", "list"]


def test_merged_records_are_the_same_and_cost_next_to_nothing(repository, store, catalog, tmp_path):
    runs = {put_run(repository, number, number % 4): (number % 4, "stopped") for number in range(30)}
    merge_announced(repository, repository.log.list())
    listing = repository.log.list()
    assert not listing.new
    assert len(listing.segments) == 1
    store.requests.clear()
    assert shown(catalog) == runs
    assert len(store.requests) == 2
    # Records merged again are known by the names of what they were merged from.
    for _ in range(2):
        runs[put_run(repository, 100, 1)] = (1, "stopped")
        merge_announced(repository, repository.log.list())
        assert shown(catalog) == runs
    merge_segments(repository, list(repository.log.list().segments))
    (name,) = repository.log.list().segments
    assert level_of(name) == 1
    assert shown(catalog) == runs
    other = Catalog(repository, tmp_path / "other")
    store.requests.clear()
    assert shown(other) == runs
    assert len(store.requests) == 2
    other.close()


def test_what_is_announced_but_not_committed_is_not_shown_and_not_merged(repository, store, catalog):
    experiment = put_run(repository, 1, 0)
    record = CheckpointRecord(CheckpointId(new_id()), experiment, TIME, 7, state="stored")
    publication = publish_checkpoint(record, ROOT)
    repository.publisher.announce(publication)
    assert shown(catalog) == {experiment: (0, "stopped")}
    merge_announced(repository, repository.log.list())
    assert list(repository.log.list().new) == [publication.announced]
    repository.publisher.commit(publication)
    catalog._records._missing.clear()  # as if time had passed
    assert shown(catalog) == {experiment: (1, "stopped")}


@pytest.mark.parametrize("merged", ["before", "after", "never"])
def test_what_was_removed_stays_away(repository, catalog, tmp_path, merged):
    keeps, loses, goes = (put_run(repository, number, 2) for number in range(3))
    if merged == "before":
        merge_announced(repository, repository.log.list())
    assert len(shown(catalog)) == 3
    checkpoint = repository.list_checkpoint_ids(loses)[0]
    repository.delete_checkpoint(loses, checkpoint)
    repository.delete_experiment(goes)
    expected = {keeps: (2, "stopped"), loses: (1, "stopped")}
    assert shown(catalog) == expected
    if merged == "after":
        merge_announced(repository, repository.log.list())
        merge_segments(repository, list(repository.log.list().segments))
    other = Catalog(repository, tmp_path / "other")
    assert shown(other) == shown(catalog) == expected
    other.close()


def test_copied_repository_is_listed_once_and_then_completed(repository, store, catalog, tmp_path):
    runs = {put_run(repository, number, 2): (2, "stopped") for number in range(3)}
    for info in list(store.list("log/")):
        if not info.key.startswith("log/index/"):
            store.delete(info.key)
    assert shown(catalog) == runs
    store.requests.clear()
    assert shown(catalog) == runs
    assert set(store.requests) <= {("list", "log/"), ("get", "repository.json")}
    merge_announced(repository, repository.log.list())
    assert repository.log.list().is_complete
    other = Catalog(repository, tmp_path / "other")
    store.requests.clear()
    assert shown(other) == runs
    assert len(store.requests) == 2
    other.close()


def test_damaged_segment_hides_nothing(repository, store, catalog):
    runs = {put_run(repository, number, 2): (2, "stopped") for number in range(3)}
    merge_announced(repository, repository.log.list())
    (name,) = repository.log.list().segments
    data = bytearray(store.get(segment_key(name)))
    data[len(data) // 2] ^= 1
    store.replace(segment_key(name), bytes(data))
    assert shown(catalog) == runs


def test_damaged_record_is_shown_as_such_and_hides_no_other(repository, store, catalog):
    good, bad = put_run(repository, 1), put_run(repository, 2, 1)
    store.replace(f"experiments/{bad}.json", b"{}")
    entries = {entry.record.id: entry for entry in (catalog.refresh(), *catalog.entries())[1:]}
    assert entries.keys() == {good, bad}
    assert (entries[bad].state, entries[bad].checkpoint_count) == ("failed", 1)
    assert "is damaged" in entries[bad].error


def test_emptied_bucket_is_missing_and_not_empty(repository, store, catalog):
    put_run(repository, 1)
    shown(catalog)
    store.delete(*[info.key for info in store.list("")])
    with pytest.raises(RepositoryMissing):
        catalog.refresh()


def test_merging_is_begun_only_when_it_is_worth_it(repository, store, monkeypatch):
    monkeypatch.setattr(record_merging, "FEWEST_ANNOUNCED", 10)
    monkeypatch.setattr(record_merging, "FEWEST_SEGMENTS", 3)
    put_run(repository, 1, 3)
    repository.log.list()
    store.requests.clear()
    assert not merge_records(repository, chance=lambda: 0.0)
    assert not store.requests
    for number in range(3):
        put_run(repository, number, 10)
        repository.log.list()
        assert not merge_records(repository, chance=lambda: 0.9)
        assert merge_records(repository, chance=lambda: 0.0)
    repository.log.list()
    assert merge_records(repository, chance=lambda: 0.0)
    assert len(repository.log.list().segments) == 1


def test_two_who_merge_at_once_lose_nothing(repository, store, catalog):
    runs = {put_run(repository, number, 2): (2, "stopped") for number in range(5)}
    listing = repository.log.list()
    for _ in range(2):
        merge_announced(repository, listing)
    segments = list(repository.log.list().segments)
    for _ in range(2):
        merge_segments(repository, segments)
    assert shown(catalog) == runs


def test_any_history_shows_what_is_there(tmp_path):
    for seed in range(15):
        rng = random.Random(seed)
        store = FarStore()
        repository = Repository.open_on(store, cache=tmp_path / f"cache{seed}", create=True)
        catalogs = [Catalog(repository, tmp_path / f"{seed}-{number}") for number in range(2)]
        expected = {}
        for _ in range(40):
            action = rng.choice(["put", "put", "checkpoint", "merge", "merge", "remove", "drop", "look"])
            if action == "put":
                expected[put_run(repository, rng.randrange(9), 0)] = 0
            elif action == "checkpoint" and expected:
                experiment = rng.choice(list(expected))
                identifier = CheckpointId(new_id())
                repository.put_checkpoint(CheckpointRecord(identifier, experiment, TIME, 1, state="stored"))
                expected[experiment] += 1
            elif action == "merge":
                listing = repository.log.list()
                if rng.random() < 0.6:
                    merge_announced(repository, listing)
                else:
                    names = list(listing.segments)
                    merge_segments(repository, rng.sample(names, rng.randint(0, len(names))))
            elif action == "remove" and expected:
                experiment = rng.choice(list(expected))
                repository.delete_experiment(experiment)
                del expected[experiment]
            elif action == "drop" and any(expected.values()):
                experiment = rng.choice([one for one, count in expected.items() if count])
                identifier = rng.choice(repository.list_checkpoint_ids(experiment))
                repository.delete_checkpoint(experiment, identifier)
                expected[experiment] -= 1
            else:
                found = {one: count for one, (count, _) in shown(rng.choice(catalogs)).items()}
                assert found == expected, f"seed {seed}"
        for catalog in catalogs:
            assert {one: count for one, (count, _) in shown(catalog).items()} == expected, f"seed {seed}"
            catalog.close()
        repository.close()


# The bytes of segments

RECORDS = st.lists(
    st.builds(
        SegmentRecord,
        st.sampled_from("ecdx"),
        st.sampled_from(["ab" * 32, "cd" * 32]),
        st.sampled_from(["ef" * 32, "01" * 32]),
        st.binary(max_size=200),
    )
)
NAMES = st.lists(st.sampled_from(["00-" + "ab" * 32, "01-" + "cd" * 32]))


@given(RECORDS, NAMES)
def test_segment_is_what_was_put_into_it(records, merged):
    data = build_segment(records, merged)
    header, found = parse_segment(data)
    assert (found, header.merged) == (records, tuple(merged))
    assert parse_header(data[: HEADER.size + 67 * len(merged)]) == header


def test_flipped_or_cut_segment_is_refused():
    data = build_segment([SegmentRecord("e", "ab" * 32, "ab" * 32, b"x" * 50)], ["00-" + "ab" * 32])
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        with pytest.raises((Malformed, NewerFormat)):
            parse_segment(bytes(damaged))
        with pytest.raises(Malformed):
            parse_segment(data[:position])


@given(st.binary(max_size=300))
def test_nonsense_is_refused_and_nothing_else(data):
    with pytest.raises((Malformed, NewerFormat)):
        parse_segment(data)


@pytest.mark.parametrize(
    "plain",
    [
        msgpack.packb(["e", "ab" * 32, "ab" * 32]),
        msgpack.packb(["e", "ab" * 32, "../../x", b""]),
        msgpack.packb(["s", "ab" * 32, "ab" * 32, b""]),
        msgpack.packb({"e": 1}),
        msgpack.packb([[["e"]]] * 3),
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
    ],
)
def test_sealed_nonsense_is_refused(plain):
    frame = zstandard.ZstdCompressor().compress(plain)
    body = HEADER.pack(b"REPLRECS", 1, bytes(3), 0, len(frame)) + frame
    with pytest.raises(Malformed):
        parse_segment(body + blake3(body).digest())


def test_frame_that_says_to_be_huge_is_refused():
    frame = zstandard.ZstdCompressor().compress(bytes(200 << 20))
    body = HEADER.pack(b"REPLRECS", 1, bytes(3), 0, len(frame)) + frame
    with pytest.raises(Malformed, match="too long"):
        parse_segment(body + blake3(body).digest())


@pytest.mark.parametrize(
    ("kind", "rank"),
    [("experiment", None), ("checkpoint", None), ("edit", None), ("removal", None), ("shard", 7)],
)
def test_keys_of_announcements_can_be_read_back(kind, rank):
    announced = Announced(kind, "ab" * 32, "cd" * 32, rank)
    assert parse_announced(announced.key) == announced
    assert parse_announced(announced.key_of(b"its bytes")) == announced


@pytest.mark.parametrize("name", ["e-x-y", f"q-{'ab' * 32}-{'cd' * 32}", f"s-{'ab' * 32}-{'cd' * 32}"])
def test_other_keys_announce_nothing(name):
    assert parse_announced(f"log/new/{name}") is None


def test_every_damaged_segment_is_made_up_for(repository, store, catalog):
    runs = {}
    for number in range(3):
        runs[put_run(repository, number, 1)] = (1, "stopped")
        merge_announced(repository, repository.log.list())
        for name in repository.log.list().segments:
            store.replace(segment_key(name), store.get(segment_key(name))[:-1] + b"?")
        assert shown(catalog) == runs


def test_copy_that_was_written_to_on_a_disk_is_listed_anew(repository, store, tmp_path):
    kept, removed = put_run(repository, 1), put_run(repository, 2)
    merge_announced(repository, repository.log.list())
    disk = MemoryStore()
    for info in list(store.list("")):
        disk.put(info.key, [store.get(info.key)])
    local = Repository.open_on(disk, cache=tmp_path / "local", create=False)
    local.delete_experiment(removed)
    added = put_run(local, 3)
    back = FarStore()
    for info in list(disk.list("")):
        back.put(info.key, [disk.get(info.key)])
    copied = Repository.open_on(back, cache=tmp_path / "back", create=False)
    catalog = Catalog(copied, tmp_path / "catalog of the copy")
    assert shown(catalog).keys() == {kept, added}
    for opened in (catalog, copied, local):
        opened.close()


def test_nothing_is_published_into_what_is_left_of_an_emptied_bucket(repository, store):
    publication = publish_checkpoint(
        CheckpointRecord(CheckpointId(new_id()), ExperimentId(new_id()), TIME, 1, state="stored"), ROOT
    )
    store.delete(*[info.key for info in store.list("")])
    repository.publisher.announce(publication)
    with pytest.raises((RepositoryMissing, RepositoryDamaged)):
        repository.publisher.settle(publication, repository.index.generation)
