"""Who we are to Google, from the variables of somebody else; everything on loopback."""

import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.oauth2.credentials import Credentials
from servers import gs_servers
from servers.fault_proxy import FaultProxy

from replicate.errors import RepositoryUnreachable
from replicated.store.base import StoreBusy
from replicated.store.buckets import parse_bucket_url
from replicated.store.gs.access import Access, find_access
from replicated.store.gs.store import GsStore


class Google(ThreadingHTTPServer):
    """What gives tokens, and what machines of Google's are asked who they are."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: tuple[int, dict[str, object]] = (200, {"access_token": "t0ken", "expires_in": 3600})
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Google

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        self.send_response(200)
        self.send_header("Metadata-Flavor", "Google")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(f"POST {self.path}")
        status, answer = self.server.answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def google() -> Iterator[Google]:
    with Google() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def private_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


@pytest.fixture
def key_file(tmp_path: Path, private_key: str, google: Google) -> Path:
    """As it is downloaded for a service account."""
    path = tmp_path / "key.json"
    described = {
        "type": "service_account",
        "project_id": "project-of-the-key",
        "private_key_id": "1",
        "private_key": private_key,
        "client_email": "trainer@project-of-the-key.example",
        "client_id": "1",
        "token_uri": f"http://{google.host}/token",
    }
    path.write_text(json.dumps(described))
    return path


def test_emulator_needs_nobody_to_be_anybody() -> None:
    access = find_access({"STORAGE_EMULATOR_HOST": "localhost:1234"})
    assert (access.endpoint, access.is_emulator, access.project) == ("http://localhost:1234", True, None)
    assert find_access(gs_servers.environment("https://host/")).endpoint == "https://host"


def test_variables_of_the_caller_count_and_not_ours(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "ours")
    before = dict(os.environ)
    access = find_access({"GOOGLE_APPLICATION_CREDENTIALS": str(key_file)})
    assert access.credentials.service_account_email == "trainer@project-of-the-key.example"
    assert (access.endpoint, access.is_emulator) == ("https://storage.googleapis.com", False)
    assert access.project == "project-of-the-key"
    assert dict(os.environ) == before
    named = {"GOOGLE_APPLICATION_CREDENTIALS": str(key_file), "GOOGLE_CLOUD_PROJECT": "theirs"}
    assert find_access(named).project == "theirs"
    assert find_access(None).endpoint == "http://127.0.0.1:1"


@pytest.mark.parametrize("variable", ["HOME", "CLOUDSDK_CONFIG"])
def test_login_with_gcloud_is_found(key_file: Path, tmp_path: Path, variable: str) -> None:
    directory = tmp_path / ".config" / "gcloud" if variable == "HOME" else tmp_path
    directory.mkdir(parents=True, exist_ok=True)
    key_file.rename(directory / "application_default_credentials.json")
    access = find_access({variable: str(tmp_path)})
    assert access.credentials.service_account_email == "trainer@project-of-the-key.example"


def test_machine_of_google_is_asked_who_it_is(google: Google, tmp_path: Path) -> None:
    from google.auth import compute_engine

    access = find_access({"GCE_METADATA_HOST": google.host, "HOME": str(tmp_path)})
    assert isinstance(access.credentials, compute_engine.Credentials)
    assert google.asked == ["GET /"]


def test_nobody_is_told_how_to_become_somebody(tmp_path: Path) -> None:
    with pytest.raises(RepositoryUnreachable, match="no credentials for Google Cloud") as caught:
        find_access({"HOME": str(tmp_path), "NO_GCE_CHECK": "true"})
    assert "gcloud auth application-default login" in caught.value.hint


@pytest.mark.parametrize("content", [None, "", "{}", '{"type": "service_account"}', "\0"])
def test_file_that_holds_no_credentials_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "credentials.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RepositoryUnreachable, match="no credentials for Google Cloud") as caught:
        find_access({"GOOGLE_APPLICATION_CREDENTIALS": str(path)})
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.fixture
def credentials(google: Google) -> Credentials:
    """Of a user, whose token has run out."""
    token_url = f"http://{google.host}/token"
    return Credentials(None, refresh_token="r", client_id="c", client_secret="s", token_uri=token_url)


def store_with(credentials: Credentials, endpoint: str) -> GsStore:
    place = parse_bucket_url("gs://bucket-with-credentials/a")
    return GsStore(Access(credentials, endpoint, False, "project"), place, create=True)


def test_requests_bear_a_token_that_is_fetched_once(credentials: Credentials, google: Google) -> None:
    with gs_servers.service() as server, FaultProxy(server.url) as proxy:
        store = store_with(credentials, proxy.url)
        store.put("a", [b"x"])
        assert store.get("a") == b"x"
        headers = [dict(exchange.headers) for exchange in proxy.counted.exchanges]
        store.close()
    assert {entry.get("Authorization", entry.get("authorization")) for entry in headers} == {"Bearer t0ken"}
    assert google.asked == ["POST /token"]


def test_token_that_is_refused_is_renewed_by_itself(credentials: Credentials, google: Google) -> None:
    credentials.token = "revoked"
    with gs_servers.service() as server, FaultProxy(server.url) as proxy:
        rule = proxy.add(lambda exchange: exchange.refuse(401, "Unauthorized", "who?"), times=1)
        store = store_with(credentials, proxy.url)
        store.put("a", [b"x"])
        assert rule.hits == 1
        store.close()
    assert google.asked == ["POST /token"]


def test_credentials_that_google_refuses_are_told_apart_from_a_google_that_is_away(
    credentials: Credentials, google: Google
) -> None:
    google.answer = (400, {"error": "invalid_grant", "error_description": "Token has been revoked."})
    with pytest.raises(RepositoryUnreachable, match=r"does not take the credentials: .*revoked") as caught:
        store_with(credentials, "http://127.0.0.1:1").get("a")
    assert not isinstance(caught.value, StoreBusy)
    google.answer = (200, {"access_token": "t0ken", "expires_in": 3600})
    with pytest.raises(StoreBusy, match="no connection"):
        store_with(credentials, "http://127.0.0.1:1").get("a")
