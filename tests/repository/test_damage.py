"""Whatever happens to the bytes of a repository, a reader gets the right ones or an error."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from replicate.errors import NotFound, NotStored, RepositoryError
from replicate.ids import CheckpointId, ExperimentId, SnapshotId
from replicate.records import CheckpointRecord, ExperimentRecord, utc_now
from replicated.chunk.codec import hash_chunk
from replicated.format.metadata import EndEdit, Snapshot
from replicated.keys import pack_key
from replicated.references import iter_chunks
from replicated.repository import Repository

Save = Callable[[Repository, dict[str, bytes]], Snapshot]
Load = Callable[[Repository, SnapshotId], dict[str, bytes]]

FILES = {"dir/raw": bytes(range(256)), "dir/text": b"compressible " * 50, "more": b"x"}
EXPERIMENT = ExperimentRecord(ExperimentId("e1" * 32), utc_now(), name="one", params={"a": 1})
CHECKPOINT = CheckpointRecord(CheckpointId("c1" * 32), EXPERIMENT.id, utc_now(), 7, state="stored")
EDIT_ID = "ed" * 32
EDIT = EndEdit("stopped", utc_now())


@pytest.fixture
def snapshot(repository: Repository, save: Save) -> Snapshot:
    """A small repository with an object of every kind."""
    repository.put_experiment(EXPERIMENT)
    repository.put_checkpoint(CHECKPOINT)
    repository.put_edit(EXPERIMENT.id, EDIT_ID, EDIT)
    saved = save(repository, FILES)
    repository.close()
    return saved


class Reading:
    """Reads everything there is, each part on its own, with caches that were never used."""

    def __init__(self, url: str, cache: Path, load: Load, snapshot: Snapshot) -> None:
        self._url, self._cache, self._load, self._snapshot = url, cache, load, snapshot
        self._count = 0

    def check(self) -> int:
        """How many parts gave an error; fails when one gave something wrong."""
        self._count += 1
        cache = self._cache / str(self._count)
        try:
            repository = Repository.open(self._url, cache=cache, create=False)
        except RepositoryError:
            return 1
        errors = 0
        parts: list[tuple[Callable[[], object], object]] = [
            (lambda: repository.load_experiment(EXPERIMENT.id), EXPERIMENT),
            (lambda: repository.load_checkpoint(EXPERIMENT.id, CHECKPOINT.id), CHECKPOINT),
            (lambda: repository.load_edit(EXPERIMENT.id, EDIT_ID), EDIT),
            (lambda: repository.load_snapshot(self._snapshot.id), self._snapshot),
            (lambda: self._load(repository, self._snapshot.id), FILES),
            (lambda: {c.plain_length for c in iter_chunks(repository, self._snapshot)} > {1, 256}, True),
        ]
        for read, expected in parts:
            try:
                assert read() == expected
            except (RepositoryError, NotFound, NotStored):
                errors += 1
        repository.close()
        return errors


@pytest.fixture
def reading(
    repository: Repository, snapshot: Snapshot, load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[Reading]:
    caplog.set_level(logging.CRITICAL)
    reading = Reading(repository.url, tmp_path / "caches", load, snapshot)
    assert reading.check() == 0
    yield reading


def objects(repository: Repository) -> list[str]:
    return sorted(info.key for info in repository.store.list(""))


def kinds(key: str) -> str:
    return key.split("/")[0]


def test_there_is_an_object_of_every_kind(repository: Repository, snapshot: Snapshot) -> None:
    assert {kinds(key) for key in objects(repository)} == {
        "repository.json", "experiments", "checkpoints", "edits", "packs", "log",
    }  # fmt: skip


def test_flipped_byte_is_never_served(repository: Repository, reading: Reading) -> None:
    for key in objects(repository):
        good = repository.store.get(key)
        step = max(1, len(good) // 40)
        for position in (*range(0, len(good), step), len(good) - 1):
            damaged = bytearray(good)
            damaged[position] ^= 0xFF
            repository.store.replace(key, bytes(damaged))
            # The records at the end of a pack and its entry headers are for rebuilding an index only.
            assert reading.check() > 0 or kinds(key) == "packs", f"{key} at {position}"
        repository.store.replace(key, good)


@pytest.mark.parametrize("damage", ["empty", "half", "one byte less", "one byte more", "zeros", "gone"])
def test_object_that_is_cut_zeroed_or_gone_is_never_served(
    repository: Repository, reading: Reading, damage: str
) -> None:
    for key in objects(repository):
        good = repository.store.get(key)
        if damage == "gone":
            repository.store.delete(key)
        else:
            bad = {
                "empty": b"",
                "half": good[: len(good) // 2],
                "one byte less": good[:-1],
                "one byte more": good + b"x",
                "zeros": bytes(len(good)),
            }[damage]
            repository.store.replace(key, bad)
        harmless = kinds(key) == "packs" and damage.startswith("one byte")
        assert (reading.check() > 0) or harmless, key
        repository.store.replace(key, good)
    assert reading.check() == 0


def test_swapped_objects_are_never_served(repository: Repository, reading: Reading) -> None:
    keys = objects(repository)
    for first in keys:
        for second in keys:
            if first < second:
                one, two = repository.store.get(first), repository.store.get(second)
                repository.store.replace(first, two)
                repository.store.replace(second, one)
                assert reading.check() > 0, f"{first} and {second}"
                repository.store.replace(first, one)
                repository.store.replace(second, two)


def test_every_byte_of_the_stored_chunks_matters(
    repository: Repository, snapshot: Snapshot, tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """With the index already known, so that nothing but the chunks is read."""
    caplog.set_level(logging.CRITICAL)
    opened = Repository.open(repository.url, cache=tmp_path / "known", create=False)
    places = opened.index.locate([chunk.id for chunk in iter_chunks(opened, snapshot)])
    for chunk_id, place in places.items():
        key = f"packs/{place.pack.hex()[:2]}/{place.pack.hex()}"
        good = opened.store.get(key)
        for position in range(place.offset, place.offset + place.stored_length):
            damaged = bytearray(good)
            damaged[position] ^= 0xFF
            opened.store.replace(key, bytes(damaged))
            fresh = Repository.open(repository.url, cache=tmp_path / "known", create=False)
            with pytest.raises(RepositoryError, match=chunk_id.hex()):
                fresh.read_chunk(chunk_id)
            fresh.close()
        opened.store.replace(key, good)
    opened.close()


def test_damaged_chunk_does_not_cost_the_index(
    repository: Repository, snapshot: Snapshot, tmp_path: Path
) -> None:
    """Reading all index objects again would take minutes in a repository of millions of chunks."""
    opened = Repository.open(repository.url, cache=tmp_path / "known", create=False)
    opened.index.refresh()
    chunk_id = hash_chunk(FILES["dir/raw"])
    place = opened.index.locate([chunk_id])[chunk_id]
    key = pack_key(place.pack)
    damaged = bytearray(opened.store.get(key))
    damaged[place.offset] ^= 0xFF
    opened.store.replace(key, bytes(damaged))
    generation = opened.index.generation
    with pytest.raises(RepositoryError, match=chunk_id.hex()):
        opened.read_chunk(chunk_id)
    assert opened.index.generation == generation
    opened.close()
