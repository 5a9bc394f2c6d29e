"""Reading the members of a JSON object with a check of their types.

Members that nobody asks for are ignored: later versions may add some.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeVar

from replicate.ids import is_id
from replicate.records import parse_time
from replicated.chunk.codec import HASH_BYTES
from replicated.format.canonical import Malformed, decode_value

T = TypeVar("T")


class Members:
    """The members of one object; every method raises `Malformed` when a member is not what is asked for."""

    def __init__(self, members: Mapping[str, Any]) -> None:
        self._members = members

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """A member of exactly this type; without a `default` it has to be there."""
        value = self._members.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not kind:
            raise Malformed(f"member {name!r} is not a {kind.__name__}")
        return value

    def optional(self, name: str) -> Members | None:
        """A member that is an object, or None when it is null or absent."""
        return None if self._members.get(name) is None else self.object(name)

    def object(self, name: str) -> Members:
        """A member that is an object; empty when absent."""
        return Members(self.get(name, dict, {}))

    def strings(self, name: str) -> tuple[str, ...]:
        """A member that is an array of strings; empty when absent."""
        values = self.get(name, list, [])
        if not all(type(value) is str for value in values):
            raise Malformed(f"member {name!r} is not a list of strings")
        return tuple(values)

    def string_map(self, name: str) -> dict[str, str]:
        """A member that is an object of strings; empty when absent."""
        values = self.get(name, dict, {})
        if not all(type(value) is str for value in values.values()):
            raise Malformed(f"member {name!r} is not an object of strings")
        return values

    def values(self, name: str) -> dict[str, Any]:
        """A member that holds values of a user; empty when absent."""
        values = decode_value(self.get(name, dict, {}))
        if type(values) is not dict:
            raise Malformed(f"member {name!r} is not an object")
        return values

    def id(self, name: str) -> str:
        """A member that is an id."""
        value = self.get(name, str)
        if not is_id(value):
            raise Malformed(f"member {name!r} is not an id")
        return value

    def time(self, name: str) -> datetime:
        """A member that is a time."""
        try:
            return parse_time(self.get(name, str))
        except ValueError as error:
            raise Malformed(f"member {name!r} is not a time") from error

    def natural(self, name: str, default: int | None = None, maximum: int = 2**63 - 1) -> int:
        """A member that is an integer from 0 to `maximum`."""
        value = self.get(name, int, default)
        if not 0 <= value <= maximum:
            raise Malformed(f"member {name!r} is out of range")
        return value

    def digest(self, name: str) -> bytes:
        """A member that is a hash in hexadecimal."""
        value = self.get(name, str)
        try:
            digest = bytes.fromhex(value)
        except ValueError:
            digest = b""
        if len(digest) != HASH_BYTES or digest.hex() != value:
            raise Malformed(f"member {name!r} is not a hash")
        return digest
