"""Credentials: those of the caller, from wherever boto3 finds them, renewed where they lie."""

import datetime
import os
import re
import sys
import threading

import pytest
from servers import s3_servers

from replicate.errors import RepositoryUnreachable
from replicated.store.base import StoreBusy
from replicated.store.s3 import client as client_module
from replicated.store.s3.client import RENEWAL_PAUSE_S, Clients
from replicated.store.s3.environment import environment_of
from replicated.store.s3.errors import Kind, read_trouble

ACCESS, SECRET = s3_servers.ACCESS_KEY, s3_servers.SECRET_KEY


def key_of(exchange):
    return re.search(r"Credential=([^/]+)/", dict(exchange.headers)["Authorization"])[1]


@pytest.fixture
def files(tmp_path):
    """Variables that let boto3 read our files and no other source."""
    (tmp_path / "config").write_text("")
    return {
        "AWS_ACCESS_KEY_ID": None,
        "AWS_SECRET_ACCESS_KEY": None,
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
    }


def write_credentials(files, access, secret, profile="default"):
    with open(files["AWS_SHARED_CREDENTIALS_FILE"], "w") as file:
        file.write(f"[{profile}]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n")


def move_clock(store, seconds):
    clients = store._requests._clients
    before = clients._clock
    clients._clock = lambda: before() + seconds


# Whose environment


def test_variables_are_those_of_the_caller_and_only_inside(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "daemon")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "daemon")
    monkeypatch.setenv("HTTPS_PROXY", "http://daemon")
    before = dict(os.environ)
    with environment_of({"AWS_PROFILE": "caller", "HTTPS_PROXY": "http://caller", "AWS_REGION": "x"}):
        assert os.environ["AWS_PROFILE"] == "caller"
        assert os.environ["HTTPS_PROXY"] == "http://caller"
        assert "AWS_SESSION_TOKEN" not in os.environ, "half of the one and half of the other are none"
        with environment_of({"AWS_PROFILE": "inner"}):
            assert os.environ["AWS_PROFILE"] == "inner"
        assert os.environ["AWS_PROFILE"] == "caller"
        with environment_of(None):
            assert os.environ["AWS_PROFILE"] == "caller"
    assert dict(os.environ) == before
    with pytest.raises(KeyError), environment_of({"AWS_PROFILE": "caller"}):
        raise KeyError
    assert dict(os.environ) == before


