"""What tells how a bucket is reached: which variables are sent, with what, and what files may say."""

from types import SimpleNamespace

import pytest

from replicate import access
from replicate.config import find_project
from replicate.errors import ConfigError

URL = "s3://lab/models"
ENVIRONMENT = {
    "AWS_PROFILE": "lab",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "GOOGLE_APPLICATION_CREDENTIALS": "/keys/one.json",
    "https_proxy": "http://proxy:3128",
    "HOME": "/home/me",
    "WANDB_API_KEY": "not ours",
    "PATH": "/bin",
    "AWS_REGION": "",
}


@pytest.fixture(autouse=True)
def _nothing_noted(monkeypatch):
    monkeypatch.setattr(access, "_settings", {})


def write(directory, text):
    (directory / "replicate.yaml").write_text(text)


def test_only_the_variables_of_the_kind_of_bucket_are_sent():
    common = {"https_proxy": "http://proxy:3128", "HOME": "/home/me"}
    assert access.collect(URL, ENVIRONMENT) == {
        **common,
        "AWS_PROFILE": "lab",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    assert access.collect("gs://lab", ENVIRONMENT) == {
        **common,
        "GOOGLE_APPLICATION_CREDENTIALS": "/keys/one.json",
    }
    assert access.collect("file:///somewhere", ENVIRONMENT) == {}


def test_paths_are_sent_as_the_caller_means_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = access.collect(URL, {"AWS_SHARED_CREDENTIALS_FILE": "here/credentials"})
    assert found == {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "here" / "credentials")}


def test_what_is_sent_arrives_and_nothing_else_is_taken():
    variables = {"AWS_PROFILE": "caf\u00e9", "AWS_SESSION_TOKEN": "\udcff" + "x" * 4000}
    assert access.decode(access.encode(URL, variables)) == (URL, variables)
    assert access.decode(access.encode(URL, {**variables, "LD_PRELOAD": "/evil.so"})) == (URL, variables)
    assert access.decode(access.encode("file:///x", variables)) == ("file:///x", {})
    for broken in (b"", b"\xff", b"{}", b"[1, 2]", b'["s3://x", 3]', b"[" * 100_000):
        with pytest.raises(ValueError, match="cannot be read") as caught:
            access.decode(broken)
        assert broken == b"" or broken.decode(errors="replace") not in str(caught.value)
    with pytest.raises(ValueError, match="bytes") as caught:
        access.encode(URL, {"AWS_SESSION_TOKEN": "secret" * 20_000})
    assert "secret" not in str(caught.value)


def test_the_repository_of_a_request_is_found_wherever_it_is():
    named = SimpleNamespace(repository=URL)
    for request in (named, SimpleNamespace(target=named), SimpleNamespace(left=named, right=named)):
        assert access.repository_of(request) == URL
    assert access.repository_of(SimpleNamespace(timeout_s=1)) == ""


def test_settings_count_where_the_environment_says_nothing(tmp_path):
    write(
        tmp_path,
        f"repository: {URL}\ns3:\n  endpoint: http://minio:9000\n  region: eu-central-1\n  profile: lab\n",
    )
    assert find_project(tmp_path).repository == URL
    assert access.collect(URL, {}) == {
        "AWS_ENDPOINT_URL": "http://minio:9000",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_PROFILE": "lab",
    }
    mine = {"AWS_ENDPOINT_URL_S3": "http://mine", "AWS_REGION": "us-east-1", "AWS_PROFILE": "me"}
    assert access.collect(URL, mine) == mine
    write(tmp_path, f"repository: {URL}\n")
    find_project(tmp_path)
    assert access.collect(URL, {}) == {}


def test_settings_of_the_other_kind_do_not_count(tmp_path):
    write(tmp_path, "repository: gs://lab\ns3: {profile: lab}\ngs: {project: 12345}\n")
    find_project(tmp_path)
    assert access.collect("gs://lab", {}) == {"GOOGLE_CLOUD_PROJECT": "12345"}


@pytest.mark.parametrize(
    "text",
    [
        "s3: {secret_access_key: hunter2}",
        "s3: {access_key: hunter2}",
        "s3:\n  session_token: hunter2",
        "gs: {credentials: hunter2}",
        "s3: {endpoint: 'http://me:hunter2@minio:9000'}",
        "repository: s3://me:hunter2@lab/models",
    ],
)
def test_secrets_in_a_file_are_refused_and_not_repeated(tmp_path, text):
    write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        find_project(tmp_path)
    assert "replicate.yaml:" in caught.value.message
    assert "credentials" in caught.value.message
    assert "AWS_SECRET_ACCESS_KEY" in caught.value.hint
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("s3: {regoin: x}", "unknown key `s3.regoin`"),
        ("s3: lab", "`s3` must hold"),
        ("s3: {profile: [a]}", "`s3.profile` must be a text"),
        ("s3: {profile: ''}", "`s3.profile` must be a text"),
        ("s3: {endpoint: 'minio:9000'}", "`s3.endpoint` must be an http:// or https:// URL"),
        ("s3: {profile: a, profile: b}", "`s3.profile` is given twice"),
    ],
)
def test_wrong_settings_are_named(tmp_path, text, problem):
    write(tmp_path, "capture: auto\n" + text)
    with pytest.raises(ConfigError) as caught:
        find_project(tmp_path)
    assert f"replicate.yaml:2: {problem}" in caught.value.message
