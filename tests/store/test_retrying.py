"""A store that repeats: what passes is not seen, what stays is told in time, and nobody is overrun."""

import threading

import pytest
from faulty_store import FaultyStore, UnpagedFaultyStore

from replicate.errors import RepositoryDamaged, RepositoryUnreachable
from replicated.store.base import Capabilities, KeyMissing, StoreBusy
from replicated.store.memory import MemoryStore
from replicated.store.retrying import InFlight, RetryingStore, longest_pause_s

KEYS = [f"packs/{number:02}" for number in range(20)]


class Scripted(MemoryStore):
    """Fails as it is told to, then works."""

    def __init__(self, *errors):
        super().__init__()
        self.errors = list(errors)
        self.calls = 0

    def exists(self, key):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return super().exists(key)


class Clock:
    """Time that passes only in the pauses of a store."""

    def __init__(self, store):
        self.now = 0.0
        self.pauses = []
        store._clock = lambda: self.now
        store._closed.wait = self.wait

    def wait(self, pause):
        self.pauses.append(pause)
        self.now += pause
        return False


def busy(is_throttled=False):
    return StoreBusy("the server is busy", hint="wait", fields={"a": "b"}, is_throttled=is_throttled)


@pytest.mark.parametrize("kind", [FaultyStore, UnpagedFaultyStore])
@pytest.mark.parametrize("seed", range(10))
def test_whatever_fails_in_passing_all_is_stored_and_listed_once(kind, seed):
    memory = MemoryStore()
    faulty = kind(memory, seed, 0.1)
    store = RetryingStore(faulty, patience_s=1e9, fraction=lambda: 0.0)
    for key in KEYS:
        store.put(key, [key.encode()])
        store.replace(key + "-r", b"x")
    found = [info.key for info in store.list("packs/")]
    assert sorted(found) == sorted(KEYS + [key + "-r" for key in KEYS])
    store.delete(*KEYS)
    assert not any(store.exists(key) for key in KEYS)
    assert store.get(KEYS[0] + "-r") == b"x"
    assert faulty.failures


def test_pauses_grow_up_to_a_bound_and_are_longer_when_throttled():
    store = RetryingStore(Scripted(*[busy()] * 12), patience_s=1e9, fraction=lambda: 1.0)
    clock = Clock(store)
    assert not store.exists("a")
    assert clock.pauses == [longest_pause_s(tries, is_throttled=False) for tries in range(1, 13)]
    assert clock.pauses == sorted(clock.pauses)
    assert clock.pauses[0] < 0.2
    assert clock.pauses[-1] == clock.pauses[-2] == 5.0
    assert all(
        longest_pause_s(tries, is_throttled=True) > longest_pause_s(tries, is_throttled=False)
        for tries in (1, 2, 5, 10, 10_000)
    )


def test_pauses_are_random_from_nothing_to_their_length():
    fractions = iter([0.0, 0.25, 1.0])
    store = RetryingStore(Scripted(*[busy()] * 3), patience_s=1e9, fraction=lambda: next(fractions))
    clock = Clock(store)
    store.exists("a")
    assert clock.pauses == pytest.approx([0.0, 0.05, 0.4])


def test_end_of_patience_is_the_last_error_with_the_number_of_tries():
    scripted = Scripted(*[busy()] * 1000)
    store = RetryingStore(scripted, patience_s=10, fraction=lambda: 1.0)
    clock = Clock(store)
    with pytest.raises(StoreBusy, match=r"the server is busy \(\d+ tries in \d+ s\)") as e:
        store.exists("a")
    assert e.value.hint == "wait"
    assert e.value.fields == {"a": "b"}
    assert f"({scripted.calls} tries" in e.value.message
    assert 5 < clock.now <= 10


def test_patience_may_be_changed():
    scripted = Scripted(*[busy()] * 3)
    store = RetryingStore(scripted, patience_s=0, fraction=lambda: 1.0)
    Clock(store)
    with pytest.raises(StoreBusy, match=r"the server is busy \(wait\)$"):
        store.exists("a")
    store.patience_s = 60
    assert not store.exists("a")


@pytest.mark.parametrize(
    "error", [KeyMissing("a"), RepositoryDamaged("bad"), RepositoryUnreachable("denied"), ValueError("key")]
)
def test_what_does_not_pass_is_not_repeated(error):
    scripted = Scripted(error)
    with pytest.raises(type(error)):
        RetryingStore(scripted).exists("a")
    assert scripted.calls == 1


def test_who_waits_is_told_when_the_store_is_closed():
    scripted = Scripted(*[busy()] * 1000)
    store = RetryingStore(scripted, patience_s=1e9, fraction=lambda: 1000.0)
    ended = []

    def ask():
        try:
            store.exists("a")
        except StoreBusy as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    store.close()
    store.close()
    thread.join()
    assert len(ended) == 1


def test_throttling_halves_the_requests_on_their_way_and_success_lets_them_grow():
    in_flight = InFlight(8)

    def request(error=None):
        try:
            with in_flight.one():
                if error:
                    raise error
        except StoreBusy:
            pass

    request(busy())
    assert in_flight.limit == 8
    for expected in (4, 2, 1, 1):
        request(busy(is_throttled=True))
        assert in_flight.limit == expected
    request()
    assert in_flight.limit == 2
    for _ in range(200):
        request()
    assert in_flight.limit == 8


def test_those_that_were_on_their_way_together_halve_once():
    in_flight = InFlight(8)
    inside = threading.Barrier(8)

    def request():
        try:
            with in_flight.one():
                inside.wait()
                raise busy(is_throttled=True)
        except StoreBusy:
            pass

    threads = [threading.Thread(target=request) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert in_flight.limit == 4


def test_no_more_requests_are_on_their_way_than_the_store_wants():
    most, running, lock = [0], [0], threading.Lock()

    class Counting(MemoryStore):
        @property
        def capabilities(self):
            return Capabilities(parallel_requests=3)

        def exists(self, key):
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            threading.Event().wait(0.002)
            with lock:
                running[0] -= 1
            return False

    store = RetryingStore(Counting())
    threads = [threading.Thread(target=lambda: [store.exists("a") for _ in range(10)]) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 3


def test_a_listing_goes_on_where_it_was_interrupted():
    memory = MemoryStore()
    for key in KEYS:
        memory.put(key, [b""])
    asked = []

    class Once(FaultyStore):
        def list_pages(self, prefix, after=""):
            asked.append(after)
            pages = super().list_pages(prefix, after)
            yield next(pages)
            yield next(pages)
            if len(asked) < 3:
                raise busy()
            yield from pages

    store = RetryingStore(Once(memory, 0, 0.0), fraction=lambda: 0.0)
    assert [info.key for info in store.list("packs/")] == KEYS
    assert asked == ["", KEYS[3], KEYS[7]]
