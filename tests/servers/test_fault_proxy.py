"""The proxy breaks what it is told to, counts what passes, and leaves everything else as it is."""

import threading
from collections import Counter

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError
from servers import faults, s3_servers
from servers.fault_proxy import FaultProxy

DATA = bytes(range(256)) * 40


@pytest.fixture(scope="module", params=["moto", "rclone"])
def upstream(request, tmp_path_factory):
    if request.param == "moto":
        with s3_servers.moto() as server:
            yield server
    else:
        with s3_servers.rclone(tmp_path_factory.mktemp("buckets")) as server:
            yield server


@pytest.fixture
def proxy(upstream):
    with FaultProxy(upstream.url) as proxy:
        yield proxy


@pytest.fixture
def make_client():
    """Clients that try once and check no sums of theirs."""
    clients = []

    def make(url, **settings):
        config = Config(
            retries={"total_max_attempts": 1},
            response_checksum_validation="when_required",
            request_checksum_calculation="when_required",
            read_timeout=settings.pop("read_timeout", 60),
            s3={"addressing_style": "path"},
        )
        client = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id=s3_servers.ACCESS_KEY,
            aws_secret_access_key=settings.pop("secret", s3_servers.SECRET_KEY),
            region_name="us-east-1",
            config=config,
        )
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def direct(make_client, upstream, request):
    """Past the proxy, with a bucket of the test's own."""
    client = make_client(upstream.url)
    client.create_bucket(Bucket=bucket_of(request))
    return client


@pytest.fixture
def client(direct, make_client, proxy):
    return make_client(proxy.url)


@pytest.fixture
def bucket(request):
    return bucket_of(request)


def bucket_of(request):
    return "b" + "".join(letter if letter.isalnum() else "-" for letter in request.node.name.lower())[
        -60:
    ].strip("-")


def keys_of(client, bucket):
    return [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket).get("Contents", ())]


def read(client, bucket, key):
    return client.get_object(Bucket=bucket, Key=key)["Body"].read()


def test_requests_pass_as_they_are_and_are_counted(client, direct, proxy, bucket):
    with proxy.counting() as counted:
        client.put_object(Bucket=bucket, Key="runs/a b/packs/1%2f", Body=DATA)
        assert read(client, bucket, "runs/a b/packs/1%2f") == DATA
        client.head_object(Bucket=bucket, Key="runs/a b/packs/1%2f")
        client.list_objects_v2(Bucket=bucket, Prefix="runs/log/")
        client.delete_object(Bucket=bucket, Key="runs/log/new/x")
        client.delete_objects(
            Bucket=bucket, Delete={"Objects": [{"Key": "x"}, {"Key": "runs/a b/packs/1%2f"}]}
        )
    assert counted.by_kind == {
        ("PUT", "packs"): 1,
        ("GET", "packs"): 1,
        ("HEAD", "packs"): 1,
        ("LIST", "log"): 1,
        ("DELETE", "log/new"): 1,
        ("DELETE", "other"): 1,
    }
    assert counted.of("PUT")[0].bytes_up == len(DATA)
    assert counted.of("GET")[0].bytes_down == len(DATA)
    assert counted.of("DELETE", "other")[0].key == "x\nruns/a b/packs/1%2f"
    assert keys_of(direct, bucket) == []


def test_several_parts_are_counted_as_such(client, proxy, bucket):
    with proxy.counting() as counted:
        started = client.create_multipart_upload(Bucket=bucket, Key="packs/1")
        names = {"Bucket": bucket, "Key": "packs/1", "UploadId": started["UploadId"]}
        part = client.upload_part(**names, PartNumber=1, Body=DATA)
        parts = [{"ETag": part["ETag"], "PartNumber": 1}]
        client.complete_multipart_upload(**names, MultipartUpload={"Parts": parts})
    assert counted.by_kind == Counter({(name, "packs"): 1 for name in ("START", "PART", "COMPLETE")})
    assert read(client, bucket, "packs/1") == DATA


def test_signatures_that_are_wrong_stay_wrong(make_client, proxy, upstream, bucket, direct):
    if not upstream.checks_signatures:
        pytest.skip("moto takes any signature")
    with pytest.raises(ClientError) as caught:
        keys_of(make_client(proxy.url, secret="another"), bucket)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (faults.server_error, 500, "InternalError"),
        (faults.slow_down, 503, "SlowDown"),
        (faults.forbidden, 403, "AccessDenied"),
        (faults.expired_token, 400, "ExpiredToken"),
        (faults.missing, 404, "NoSuchKey"),
    ],
)
def test_what_is_refused_is_not_done(client, direct, proxy, bucket, fault, status, code):
    proxy.add(fault, "PUT", times=1)
    with pytest.raises(ClientError) as caught:
        client.put_object(Bucket=bucket, Key="a", Body=DATA)
    assert caught.value.response["Error"]["Code"] == code
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert keys_of(direct, bucket) == []
    client.put_object(Bucket=bucket, Key="a", Body=DATA)
    assert keys_of(direct, bucket) == ["a"]


@pytest.mark.parametrize(("fault", "is_done"), [("reset_before", False), ("reset_after", True)])
def test_broken_connections_leave_it_done_or_not(client, direct, proxy, bucket, fault, is_done):
    proxy.add(getattr(faults, fault), "PUT")
    with pytest.raises(BotoCoreError):
        client.put_object(Bucket=bucket, Key="a", Body=DATA)
    assert keys_of(direct, bucket) == ["a"] * is_done


