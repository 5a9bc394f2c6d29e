"""What the server of a bucket turned out to take, and not to take.

Kept by endpoint and bucket for the whole process, so that each is found out once. Nothing depends on it being
right: a server that begins to refuse something is noticed by its answer.
"""

from __future__ import annotations

import enum
import threading
from typing import Any


class Extra(enum.Enum):
    """What a request may hold beyond what every server knows."""

    CONDITION = "If-None-Match: * with a PUT"
    CHECKSUM = "x-amz-checksum-crc32"
    UNSIGNED = "UNSIGNED-PAYLOAD"
    BATCHES = "DeleteObjects"


class Features:
    """Which extras a server takes. Thread-safe: each is one assignment, and two threads find out the same."""

    def __init__(self) -> None:
        self._takes: dict[Extra, bool] = {}

    def can(self, extra: Extra) -> bool:
        """Whether it is worth trying."""
        return self._takes.get(extra, True)

    def is_known(self, extra: Extra) -> bool:
        """Whether the server has shown that it takes it, or does not."""
        return extra in self._takes

    def have(self, extra: Extra) -> None:
        """It was taken, and worked."""
        self._takes[extra] = True

    def lack(self, extra: Extra) -> None:
        """It was refused, or ignored."""
        self._takes[extra] = False


_known: dict[tuple[str, str], Features] = {}
_lock = threading.Lock()


def features_of(client: Any, bucket: str) -> Features:
    """Those of the server behind a client, shared by all stores in this bucket."""
    place = (client.meta.endpoint_url, bucket)
    with _lock:
        features = _known.get(place)
        if features is None:
            features = _known[place] = Features()
            members = client.meta.service_model.operation_model("PutObject").input_shape.members
            # Older versions of boto3 do not know it.
            if "IfNoneMatch" not in members:
                features.lack(Extra.CONDITION)
            if "ChecksumCRC32" not in members:
                features.lack(Extra.CHECKSUM)
        return features
