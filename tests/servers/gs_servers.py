"""Servers on loopback that speak as Google Cloud Storage does: an emulator, and one that is more like it.

The emulator ignores conditions, gives every listing as one page and every range of bytes that it does not
understand as the whole object. `gs_service` adds what the service documents of these; see there.
"""

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from google.auth.credentials import AnonymousCredentials
from servers.s3_servers import Server

from replicated.store.buckets import parse_bucket_url
from replicated.store.gs.access import Access
from replicated.store.gs.store import GsStore


@contextlib.contextmanager
def emulator() -> Iterator[Server]:
    """An emulator in memory, as it is. It has no buckets."""
    port = _free_port()
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--quiet", "--in-memory"]
    yield from _run([*command, "--host", "127.0.0.1", "--port", str(port)], port)


@contextlib.contextmanager
def service() -> Iterator[Server]:
    """The emulator, with conditions, pages and ranges as the service has them."""
    port = _free_port()
    yield from _run([sys.executable, str(Path(__file__).with_name("gs_service.py")), str(port)], port)


def environment(server_url: str) -> dict[str, str]:
    """What a client needs to speak to one of them, or to a proxy before it."""
    return {"STORAGE_EMULATOR_HOST": server_url, "GOOGLE_CLOUD_PROJECT": "tests"}


def open_service(url: str, server_url: str, *, create: bool = True) -> GsStore:
    """A store on `service`, or a proxy before it, that trusts it as it would the service itself."""
    credentials = AnonymousCredentials()
    return GsStore(Access(credentials, server_url, False, "tests"), parse_bucket_url(url), create=create)


def _run(command: list[str], port: int) -> Iterator[Server]:
    server = Server(command, port, checks_signatures=False)
    try:
        server.start()
        yield server
    finally:
        server.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
