"""Packs for a store where requests cost: several on their way, few in memory, listed once they are there."""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from replicate.errors import RepositoryUnreachable
from replicated import packer
from replicated.chunk.codec import hash_chunk
from replicated.format import pack
from replicated.format.listing import parse_index
from replicated.keys import pack_key
from replicated.packer import Chunk, Packer, WriteStats, make_pack_memory
from replicated.repository import Repository
from replicated.store.base import Buffer, Capabilities
from replicated.store.memory import MemoryStore

PACK_BYTES = 100_000


class CostlyStore(MemoryStore):
    """A store that is far away; tells what it is asked to put."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[str], None] = lambda key: None
        self.flags: dict[str, dict[str, bool]] = {}

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(has_costly_requests=True, parallel_requests=8)

    def put(self, key: str, parts: Sequence[Buffer], **how: bool) -> None:
        self.before(key)
        super().put(key, parts, **how)
        self.flags[key] = how

    def keys(self, part: str) -> list[str]:
        return [info.key for info in self.list("") if part in info.key]


@pytest.fixture
def store() -> CostlyStore:
    return CostlyStore()


@pytest.fixture
def repository(store: CostlyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    monkeypatch.setattr(pack, "DATA_PACK_BYTES", PACK_BYTES)
    opened = Repository.open_on(store, cache=tmp_path, create=True)
    yield opened
    opened.close()


def chunks(count: int, size: int = PACK_BYTES) -> list[Chunk]:
    """Content that fills a pack each."""
    plain = [random.Random(number).randbytes(size) for number in range(count)]
    return [Chunk(hash_chunk(data), data) for data in plain]


def is_pack(key: str) -> bool:
    return key.startswith("packs/")


def test_several_packs_are_uploaded_at_the_same_time(store: CostlyStore, repository: Repository) -> None:
    # Each waits until the others are there as well.
    together = threading.Barrier(packer.MAX_UPLOADS)

    def wait_for_others(key: str) -> None:
        if is_pack(key):
            together.wait(timeout=60)

    store.before = wait_for_others
    packing = Packer(store, repository.index, WriteStats())
    wanted = chunks(2 * packer.MAX_UPLOADS)
    packing.add(wanted)
    packing.finish()
    assert not repository.index.find_missing(chunk.id for chunk in wanted)
    for chunk in wanted:
        assert repository.read_chunk(chunk.id) == chunk.plain


def test_near_stores_get_one_pack_after_the_other() -> None:
    assert packer.count_uploads(Capabilities(is_near=True)) == 1
    assert packer.count_uploads(Capabilities(has_costly_requests=True, parallel_requests=2)) == 2
    assert packer.count_uploads(Capabilities(has_costly_requests=True, parallel_requests=99)) == (
        packer.MAX_UPLOADS
    )


def test_no_more_packs_are_in_memory_than_uploads_and_the_one_being_filled(
    store: CostlyStore, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent = 0
    most = 0
    memory = make_pack_memory(store.capabilities)
    buffers = memory[pack.DATA_PACK]
    take, give_back = buffers.take, buffers.give_back

    def counted_take() -> memoryview:
        nonlocal lent, most
        buffer = take()
        lent += 1
        most = max(most, lent)
        return buffer

    def counted_give_back(buffer: memoryview) -> None:
        nonlocal lent
        lent -= 1
        give_back(buffer)

    monkeypatch.setattr(buffers, "take", counted_take)
    monkeypatch.setattr(buffers, "give_back", counted_give_back)
    packing = Packer(store, repository.index, WriteStats(), memory=memory)
    packing.add(chunks(20))
    packing.finish()
    assert lent == 0
    assert 1 < most <= packer.MAX_UPLOADS + 1


def test_index_object_lists_only_packs_that_are_there(
    store: CostlyStore, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer, "INDEX_AFTER_BYTES", 2 * PACK_BYTES)
    packing = Packer(store, repository.index, WriteStats())
    first = threading.Event()

    def hold_first(key: str) -> None:
        # The first pack comes after index objects for those that overtook it.
        if is_pack(key) and not first.is_set():
            first.set()
            assert listed.wait(60)
        elif not is_pack(key):
            listed.set()

    listed = threading.Event()
    store.before = hold_first
    wanted = chunks(9)
    packing.add(wanted)
    packing.finish()
    objects = store.keys("index/")
    assert len(objects) > 1
    names = [listing.name for key in objects for listing in parse_index(store.get(key))]
    assert len(names) == len(set(names)) == 9
    for key in objects:
        order = list(store.flags)
        for listing in parse_index(store.get(key)):
            assert order.index(pack_key(listing.name)) < order.index(key)


def test_long_upload_is_listed_now_and_then(store: CostlyStore, repository: Repository) -> None:
    now = [1000.0]
    packing = Packer(store, repository.index, WriteStats(), clock=lambda: now[0])
    wanted = chunks(3)

    def take_long(key: str) -> None:
        now[0] += packer.INDEX_AFTER_S if is_pack(key) else 0

    store.before = take_long
    packing.add(wanted)
    packing.abandon()
    # What was uploaded is not uploaded again, though nobody has finished.
    uploaded = len(store.keys("packs/"))
    assert uploaded
    assert len(repository.index.find_missing(chunk.id for chunk in wanted)) == len(wanted) - uploaded


def test_quick_upload_is_listed_once(store: CostlyStore, repository: Repository) -> None:
    packing = Packer(store, repository.index, WriteStats(), clock=lambda: 1000.0)
    packing.add(chunks(6))
    packing.finish()
    assert len(store.keys("index/")) == 1


def test_names_are_unique_and_packs_are_looked_for_after_putting(
    store: CostlyStore, repository: Repository
) -> None:
    packing = Packer(store, repository.index, WriteStats())
    packing.add(chunks(2))
    packing.finish()
    for key in store.keys("packs/"):
        assert store.flags[key] == {"is_unique": True}
    for key in store.keys("index/"):
        assert store.flags[key] == {"is_unique": True, "is_checked": False}


def test_failure_of_any_upload_is_raised_and_nothing_is_listed_after_it(
    store: CostlyStore, repository: Repository
) -> None:
    count = 0
    lock = threading.Lock()

    def fail_second(key: str) -> None:
        nonlocal count
        with lock:
            count += is_pack(key)
            if is_pack(key) and count == 2:
                raise RepositoryUnreachable("the bucket does not answer")

    store.before = fail_second
    packing = Packer(store, repository.index, WriteStats())
    with pytest.raises(RepositoryUnreachable, match="does not answer"):
        for chunk in chunks(30):
            packing.add([chunk])
        packing.finish()
    packing.abandon()
    assert store.keys("index/") == []


def test_who_waits_for_room_is_let_go_when_the_writer_stops(
    store: CostlyStore, repository: Repository
) -> None:
    released = threading.Event()
    uploading = threading.Semaphore(0)

    def hang(key: str) -> None:
        if is_pack(key):
            uploading.release()
            assert released.wait(60)

    store.before = hang
    packing = Packer(store, repository.index, WriteStats())
    ended: list[BaseException] = []

    def add() -> None:
        try:
            for chunk in chunks(20):
                packing.add([chunk])
        except RuntimeError as error:
            ended.append(error)

    adding = threading.Thread(target=add)
    adding.start()
    for _ in range(packer.MAX_UPLOADS):
        assert uploading.acquire(timeout=60)
    packing.stop()
    released.set()
    adding.join(60)
    packing.abandon()
    assert not adding.is_alive()
    assert [str(error) for error in ended] == ["the writer was abandoned"]
    assert len(store.keys("packs/")) <= packer.MAX_UPLOADS
