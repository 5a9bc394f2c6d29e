"""What a store in a bucket asks for, what it believes, and what it makes of servers that can do less."""

import os
import threading

import pytest
from servers import faults

from replicate.errors import RepositoryDamaged, RepositoryMissing, RepositoryUnreachable
from replicated.store.base import KeyMissing, ObjectInfo, StoreBusy
from replicated.store.retrying import RetryingStore
from replicated.store.s3.features import Extra
from replicated.store.s3.store import S3Store

BIG = os.urandom((3 << 20) + 5)


@pytest.fixture(params=["moto_server", "rclone_server"])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def store(make_s3, moto_proxy):
    store = make_s3(moto_proxy.url)
    store.put("first", [b"so that the bucket is there, and the server is known"])
    return store


def header(exchange, name):
    return next((value for key, value in exchange.headers if key.lower() == name.lower()), None)


def reject(status, code, name, value=None):
    """A server that refuses requests with a header."""

    def fault(exchange):
        found = header(exchange, name)
        if found is not None and (value is None or found == value):
            exchange.refuse(
                status, code, "A header you provided implies functionality that is not implemented"
            )
        else:
            faults.passing(exchange)

    return fault


def without(name):
    """A server that does not look at a header."""

    def fault(exchange):
        exchange.headers = [(key, value) for key, value in exchange.headers if key.lower() != name]
        faults.passing(exchange)

    return fault


# Requests


def test_opening_asks_nothing_and_a_unique_object_costs_one_request_and_a_look(make_s3, moto_proxy, store):
    with moto_proxy.counting() as counted:
        again = make_s3(moto_proxy.url, store.url)
        assert counted.total == 0
        again.put("packs/ab/1", [BIG], is_unique=True)
        assert dict(counted.by_kind) == {("PUT", "packs"): 1, ("HEAD", "packs"): 1}
        again.put("log/index/1", [b"x"], is_unique=True, is_checked=False)
        assert counted.total == 3
        again.put("experiments/1", [b"x"])
        assert counted.total == 5, "it is known already that this server takes conditions"
        again.replace("heartbeats/1", b"x")
        assert counted.total == 6
        assert len(list(again.list("log/"))) == 1
        assert again.get("packs/ab/1", 5, 10) == BIG[5:15]
        assert counted.total == 8


def test_large_bodies_go_out_unsigned_and_with_a_checksum_and_small_ones_signed(moto_proxy, store):
    with moto_proxy.counting() as counted:
        store.put("packs/ab/1", [BIG[: 1 << 20], BIG[1 << 20 :]], is_unique=True)
        store.put("small", [b"x"], is_unique=True)
    large, small = [exchange for exchange in counted.of("PUT") if exchange.operation == "PUT"]
    assert header(large, "x-amz-content-sha256") == "UNSIGNED-PAYLOAD"
    assert header(small, "x-amz-content-sha256") != "UNSIGNED-PAYLOAD"
    assert header(large, "x-amz-checksum-crc32")
    assert header(large, "expect") == "100-continue"
    assert header(small, "expect") is None
    assert store.get("packs/ab/1") == BIG


def test_objects_of_many_mebibytes_are_whole_on_every_server(make_s3, server):
    store = make_s3(server.url)
    data = os.urandom(20 << 20)
    store.put("packs/ab/1", [data[:7], data[7 : 9 << 20], data[9 << 20 :]], is_unique=True)
    assert store.get("packs/ab/1") == data
    assert store.get("packs/ab/1", (8 << 20) + 1, 100) == data[(8 << 20) + 1 :][:100]
    assert store._requests.features.can(Extra.UNSIGNED)
    assert store._requests.features.can(Extra.CHECKSUM)
    store.put("packs/ab/1", [data])
    with pytest.raises(RepositoryDamaged):
        store.put("packs/ab/1", [data[:-1], b"?"])
    with pytest.raises(RepositoryDamaged):
        store.put("packs/ab/1", [data, b"?"])
    assert store.get("packs/ab/1") == data


def test_whether_a_server_knows_conditions_is_found_out_with_the_first_object(make_s3, server):
    store = make_s3(server.url)
    assert not store._requests.features.is_known(Extra.CONDITION)
    store.put("experiments/1", [b"x"])
    assert store._requests.features.is_known(Extra.CONDITION)
    # Known of rclone 1.75 and moto 5.2: reliability of our promises depends on none of it.
    assert store._requests.features.can(Extra.CONDITION) is not server.checks_signatures


# What servers refuse


