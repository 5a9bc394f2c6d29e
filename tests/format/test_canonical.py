"""The two encodings of structured objects."""

import json
import math

import msgpack
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from replicated.format.canonical import (
    Malformed,
    decode_value,
    dump_json,
    encode_value,
    load_json,
    pack,
    pack_array_header,
    seal,
    unpack,
    unseal,
)

numbers = st.integers(-(2**63), 2**64 - 1)
node_values = st.recursive(numbers | st.binary(max_size=40), lambda inner: st.lists(inner, max_size=5))
texts = st.text(alphabet=st.characters(exclude_categories=()), max_size=20)
user_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts.filter(lambda text: text.isprintable()),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "b", "$float", "$object", "$", "$int"]), inner, max_size=4)
    ),
    max_leaves=20,
)


def as_tuples(value: object) -> object:
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def same(left: object, right: object) -> bool:
    """Equality that tells 1 from 1.0 and True, 0.0 from -0.0, and takes NaN for equal to itself."""
    return repr(left) == repr(right)


# MessagePack


@given(node_values)
def test_unpacked_is_what_was_packed(value: object) -> None:
    assert unpack(pack(value)) == as_tuples(value)


@given(st.integers(0, 70000))
def test_array_header_is_that_of_messagepack(length: int) -> None:
    assert pack_array_header(length) + b"\xc0" * length == msgpack.packb([None] * length)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x91",
        b"\x01\x01",
        b"\xcc\x01",  # 1 in two bytes instead of one
        b"\xcd\x00\x80",
        b"\xd9\x01a",
        b"\xc5\x00\x01a",
        b"\xdc\x00\x01\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 5000 + b"\xc0",
        b"\xa1\xff",
    ],
)
def test_not_canonical_messagepack_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        unpack(data)


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_canonical(data: bytes) -> None:
    try:
        value = unpack(data)
    except Malformed:
        return
    assert pack(value) == data


# Sealed JSON


def test_sealed_object_can_be_checked_with_plain_tools() -> None:
    data = seal({"b": [1, {}], "a": "é\udcff"})
    text = b'{\n "a": "\\u00e9\\udcff",\n "b": [\n  1,\n  {}\n ]\n}'
    digest = blake3(text).hexdigest().encode()
    assert data == text[:-2] + b',\n "blake3": "' + digest + b'"\n}\n'
    assert json.loads(data)["a"] == "é\udcff"


@given(st.dictionaries(st.text(max_size=5), user_values, min_size=1, max_size=4))
def test_unsealed_is_what_was_sealed(members: dict[str, object]) -> None:
    encoded = {key: encode_value(value) for key, value in members.items()}
    assert same(unseal(seal(encoded)), json.loads(json.dumps(encoded, sort_keys=True)))


@given(user_values)
def test_decoded_value_is_what_was_encoded(value: object) -> None:
    text = json.dumps(encode_value(value), allow_nan=False)
    assert same(decode_value(json.loads(text)), value)


def test_every_flipped_byte_of_a_sealed_object_is_found() -> None:
    data = seal({"name": "x", "values": [1.5, None, {"$float": "NaN"}]})
    for position in range(len(data)):
        for bits in (0x01, 0x20, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= bits
            with pytest.raises(Malformed):
                unseal(bytes(damaged))


def test_every_truncation_and_extension_of_a_sealed_object_is_found() -> None:
    data = seal({"name": "x"})
    for damaged in (*(data[:length] for length in range(len(data))), data + b"\n", data + data, b" " + data):
        with pytest.raises(Malformed):
            unseal(damaged)


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        unseal(data)


@pytest.mark.parametrize(
    "text",
    [
        "[]", "1", "", "nonsense", '{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', '{"a": 1, "a": 2}',
        '{"a":' * 200_000 + "1" + "}" * 200_000, '{"a": ' + "9" * 5000 + "}", '{"a": "é"}',
    ],
)  # fmt: skip
def test_json_that_no_writer_made_is_refused(text: str) -> None:
    with pytest.raises(Malformed):
        load_json(text.encode())


def test_json_without_a_seal_is_what_was_dumped() -> None:
    assert load_json(dump_json({"a": [1, "b"]})) == {"a": [1, "b"]}


def test_huge_integers_survive_whatever_the_limit_of_decimal_digits() -> None:
    for value in (10**5000, -(10**5000), 2**1024, 2**1024 - 1, -(2**63)):
        assert decode_value(json.loads(json.dumps(encode_value(value)))) == value


def test_special_floats_survive() -> None:
    assert math.isnan(decode_value(encode_value(math.nan)))
    assert decode_value(encode_value([math.inf, {"x": -math.inf}])) == [math.inf, {"x": -math.inf}]


def test_value_that_is_nested_too_deeply_is_refused() -> None:
    value: object = 1
    for depth in range(5000):
        value = {"a": value} if depth % 2 else [value]
    with pytest.raises(Malformed, match="too deeply"):
        decode_value(value)


@pytest.mark.parametrize(
    "value",
    [{"$float": "nan"}, {"$float": 1}, {"$int": "12"}, {"$int": "0x"}, {"$object": []}, {"$new": 1},
     {"$float": "NaN", "a": 1}, [{"$": {}}]],
)  # fmt: skip
def test_unknown_kinds_of_values_are_refused(value: object) -> None:
    with pytest.raises(Malformed):
        decode_value(value)
