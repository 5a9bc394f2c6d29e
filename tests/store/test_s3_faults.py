"""A bucket that breaks: in the end the right result or a clear error; nothing believed that is not so.

Every request passes a proxy that breaks it as told (`servers.faults`); `RetryingStore` is above it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from random import Random

import pytest
from servers import faults, s3_servers
from servers.fault_proxy import FaultProxy

from replicate.errors import RepositoryDamaged, RepositoryError, RepositoryUnreachable
from replicated.store.base import KeyMissing, ObjectInfo, Store, StoreBusy
from replicated.store.buckets import parse_bucket_url
from replicated.store.retrying import RetryingStore
from replicated.store.s3 import client as s3_client
from replicated.store.s3.store import S3Store

OLD, NEW = b"old" * 400, b"new" * 500
#: More than is signed and sent in one piece.
LARGE = bytes(range(256)) * 8192
SEEDS = range(1, 5)


@dataclasses.dataclass
class Place:
    """A bucket: past the proxy, and through it."""

    proxy: FaultProxy
    direct: Store
    store: Store
    #: Whether the server looks at signatures, and so at what was sent.
    verifies: bool

    def reset(self) -> None:
        self.proxy.clear()
        self.direct.delete(*[info.key for info in self.direct.list("")])
        for key in ("a/there", "a/removed", "a/1", "a/2", "a/3"):
            self.direct.replace(key, OLD)


@pytest.fixture(scope="module", params=["moto", "rclone"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    server = request.getfixturevalue(f"{request.param}_server")
    with FaultProxy(server.url) as proxy:
        url = f"s3://faults-{request.param}/team/runs"
        direct, through = open_at(server.url, url), open_at(proxy.url, url)
        # Loses its patience after twelve tries, and waits for none of them.
        store = RetryingStore(through, patience_s=12, clock=count().__next__, fraction=lambda: 0.0)
        # What a server can do is found out with the first object.
        store.put("b/first", [OLD])
        yield Place(proxy, direct, store, verifies=server.checks_signatures)
        store.close()
        direct.close()


@pytest.fixture(autouse=True)
def _as_new(place: Place) -> Iterator[None]:
    """A few objects, and nothing wrong."""
    place.reset()
    yield
    place.proxy.clear()


@pytest.fixture
def proxy(place: Place) -> FaultProxy:
    return place.proxy


@pytest.fixture
def direct(place: Place) -> Store:
    return place.direct


@pytest.fixture
def store(place: Place) -> Store:
    return place.store


def open_at(endpoint: str, url: str) -> S3Store:
    environment = {**s3_servers.ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}
    return S3Store(parse_bucket_url(url), create=True, environment=environment)


@contextmanager
def open_through(place: Place) -> Iterator[Store]:
    """A store with a client of its own, for what clients remember."""
    store = RetryingStore(open_at(place.proxy.url, place.direct.url))
    yield store
    store.close()


def keys_of(store: Store, prefix: str = "a/") -> list[str]:
    return sorted(info.key for info in store.list(prefix))


#: What is done through the proxy, and whether what it gives, and what is there afterwards, is right.
CASES: dict[str, tuple[Callable[[Store], object], Callable[[object, Store], bool]]] = {
    "put": (lambda s: s.put("n", [NEW]), lambda _, d: d.get("n") == NEW),
    "put large": (lambda s: s.put("n", [LARGE[:7], LARGE[7:]]), lambda _, d: d.get("n") == LARGE),
    "put again": (lambda s: s.put("a/there", [OLD]), lambda _, d: d.get("a/there") == OLD),
    "put unique": (lambda s: s.put("n", [NEW], is_unique=True), lambda _, d: d.get("n") == NEW),
    "replace": (lambda s: s.replace("a/there", NEW), lambda _, d: d.get("a/there") == NEW),
    "get": (lambda s: s.get("a/there"), lambda found, _: found == OLD),
    "get a range": (lambda s: s.get("a/there", 100, 200), lambda found, _: found == OLD[100:300]),
    "get the end": (lambda s: s.get("a/there", 1190), lambda found, _: found == OLD[1190:]),
    "list": (lambda s: keys_of(s), lambda found, d: found == keys_of(d)),
    "delete": (lambda s: s.delete("a/removed"), lambda _, d: "a/removed" not in keys_of(d)),
    "delete many": (lambda s: s.delete("a/1", "a/2", "a/3"), lambda _, d: len(keys_of(d)) == 2),
    "exists": (lambda s: s.exists("a/there"), lambda found, _: found is True),
    "exists not": (lambda s: s.exists("a/not"), lambda found, _: found is False),
}  # fmt: skip
#: Of these the bytes of an answer are no more than what was sent; who reads them checks their hash.
PASSING = {name: fault for name, fault in faults.PASSING_FAULTS.items() if name != "flip"}


@pytest.mark.parametrize("case", CASES)
def test_what_passes_is_got_over(place: Place, case: str) -> None:
    do, is_right = CASES[case]
    for name, fault in PASSING.items():
        rule = place.proxy.add(fault, times=2)
        assert is_right(do(place.store), place.direct), name
        assert rule.hits
        place.reset()


@pytest.mark.parametrize("fault", [faults.forbidden, faults.expired_token])
def test_credentials_that_are_refused_once_are_tried_again(place: Place, fault: faults.Fault) -> None:
    for case, (do, is_right) in CASES.items():
        with open_through(place) as store:
            place.proxy.add(fault, times=1)
            assert is_right(do(store), place.direct), case
        place.reset()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (faults.server_error, "InternalError|internal error|500"),
        (faults.slow_down, "SlowDown|reduce your request rate|fewer requests|503"),
        (faults.forbidden, "AccessDenied|Access Denied|403|not allowed|refused"),
        (faults.expired_token, "expired"),
        (faults.reset_before, "connection|closed|reset"),
    ],
)
def test_what_does_not_pass_is_an_error_that_says_where_and_why(
    store: Store, proxy: FaultProxy, fault: faults.Fault, reason: str
) -> None:
    proxy.add(fault)
    for do, _ in CASES.values():
        with pytest.raises(RepositoryUnreachable, match=f"(?i){reason}") as caught:
            do(store)
        assert store.url in str(caught.value)


def test_a_server_that_is_away_is_an_error_that_says_where(store: Store, proxy: FaultProxy) -> None:
    proxy.go_away()
    for do, _ in CASES.values():
        with pytest.raises(RepositoryUnreachable, match=f"{proxy.port}") as caught:
            do(store)
        assert store.url in str(caught.value)
    proxy.come_back()
    assert store.get("a/there") == OLD


def test_a_server_that_hangs_is_asked_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client, "READ_TIMEOUT_S", 0.3)
    with open_through(place) as store:
        for case, (do, is_right) in CASES.items():
            rule = place.proxy.add(faults.hang, times=1)
            assert is_right(do(store), place.direct), case
            assert rule.hits
            place.reset()


@pytest.mark.parametrize("case", ["put", "put large", "put unique"])
def test_an_object_that_was_not_taken_is_not_believed_to_be_there(
    store: Store, direct: Store, proxy: FaultProxy, case: str
) -> None:
    do, is_right = CASES[case]
    rule = proxy.add(faults.lie, "PUT")
    with pytest.raises(StoreBusy, match="does not have it"):
        do(store)
    assert rule.hits > 1
    proxy.clear()
    proxy.add(faults.lie, "PUT", times=1)
    assert is_right(do(store), direct)


@pytest.mark.parametrize("case", ["put", "put large", "put unique"])
def test_an_object_that_does_not_show_at_once_is_stored_all_the_same(
    store: Store, direct: Store, proxy: FaultProxy, case: str
) -> None:
    do, is_right = CASES[case]
    proxy.add(faults.missing, "HEAD GET", times=3)
    assert is_right(do(store), direct)


def test_bytes_that_change_on_their_way_are_not_taken_for_what_was_sent(place: Place) -> None:
    """rclone looks at no checksum but MD5: it is we who notice. moto keeps the checksum that it was sent."""
    if not place.verifies:
        pytest.skip("moto takes any checksum and any signature")
    rule = place.proxy.add(faults.flip_sent, "PUT", times=1)
    try:
        place.store.put("n", [NEW])
    except RepositoryError:
        assert place.direct.get("n") != NEW
    else:
        assert place.direct.get("n") == NEW
    assert rule.hits == 1


def test_other_bytes_stay_whatever_befalls_the_requests(
    store: Store, direct: Store, proxy: FaultProxy
) -> None:
    for fault in PASSING.values():
        proxy.clear()
        proxy.add(fault, times=2)
        with pytest.raises(RepositoryDamaged, match="a/there"):
            store.put("a/there", [NEW])
        assert direct.get("a/there") == OLD


def test_a_listing_goes_on_where_a_page_failed(store: Store, direct: Store, proxy: FaultProxy) -> None:
    keys = [f"c/{number:04}" for number in range(1100)]
    for key in keys:
        direct.replace(key, b"")
    for number, fault in enumerate(fault for name, fault in PASSING.items() if name != "duplicate"):
        proxy.clear()
        rule = proxy.add(fault, "LIST", nth=1 + number % 2, times=2)
        with proxy.counting() as counted:
            assert keys_of(store, "c/") == keys
        assert rule.hits == 2
        assert counted.total == 4


@pytest.mark.parametrize("seed", SEEDS)
def test_any_calls_with_any_faults_give_what_a_dictionary_gives_or_an_error(
    store: Store, direct: Store, proxy: FaultProxy, seed: int
) -> None:
    """After an error what was to be changed may be either way; everything else must be right."""
    print(f"seed {seed}")
    random = Random(seed)
    for number, fault in enumerate([*PASSING.values(), faults.forbidden, faults.lie]):
        operations = "PUT" if fault is faults.lie else ""
        proxy.add(fault, operations, probability=0.05, seed=1000 * seed + number)
    keys = [f"d/{number}" for number in range(8)]
    #: What each key may hold; None: nothing.
    may: dict[str, set[bytes | None]] = {key: {None} for key in keys}
    errors = 0
    for number in range(120):
        key = random.choice(keys)
        data = f"{number % 5}".encode() * random.choice([1, 1000])
        action = random.choice(["put", "replace", "get", "exists", "list", "delete", "delete many"])
        some = random.sample(keys, 3)
        try:
            if action == "put":
                try:
                    store.put(key, [data])
                except RepositoryDamaged:
                    assert may[key] - {data, None}
                    may[key] -= {data, None}
                else:
                    # What was there may have been so because an earlier call was done after all.
                    assert may[key] & {data, None}
                    may[key] = {data}
            elif action == "replace":
                store.replace(key, data)
                # Nobody looks whether it is there: a liar is believed.
                may[key] = may[key] | {data}
            elif action == "get":
                try:
                    found = store.get(key)
                except KeyMissing:
                    found = None
                assert found in may[key]
                may[key] = {found}
            elif action == "exists":
                assert (not store.exists(key)) in {value is None for value in may[key]}
            elif action == "list":
                listed = {info.key: info for info in store.list("d/")}
                for one, values in may.items():
                    info = listed.pop(one, None)
                    assert info in {None if v is None else ObjectInfo(one, len(v)) for v in values}
                assert not listed
            else:
                removed = some if action == "delete many" else [key]
                store.delete(*removed)
                for one in removed:
                    may[one] = {None}
        except RepositoryError as error:
            errors += 1
            assert isinstance(error, RepositoryUnreachable), error
            touched = {"put": {key: {data}}, "replace": {key: {data}}, "delete": {key: {None}}}.get(
                action, {}
            )
            if action == "delete many":
                touched = {one: {None} for one in some}
            for one, values in touched.items():
                may[one] |= values
    print(f"{errors} errors")
    proxy.clear()
    for key, values in may.items():
        assert (direct.get(key) if direct.exists(key) else None) in values