@pytest.mark.parametrize(
    ("fault", "lacking"),
    [
        (reject(501, "NotImplemented", "if-none-match"), {Extra.CONDITION}),
        (reject(400, "InvalidArgument", "x-amz-checksum-crc32"), {Extra.CHECKSUM}),
        (reject(403, "SignatureDoesNotMatch", "x-amz-content-sha256", "UNSIGNED-PAYLOAD"), {Extra.UNSIGNED}),
        (
            reject(400, "XAmzContentSHA256Mismatch", "x-amz-content-sha256", "UNSIGNED-PAYLOAD"),
            {Extra.UNSIGNED},
        ),
        (without("if-none-match"), {Extra.CONDITION}),
    ],
)
def test_what_a_server_refuses_or_ignores_is_found_out_and_left_out(make_s3, moto_proxy, fault, lacking):
    moto_proxy.add(fault, "PUT")
    store = make_s3(moto_proxy.url)
    store.put("a/1", [BIG])
    store.put("a/2", [b"small"])
    features = store._requests.features
    assert {extra for extra in Extra if not features.can(extra)} == lacking
    with moto_proxy.counting() as counted:
        store.put("a/3", [BIG], is_unique=True)
    assert [exchange.status for exchange in counted.of("PUT")] == [200]
    store.put("a/1", [BIG])
    with pytest.raises(RepositoryDamaged, match="a/2"):
        store.put("a/2", [b"other"])
    assert store.get("a/1") == BIG
    assert store.get("a/2") == b"small"


@pytest.mark.parametrize("status", [501, 405, 400])
def test_where_many_cannot_be_deleted_at_once_each_is(moto_proxy, store, status):
    moto_proxy.add(lambda exchange: (
        exchange.refuse(status, "NotImplemented" if status == 501 else "", "?")
        if exchange.method == "POST" else faults.passing(exchange)
    ), "DELETE")  # fmt: skip
    for number in range(4):
        store.put(f"a/{number}", [b""], is_unique=True)
    if status == 400:
        with pytest.raises(RepositoryUnreachable, match="cannot delete a/0 and 2 more"):
            store.delete("a/0", "a/1", "a/2", "a/3")
        return
    store.delete("a/0", "a/1", "a/2", "a/3")
    assert list(store.list("a/")) == []
    assert not store._requests.features.can(Extra.BATCHES)


def test_a_server_that_knows_no_ranges_is_read_whole(moto_proxy, store):
    store.put("a", [b"0123456789"])
    moto_proxy.add(without("range"), "GET")
    assert store.get("a", 3) == b"3456789"
    assert store.get("a", 3, 4) == b"3456"
    assert store.get("a", 10) == store.get("a", 99, 5) == b""


# What is not believed


def test_a_lost_answer_to_a_conditional_put_is_no_other_writer(moto_proxy, store):
    rule = moto_proxy.add(faults.reset_after, "PUT", "experiments/", times=1)
    patient = RetryingStore(store, fraction=lambda: 0.0)
    patient.put("experiments/1", [b"mine"])
    assert rule.hits == 1
    assert store.get("experiments/1") == b"mine"


def test_a_put_that_is_said_to_be_done_and_is_not_is_done_again(moto_proxy, store):
    for number, arguments in enumerate([{"is_unique": True}, {}]):
        rule = moto_proxy.add(faults.lie, "PUT", "packs/")
        with pytest.raises(StoreBusy, match="does not have it"):
            store.put(f"packs/{number}", [BIG], **arguments)
        assert rule.hits
        moto_proxy.clear()
        rule = moto_proxy.add(faults.lie, "PUT", "packs/", times=1)
        RetryingStore(store, fraction=lambda: 0.0).put(f"packs/{number}", [BIG], **arguments)
        assert rule.hits == 1
        assert store.get(f"packs/{number}") == BIG
        moto_proxy.clear()


@pytest.mark.parametrize("is_checked", [True, False])
@pytest.mark.parametrize("is_unique", [True, False])
def test_small_objects_that_changed_on_their_way_are_sent_again(moto_proxy, store, is_unique, is_checked):
    # moto keeps the checksum that it was sent, and does not compare it; its tag tells.
    rule = moto_proxy.add(faults.flip_sent, "PUT", "experiments/", times=1)
    patient = RetryingStore(store, fraction=lambda: 0.0)
    patient.put("experiments/1", [b"abc"], is_unique=is_unique, is_checked=is_checked)
    assert rule.hits == 1
    assert store.get("experiments/1") == b"abc"