def test_two_callers_never_see_the_variables_of_each_other():
    seen = []

    def look(name):
        for _ in range(200):
            with environment_of({"AWS_PROFILE": name}):
                seen.append(os.environ["AWS_PROFILE"] == name)

    threads = [threading.Thread(target=look, args=(f"caller-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 800
    assert all(seen)


def test_stores_of_two_callers_use_the_credentials_of_each(make_s3, moto_proxy):
    one = make_s3(moto_proxy.url, AWS_ACCESS_KEY_ID="AKIAONE0000000000000")
    two = make_s3(moto_proxy.url, one.url, AWS_ACCESS_KEY_ID="AKIATWO0000000000000")
    for store, expected in ((one, "AKIAONE0000000000000"), (two, "AKIATWO0000000000000")):
        with moto_proxy.counting() as counted:
            store.put("a", [b"x"])
        assert {key_of(exchange) for exchange in counted.exchanges} == {expected}


def test_without_variables_of_a_caller_those_of_this_process_count(moto_proxy, monkeypatch):
    for name, value in {**s3_servers.ENVIRONMENT, "AWS_ENDPOINT_URL": moto_proxy.url}.items():
        monkeypatch.setenv(name, value)
    clients = Clients(None, 4)
    with moto_proxy.counting() as counted:
        clients.get().list_buckets()
    clients.close()
    assert [key_of(exchange) for exchange in counted.exchanges] == [ACCESS]


# Sources


def test_a_profile_gives_credentials_region_and_endpoint(make_s3, moto_proxy, files):
    write_credentials(files, "AKIAPROFILE000000000", "x", "lab")
    with open(files["AWS_CONFIG_FILE"], "w") as file:
        file.write(f"[profile lab]\nregion = eu-west-3\nendpoint_url = {moto_proxy.url}\n")
    store = make_s3(None, **files, AWS_PROFILE="lab", AWS_DEFAULT_REGION=None)
    with moto_proxy.counting() as counted:
        store.put("a", [b"x"])
    scopes = [dict(exchange.headers)["Authorization"] for exchange in counted.exchanges]
    assert scopes
    assert all("AKIAPROFILE000000000/" in scope and "/eu-west-3/s3" in scope for scope in scopes)


def test_the_endpoint_of_s3_alone_comes_first(make_s3, moto_proxy):
    store = make_s3("http://127.0.0.1:1", AWS_ENDPOINT_URL_S3=moto_proxy.url)
    store.put("a", [b"x"])
    assert store.get("a") == b"x"


def test_credentials_that_a_program_hands_out_are_renewed_in_the_environment_of_the_caller(
    make_s3, moto_proxy, files, tmp_path, monkeypatch
):
    # It counts its calls, and hands out what runs out at once: each request needs new ones.
    monkeypatch.setenv("AWS_CALLER_OF_THE_TEST", "the daemon")
    program, calls = tmp_path / "program.py", tmp_path / "calls"
    soon = (datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=5)).isoformat()
    answer = {"Version": 1, "SecretAccessKey": "x", "SessionToken": "t", "Expiration": soon}
    program.write_text(
        "import json, os\n"
        f"with open({str(calls)!r}, 'a') as file: file.write(os.environ['AWS_CALLER_OF_THE_TEST'] + '\\n')\n"
        f"count = len(open({str(calls)!r}).readlines())\n"
        f"print(json.dumps({{**{answer!r}, 'AccessKeyId': f'AKIACALL{{count}}'}}))\n"
    )
    with open(files["AWS_CONFIG_FILE"], "w") as file:
        file.write(f"[default]\ncredential_process = {sys.executable} {program}\n")
    store = make_s3(moto_proxy.url, **files, AWS_CALLER_OF_THE_TEST="the caller")
    with moto_proxy.counting() as counted:
        store.put("a", [b"x"])
        store.put("b", [b"x"])
    keys = [key_of(exchange) for exchange in counted.exchanges]
    assert len(set(keys)) == len(keys) > 2
    assert set(calls.read_text().splitlines()) == {"the caller"}


# Renewal


def test_credentials_that_were_renewed_in_their_file_are_found(make_s3, rclone_server, files):
    write_credentials(files, ACCESS, "out of date")
    store = make_s3(rclone_server.url, **files)
    with pytest.raises(RepositoryUnreachable, match=r"SignatureDoesNotMatch.*aws sso login") as caught:
        store.put("a", [b"x"])
    assert not isinstance(caught.value, StoreBusy)
    assert "out of date" not in str(caught.value)
    write_credentials(files, ACCESS, SECRET)
    move_clock(store, RENEWAL_PAUSE_S + 1)
    store.put("a", [b"x"])
    assert store.get("a") == b"x"


def test_a_session_is_made_anew_once_in_a_while_and_once_for_all_who_failed():
    now = [0.0]
    clients = Clients(
        {**s3_servers.ENVIRONMENT, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, 4, clock=lambda: now[0]
    )
    first = clients.get()
    assert clients.get() is first
    clients.renew(clients.generation)
    second, generation = clients.get(), clients.generation
    assert second is not first
    clients.renew(generation - 1)
    assert clients.get() is second, "somebody else has renewed it meanwhile"
    clients.renew(generation)
    assert clients.get() is second, "a moment ago"
    now[0] += RENEWAL_PAUSE_S
    clients.renew(generation)
    assert clients.get() is not second


def test_who_waits_for_credentials_of_a_server_holds_up_nobody_who_has_some(make_s3, moto_proxy):
    store = make_s3(moto_proxy.url)
    store.put("a", [b"x"])
    is_held, may_go = threading.Event(), threading.Event()

    def hold():
        with environment_of({"AWS_PROFILE": "slow"}):
            is_held.set()
            may_go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    try:
        assert store.get("a") == b"x"
    finally:
        may_go.set()
        thread.join()


@pytest.mark.parametrize("name", ["NoCredentialsError", "CredentialRetrievalError", "SSOTokenLoadError"])
def test_what_goes_wrong_on_the_way_to_credentials_is_told_as_that(name):
    import botocore.exceptions

    cls = getattr(botocore.exceptions, name)
    error = cls(provider="p", error_msg="e", profile_name="n") if name != "NoCredentialsError" else cls()
    assert read_trouble(error).kind is Kind.CREDENTIALS
    assert client_module.CONNECT_TIMEOUT_S < client_module.READ_TIMEOUT_S
