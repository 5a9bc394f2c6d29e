"""A store in a bucket of Amazon S3, or of a server that speaks as it does.

Servers differ, and few say what they cannot do: what one turns out not to take (`Features`) is not sent to it
again. Nothing that a server says about an object is believed where that would lose data: after a conditional
request that failed, the object is read and compared; after a PUT, the object is looked at. Requests that
failed in a way that passes raise `StoreBusy`: `store.retrying` repeats them. The bucket itself is not looked
for when a store is opened: the first request finds out, so that opening costs none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Final

from replicate.errors import RepositoryDamaged, RepositoryUnreachable
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
from replicated.store.s3.body import Body
from replicated.store.s3.errors import Kind, Trouble, read_trouble
from replicated.store.s3.features import Extra
from replicated.store.s3.requests import Failed, Requests
from replicated.store.s3.trials import S3Trials

#: A request of 25 ms keeps Python busy for 2.5 ms: more than ten of them at a time only wait for each other.
PARALLEL_REQUESTS: Final = 12
#: What a request costs in time, a connection reads 1 MiB in, and receiving half of that costs as much
#: processor time as a request does.
MAX_GAP_BYTES: Final = 512 << 10
#: A connection carries 50 to 90 MB/s: this takes about 0.1 s, of which the way to the server is a quarter.
MAX_READ_BYTES: Final = 8 << 20
#: Larger bodies are sent as they lie in memory, and without a signature over them: their checksum is signed.
_SMALL_BYTES: Final = 1 << 20
#: As many keys as one request may delete.
_BATCH: Final = 1000
_CHUNK_BYTES: Final = 8 << 20
_MD5: Final = re.compile('"[0-9a-f]{32}"')


class S3Store:
    """A `Store` in a bucket."""

    def __init__(
        self, place: Place, *, create: bool = False, environment: Mapping[str, str] | None = None
    ) -> None:
        """`create`: make the bucket when there is none. `environment`: see `open_store`."""
        self._place = place
        # A few more connections than requests: one that has just been given back may not be free yet.
        self._requests = Requests(place, PARALLEL_REQUESTS + 4, create=create, environment=environment)
        self._capabilities = Capabilities(
            is_near=False,
            has_costly_requests=True,
            parallel_requests=PARALLEL_REQUESTS,
            max_gap_bytes=MAX_GAP_BYTES,
            max_read_bytes=MAX_READ_BYTES,
        )

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`."""
        return self._place.url

    @property
    def capabilities(self) -> Capabilities:
        """Far away, and every request costs."""
        return self._capabilities

    def put(
        self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
    ) -> None:
        """See `Store.put`. Where the server knows no conditions, two writers of other bytes may both win."""
        check_key(key)
        body = Body(parts)
        if is_unique:
            etag = self._upload(key, body)
            if is_checked or _is_doubtful(body, etag):
                self._check_stored(key, body, etag)
        else:
            self._put_new(key, body, is_checked)

    def replace(self, key: str, data: bytes) -> None:
        """See `Store.replace`."""
        self._upload(check_key(key), Body([data]))

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Store.get`. Whole objects are compared with their checksum, or with their tag if small."""
        response, data = self._get(check_key(key), offset, length)
        is_whole = not offset and length is None
        if is_whole and not response.get("ChecksumCRC32") and _is_doubtful(Body([data]), _tag(response)):
            # It may be no MD5; but what changed on the way would hardly change in the same way twice.
            again = self._get(key, 0, None)[1]
            if again != data:
                raise StoreBusy(f"cannot read {key} in {self.url}: other bytes came each time")
        return data

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Store.list`."""
        for page in self.list_pages(prefix):
            yield from page

    def list_pages(self, prefix: str, after: str = "") -> Iterator[Sequence[ObjectInfo]]:
        """What `list` gives, in the order of the keys and from behind the key `after`, one request a page."""
        root = self._place.root
        arguments: dict[str, Any] = {"Prefix": root + check_prefix(prefix)}
        if after:
            arguments["StartAfter"] = root + after
        while True:
            try:
                response = self._requests.ask(f"list {prefix}*", "list_objects_v2", **arguments)
            except Failed as failed:
                raise self._requests.explained(failed) from failed.__cause__
            found = response.get("Contents") or []
            yield [
                ObjectInfo(entry["Key"][len(root) :], int(entry["Size"]), _age_s(entry, response))
                for entry in found
                if entry["Key"].startswith(root + prefix) and is_key(entry["Key"][len(root) :])
            ]
            if not response.get("IsTruncated"):
                return
            token = response.get("NextContinuationToken")
            if token and token != arguments.get("ContinuationToken"):
                arguments["ContinuationToken"] = token
            elif found and found[-1]["Key"] != arguments.get("StartAfter"):
                arguments.pop("ContinuationToken", None)
                arguments["StartAfter"] = found[-1]["Key"]
            else:
                raise RepositoryUnreachable(
                    f"cannot list {prefix}* in {self.url}: the server does not say how the list goes on"
                )

    def delete(self, *keys: str) -> None:
        """See `Store.delete`. In batches, in which the server chooses the order; the last key goes last."""
        for key in keys:
            check_key(key)
        if len(keys) > 2 and self._requests.features.can(Extra.BATCHES):
            for start in range(0, len(keys) - 1, _BATCH):
                self._delete_batch(keys[start : min(start + _BATCH, len(keys) - 1)])
            keys = keys[-1:]
        for key in keys:
            self._delete_one(key)

    def exists(self, key: str) -> bool:
        """See `Store.exists`."""
        return self._head(check_key(key)) is not None

    @property
    def trials(self) -> S3Trials:
        """What `store.probing` tries of the server."""
        return S3Trials(self._requests)

    def close(self) -> None:
        """Close the connections; they are made again when they are needed."""
        self._requests.close()

    # Writing

    def _put_new(self, key: str, body: Body, is_checked: bool) -> None:
        """Make an object unless another one is there already."""
        features = self._requests.features
        is_known = features.is_known(Extra.CONDITION)
        is_on_faith = is_known and features.can(Extra.CONDITION)
        if not is_on_faith and (same := self._is_same(key, body)) is not None:
            self._check_same(key, same)
            return
        etag = self._upload(key, body, is_new=True)
        if etag is not None and not is_known and features.can(Extra.CONDITION):
            # A server that ignores the condition says that it made the object a second time.
            if self._upload(key, body, is_new=True) is None:
                features.have(Extra.CONDITION)
            else:
                features.lack(Extra.CONDITION)
        if etag is not None and features.can(Extra.CONDITION):
            if is_checked or _is_doubtful(body, etag):
                try:
                    self._check_stored(key, body, etag)
                except StoreBusy:
                    if not self._is_ours(key, etag):
                        raise
                    # We have made it just now, and nobody relies on it yet: what is wrong may be put right.
                    self._check_stored(key, body, self._upload(key, body))
            return
        # Somebody else's object or, when the answer was lost, our own: it tells by itself.
        found = self._is_same(key, body)
        if found is None:
            raise StoreBusy(f"cannot write {key} in {self.url}: the server took it, and does not have it")
        self._check_same(key, found)

    def _upload(self, key: str, body: Body, *, is_new: bool = False) -> str | None:
        """One PUT; the ETag of the object, or None where `is_new` and there is one already.

        What the server refuses to be sent along is left out from then on.
        """
        features = self._requests.features
        is_small = body.size <= _SMALL_BYTES
        data: Any = body.whole() if is_small else body
        wanted = {Extra.CHECKSUM}
        if is_new:
            wanted.add(Extra.CONDITION)
        if not is_small:
            wanted.add(Extra.UNSIGNED)
        used = {extra for extra in wanted if features.can(extra)}
        left_out: list[Extra] = []
        while True:
            arguments: dict[str, Any] = {"Body": data}
            if Extra.CHECKSUM in used:
                arguments["ChecksumCRC32"] = body.crc32()
            if Extra.CONDITION in used:
                arguments["IfNoneMatch"] = "*"
            body.seek(0)
            try:
                response = self._requests.ask(
                    f"write {key}",
                    "put_object",
                    key=key,
                    is_signing_payload=Extra.UNSIGNED not in used,
                    **arguments,
                )
            except Failed as failed:
                trouble = failed.trouble
                if trouble.kind is Kind.PRECONDITION and Extra.CONDITION in used:
                    return None
                refused = _refused(trouble, used)
                if refused is None:
                    raise self._requests.explained(failed) from failed.__cause__
                used.discard(refused)
                left_out.append(refused)
                continue
            for extra in left_out:
                features.lack(extra)
            return _tag(response)

    def _check_stored(self, key: str, body: Body, etag: str | None) -> None:
        """Raise `StoreBusy` unless the object is there as it was sent, whatever the server has said."""
        found = self._head(key)
        if found is None:
            raise StoreBusy(f"cannot write {key} in {self.url}: the server took it, and does not have it")
        checksum = found.get("ChecksumCRC32")
        is_same = int(found.get("ContentLength") or 0) == body.size and (
            not checksum or found.get("ChecksumType") == "COMPOSITE" or checksum == body.crc32()
        )
        tag = _tag(found)
        if is_same and (_is_doubtful(body, tag) or (not checksum and etag and tag and tag != etag)):
            # Some servers keep the checksum that they were sent without looking at it, some change tags.
            is_same = self._is_same(key, body) is True
        if not is_same:
            raise StoreBusy(f"cannot write {key} in {self.url}: the server holds other bytes than were sent")

    def _is_ours(self, key: str, etag: str) -> bool:
        """Whether the object is the one that our PUT was answered with this tag for, not somebody else's."""
        found = self._head(key)
        return found is not None and bool(etag) and _tag(found) == etag

    def _is_same(self, key: str, body: Body) -> bool | None:
        """Whether the object holds these bytes; None when there is no object."""
        try:
            offset = 0
            while True:
                # One byte more than there should be.
                wanted = min(_CHUNK_BYTES, body.size + 1 - offset)
                data = self.get(key, offset, wanted)
                if not body.is_at(offset, data):
                    return False
                offset += len(data)
                if len(data) < wanted:
                    return offset == body.size
        except KeyMissing:
            return None

    def _check_same(self, key: str, is_same: bool) -> None:
        if not is_same:
            raise RepositoryDamaged(
                f"another object is already stored as {key} in {self.url}", fields={"key": key}
            )

    def _delete_one(self, key: str) -> None:
        try:
            self._requests.ask(f"delete {key}", "delete_object", key=key)
        except Failed as failed:
            if failed.trouble.kind is not Kind.KEY_MISSING:
                raise self._requests.explained(failed) from failed.__cause__

    def _delete_batch(self, keys: Sequence[str]) -> None:
        action = f"delete {keys[0]} and {len(keys) - 1} more"
        names = [{"Key": self._place.root + key} for key in keys]
        try:
            response = self._requests.ask(action, "delete_objects", Delete={"Objects": names, "Quiet": True})
        except Failed as failed:
            if failed.trouble.kind is not Kind.UNSUPPORTED:
                raise self._requests.explained(failed) from failed.__cause__
            self._requests.features.lack(Extra.BATCHES)
            for key in keys:
                self._delete_one(key)
            return
        for error in response.get("Errors") or ():
            trouble = read_trouble(_Answer({"Error": error}))
            if trouble.kind is not Kind.KEY_MISSING:
                key = str(error.get("Key", "")).removeprefix(self._place.root)
                raise self._requests.explain(trouble, f"delete {key}")

    # Reading

    def _get(self, key: str, offset: int, length: int | None) -> tuple[Mapping[str, Any], bytes]:
        if length is not None and length <= 0:
            if not self.exists(key):
                raise KeyMissing(key)
            return {}, b""
        arguments: dict[str, Any] = {}
        if offset or length is not None:
            end = "" if length is None else str(offset + length - 1)
            arguments["Range"] = f"bytes={offset}-{end}"
        else:
            # Of a whole object the checksum is compared by botocore; of a range there is none.
            arguments["ChecksumMode"] = "ENABLED"
        data: bytes
        try:
            response, data = self._requests.ask(f"read {key}", "get_object", _read_body, key=key, **arguments)
        except Failed as failed:
            if failed.trouble.kind is Kind.KEY_MISSING:
                raise KeyMissing(key) from None
            if failed.trouble.kind is Kind.RANGE:
                return {}, b""
            raise self._requests.explained(failed) from failed.__cause__
        if "Range" in arguments and not response.get("ContentRange"):
            # The server knows no ranges and sent everything.
            data = data[offset:] if length is None else data[offset : offset + length]
            response = {}
        self._check_length(key, response, data, offset, length)
        return response, data

    def _head(self, key: str) -> Mapping[str, Any] | None:
        try:
            found: Mapping[str, Any] = self._requests.ask(
                f"look at {key}", "head_object", key=key, ChecksumMode="ENABLED"
            )
            return found
        except Failed as failed:
            trouble = failed.trouble
            if trouble.kind in (Kind.KEY_MISSING, Kind.BUCKET_MISSING):
                return None
            if trouble.code.startswith("status") and trouble.kind not in (Kind.BUSY, Kind.THROTTLED):
                # An answer to HEAD has no body that tells the reason; one to GET has.
                try:
                    self.get(key, 0, 1)
                except KeyMissing:
                    return None
                # It is well again: credentials were renewed, for one.
                raise StoreBusy(f"cannot look at {key} in {self.url}: {trouble.reason}") from failed.__cause__
            raise self._requests.explained(failed) from failed.__cause__

    def _check_length(
        self, key: str, response: Mapping[str, Any], data: bytes, offset: int, length: int | None
    ) -> None:
        """Raise `StoreBusy` when the connection ended before all was here: not every client notices."""
        expected = response.get("ContentLength")
        said = str(response.get("ContentRange") or "").rpartition("/")
        first = said[0].removeprefix("bytes").strip(" =").partition("-")[0]
        if said[2].isdigit():
            rest = max(0, int(said[2]) - offset)
            expected = rest if length is None else min(length, rest)
        is_elsewhere = first.isdigit() and int(first) != offset
        if is_elsewhere or (expected is not None and len(data) != int(expected)):
            came = f"{len(data)} bytes came of {expected} from {first or offset}"
            raise StoreBusy(f"cannot read {key} in {self.url}: {came}")