def test_whole_objects_that_changed_on_their_way_here_are_read_again(moto_proxy, store):
    store.put("experiments/1", [b"abc"])
    for _ in range(2):
        rule = moto_proxy.add(faults.flip, "GET", times=1)
        with pytest.raises(StoreBusy, match="cannot read experiments/1"):
            store.get("experiments/1")
        assert rule.hits == 1
        assert store.get("experiments/1") == b"abc"


def test_a_tag_that_is_no_md5_is_no_reason_to_doubt_for_ever(moto_proxy, store):
    def other_tags(exchange):
        status, headers, body = exchange.forward()
        kept = [(name, value) for name, value in headers if name.lower() != "etag" and "crc" not in name]
        exchange.answer(status, [*kept, ("ETag", f'"{os.urandom(16).hex()}"')], body)

    moto_proxy.add(other_tags)
    for is_unique in (True, False):
        store.put(f"experiments/{is_unique}".lower(), [b"abc"], is_unique=is_unique)
    assert store.get("experiments/true") == store.get("experiments/false") == b"abc"


@pytest.mark.parametrize(("offset", "length"), [(0, None), (5, None), (5, 1000)])
def test_a_truncated_answer_is_noticed_and_read_again(moto_proxy, store, offset, length):
    store.put("packs/1", [BIG], is_unique=True)
    rule = moto_proxy.add(faults.truncate, "GET", "packs/", times=1)
    with pytest.raises(StoreBusy, match="cannot read packs/1"):
        store.get("packs/1", offset, length)
    assert rule.hits == 1
    expected = BIG[offset:] if length is None else BIG[offset : offset + length]
    assert store.get("packs/1", offset, length) == expected


@pytest.mark.parametrize("name", sorted(faults.PASSING_FAULTS))
def test_what_befalls_requests_in_passing_is_not_seen(moto_proxy, store, name):
    if name == "flip":
        pytest.skip("what changes on its way is noticed where it can be: see above")
    patient = RetryingStore(store, patience_s=60, fraction=lambda: 0.01)
    rule = moto_proxy.add(faults.PASSING_FAULTS[name], probability=0.3, seed=5)
    keys = [f"packs/{number}" for number in range(12)]
    for number, key in enumerate(keys):
        patient.put(key, [key.encode() * 99], is_unique=number % 2 == 0)
    assert [info.key for info in patient.list("packs/")] == sorted(keys)
    assert [patient.get(key) for key in keys] == [key.encode() * 99 for key in keys]
    patient.delete(*keys)
    assert not any(patient.exists(key) for key in keys)
    assert rule.hits


def test_throttling_is_told_apart(moto_proxy, store):
    moto_proxy.add(faults.slow_down, "GET HEAD")
    for call in (lambda: store.get("a"), lambda: store.exists("a")):
        with pytest.raises(StoreBusy) as caught:
            call()
        assert caught.value.is_throttled
    moto_proxy.clear()
    moto_proxy.add(faults.server_error, "GET")
    with pytest.raises(StoreBusy, match="InternalError") as caught:
        store.get("a")
    assert not caught.value.is_throttled


# Listings and deletion


def in_pages_of(count):
    """A server that lists so many objects a page, not a thousand."""

    def fault(exchange):
        exchange.target += f"&max-keys={count}"
        faults.passing(exchange)

    return fault


def test_listings_of_many_pages_are_whole_and_have_ages_by_the_clock_of_the_server(moto_proxy, store):
    moto_proxy.add(in_pages_of(10), "LIST")
    keys = [f"a/{number:02}" for number in range(25)]
    for key in keys:
        store.put(key, [b"xy"], is_unique=True, is_checked=False)
    with moto_proxy.counting() as counted:
        found = list(store.list("a/"))
    assert counted.total == 3
    assert found == [ObjectInfo(key, 2) for key in keys]
    assert all(info.age_s is not None and 0 <= info.age_s < 600 for info in found)
    pages = list(store.list_pages("a/", after="a/13"))
    assert [info.key for page in pages for info in page] == keys[14:]


def test_more_objects_than_fit_into_a_page_or_a_batch(make_s3, rclone_server):
    store = make_s3(rclone_server.url)
    keys = [f"a/{number:04}" for number in range(1005)]
    store.put("b", [b"x"])
    for key in keys:
        store.put(key, [b"xy"], is_unique=True, is_checked=False)
    assert [info.key for info in store.list("a/")] == keys
    store.delete(*keys)
    assert list(store.list("")) == [ObjectInfo("b", 1)]


