"""`doctor --store` from the command line through the daemon to real servers, and on disk."""

import json
from contextlib import contextmanager

import pytest
from servers import gs_servers, s3_servers
from servers.fault_proxy import FaultProxy

from replicated.store import open_store


@contextmanager
def moto():
    with s3_servers.moto() as server:
        yield server, {**s3_servers.ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}


@contextmanager
def rclone(directory):
    with s3_servers.rclone(directory) as server:
        yield server, {**s3_servers.ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}


@contextmanager
def emulator():
    with gs_servers.emulator() as server:
        yield server, gs_servers.environment(server.url)


def set_environment(project, monkeypatch, variables):
    """For the command, and for the daemon that it starts."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    project.replicate("daemon", "stop")


def checks(result):
    report = json.loads(result.stdout)
    assert set(report) == {"ok", "checks"}
    for check in report["checks"]:
        assert set(check) == {"name", "outcome", "value", "detail", "hint"}
    return {check["name"]: check for check in report["checks"]}


@pytest.mark.parametrize(
    ("name", "scheme", "condition"),
    [("moto", "s3", "honoured"), ("rclone", "s3", "ignored"), ("emulator", "gs", "ignored")],
)
def test_bucket_is_tried_out_and_left_as_it_was(own_project, monkeypatch, tmp_path, name, scheme, condition):
    server = {"moto": moto, "rclone": lambda: rclone(tmp_path), "emulator": emulator}[name]()
    url = f"{scheme}://bucket-of-doctor/models"
    with server as (_, variables):
        set_environment(own_project, monkeypatch, variables)
        missing = own_project.run("doctor", "--store", url)
        assert missing.returncode == 0
        assert "warn  Reachable: " in missing.stdout and "there is no bucket" in missing.stdout
        store = open_store(url, create=True, environment=variables)
        store.put("repository.json", [b"{}"])
        result = own_project.run("doctor", "--store", url, "--json")
        found = checks(result)
        assert (result.returncode, json.loads(result.stdout)["ok"]) == (0, True)
        assert found["Conditional write"]["value"] == condition
        assert found["Listing"]["value"] == "at once"
        assert found["Batch delete"]["value"] == "works"
        assert found["Clock"]["outcome"] == "ok"
        assert [info.key for info in store.list("")] == ["repository.json"]
        text = own_project.run("doctor", "--store", url).stdout
        assert "ok    Ranged read: parts of an object are read right\n" in text


def test_listing_that_lags_is_told_with_what_follows(own_project, monkeypatch):
    with moto() as (server, variables), FaultProxy(server.url) as proxy:
        set_environment(own_project, monkeypatch, {**variables, "AWS_ENDPOINT_URL": proxy.url})
        open_store("s3://bucket-that-lags", create=True, environment=variables).put("a", [b""])
        proxy.lag_listings(2)
        result = own_project.run("doctor", "--store", "s3://bucket-that-lags")
        assert result.returncode == 0
        assert "warn  Listing: " in result.stdout and "gc must stay off here" in result.stdout
        assert "1 warning" in result.stderr or "2 warnings" in result.stderr


def test_server_that_is_away_fails_on_one_line(own_project, monkeypatch):
    with FaultProxy("http://127.0.0.1:1") as proxy:
        proxy.go_away()
        set_environment(own_project, monkeypatch, gs_servers.environment(proxy.url))
        result = own_project.run("doctor", "--store", "gs://bucket-that-is-away")
    assert result.returncode == 1
    assert "fail  Reachable: cannot list gs://bucket-that-is-away/" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_directory_is_tried_out_too(own_project, tmp_path):
    result = own_project.run("doctor", "--store", f"file://{tmp_path}", "--json")
    assert result.returncode == 0
    assert checks(result)["Large object"]["outcome"] == "ok"
    assert list(tmp_path.iterdir()) == []
    missing = own_project.run("doctor", "--store", f"file://{tmp_path}/missing", "--json")
    assert checks(missing)["Reachable"]["value"] == "missing"
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_url_is_refused(own_project):
    result = own_project.run("doctor", "--store", "models")
    assert result.returncode == 1
    assert "not a repository URL" in result.stderr
    result = own_project.run("doctor", "--store", "s3://No_Bucket")
    assert result.returncode == 1
    assert "fail  Reachable: not the name of a bucket" in result.stdout
