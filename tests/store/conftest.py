"""Every store that the contract is tested on, and the servers that some of them need."""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from servers import gs_servers, s3_servers
from servers.fault_proxy import FaultProxy
from servers.s3_servers import Server

from replicated.store.base import Store
from replicated.store.buckets import parse_bucket_url
from replicated.store.gs import open_gs
from replicated.store.gs.store import GsStore
from replicated.store.limited import LimitedStore, UploadLimit
from replicated.store.local import LocalStore
from replicated.store.memory import MemoryStore
from replicated.store.retrying import RetryingStore
from replicated.store.s3.store import S3Store

sys.path.append(str(Path(__file__).parent))
from faulty_store import FaultyStore

_numbers = itertools.count()


@pytest.fixture(scope="session")
def moto_server() -> Iterator[Server]:
    with s3_servers.moto() as server:
        yield server


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_servers.rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def emulator_server() -> Iterator[Server]:
    with gs_servers.emulator() as server:
        yield server


@pytest.fixture(scope="session")
def service_server() -> Iterator[Server]:
    with gs_servers.service() as server:
        yield server


@pytest.fixture
def moto_proxy(moto_server: Server) -> Iterator[FaultProxy]:
    with FaultProxy(moto_server.url) as proxy:
        yield proxy


def open_s3(endpoint: str | None, url: str = "", *, create: bool = True, **variables: str | None) -> S3Store:
    """A store in a bucket of its own, which is made when it is asked for; None leaves a variable out."""
    url = url or f"s3://bucket-{next(_numbers)}/Team A/models"
    every = {**s3_servers.ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint, **variables}
    environment = {name: value for name, value in every.items() if value is not None}
    return S3Store(parse_bucket_url(url), create=create, environment=environment)


@pytest.fixture
def make_s3() -> Iterator[Callable[..., S3Store]]:
    """`open_s3`, whose connections are closed in the end."""
    with ExitStack() as stack:

        def make(
            endpoint: str | None, url: str = "", *, create: bool = True, **variables: str | None
        ) -> S3Store:
            store = open_s3(endpoint, url, create=create, **variables)
            stack.callback(store.close)
            return store

        yield make


@pytest.fixture(
    params=["local", "memory", "limited", "faulty", "s3-moto", "s3-rclone", "gs-emulator", "gs-service"]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with ExitStack() as stack:
        yield _open(request, tmp_path, stack)


def open_google(request: pytest.FixtureRequest) -> GsStore:
    url = f"gs://bucket-{next(_numbers)}/Team A/models"
    if request.param == "gs-service":
        return gs_servers.open_service(url, request.getfixturevalue("service_server").url)
    environment = gs_servers.environment(request.getfixturevalue("emulator_server").url)
    return open_gs(url, create=True, environment=environment)


def _open(request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack) -> Store:
    if request.param == "limited":
        return LimitedStore(MemoryStore(), UploadLimit(1 << 40))
    if request.param == "local":
        return LocalStore(tmp_path)
    if request.param.startswith("s3-"):
        s3 = open_s3(request.getfixturevalue(request.param.removeprefix("s3-") + "_server").url)
        stack.callback(s3.close)
        return RetryingStore(s3)
    if request.param.startswith("gs-"):
        google = open_google(request)
        stack.callback(google.close)
        return RetryingStore(google)
    if request.param == "faulty":
        return RetryingStore(FaultyStore(MemoryStore(), seed=1), patience_s=1e9, fraction=lambda: 0.0)
    return MemoryStore()