class _Answer(Exception):
    """One object's part of an answer, in the form of botocore's errors."""

    def __init__(self, response: Mapping[str, Any]) -> None:
        super().__init__()
        self.response = dict(response)


def _is_doubtful(body: Body, etag: str | None) -> bool:
    """Whether a small object may be another one, by its tag: not all that look like an MD5 are one.

    The MD5 of a large one takes longer than sending it; its checksum goes with it.
    """
    is_md5 = etag is not None and _MD5.fullmatch(etag) is not None
    return is_md5 and body.size <= _SMALL_BYTES and etag != f'"{body.md5()}"'


def _tag(response: Mapping[str, Any]) -> str:
    """The tag of the object, unless it is encrypted in a way that makes another one of every writing."""
    if str(response.get("ServerSideEncryption") or "").startswith("aws:kms"):
        return ""
    return str(response.get("ETag") or "")


def _refused(trouble: Trouble, used: set[Extra]) -> Extra | None:
    """What of that which was sent along may be what the server did not take."""
    if trouble.code in ("SignatureDoesNotMatch", "XAmzContentSHA256Mismatch"):
        order: tuple[Extra, ...] = (Extra.UNSIGNED,)
    elif trouble.kind is not Kind.UNSUPPORTED and trouble.status != 400:
        order = ()
    elif trouble.status == 501:
        order = (Extra.CONDITION, Extra.CHECKSUM, Extra.UNSIGNED)
    else:
        order = (Extra.CHECKSUM, Extra.UNSIGNED, Extra.CONDITION)
    return next((extra for extra in order if extra in used), None)


def _read_body(response: Mapping[str, Any]) -> tuple[Mapping[str, Any], bytes]:
    with response["Body"] as body:
        return response, body.read()


def _age_s(entry: Mapping[str, Any], response: Mapping[str, Any]) -> float | None:
    """By the clock of the server alone: ours may be wrong."""
    made = entry.get("LastModified")
    now = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    if made is None or not now:
        return None
    try:
        return max(0.0, float((parsedate_to_datetime(now) - made).total_seconds()))
    except (TypeError, ValueError):
        return None
