"""What is said of servers that refuse or cannot be reached: a line for each, and never a secret."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from servers import faults, s3_servers

from replicate.errors import ConfigError, RepositoryUnreachable
from replicated.store.base import StoreBusy
from replicated.store.s3 import client as client_module


def refusing(status, code, message):
    return lambda exchange: exchange.refuse(status, code, message)


def only_in(region):
    """A server of one region, which says so; told by the signature, as by those of Amazon."""

    def fault(exchange):
        scope = dict(exchange.headers)["Authorization"]
        signed = re.search(r"Credential=[^/]+/\d+/([^/]+)/s3", scope)[1]
        if signed == region:
            faults.passing(exchange)
        else:
            exchange.refuse(
                400,
                "AuthorizationHeaderMalformed",
                f"The authorization header is malformed: '{signed}' is wrong; expecting '{region}'",
            )

    return fault


def redirecting_to(region):
    """A server that sends those who sign for another region elsewhere, without saying where."""

    def fault(exchange):
        if f"/{region}/s3" in dict(exchange.headers)["Authorization"]:
            faults.passing(exchange)
        elif exchange.method == "HEAD":
            exchange.answer(200, [("x-amz-bucket-region", region), ("Content-Length", "0")], b"")
        else:
            exchange.refuse(301, "PermanentRedirect", "The bucket must be addressed in another way")

    return fault


def test_a_server_that_is_down_is_busy_and_named(make_s3):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(StoreBusy) as caught:
            make_s3(url, "s3://lab/x").get("repository.json")
    assert caught.value.message.startswith(f"cannot read repository.json in s3://lab/x at {url}: ")
    assert "Connection refused" in caught.value.message
    assert "AWS_ENDPOINT_URL" in caught.value.hint


@pytest.mark.parametrize(
    ("status", "code", "message", "said", "hint"),
    [
        (403, "AccessDenied", "Access Denied.", "AccessDenied: Access Denied", "s3:ListBucket"),
        (403, "InvalidAccessKeyId", "The key does not exist", "InvalidAccessKeyId", "AWS_PROFILE"),
        (403, "SignatureDoesNotMatch", "It does not match", "SignatureDoesNotMatch", "AWS_PROFILE"),
        (400, "ExpiredToken", "The token has expired", "ExpiredToken", "aws sso login"),
        (403, "RequestTimeTooSkewed", "The difference is too large.", "It is .* GMT there", "clock"),
        (301, "PermanentRedirect", "Use another endpoint", "PermanentRedirect", "AWS_REGION"),
        (405, "MethodNotAllowed", "Not allowed", "MethodNotAllowed", "doctor --store"),
    ],
)
def test_each_refusal_has_a_line_of_its_own(make_s3, moto_proxy, status, code, message, said, hint):
    store = make_s3(moto_proxy.url)
    store.put("a", [b"x"])

    def refuse(exchange):
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        exchange.answer(status, [("Date", "Mon, 23 Nov 2026 10:00:00 GMT")], body)

    moto_proxy.add(refuse)
    for call, action in (
        (lambda: store.get("a"), "read a"),
        (lambda: store.put("b", [b"x"]), "(read|write) b"),
        (lambda: list(store.list("log/")), r"list log/\*"),
        (lambda: store.exists("a"), "(look at|read) a"),
        (lambda: store.delete("a"), "delete a"),
    ):
        with pytest.raises(RepositoryUnreachable) as caught:
            call()
        assert re.fullmatch(rf"cannot {action} in {store.url} at {moto_proxy.url}: .*", caught.value.message)
        assert re.search(said, caught.value.message)
        assert hint in caught.value.hint
        assert "\n" not in str(caught.value)
        assert s3_servers.SECRET_KEY not in str(caught.value)
        assert not isinstance(caught.value, StoreBusy)


def test_a_403_that_passes_is_not_seen(make_s3, moto_proxy):
    store = make_s3(moto_proxy.url)
    store.put("a", [b"x"])
    for fault in (faults.forbidden, faults.expired_token):
        rule = moto_proxy.add(fault, "GET HEAD", times=1)
        assert store.get("a") == b"x"
        assert rule.hits == 1


def test_no_credentials_are_told(make_s3, moto_proxy, tmp_path, monkeypatch):
    store = make_s3(
        moto_proxy.url,
        AWS_ACCESS_KEY_ID="",
        AWS_SECRET_ACCESS_KEY="",
        AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "none"),
        AWS_CONFIG_FILE=str(tmp_path / "none"),
    )
    with pytest.raises(RepositoryUnreachable, match=r"Unable to locate credentials.*AWS_ACCESS_KEY_ID"):
        store.get("a")


def test_a_profile_that_is_not_there_is_told(make_s3, moto_proxy, tmp_path):
    store = make_s3(moto_proxy.url, AWS_PROFILE="nobody", AWS_CONFIG_FILE=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"nobody.*~/\.aws/config"):
        store.get("a")


@pytest.mark.parametrize("endpoint", ["no url", "http://", "ftp//x", "http://bad host:1"])
def test_an_endpoint_that_is_none_is_told(make_s3, endpoint):
    with pytest.raises((ConfigError, RepositoryUnreachable), match="s3://lab"):
        make_s3(endpoint, "s3://lab/x").get("a")


def test_a_password_in_the_endpoint_is_not_shown(make_s3):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(StoreBusy) as caught:
            make_s3(f"http://me:hunter2@127.0.0.1:{port}", "s3://lab/x").get("a")
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in str(caught.value.fields)


def test_nonsense_for_an_answer_is_trouble_that_passes(make_s3, moto_proxy):
    store = make_s3(moto_proxy.url)
    store.put("a", [b"x"])
    moto_proxy.add(lambda exchange: exchange.answer(200, [], b"<html>Welcome to the hotel"), "LIST")
    with pytest.raises(StoreBusy, match="cannot list"):
        list(store.list(""))
    moto_proxy.add(lambda exchange: exchange.answer(502, [], b"<html>Bad gateway"), "GET")
    with pytest.raises(StoreBusy, match="502"):
        store.get("a")


@pytest.mark.parametrize("tells", [only_in, redirecting_to])
def test_the_region_of_the_bucket_is_found(make_s3, moto_proxy, tells):
    there = make_s3(moto_proxy.url, AWS_DEFAULT_REGION="eu-west-3")
    there.put("a", [b"x"])
    rule = moto_proxy.add(tells("eu-west-3"))
    store = make_s3(moto_proxy.url, there.url)
    store.put("b", [b"x"])
    assert store.get("a") == b"x"
    assert rule.hits
    with moto_proxy.counting() as counted:
        store.get("a")
        store.get("a")
    assert counted.total == 2, "it is remembered"


def test_the_region_that_is_configured_is_used(make_s3, moto_proxy):
    moto_proxy.add(only_in("eu-west-3"))
    with moto_proxy.counting() as counted:
        store = make_s3(moto_proxy.url, AWS_DEFAULT_REGION="eu-west-3")
        store.put("a", [b"x"], is_unique=True, is_checked=False)
    assert {exchange.status for exchange in counted.exchanges} <= {200, 404}


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """A certificate that its own authority has signed, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", "2", "-keyout", str(key), "-out", str(certificate)),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


