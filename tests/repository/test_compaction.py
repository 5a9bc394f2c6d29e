"""Few index objects out of many: nothing may be lost, whoever does it, and wherever he is killed."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from repository.conftest import Load, Save

from replicated import compaction
from replicated.compaction import FEWEST_MERGED, IndexChanged, compact, merge, plan_merge
from replicated.format.listing import parse_index
from replicated.keys import INDEX_PREFIX, index_key, level_of
from replicated.repository import Repository
from replicated.store.base import ObjectInfo
from replicated.store.memory import MemoryStore


def never() -> float:
    return 1.0


def always() -> float:
    return 0.0


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def repository(store: MemoryStore, tmp_path: Path) -> Iterator[Repository]:
    opened = Repository.open_on(store, cache=tmp_path / "cache", create=True)
    yield opened
    opened.close()


def listed_packs(store: MemoryStore) -> list[bytes]:
    objects = [parse_index(store.get(info.key)) for info in store.list(INDEX_PREFIX)]
    return [listing.name for listings in objects for listing in listings]


def index_names(store: MemoryStore) -> list[str]:
    return sorted(info.key.removeprefix(INDEX_PREFIX) for info in store.list(INDEX_PREFIX))


def compact_now(repository: Repository) -> bool:
    repository.log.list()
    return compact(repository.store, repository.log, repository.index, chance=always)


def test_many_index_objects_become_one_and_everything_is_found(
    repository: Repository, store: MemoryStore, save: Save, load: Load, tmp_path: Path
) -> None:
    saved = [save(repository, {"a": b"%d" % number}) for number in range(FEWEST_MERGED)]
    packs = set(listed_packs(store))
    generation = repository.index.generation
    assert compact_now(repository)
    (name,) = index_names(store)
    assert level_of(name) == 1
    assert sorted(listed_packs(store)) == sorted(packs)
    cold = Repository.open_on(store, cache=tmp_path / "cold", create=False)
    for reader in (repository, cold):
        reader.index.refresh()
        assert [load(reader, snapshot.id) for snapshot in saved] == [
            {"a": b"%d" % number} for number in range(FEWEST_MERGED)
        ]
    assert repository.index.generation == generation
    cold.close()


def test_it_is_not_done_for_a_few_nor_by_everybody(repository: Repository, save: Save) -> None:
    for number in range(FEWEST_MERGED):
        assert not compact_now(repository)
        save(repository, {"a": b"%d" % number})
    repository.log.list()
    assert not compact(repository.store, repository.log, repository.index, chance=never)


def test_levels_grow_like_the_logarithm_of_what_was_written() -> None:
    """Of a thousand objects a few are left, and each was merged a few times only."""
    objects: dict[str, ObjectInfo] = {}
    copied = 0
    for number in range(1000):
        name = "00-" + blake3(b"%d" % number).hexdigest()
        objects[name] = ObjectInfo(name, 1000)
        if names := plan_merge(objects):
            size = sum(objects.pop(name).size for name in names)
            copied += size
            merged = f"{max(map(level_of, names)) + 1:02x}-" + blake3(b"m%d" % number).hexdigest()
            objects[merged] = ObjectInfo(merged, size)
    assert len(objects) < 4 * FEWEST_MERGED
    assert copied <= 4 * 1000 * 1000


def test_large_objects_stay_and_none_is_made_that_is_much_larger(
    repository: Repository, store: MemoryStore, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "LARGE_BYTES", 1000)
    for number in range(3 * FEWEST_MERGED):
        save(repository, {"a": b"%d" % number})
    packs = sorted(listed_packs(store))
    assert compact_now(repository)
    assert sorted(listed_packs(store)) == packs
    sizes = [info.size for info in store.list(INDEX_PREFIX)]
    assert len(sizes) < 3 * FEWEST_MERGED
    assert max(sizes) < 2000
    assert plan_merge({str(size): ObjectInfo("", 1000) for size in range(100)}) == []


def test_two_machines_that_merge_the_same_write_the_same(
    repository: Repository, store: MemoryStore, save: Save, load: Load, tmp_path: Path
) -> None:
    snapshot = save(repository, {"a": b"1"})
    for number in range(FEWEST_MERGED):
        save(repository, {"a": b"%d" % number})
    other = MemoryStore()
    for info in store.list(""):
        other.replace(info.key, store.get(info.key))
    second = Repository.open_on(other, cache=tmp_path / "second", create=False)
    assert compact_now(repository) and compact_now(second)
    assert index_names(store) == index_names(other)
    assert load(second, snapshot.id) == {"a": b"1"}
    second.close()


class KilledStore(MemoryStore):
    """Ends whoever uses it after so many changes."""

    changes_left = 1 << 30

    def put(self, *args: object, **options: object) -> None:
        self._count()
        super().put(*args, **options)  # type: ignore[arg-type]

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._count()
            super().delete(key)

    def _count(self) -> None:
        if self.changes_left == 0:
            raise KeyboardInterrupt
        self.changes_left -= 1


def test_killed_anywhere_nothing_is_lost_and_the_next_one_goes_on(
    save: Save, load: Load, tmp_path: Path
) -> None:
    for killed_after in range(FEWEST_MERGED + 2):
        store = KilledStore(str(killed_after))
        directory = tmp_path / str(killed_after)
        writer = Repository.open_on(store, cache=directory / "writer", create=True)
        saved = [save(writer, {"a": b"%d" % number}) for number in range(FEWEST_MERGED)]
        store.changes_left = killed_after
        try:
            compact_now(writer)
            assert killed_after == FEWEST_MERGED + 1
        except KeyboardInterrupt:
            assert killed_after <= FEWEST_MERGED
        store.changes_left = 1 << 30
        reader = Repository.open_on(store, cache=directory / "reader", create=False)
        for number, snapshot in enumerate(saved):
            assert load(reader, snapshot.id) == {"a": b"%d" % number}
        for number in range(FEWEST_MERGED, 2 * FEWEST_MERGED):
            save(writer, {"a": b"%d" % number})
        assert compact_now(writer)
        # Of content and of nodes one each; what was merged twice is listed twice until the next level.
        assert len(set(listed_packs(store))) == 2 * 2 * FEWEST_MERGED
        for opened in (writer, reader):
            assert load(opened, saved[0].id) == {"a": b"0"}
            opened.close()


def test_what_somebody_else_has_merged_meanwhile_is_left_alone(
    repository: Repository, store: MemoryStore, save: Save
) -> None:
    for number in range(FEWEST_MERGED):
        save(repository, {"a": b"%d" % number})
    names = index_names(store)
    store.delete(index_key(names[3]))
    with pytest.raises(IndexChanged):
        merge(store, repository.log, names, ())
    assert {*names} - {names[3]} <= {*index_names(store)}


def test_damaged_object_stays(repository: Repository, store: MemoryStore, save: Save) -> None:
    for number in range(FEWEST_MERGED + 1):
        save(repository, {"a": b"%d" % number})
    damaged = random.Random(1).choice(index_names(store))
    data = bytearray(store.get(index_key(damaged)))
    data[100] ^= 0xFF
    store.replace(index_key(damaged), bytes(data))
    assert compact_now(repository)
    assert damaged in index_names(store)
    assert len(index_names(store)) == 2
