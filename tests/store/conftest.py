"""Every store that the contract is tested on, and the servers that some of them need."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from servers import s3_servers
from servers.s3_servers import Server

from replicated.store.base import Store
from replicated.store.buckets import parse_bucket_url
from replicated.store.limited import LimitedStore, UploadLimit
from replicated.store.local import LocalStore
from replicated.store.memory import MemoryStore
from replicated.store.retrying import RetryingStore
from replicated.store.s3.store import S3Store

_numbers = itertools.count()


@pytest.fixture(scope="session")
def moto_server() -> Iterator[Server]:
    with s3_servers.moto() as server:
        yield server


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_servers.rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


def open_s3(server: Server, *, url: str = "", create: bool = True) -> S3Store:
    """A store in a bucket of its own, which is made when something is stored."""
    url = url or f"s3://bucket-{next(_numbers)}/Team A/models"
    environment = {**s3_servers.ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}
    return S3Store(parse_bucket_url(url), create=create, environment=environment)


@pytest.fixture(params=["local", "memory", "limited", "s3-moto", "s3-rclone"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with ExitStack() as stack:
        yield _open(request, tmp_path, stack)


def _open(request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack) -> Store:
    if request.param == "limited":
        return LimitedStore(MemoryStore(), UploadLimit(1 << 40))
    if request.param == "local":
        return LocalStore(tmp_path)
    if request.param.startswith("s3-"):
        s3 = open_s3(request.getfixturevalue(request.param.removeprefix("s3-") + "_server"))
        stack.callback(s3.close)
        return RetryingStore(s3)
    return MemoryStore()
