"""Clients of one endpoint: which credentials, which region, how long to wait. boto3 is imported here only.

Credentials come from wherever boto3 finds them: variables, profiles, roles, single sign-on, the metadata of
the machine. A session keeps what it has read of files for ever, so after an error that new credentials
would mend, a new session is made, once in a while.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from replicated.store.s3.body import Body
from replicated.store.s3.environment import environment_of
from replicated.store.s3.errors import plain_endpoint

#: A connection that does not come about in this time never will.
CONNECT_TIMEOUT_S: Final = 5.0
#: Without a single byte from the server, or to it. After 64 MiB a slow one needs a while to have them on its
#: disks.
READ_TIMEOUT_S: Final = 60.0
#: Between two sessions that were made because credentials were refused.
RENEWAL_PAUSE_S: Final = 30.0
DEFAULT_REGION: Final = "us-east-1"


class Clients:
    """boto3 clients that share credentials and region. Thread-safe."""

    def __init__(
        self,
        environment: Mapping[str, str] | None,
        connections: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`connections`: how many requests are made at the same time."""
        self._environment = environment
        self._connections = connections
        self._clock = clock
        # Held while a client is made, which asks no server unless that is where credentials come from.
        self._lock = threading.Lock()
        self._session: Any = None
        self._clients: dict[bool, Any] = {}
        self._region = ""
        self._renewed_at = -RENEWAL_PAUSE_S
        #: Counts sessions and regions: who failed with an older one need not have another made.
        self.generation = 0

    def get(self, *, is_signing_payload: bool = True) -> Any:
        """A client. Without a signature over the payload, sending takes half the processor time.

        Raises what botocore raises when something is configured that cannot be.
        """
        client = self._clients.get(is_signing_payload)
        if client is not None:
            return client
        with self._lock:
            client = self._clients.get(is_signing_payload)
            if client is None:
                client = self._clients[is_signing_payload] = self._make(is_signing_payload)
            return client

    @property
    def endpoint(self) -> str:
        """Where the requests go, as it may be shown; empty before the first."""
        for client in tuple(self._clients.values()):
            return plain_endpoint(client.meta.endpoint_url)
        return ""

    @property
    def region(self) -> str:
        """The region that requests are signed for."""
        return str(self.get().meta.region_name)

    def renew(self, generation: int) -> None:
        """Forget the credentials that a request of this `generation` was refused with.

        They are read anew, but not again and again: where they are still wrong, that is asked of files,
        and of servers, once in `RENEWAL_PAUSE_S`.
        """
        with self._lock:
            if generation != self.generation or self._clock() < self._renewed_at + RENEWAL_PAUSE_S:
                return
            self._renewed_at = self._clock()
            self._forget()
            self._session = None

    def move(self, generation: int, region: str) -> bool:
        """Sign for another region from now on; whether a request of `generation` was signed for another."""
        with self._lock:
            if generation != self.generation:
                return True
            if region == self._region:
                return False
            self._region = region
            self._forget()
            return True

    def close(self) -> None:
        """Close the connections; the next request makes new ones."""
        with self._lock:
            clients = list(self._clients.values())
            self._forget()
        for client in clients:
            client.close()

    def _forget(self) -> None:
        # Requests of other threads may be on their way in these: they are not closed, they end by themselves.
        self._clients = {}
        self.generation += 1

    def _make(self, is_signing_payload: bool) -> Any:
        import boto3.session
        from botocore.config import Config

        from replicated.store.s3.connections import let_bodies_take

        wanted: dict[str, Any] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "max_pool_connections": self._connections,
            "tcp_keepalive": True,
            # `RetryingStore` repeats, with one patience for everything.
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            # Older servers know no trailers, and some send the checksum of the whole object with a range.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        # Before boto3 1.36 there are no such options, and it does as we want.
        known = {name: value for name, value in wanted.items() if name in Config.OPTION_DEFAULTS}
        if not is_signing_payload:
            known["s3"] = {"payload_signing_enabled": False}
        with environment_of(self._environment):
            if self._session is None:
                self._session = boto3.session.Session(botocore_session=self._new_session())
            region = self._region or self._session.region_name or DEFAULT_REGION
            client = self._session.client("s3", region_name=region, config=Config(**known))
        self._region = region
        let_bodies_take(client, READ_TIMEOUT_S)
        client.meta.events.register("before-sign.s3.PutObject", _asking_for_large_ones_only)
        client.meta.events.register("before-sign.s3.DeleteObjects", _with_md5)
        return client

    def _new_session(self) -> Any:
        import botocore.session

        session = botocore.session.Session()
        provider = session.get_component("credential_provider")
        session.register_component("credential_provider", _Provider(provider, self._environment))
        return session


class _Provider:
    """Finds credentials as botocore does, and has them renewed in the environment of the caller."""

    def __init__(self, provider: Any, environment: Mapping[str, str] | None) -> None:
        self._provider = provider
        self._environment = environment

    def load_credentials(self) -> Any:
        with environment_of(self._environment):
            found = self._provider.load_credentials()
        return found if found is None else _Credentials(found, self._environment)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)


class _Credentials:
    """Credentials that may have to be renewed, as botocore's signers use them."""

    def __init__(self, found: Any, environment: Mapping[str, str] | None) -> None:
        self._found = found
        self._environment = environment

    def get_frozen_credentials(self) -> Any:
        refresh_needed = getattr(self._found, "refresh_needed", None)
        if refresh_needed is None or not refresh_needed():
            return self._found.get_frozen_credentials()
        with environment_of(self._environment):
            return self._found.get_frozen_credentials()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found, name)


def _asking_for_large_ones_only(request: Any, **_: object) -> None:
    """Send small objects at once: to ask whether they are wanted takes as long."""
    if "Expect" in request.headers and not isinstance(request.body, Body):
        del request.headers["Expect"]


def _with_md5(request: Any, **_: object) -> None:
    """What S3 wanted of this request before there were other checksums, and many servers still do."""
    body = request.body if isinstance(request.body, bytes) else str(request.body or "").encode()
    if "Content-MD5" not in request.headers:
        digest = hashlib.md5(body, usedforsecurity=False).digest()
        request.headers["Content-MD5"] = base64.b64encode(digest).decode()
