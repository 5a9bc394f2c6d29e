"""A store in a bucket of Google Cloud Storage, through Google's library.

Each method makes as few requests as it can and makes none twice: `store.retrying` does. An object is made
under the condition that there is none yet, so a request that was answered without our hearing it cannot do
harm. Emulators ignore that condition, so there it is looked first. What arrives is checked by the service
(CRC32C); whole objects that come back by the library, parts of them by their length here and by hashes above.
"""

from __future__ import annotations

import base64
import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from typing import Final

import google_crc32c
from google.api_core.exceptions import (
    BadRequest,
    Conflict,
    NotFound,
    PreconditionFailed,
    RequestRangeNotSatisfiable,
)
from google.cloud.storage import Blob

from replicate.errors import RepositoryDamaged, RepositoryMissing, RepositoryUnreachable
from replicated.store.base import (
    Buffer,
    Capabilities,
    KeyMissing,
    ObjectInfo,
    StoreBusy,
    check_key,
    check_prefix,
    is_key,
)
from replicated.store.buckets import Place
from replicated.store.gs.access import Access, Answers, connect
from replicated.store.gs.errors import explained, is_missing_bucket, missing_bucket

#: Until a connection is there, and between two pieces of an answer.
TIMEOUT_S: Final = (10.0, 60.0)
#: The service takes no more in one request.
MAX_BATCH: Final = 100

_LISTED: Final = "items(name,size,timeCreated),nextPageToken"


