"""The two encodings of structured objects: canonical MessagePack and sealed JSON.

MessagePack is for tree nodes, which are addressed by their hash: one value has one encoding. JSON is
for what people read with `cat` and `jq`; its last member is the hash of the text before it, so that a
flipped byte is found without writing the text again. Both parsers are bounded and accept nothing that
the writers could not have made. docs/format.md has the bytes.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Mapping
from typing import Any, Final

import msgpack
from blake3 import blake3

#: Bounds of what is read; nothing that we write comes near.
MAX_JSON_BYTES: Final = 64 << 20
#: Levels of arrays and objects within a value of a user.
MAX_VALUE_DEPTH: Final = 100
#: Integers of more bits are written in hexadecimal: parsers refuse thousands of decimal digits.
MAX_PLAIN_INT_BITS: Final = 1024

_SEAL = re.compile(rb',\n "blake3": "([0-9a-f]{64})"\n\}\n')
_SEAL_LENGTH = len(',\n "blake3": ""\n}\n') + 64

_FLOAT, _INT, _OBJECT = "$float", "$int", "$object"
_SPECIAL_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_HEX_INT = re.compile(r"-?0x[0-9a-f]+")


class Malformed(Exception):
    """Bytes that no writer of this format could have made."""


class NewerFormat(Exception):
    """Bytes of a later version of the format."""


# MessagePack


def pack(value: Any) -> bytes:
    """Canonical MessagePack of arrays (lists, tuples), integers and bytes."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def pack_array_header(length: int) -> bytes:
    """What comes before the packed items of an array of this length."""
    if length < 16:
        return bytes([0x90 | length])
    if length < 1 << 16:
        return b"\xdc" + length.to_bytes(2, "big")
    return b"\xdd" + length.to_bytes(4, "big")


def unpack(data: bytes) -> Any:
    """The value that `pack` made, arrays as tuples; raises `Malformed` for anything else.

    It may still hold types that `pack` is not meant for; they are refused where they are used.
    """
    try:
        value = msgpack.unpackb(data, use_list=False, raw=False, strict_map_key=True)
        if pack(value) != data:
            raise Malformed("not in canonical form")
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise Malformed(f"not MessagePack: {error}") from error
    return value


def find_items(data: bytes) -> array[int]:
    """Where each item of an array begins, and where the last one ends, in bytes that `unpack` takes.

    The array is the last member of another one.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=len(data))
    unpacker.feed(data)
    for _ in range(unpacker.read_array_header() - 1):
        unpacker.skip()
    starts = array("I")
    for _ in range(unpacker.read_array_header()):
        starts.append(unpacker.tell())
        unpacker.skip()
    starts.append(unpacker.tell())
    return starts


def unpack_items(count: int, data: bytes) -> tuple[Any, ...]:
    """So many values that stand one after the other, in bytes that were checked before."""
    items: tuple[Any, ...] = msgpack.unpackb(pack_array_header(count) + data, use_list=False)
    return items


# JSON


def seal(members: Mapping[str, Any]) -> bytes:
    """A JSON object with the hash of its text as last member; `members` is not empty."""
    text = _dump(members)
    digest = blake3(text.encode("ascii")).hexdigest()
    return f'{text[:-2]},\n "blake3": "{digest}"\n}}\n'.encode("ascii")


def unseal(data: bytes) -> dict[str, Any]:
    """The members that `seal` wrote; raises `Malformed` when a byte has changed."""
    tail = _SEAL.fullmatch(data, max(0, len(data) - _SEAL_LENGTH))
    if tail is None:
        raise Malformed("it does not end with its hash")
    text = data[:-_SEAL_LENGTH] + b"\n}"
    if blake3(text).hexdigest().encode("ascii") != tail.group(1):
        raise Malformed("its hash is wrong")
    return load_json(text)


def dump_json(members: Mapping[str, Any]) -> bytes:
    """A JSON object without a hash, for objects that are overwritten."""
    return f"{_dump(members)}\n".encode("ascii")


def load_json(data: bytes) -> dict[str, Any]:
    """The members of a JSON object; raises `Malformed`."""
    if len(data) > MAX_JSON_BYTES:
        raise Malformed("it is too large")
    try:
        value = _JSON.decode(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Malformed("not a JSON object")
    return value


def encode_value(value: Any) -> Any:
    """A value of a user in the form in which JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, int) and value.bit_length() > MAX_PLAIN_INT_BITS:
        return {_INT: hex(value)}
    if isinstance(value, (list, tuple)):
        return [encode_value(item) for item in value]
    if isinstance(value, Mapping):
        members = {key: encode_value(item) for key, item in value.items()}
        return {_OBJECT: members} if any(key.startswith("$") for key in members) else members
    return value


def decode_value(value: Any, depth: int = 0) -> Any:
    """The value that `encode_value` took; raises `Malformed`."""
    if depth > MAX_VALUE_DEPTH:
        raise Malformed("a value is nested too deeply")
    if isinstance(value, list):
        return [decode_value(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("$") for key in value):
        return {key: decode_value(item, depth + 1) for key, item in value.items()}
    if len(value) == 1:
        ((kind, inner),) = value.items()
        if kind == _FLOAT and isinstance(inner, str) and inner in _SPECIAL_FLOATS:
            return _SPECIAL_FLOATS[inner]
        if kind == _INT and isinstance(inner, str) and _HEX_INT.fullmatch(inner):
            return int(inner, 16)
        if kind == _OBJECT and isinstance(inner, dict):
            return {key: decode_value(item, depth + 1) for key, item in inner.items()}
    raise Malformed(f"unknown kind of value: {', '.join(value)[:100]}")


def _dump(members: Mapping[str, Any]) -> str:
    return json.dumps(members, ensure_ascii=True, allow_nan=False, indent=1, sort_keys=True)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a float")
    return value


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member appears twice")
    return members


_JSON: Final = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite_float, object_pairs_hook=_unique_members
)
