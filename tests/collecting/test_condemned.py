"""What machines make of packs that somebody else has condemned."""

from collections.abc import Callable
from pathlib import Path

import pytest
from collecting.conftest import Open, pack_keys
from repository.conftest import Load, Save
from repository.test_deltas import ONE, OTHER, THIRD, put

from replicate.ids import new_id
from replicate.records import utc_now
from replicated.chunk.codec import hash_chunk
from replicated.format.condemned import Condemned, encode_condemned
from replicated.format.listing import parse_index
from replicated.keys import INDEX_PREFIX, condemned_key
from replicated.repository import Repository
from replicated.store.memory import MemoryStore

Condemn = Callable[..., None]

CONTENT = b"1" * 100


@pytest.fixture
def condemn(store: MemoryStore) -> Condemn:
    """Condemns all packs that there are, or those given."""

    def put_list(*packs: bytes, is_final: bool = False) -> None:
        names = packs or [bytes.fromhex(key.rpartition("/")[2]) for key in pack_keys(store)]
        data = encode_condemned(Condemned(frozenset(names), is_final), utc_now(), "elsewhere")
        store.put(condemned_key(new_id()), [data])

    return put_list


def test_what_is_condemned_is_read_and_not_relied_on(
    repository: Repository,
    store: MemoryStore,
    save: Save,
    load: Load,
    condemn: Condemn,
    open_repository: Open,
) -> None:
    snapshot = save(repository, {"a": CONTENT})
    generation = repository.index.generation
    packs = pack_keys(store)
    condemn()
    for reader in (repository, open_repository()):
        reader.index.refresh()
        assert load(reader, snapshot.id) == {"a": CONTENT}
        assert reader.index.find_missing([hash_chunk(CONTENT)])
        assert reader.index.find_bases([hash_chunk(CONTENT)]) == []
    assert repository.index.generation != generation
    again = save(repository, {"a": CONTENT})
    assert pack_keys(store) > packs
    # Now it is elsewhere too, and the old packs may go.
    condemn(*(bytes.fromhex(key.rpartition("/")[2]) for key in packs), is_final=True)
    store.delete(*packs)
    for reader in (repository, open_repository()):
        assert load(reader, snapshot.id) == load(reader, again.id) == {"a": CONTENT}


def test_condemned_packs_that_are_not_known_here_change_nothing(
    repository: Repository, save: Save, condemn: Condemn
) -> None:
    save(repository, {"a": b"1"})
    generation = repository.index.generation
    condemn(bytes([1]) * 32, is_final=True)
    repository.index.refresh()
    assert repository.index.generation == generation


def test_difference_to_a_condemned_base_is_not_relied_on(repository: Repository, condemn: Condemn) -> None:
    base, _, _ = put(repository, [(ONE, None)], [(OTHER, ONE)], [(THIRD, None)])
    condemn(base.name)
    repository.index.refresh()
    ids = [hash_chunk(content) for content in (ONE, OTHER, THIRD)]
    assert repository.index.find_missing(ids) == set(ids[:2])
    assert repository.index.find_bases(ids) == [ids[2]]
    assert repository.read_chunk(ids[1]) == OTHER


@pytest.mark.parametrize("going", [0, 1])
def test_place_in_a_pack_that_is_not_condemned_is_preferred(
    repository: Repository, open_repository: Open, condemn: Condemn, going: int
) -> None:
    packs = put(repository, [(ONE, None)], [(ONE, None)])
    condemn(packs[going].name)
    reader = open_repository()
    reader.index.refresh()
    assert reader.index.locate([hash_chunk(ONE)])[hash_chunk(ONE)].pack == packs[1 - going].name
    assert not reader.index.find_missing([hash_chunk(ONE)])


@pytest.mark.parametrize("is_final", [False, True])
def test_processes_that_share_an_index_see_one_generation(
    store: MemoryStore, tmp_path: Path, save: Save, condemn: Condemn, is_final: bool
) -> None:
    """The daemon compares what its store process has seen with what it sees itself."""
    daemon, process = (Repository.open_on(store, cache=tmp_path / "shared", create=True) for _ in range(2))
    save(process, {"a": b"1"})
    daemon.index.refresh()
    before = daemon.index.generation
    assert process.index.generation == before
    condemn(is_final=is_final)
    daemon.index.refresh()
    process.index.refresh()
    assert before != daemon.index.generation == process.index.generation
    for repository in (daemon, process):
        repository.close()


def test_index_objects_may_list_packs_that_are_gone(
    repository: Repository, store: MemoryStore, save: Save, condemn: Condemn, open_repository: Open
) -> None:
    save(repository, {"a": CONTENT})
    condemn(is_final=True)
    for reader in (repository, open_repository()):
        reader.index.refresh()
        assert reader.index.list_packs() == []
        assert reader.index.locate([hash_chunk(CONTENT)]) == {}
    (info,) = store.list(INDEX_PREFIX)
    assert {listing.name for listing in parse_index(store.get(info.key))} == repository.index.list_gone()