class GsStore:
    """A `Store` in a bucket, below a prefix."""

    def __init__(self, access: Access, place: Place, *, create: bool) -> None:
        self._access = access
        self._place = place
        self._answers = Answers()
        self._client = connect(access, self._answers)
        self._bucket = self._client.bucket(place.bucket)
        self._create = create

    @property
    def url(self) -> str:
        """`gs://`, the bucket and the prefix."""
        return self._place.url

    @property
    def capabilities(self) -> Capabilities:
        """Every request is a round trip and costs money."""
        return Capabilities(has_costly_requests=True, parallel_requests=8, max_gap_bytes=256 << 10)

    def put(
        self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
    ) -> None:
        """See `Store.put`."""
        check_key(key)
        data = b"".join(parts)
        if self._access.is_emulator and not is_unique and self._is_stored(key, data):
            return
        with explained("write", self._url_of(key)):
            try:
                self._upload_or_make_bucket(key, data)
            except PreconditionFailed:
                # Perhaps by a request of ours whose answer got lost.
                if not self._is_stored(key, data):
                    raise StoreBusy(f"{self._url_of(key)} was there and has gone again") from None
                return
        if is_checked and not self._is_stored(key, data, is_ours=True):
            raise StoreBusy(f"cannot write {self._url_of(key)}: the server took it, and does not have it")

    def replace(self, key: str, data: bytes) -> None:
        """See `Store.replace`."""
        check_key(key)
        with explained("write", self._url_of(key)):
            self._upload_or_make_bucket(key, bytes(data), is_new=False)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Store.get`."""
        if length == 0:
            # No range is empty.
            if not self.exists(key):
                raise KeyMissing(key)
            return b""
        if offset == 0 and length is None:
            return self._download(key, None, None)
        data = self._download(key, offset, None if length is None else offset + length - 1)
        if length is not None and len(data) > length:
            raise RepositoryUnreachable(
                f"cannot read {self._url_of(key)}: more came back than was asked for",
                hint="this server does not answer requests for a part of an object",
            )
        return data

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Store.list`; in the order of the keys."""
        for page in self.list_pages(prefix):
            yield from page

    def list_pages(self, prefix: str, after: str = "") -> Iterator[Sequence[ObjectInfo]]:
        """What `list` gives, in the order of the keys and from behind the key `after`, one request a page."""
        root = self._place.root
        first = f"{root}{after}" if after else None
        with explained("list", self._url_of(check_prefix(prefix))):
            try:
                pages = self._client.list_blobs(
                    self._bucket,
                    prefix=root + prefix or None,
                    start_offset=first,
                    fields=_LISTED,
                    timeout=TIMEOUT_S,
                    retry=None,
                ).pages
                for page in pages:
                    # That with which a listing begins is in it, and emulators begin anywhere.
                    found = [self._describe(blob) for blob in page if first is None or blob.name > first]
                    yield [info for info in found if is_key(info.key)]
            except NotFound:
                if not self._create:
                    raise missing_bucket(self._place.bucket) from None

    def delete(self, *keys: str) -> None:
        """See `Store.delete`. In batches, in which the server chooses the order; the last key goes last."""
        for key in keys:
            check_key(key)
        for start in range(0, len(keys) - 1, MAX_BATCH):
            self._delete_batch(keys[start : min(start + MAX_BATCH, len(keys) - 1)])
        if keys:
            self._delete_batch(keys[-1:])

    def exists(self, key: str) -> bool:
        """See `Store.exists`."""
        with explained("read", self._url_of(check_key(key))):
            return bool(self._blob(key).exists(timeout=TIMEOUT_S, retry=None))

    def close(self) -> None:
        """Close the connections; they are made again when they are needed."""
        self._client.close()

    # What `store.probing` tries beyond the contract: see `Trials`.

    @property
    def trials(self) -> GsStore:
        """The four below."""
        return self

    def put_new(self, key: str, data: bytes) -> bool:
        """Put under the condition that there is no such object; whether the server said that it did."""
        with explained("write", self._url_of(check_key(key))):
            try:
                self._upload(key, data)
            except PreconditionFailed:
                return False
            return True

    def put_damaged(self, key: str, data: bytes) -> bool:
        """Put with the checksum of other bytes; whether the server takes that."""
        with explained("write", self._url_of(check_key(key))):
            try:
                self._upload(key, data, crc32c=_crc32c(data + b"x"))
            except BadRequest:
                return False
            return True

    def get_tail(self, key: str, length: int) -> bytes:
        """The last bytes of an object, by a range that counts from its end."""
        return self._download(check_key(key), -length, None)

    def clock_ahead_s(self) -> float | None:
        """Seconds that the server's clock is ahead of ours; None before the first answer that told."""
        return self._answers.ahead_s

    def _url_of(self, key: str) -> str:
        return f"gs://{self._place.bucket}/{self._place.root}{key}"

    def _blob(self, key: str) -> Blob:
        return self._bucket.blob(self._place.root + check_key(key))

    def _upload_or_make_bucket(self, key: str, data: bytes, *, is_new: bool = True) -> None:
        try:
            self._upload(key, data, is_new=is_new)
        except NotFound:
            if not self._is_bucket_missing():
                # A large object is sent in a session, and those can get lost.
                raise StoreBusy(f"cannot write {self._url_of(key)}: the upload got lost") from None
            if not self._create:
                raise missing_bucket(self._place.bucket) from None
            self._make_bucket()
            self._upload(key, data, is_new=is_new)

    def _upload(self, key: str, data: bytes, *, is_new: bool = True, crc32c: str = "") -> None:
        blob = self._blob(key)
        # As a property of the object, so that the service refuses other bytes than these.
        blob.crc32c = crc32c or _crc32c(data)
        blob.upload_from_file(
            io.BytesIO(data),
            size=len(data),
            content_type="application/octet-stream",
            if_generation_match=0 if is_new else None,
            checksum=None,
            timeout=TIMEOUT_S,
            retry=None,
        )

    def _is_bucket_missing(self) -> bool:
        # Whoever may write objects need not be allowed to look at buckets.
        try:
            list(self._client.list_blobs(self._bucket, max_results=1, timeout=TIMEOUT_S, retry=None))
        except NotFound:
            return True
        return False

    def _make_bucket(self) -> None:
        name = self._place.bucket
        if self._access.project is None and not self._access.is_emulator:
            raise RepositoryMissing(
                f"there is no bucket gs://{name}, and no project to make it in",
                hint=f"set GOOGLE_CLOUD_PROJECT, or make it: gcloud storage buckets create gs://{name}",
            )
        try:
            project = self._access.project or "emulated"
            self._client.create_bucket(name, project=project, timeout=TIMEOUT_S, retry=None)
        except Conflict:
            pass  # Somebody was faster.

    def _is_stored(self, key: str, data: bytes, *, is_ours: bool = False) -> bool:
        """Whether there is an object with these bytes; raises `RepositoryDamaged` when it has others.

        `is_ours`: it was we who put it, a moment ago, so that the checksum on the way is proof enough.
        """
        blob = self._blob(key)
        with explained("read", self._url_of(key)):
            try:
                blob.reload(timeout=TIMEOUT_S, retry=None)
            except NotFound:
                return False
        same = blob.size == len(data) and blob.crc32c == _crc32c(data)
        if same and not is_ours:
            # 32 bits are few where somebody else may have written, and some objects have no longer hash.
            if blob.md5_hash:
                same = base64.b64decode(blob.md5_hash) == hashlib.md5(data, usedforsecurity=False).digest()
            else:
                same = self.get(key) == data
        if not same and is_ours:
            raise StoreBusy(f"cannot write {self._url_of(key)}: the server holds other bytes than were sent")
        if not same:
            raise RepositoryDamaged(
                f"another object is already stored as {key} in {self.url}", fields={"key": key}
            )
        return True

    def _download(self, key: str, start: int | None, end: int | None) -> bytes:
        blob = self._blob(key)
        with explained("read", self._url_of(key)):
            try:
                data: bytes = blob.download_as_bytes(
                    start=start,
                    end=end,
                    raw_download=True,
                    # Not in pieces of 8 KiB, which take twice the processor time.
                    single_shot_download=True,
                    checksum="crc32c" if start is None else None,
                    timeout=TIMEOUT_S,
                    retry=None,
                )
            except RequestRangeNotSatisfiable:
                return b""
            except NotFound as error:
                if is_missing_bucket(error) and not self._create:
                    raise missing_bucket(self._place.bucket) from None
                raise KeyMissing(key) from None
        announced = self._answers.announced_bytes()
        if announced is not None and announced != len(data):
            raise StoreBusy(f"cannot read {self._url_of(key)}: {len(data)} of {announced} bytes came back")
        return data

    def _describe(self, blob: Blob) -> ObjectInfo:
        age_s = None
        if blob.time_created is not None and self._answers.ahead_s is not None:
            age_s = max(0.0, time.time() + self._answers.ahead_s - blob.time_created.timestamp())
        return ObjectInfo(blob.name[len(self._place.root) :], blob.size or 0, age_s)

    def _delete_batch(self, keys: Sequence[str]) -> None:
        with explained("delete", self._url_of(keys[0])):
            try:
                if len(keys) > 1:
                    with self._client.batch():
                        for key in keys:
                            self._blob(key).delete(timeout=TIMEOUT_S, retry=None)
                    return
            except NotFound:
                pass  # Of all that failed this is what we hear of one: ask for each.
            for key in keys:
                try:
                    self._blob(key).delete(timeout=TIMEOUT_S, retry=None)
                except NotFound:
                    continue


def _crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()
