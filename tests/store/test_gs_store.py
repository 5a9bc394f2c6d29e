"""What only the store at Google's can do right or wrong, behind a proxy that counts and breaks."""

import random
import threading
from collections.abc import Callable, Iterator

import pytest
from servers import faults, gs_servers
from servers.fault_proxy import FaultProxy
from servers.s3_servers import Server

from replicate.errors import ConfigError, RepositoryDamaged, RepositoryMissing, RepositoryUnreachable
from replicated.store import open_store
from replicated.store.base import KeyMissing, StoreBusy
from replicated.store.gs import open_gs
from replicated.store.gs.store import GsStore
from replicated.store.retrying import RetryingStore

SMALL = b"a small object"
MIDDLE = bytes(100_000)
LARGE = random.Random(2).randbytes((8 << 20) + 4321)  # larger than what the library sends in one request


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with gs_servers.service() as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    with FaultProxy(server.url) as proxy:
        yield proxy


@pytest.fixture
def store(proxy: FaultProxy, request: pytest.FixtureRequest) -> Iterator[GsStore]:
    """Not one that repeats; its bucket is there."""
    url = f"gs://bucket-of-{abs(hash(request.node.name))}/team/models"
    store = gs_servers.open_service(url, proxy.url)
    store.put("there", [SMALL])
    proxy.counted.exchanges.clear()
    yield store
    proxy.clear()
    store.close()


def repeated(store: GsStore) -> RetryingStore:
    return RetryingStore(store, fraction=lambda: 0.01)


def operations(proxy: FaultProxy, call: Callable[[], object]) -> list[str]:
    with proxy.counting() as counted:
        call()
    return [exchange.operation for exchange in counted.exchanges]


# What it costs


def test_every_call_is_as_few_requests_as_can_be(store: GsStore, proxy: FaultProxy) -> None:
    assert operations(proxy, lambda: store.put("a", [SMALL], is_checked=False)) == ["PUT"]
    assert operations(proxy, lambda: store.put("b", [SMALL])) == ["PUT", "GET"]
    assert operations(proxy, lambda: store.put("a", [SMALL], is_checked=False)) == ["PUT", "GET"]
    # A session, and all of it in one request.
    assert operations(proxy, lambda: store.put("c", [LARGE], is_checked=False)) == ["PUT", "PUT"]
    assert operations(proxy, lambda: store.replace("d", SMALL)) == ["PUT"]
    assert operations(proxy, lambda: store.get("c")) == ["GET"]
    assert operations(proxy, lambda: store.get("c", 5, 99)) == ["GET"]
    assert operations(proxy, lambda: store.get("a", 5, 99)) == ["GET"]
    assert operations(proxy, lambda: store.exists("a")) == ["GET"]
    assert operations(proxy, lambda: list(store.list(""))) == ["LIST"]
    assert len(operations(proxy, lambda: store.delete("a", "b", "c"))) == 2
    assert operations(proxy, lambda: store.delete("d")) == ["DELETE"]
    assert [info.key for info in store.list("")] == ["there"]


def test_opening_asks_nothing(proxy: FaultProxy) -> None:
    environment = gs_servers.environment(proxy.url)
    assert (
        operations(proxy, lambda: open_store("gs://any-bucket", create=True, environment=environment)) == []
    )


def test_first_write_is_one_request_as_any_other(store: GsStore, proxy: FaultProxy) -> None:
    again = gs_servers.open_service(store.url, proxy.url)
    assert operations(proxy, lambda: again.put("a", [SMALL], is_checked=False)) == ["PUT"]
    again.close()


def test_many_objects_go_in_few_requests(store: GsStore, proxy: FaultProxy) -> None:
    for number in range(150):
        store.put(f"many/{number}", [b"x"], is_checked=False)
    assert len(operations(proxy, lambda: store.delete(*(f"many/{number}" for number in range(150))))) == 3
    assert list(store.list("many/")) == []


# What is said of the same bytes and of others


def test_put_whose_answer_was_lost_finds_its_own_object(store: GsStore, proxy: FaultProxy) -> None:
    for name, data in (("a", SMALL), ("b", LARGE)):
        rule = proxy.add(faults.reset_after, "PUT", times=1, nth=1 if name == "a" else 2)
        repeated(store).put(name, [data])
        assert rule.hits == 1
        assert store.get(name) == data
        proxy.clear()