def test_over_tls_everything_is_the_same(make_s3, tls, tmp_path: Path):
    certificate, _ = tls
    big = bytes(range(256)) * (5 << 12)
    with s3_servers.rclone(tmp_path, tls) as server:
        assert server.url.startswith("https://")
        store = make_s3(server.url, AWS_CA_BUNDLE=str(certificate))
        store.put("packs/1", [big], is_unique=True)
        store.put("a", [b"x"])
        assert store.get("packs/1") == big
        assert store.get("packs/1", 3, 1000) == big[3:1003]
        assert [info.key for info in store.list("")] == ["a", "packs/1"]
        store.delete("a", "packs/1", "b")
        assert list(store.list("")) == []
        with pytest.raises(
            RepositoryUnreachable, match=r"CERTIFICATE_VERIFY_FAILED.*AWS_CA_BUNDLE"
        ) as caught:
            make_s3(server.url).get("a")
        assert not isinstance(caught.value, StoreBusy)
        with pytest.raises((ConfigError, RepositoryUnreachable), match=r"AWS_CA_BUNDLE"):
            make_s3(server.url, AWS_CA_BUNDLE=str(tmp_path / "missing.pem")).get("a")


def test_boto3_is_imported_only_for_buckets():
    source = Path(client_module.__file__).read_text()
    assert not re.search(r"^(import|from) boto", source, re.MULTILINE)
    script = (
        "import sys\nfrom replicated.store import open_store\nopen_store('file:///tmp', create=False)\n"
        "assert not {'boto3', 'botocore', 'replicated.store.s3.store'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
