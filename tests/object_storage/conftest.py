"""Machines that share a bucket, which lies behind a proxy that counts and breaks what passes."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from object_storage.machines import Machine
from servers import s3_servers
from servers.fault_proxy import FaultProxy

BUCKET = "lab"


@pytest.fixture(scope="session")
def moto() -> Iterator[s3_servers.Server]:
    with s3_servers.moto() as server:
        yield server


@pytest.fixture(scope="session")
def rclone(tmp_path_factory) -> Iterator[s3_servers.Server]:
    with s3_servers.rclone(tmp_path_factory.mktemp("buckets")) as server:
        yield server


@pytest.fixture(params=["moto"])
def server(request) -> s3_servers.Server:
    """The server behind the proxy; a module may ask for others."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def proxy(server) -> Iterator[FaultProxy]:
    with FaultProxy(server.url) as proxy:
        yield proxy


@pytest.fixture
def url(request) -> str:
    """A repository of the test's own, in a bucket that all share."""
    letters = [letter if letter.isalnum() else "-" for letter in request.node.name.lower()]
    return f"s3://{BUCKET}/{''.join(letters)[:80].strip('-')}/runs"


@pytest.fixture
def make_machine(proxy, url, tmp_path) -> Iterator[Callable[..., Machine]]:
    """Machines that know the repository and nothing else."""
    made: list[Machine] = []

    def make(**access: str) -> Machine:
        # Short: the path of a socket holds 107 bytes.
        home = Path(tempfile.mkdtemp(prefix="rpl-"))
        directory = tmp_path / f"project-{len(made)}"
        directory.mkdir()
        (directory / "replicate.yaml").write_text(f"repository: {url}\n")
        access = {**s3_servers.ENVIRONMENT, "AWS_ENDPOINT_URL": proxy.url, **access}
        made.append(Machine(home, directory, access))
        return made[-1]

    yield make
    proxy.clear()
    for machine in made:
        machine.leave()


@pytest.fixture
def machine(make_machine) -> Machine:
    return make_machine()
