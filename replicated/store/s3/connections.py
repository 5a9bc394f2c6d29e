"""Connections that give a slow line time to carry the body of a request.

urllib3 sends with the time limit that was meant for connecting: a server, or a line, that takes nothing for
some seconds in the middle of a pack would make it a failure, and the pack is sent from its beginning again,
which makes such a line no faster. Used by `client`; imports botocore.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from botocore import awsrequest


def let_bodies_take(client: Any, timeout_s: float) -> None:
    """Let the connections of a client wait so long for each piece of a body to be taken."""

    class Plain(awsrequest.AWSHTTPConnection):  # type: ignore[misc]  # botocore has no types
        def connect(self) -> None:
            super().connect()
            self.sock.settimeout(timeout_s)

    class Encrypted(awsrequest.AWSHTTPSConnection):  # type: ignore[misc]
        def connect(self) -> None:
            super().connect()
            self.sock.settimeout(timeout_s)

    class PlainPool(awsrequest.AWSHTTPConnectionPool):  # type: ignore[misc]
        ConnectionCls = Plain

    class EncryptedPool(awsrequest.AWSHTTPSConnectionPool):  # type: ignore[misc]
        ConnectionCls = Encrypted

    # Where a later botocore keeps them elsewhere, slow lines are slow as before.
    with suppress(AttributeError):
        session = client._endpoint.http_session
        session._pool_classes_by_scheme.update(http=PlainPool, https=EncryptedPool)