def test_put_under_a_key_that_others_have_taken_is_told(store: GsStore) -> None:
    store.put("large", [LARGE])
    store.put("large", [LARGE[:100], LARGE[100:]])
    with pytest.raises(RepositoryDamaged, match="large"):
        store.put("large", [LARGE[:-1] + b"?"], is_unique=True)
    assert store.get("large") == LARGE


def test_server_that_says_done_and_is_not_is_found_out(store: GsStore, proxy: FaultProxy) -> None:
    rule = proxy.add(faults.lie, "PUT", times=1)
    with pytest.raises(StoreBusy, match=r"team/models/lost"):
        store.put("lost", [SMALL])
    assert rule.hits == 1
    repeated(store).put("lost", [SMALL])
    assert store.get("lost") == SMALL


# What breaks on the way


@pytest.mark.parametrize(("data", "nth"), [(MIDDLE, 1), (LARGE, 2)], ids=["at once", "in a session"])
def test_bytes_that_changed_on_the_way_are_refused(
    store: GsStore, proxy: FaultProxy, data: bytes, nth: int
) -> None:
    proxy.add(faults.flip_sent, "PUT", nth=nth, times=1)
    with pytest.raises(StoreBusy, match="other bytes arrived than were sent"):
        store.put("flipped", [data])
    assert not store.exists("flipped")
    store.put("flipped", [data])
    assert store.get("flipped") == data


def test_whole_object_that_changed_on_the_way_back_is_not_believed(store: GsStore, proxy: FaultProxy) -> None:
    proxy.add(faults.flip, "GET", times=1)
    with pytest.raises(StoreBusy, match="other bytes came back"):
        store.get("there")
    assert store.get("there") == SMALL


@pytest.mark.parametrize("where", [(0, None), (3, None), (3, 1 << 20), (0, 100)])
def test_body_that_ends_too_early_is_noticed(
    store: GsStore, proxy: FaultProxy, where: tuple[int, int | None]
) -> None:
    store.put("large", [LARGE])
    rule = proxy.add(faults.truncate, "GET", times=2)
    with pytest.raises(StoreBusy, match="large"):
        store.get("large", *where)
    end = None if where[1] is None else where[0] + where[1]
    assert repeated(store).get("large", *where) == LARGE[where[0] : end]
    assert rule.hits == 2


# What a listing says has no checksum but that of the connection.
@pytest.mark.parametrize("fault", sorted(set(faults.PASSING_FAULTS) - {"flip"}))
def test_every_call_gets_over_what_passes(store: GsStore, proxy: FaultProxy, fault: str) -> None:
    proxy.add(faults.PASSING_FAULTS[fault], probability=0.4, seed=3)
    patient = RetryingStore(store, patience_s=1e9, fraction=lambda: 0.001)
    for number in range(10):
        patient.put(f"a/{number}", [b"%d" % number])
    assert [info.key for info in patient.list("a/")] == [f"a/{number}" for number in range(10)]
    assert [patient.get(f"a/{number}", 0, 1) for number in range(10)] == [b"%d" % n for n in range(10)]
    patient.delete(*(f"a/{number}" for number in range(9)))
    proxy.clear()
    assert [info.key for info in store.list("a/")] == ["a/9"]


def test_asking_for_fewer_requests_is_told_apart(store: GsStore, proxy: FaultProxy) -> None:
    proxy.add(faults.slow_down, times=1)
    with pytest.raises(StoreBusy) as caught:
        store.get("there")
    assert caught.value.is_throttled
    proxy.add(faults.server_error)
    with pytest.raises(StoreBusy) as caught:
        store.get("there")
    assert not caught.value.is_throttled


def test_library_repeats_nothing_by_itself(store: GsStore, proxy: FaultProxy) -> None:
    proxy.add(faults.server_error)
    calls: list[Callable[[], object]] = [
        lambda: store.put("a", [SMALL]),
        lambda: store.put("a", [LARGE]),
        lambda: store.replace("a", SMALL),
        lambda: store.get("there"),
        lambda: store.exists("there"),
        lambda: list(store.list("")),
        lambda: store.delete("a"),
        lambda: store.delete("a", "b"),
    ]
    for call in calls:
        with proxy.counting() as counted, pytest.raises(StoreBusy):
            call()
        assert counted.total == 1


# Listings