def test_keys_of_others_are_passed_over(make_s3, moto_server, store):
    client = store._requests._clients.get()
    bucket = store.url.split("/")[2]
    for key in ("Team A/models/Upper", "Team A/models/a b", "Team A/models/dir/", "Team A/modelsx", "other"):
        client.put_object(Bucket=bucket, Key=key, Body=b"")
    store.put("a/b", [b""])
    assert [info.key for info in store.list("")] == ["a/b", "first"]


def test_the_last_key_is_deleted_after_all_others(moto_proxy, store):
    for number in range(5):
        store.put(f"a/{number}", [b""], is_unique=True)
    with moto_proxy.counting() as counted:
        store.delete("a/0", "a/1", "a/2", "a/3", "a/4")
        assert [e.key.split() and e.method for e in counted.of("DELETE")] == ["POST", "DELETE"]
    assert counted.of("DELETE")[1].key.endswith("a/4")


def test_what_may_not_be_deleted_is_named(moto_proxy, store):
    body = (
        b'<?xml version="1.0"?><DeleteResult><Error><Key>Team A/models/a/1</Key><Code>AccessDenied</Code>'
        b"<Message>Access Denied</Message></Error></DeleteResult>"
    )
    moto_proxy.add(
        lambda exchange: exchange.answer(200, [("Content-Type", "application/xml")], body), "DELETE"
    )
    with pytest.raises(RepositoryUnreachable, match=r"cannot delete a/1 in .*AccessDenied.*s3:DeleteObject"):
        store.delete("a/0", "a/1", "a/2")


# Buckets


def test_a_missing_bucket_is_made_by_the_first_request_when_that_was_asked(make_s3, moto_proxy):
    store = make_s3(moto_proxy.url)
    with pytest.raises(KeyMissing):
        store.get("repository.json")
    store.put("repository.json", [b"{}"])
    assert make_s3(moto_proxy.url, store.url, create=False).get("repository.json") == b"{}"


@pytest.mark.parametrize(
    "call", [lambda s: s.get("a"), lambda s: list(s.list("")), lambda s: s.put("a", [b""])]
)
def test_a_missing_bucket_is_not_made_unasked(make_s3, server, call):
    store = make_s3(server.url, "s3://never-made/x", create=False)
    for _ in range(2):
        with pytest.raises(RepositoryMissing, match="there is no bucket never-made at http://127"):
            call(store)
    assert not store.exists("a")


def test_a_bucket_that_is_taken_away_is_not_made_again(make_s3, rclone_server):
    store = make_s3(rclone_server.url)
    store.put("a", [b"x"])
    store.delete("a")
    store._requests._clients.get().delete_bucket(Bucket=store.url.split("/")[2])
    with pytest.raises(RepositoryMissing, match="there is no bucket"):
        store.put("a", [b"x"])


def test_many_threads_that_miss_the_bucket_make_it_once(make_s3, moto_proxy):
    store = make_s3(moto_proxy.url)
    barrier = threading.Barrier(6)
    failed = []

    def write(number):
        barrier.wait()
        try:
            store.put(f"a/{number}", [b"x"], is_unique=True)
        except Exception as error:
            failed.append(error)

    with moto_proxy.counting() as counted:
        threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []
    assert len(list(store.list("a/"))) == 6
    assert len([e for e in counted.of("BUCKET") if e.method == "PUT"]) == 1


def test_a_bucket_that_may_not_be_made_is_told_with_what_to_do(make_s3, moto_proxy):
    moto_proxy.add(faults.forbidden, "BUCKET")
    with pytest.raises(RepositoryMissing, match=r"cannot be made: AccessDenied.*aws s3 mb s3://nobodys"):
        make_s3(moto_proxy.url, "s3://nobodys/x").put("a", [b""])


def test_a_new_bucket_is_in_the_region_that_is_configured(make_s3, moto_proxy):
    store = make_s3(moto_proxy.url, AWS_DEFAULT_REGION="eu-west-3")
    store.put("a", [b""])
    found = store._requests._clients.get().get_bucket_location(Bucket=store.url.split("/")[2])
    assert found["LocationConstraint"] == "eu-west-3"


def test_it_is_a_store(make_s3, moto_proxy):
    assert isinstance(make_s3(moto_proxy.url), S3Store)
    capabilities = make_s3(moto_proxy.url).capabilities
    assert capabilities.has_costly_requests
    assert not capabilities.is_near
    assert capabilities.local_root is None