def test_a_body_that_is_cut_ends_early(client, proxy, bucket):
    client.put_object(Bucket=bucket, Key="a", Body=DATA)
    proxy.add(faults.truncate, "GET")
    with pytest.raises(BotoCoreError):
        read(client, bucket, "a")
    assert proxy.counted.of("GET")[0].bytes_down == len(DATA) // 2


def test_one_bit_flips_on_the_way_in_either_direction(client, direct, proxy, upstream, bucket):
    client.put_object(Bucket=bucket, Key="a", Body=DATA)
    rule = proxy.add(faults.flip, "GET")
    assert differing_bits(read(client, bucket, "a"), DATA) == 1
    assert rule.hits == 1
    if not upstream.checks_signatures:  # which sees that from the signature
        proxy.add(faults.flip_sent, "PUT")
        client.put_object(Bucket=bucket, Key="b", Body=DATA)
        assert differing_bits(read(direct, bucket, "b"), DATA) == 1


def differing_bits(one, other):
    assert len(one) == len(other)
    return sum(bin(a ^ b).count("1") for a, b in zip(one, other, strict=True))


def test_a_duplicate_meets_what_the_first_has_done(client, direct, proxy, upstream, bucket):
    proxy.add(faults.duplicate, "PUT")
    if upstream.checks_signatures:
        client.put_object(Bucket=bucket, Key="a", Body=DATA)
    else:
        with pytest.raises(ClientError) as caught:
            client.put_object(Bucket=bucket, Key="a", Body=DATA, IfNoneMatch="*")
        assert caught.value.response["Error"]["Code"] == "PreconditionFailed"
    assert read(direct, bucket, "a") == DATA


def test_a_liar_says_that_it_is_done(client, direct, proxy, bucket):
    rule = proxy.add(faults.lie, "PUT DELETE", r"^packs/")
    direct.put_object(Bucket=bucket, Key="packs/there", Body=DATA)
    client.put_object(Bucket=bucket, Key="packs/1", Body=DATA)
    client.put_object(Bucket=bucket, Key="log/1", Body=DATA)
    client.delete_object(Bucket=bucket, Key="packs/there")
    assert keys_of(direct, bucket) == ["log/1", "packs/there"]
    assert (rule.hits, rule.seen) == (2, 2)


def test_what_hangs_goes_on_when_all_is_well_again(client, make_client, direct, proxy, bucket):
    rule = proxy.add(faults.hang, "PUT")
    with pytest.raises(BotoCoreError):
        make_client(proxy.url, read_timeout=0.2).put_object(Bucket=bucket, Key="a", Body=DATA)
    thread = threading.Thread(target=client.put_object, kwargs={"Bucket": bucket, "Key": "b", "Body": DATA})
    thread.start()
    while rule.hits < 2:
        pass
    assert keys_of(direct, bucket) == []
    proxy.clear()
    thread.join()
    assert keys_of(direct, bucket) == ["b"]


def test_a_late_request_is_done_after_those_that_came_later(client, direct, proxy, bucket):
    moment = threading.Event()
    proxy.add(faults.late(moment), "PUT", times=1)
    with pytest.raises(BotoCoreError):
        client.put_object(Bucket=bucket, Key="a", Body=DATA)
    client.put_object(Bucket=bucket, Key="a", Body=DATA)
    client.delete_object(Bucket=bucket, Key="a")
    assert keys_of(client, bucket) == []
    moment.set()
    while keys_of(direct, bucket) != ["a"]:
        pass


def test_requests_can_be_held_and_slowed(client, direct, proxy, bucket):
    moment = threading.Event()
    rule = proxy.add(faults.hold(moment), "PUT", "held")
    proxy.add(faults.slow(10 * len(DATA)))
    thread = threading.Thread(
        target=client.put_object, kwargs={"Bucket": bucket, "Key": "held", "Body": DATA}
    )
    thread.start()
    while not rule.hits:
        pass
    client.put_object(Bucket=bucket, Key="a", Body=DATA)
    assert keys_of(client, bucket) == ["a"]
    moment.set()
    thread.join()
    assert read(client, bucket, "held") == DATA


def test_new_keys_are_missing_from_so_many_listings(client, direct, proxy, bucket):
    client.put_object(Bucket=bucket, Key="old", Body=DATA)
    proxy.lag_listings(2)
    client.put_object(Bucket=bucket, Key="new", Body=DATA)
    assert read(client, bucket, "new") == DATA
    shown = [client.list_objects_v2(Bucket=bucket) for _ in range(3)]
    keys = [[entry["Key"] for entry in one["Contents"]] for one in shown]
    assert keys == [
        ["old"],
        ["old"],
        ["new", "old"],
    ]
    assert [one["KeyCount"] for one in shown] == [1, 1, 2]


def test_nobody_listens_while_it_is_away(client, proxy, bucket):
    client.put_object(Bucket=bucket, Key="a", Body=DATA)
    for _ in range(2):
        proxy.go_away()
        with pytest.raises(EndpointConnectionError):
            read(client, bucket, "a")
        proxy.come_back()
        assert read(client, bucket, "a") == DATA


def test_faults_strike_the_nth_and_by_chance_and_are_the_same_again(client, proxy, bucket):
    proxy.add(faults.server_error, "GET HEAD", nth=3)
    assert [is_well(client, bucket) for _ in range(5)] == [True, True, False, True, True]
    drawn = []
    for seed in (5, 5, 6):
        proxy.clear()
        proxy.add(faults.server_error, probability=0.5, seed=seed)
        drawn.append([is_well(client, bucket) for _ in range(20)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert {True, False} == set(drawn[0])


def is_well(client, bucket):
    try:
        client.head_object(Bucket=bucket, Key="no-such-key")
    except ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"] == 404
    raise AssertionError("there is such a key")