def test_listing_of_many_pages_goes_on_where_it_broke(store: GsStore, proxy: FaultProxy) -> None:
    keys = [f"log/{number:03}" for number in range(30)]
    for key in keys:
        store.put(key, [b""], is_checked=False)
    pages = operations(proxy, lambda: list(store.list("log/")))
    assert len(pages) == 5
    proxy.add(faults.reset_before, "LIST", nth=3)
    again = operations(proxy, lambda: list(repeated(store).list("log/")))
    assert len(again) <= len(pages) + 2
    assert [info.key for info in repeated(store).list("log/")] == keys
    assert [info.key for page in store.list_pages("log/", after="log/027") for info in page] == keys[28:]


def test_objects_of_others_are_not_listed(store: GsStore, proxy: FaultProxy) -> None:
    beside = open_gs(
        store.url.replace("models", "models2"), create=False, environment=gs_servers.environment(proxy.url)
    )
    beside.put("x", [b""])
    store._bucket.blob("team/models/Not A Key").upload_from_string(b"")
    store._bucket.blob("team/models/directory/").upload_from_string(b"")
    assert [(info.key, info.size) for info in store.list("")] == [("there", len(SMALL))]


def test_age_is_by_the_clock_of_the_server(store: GsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from replicated.store.gs import access
    from replicated.store.gs import store as module

    ages = [info.age_s for info in store.list("")]
    wrong = module.time.time() + 7200

    class Clock:
        time = staticmethod(lambda: wrong)

    monkeypatch.setattr(module, "time", Clock)
    monkeypatch.setattr(access, "time", Clock)
    (later,) = store.list("")
    assert ages[0] is not None and ages[0] < 60
    assert later.age_s is not None and later.age_s < 60
    assert -7260 < (store.clock_ahead_s() or 0) < -7140


# Errors


def test_missing_bucket_is_made_by_the_first_write_and_not_before(proxy: FaultProxy) -> None:
    environment = gs_servers.environment(proxy.url)
    new = gs_servers.open_service("gs://bucket-new/a", proxy.url)
    assert list(new.list("")) == []
    assert not new.exists("a")
    with pytest.raises(KeyMissing):
        new.get("a")
    new.delete("a", "b", "c")
    reader = open_gs("gs://bucket-new/a", create=False, environment=environment)
    for call in (lambda: list(reader.list("")), lambda: reader.get("a"), lambda: reader.put("a", [b""])):
        with pytest.raises(RepositoryMissing, match="there is no bucket gs://bucket-new"):
            call()
    new.put("a", [LARGE])
    assert reader.get("a") == LARGE


def test_bucket_that_needs_a_project_says_so(proxy: FaultProxy) -> None:
    from google.auth.credentials import AnonymousCredentials

    from replicated.store.buckets import parse_bucket_url
    from replicated.store.gs.access import Access

    access = Access(AnonymousCredentials(), proxy.url, False, None)
    store = GsStore(access, parse_bucket_url("gs://bucket-without-project"), create=True)
    with pytest.raises(RepositoryMissing, match="no project to make it in") as caught:
        store.put("a", [b""])
    assert "GOOGLE_CLOUD_PROJECT" in caught.value.hint


def test_what_is_not_allowed_is_told_with_the_role_that_is_needed(store: GsStore, proxy: FaultProxy) -> None:
    proxy.add(faults.forbidden)
    calls: list[Callable[[], object]] = [
        lambda: store.put("a", [b""]),
        lambda: store.get("a"),
        lambda: list(store.list("")),
        lambda: store.delete("a", "b"),
    ]
    for call in calls:
        with pytest.raises(RepositoryUnreachable, match="not allowed") as caught:
            call()
        assert not isinstance(caught.value, StoreBusy)
        assert "roles/storage.objectUser" in caught.value.hint
        assert "\n" not in caught.value.message


def test_server_that_is_away_is_told(store: GsStore, proxy: FaultProxy) -> None:
    proxy.go_away()
    with pytest.raises(StoreBusy, match=r"cannot read gs://.*/there: no connection") as caught:
        store.get("there")
    assert "0x" not in caught.value.message
    proxy.come_back()
    assert store.get("there") == SMALL


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith(("google.cloud", "replicated.store.gs."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        open_store("gs://bucket", create=False)
    assert caught.value.hint == "pip install 'replicate-vcs[gs]'"


def test_many_threads_may_use_one_store(store: GsStore) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        data = bytes([number]) * (1000 + number)
        for step in range(5):
            store.put(f"t/{number}-{step}", [data])
            if store.get(f"t/{number}-{step}", number, 500) != data[number : number + 500]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(list(store.list("t/"))) == 40
