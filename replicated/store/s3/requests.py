"""Requests to one bucket: made, and what can be mended at once is mended.

Wrong credentials are read anew, another region is signed for, a missing bucket is made; each once a request.
Whatever else fails is told to who asked, before it is known whether that matters to anybody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from replicate.errors import ReplicateError
from replicated.store.buckets import Place
from replicated.store.s3.body import Body
from replicated.store.s3.bucket import make_bucket
from replicated.store.s3.client import Clients
from replicated.store.s3.errors import Kind, Trouble, explain, read_trouble
from replicated.store.s3.features import Features, features_of


class Failed(Exception):
    """A request that failed, before it is known whether that matters."""

    def __init__(self, trouble: Trouble, action: str) -> None:
        super().__init__(trouble.reason)
        self.trouble = trouble
        self.action = action


class Requests:
    """Asks for objects of one bucket by their keys. Thread-safe."""

    def __init__(
        self, place: Place, parallel: int, *, create: bool, environment: Mapping[str, str] | None
    ) -> None:
        """`parallel`: how many are made at the same time; `create`: make the bucket when there is none."""
        self._place = place
        self._clients = Clients(environment, parallel)
        # Held while the bucket is made; False once it was seen, so that one that is taken away is missed.
        self._making = threading.Lock()
        self._may_make = create
        # Counts how often it was made, for those who missed it meanwhile.
        self._made = 0
        self._features: Features | None = None

    @property
    def features(self) -> Features:
        """What the server turned out to take."""
        if self._features is None:
            try:
                client = self._clients.get()
            except Exception as error:
                raise self.explain(read_trouble(error), "ask for anything") from error
            self._features = features_of(client, self._place.bucket)
        return self._features

    def close(self) -> None:
        """Close the connections; they are made again when they are needed."""
        self._clients.close()

    def explain(self, trouble: Trouble, action: str) -> ReplicateError:
        """The error to raise for what failed."""
        return explain(trouble, action, self._place.url, self._clients.endpoint)

    def explained(self, failed: Failed) -> ReplicateError:
        """The error to raise for a request that failed, and does matter."""
        return self.explain(failed.trouble, failed.action)

    def ask(
        self,
        action: str,
        operation: str,
        finish: Callable[[Any], Any] | None = None,
        *,
        key: str | None = None,
        is_signing_payload: bool = True,
        **arguments: Any,
    ) -> Any:
        """The answer to one request, through `finish`; raises `Failed`."""
        if key is not None:
            arguments["Key"] = self._place.root + key
        mended: set[Kind] = set()
        while True:
            generation, made = self._clients.generation, self._made
            try:
                client = self._clients.get(is_signing_payload=is_signing_payload)
                response = getattr(client, operation)(Bucket=self._place.bucket, **arguments)
                if finish is not None:
                    response = finish(response)
                self._may_make = False
                return response
            except Exception as error:
                trouble = read_trouble(error)
                if trouble.kind in mended or not self._mend(trouble, generation, made, operation):
                    raise Failed(trouble, action) from error
                mended.add(trouble.kind)
                if isinstance(arguments.get("Body"), Body):
                    arguments["Body"].seek(0)

    def _mend(self, trouble: Trouble, generation: int, made: int, operation: str) -> bool:
        """Whether it is worth asking again, at once."""
        if trouble.kind in (Kind.CREDENTIALS, Kind.DENIED):
            self._clients.renew(generation)
            return True
        if trouble.kind is Kind.REGION:
            return bool(trouble.region) and self._clients.move(generation, trouble.region)
        if trouble.kind is Kind.BUCKET_MISSING and operation != "head_object":
            with self._making:
                if made != self._made:
                    return True
                if not self._may_make:
                    return False
                make_bucket(self._clients, self._place)
                self._may_make = False
                self._made += 1
                return True
        return False
