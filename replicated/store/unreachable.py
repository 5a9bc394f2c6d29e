"""A store that cannot be reached, for what this machine knows of a repository all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from replicate.errors import ReplicateError
from replicated.store.base import Buffer, Capabilities, ObjectInfo


class UnreachableStore:
    """Answers every request with the same error."""

    capabilities = Capabilities(has_costly_requests=True)

    def __init__(self, url: str, make_error: Callable[[], ReplicateError]) -> None:
        self.url = url
        self._make_error = make_error

    def put(
        self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
    ) -> None:
        """Raises."""
        self._raise()

    def replace(self, key: str, data: bytes) -> None:
        """Raises."""
        self._raise()

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Raises."""
        self._raise()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Raises."""
        self._raise()

    def delete(self, *keys: str) -> None:
        """Raises."""
        self._raise()

    def exists(self, key: str) -> bool:
        """Raises."""
        self._raise()

    def _raise(self) -> NoReturn:
        raise self._make_error()
