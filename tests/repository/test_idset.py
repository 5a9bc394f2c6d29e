"""A set of ids in little memory is a set like any other."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from replicated.idset import IdSet


def make_id(number: int) -> bytes:
    # Many in one bucket, some in others.
    return bytes([0, number % 3]) + hashlib.sha256(bytes([number])).digest()[2:]


ids = st.integers(0, 60).map(make_id)


@given(st.lists(st.tuples(st.sampled_from(["add", "keep", "undo"]), ids), max_size=200))
def test_it_holds_what_was_added_and_not_taken_back(steps: list[tuple[str, bytes]]) -> None:
    found = IdSet()
    kept: set[bytes] = set()
    expected: set[bytes] = set()
    for step, identifier in steps:
        if step == "add":
            assert found.add(identifier) == (identifier not in expected)
            expected.add(identifier)
        elif step == "keep":
            found.keep()
            kept = set(expected)
        else:
            found.undo()
            expected = set(kept)
        assert len(found) == len(expected)
    assert {make_id(number) for number in range(61) if make_id(number) in found} == expected
