"""A bucket on the loopback interface: `rclone serve s3` on a directory, alone or behind a proxy that counts.

The server is that of the tests (tests/servers), which checks signatures and keeps each object as a file. So a
bucket can be filled by writing files, and looked into.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from servers import fault_proxy, s3_servers  # where the tests have them

BUCKET = "benchmark"


class Bucket:
    """A server with one bucket, and two ways to it."""

    def __init__(self, root: Path, server: s3_servers.Server, proxy: fault_proxy.FaultProxy) -> None:
        self._server = server
        self.directory = root / BUCKET
        #: Nothing between the client and the server.
        self.url: str = server.url
        #: Through the proxy, which counts.
        self.counting_url: str = proxy.url
        self._proxy = proxy

    @contextlib.contextmanager
    def counting(self) -> Iterator[Any]:
        """What passes through the proxy meanwhile; see tests/servers/fault_proxy.py."""
        with self._proxy.counting() as counted:
            yield counted

    def surroundings(self, *, is_counted: bool = False) -> dict[str, str]:
        """The variables by which clients reach it."""
        return {
            **s3_servers.ENVIRONMENT,
            "AWS_ENDPOINT_URL": self.counting_url if is_counted else self.url,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def rclone_surroundings(self, *, is_counted: bool = False) -> dict[str, str]:
        """The same for rclone, whose remote is `:s3:`."""
        return {
            "RCLONE_CONFIG": os.devnull,
            "RCLONE_S3_PROVIDER": "Rclone",
            "RCLONE_S3_ENDPOINT": self.counting_url if is_counted else self.url,
            "RCLONE_S3_ACCESS_KEY_ID": s3_servers.ACCESS_KEY,
            "RCLONE_S3_SECRET_ACCESS_KEY": s3_servers.SECRET_KEY,
            # Its client for buckets takes no certificates but its own, and there is no TLS here.
            "AWS_CA_BUNDLE": "",
        }

    def empty(self, prefix: str) -> None:
        """Remove all objects below a prefix."""
        shutil.rmtree(self.directory / prefix, ignore_errors=True)
        self.look_again()

    def look_again(self) -> None:
        """Let the server show what was written into the directory itself: it remembers listings."""
        self._server.kill()
        self._server.start()


@contextlib.contextmanager
def serve(root: Path) -> Iterator[Bucket]:
    """A bucket below `root`, until the end."""
    (root / BUCKET).mkdir(parents=True)
    with s3_servers.rclone(root) as server, fault_proxy.FaultProxy(server.url) as proxy:
        yield Bucket(root, server, proxy)


def find_rclone() -> Path:
    """The program that serves, which is a peer as well."""
    return Path(sys.executable).with_name("rclone")
