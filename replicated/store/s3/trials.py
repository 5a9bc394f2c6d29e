"""What `store.probing` tries of an S3 server beyond the contract of stores: see `Trials` there.

Asked as it stands, whatever the server turned out to take before.
"""

from __future__ import annotations

import base64
import time
import zlib
from email.utils import parsedate_to_datetime
from typing import Any, Final

from replicated.store.s3.errors import Kind
from replicated.store.s3.requests import Failed, Requests

_WRONG_CHECKSUM: Final = frozenset({"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch"})


class S3Trials:
    """Trials of one bucket."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    def put_new(self, key: str, data: bytes) -> bool:
        """See `Trials`."""
        try:
            self._put(key, data, IfNoneMatch="*")
        except Failed as failed:
            if failed.trouble.kind is Kind.PRECONDITION:
                return False
            raise self._requests.explained(failed) from failed.__cause__
        return True

    def put_damaged(self, key: str, data: bytes) -> bool:
        """See `Trials`."""
        wrong = base64.b64encode(zlib.crc32(data + b"x").to_bytes(4, "big")).decode()
        try:
            self._put(key, data, ChecksumCRC32=wrong)
        except Failed as failed:
            if failed.trouble.code in _WRONG_CHECKSUM or "checksum" in failed.trouble.reason.lower():
                return False
            raise self._requests.explained(failed) from failed.__cause__
        return True

    def get_tail(self, key: str, length: int) -> bytes:
        """See `Trials`."""
        try:
            data: bytes = self._requests.ask(
                f"read {key}", "get_object", _read_body, key=key, Range=f"bytes=-{length}"
            )
        except Failed as failed:
            raise self._requests.explained(failed) from failed.__cause__
        return data

    def clock_ahead_s(self) -> float | None:
        """See `Trials`."""
        try:
            response = self._requests.ask("list", "list_objects_v2", MaxKeys=1)
        except Failed as failed:
            raise self._requests.explained(failed) from failed.__cause__
        told = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        if not told:
            return None
        # It is cut to seconds, so half of one is missing on average.
        return float(parsedate_to_datetime(told).timestamp()) + 0.5 - time.time()

    def _put(self, key: str, data: bytes, **arguments: Any) -> None:
        self._requests.ask(f"write {key}", "put_object", key=key, Body=data, **arguments)


def _read_body(response: Any) -> bytes:
    with response["Body"] as body:
        data: bytes = body.read()
        return data
