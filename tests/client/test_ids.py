"""Ids, and what users may write where one is expected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate.errors import InvalidArgument
from replicate.ids import MIN_PREFIX_LENGTH, Reference, is_id, new_id, parse_reference, short

prefixes = st.text("0123456789abcdef", min_size=MIN_PREFIX_LENGTH, max_size=64)


def test_new_ids_are_ids_and_differ():
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(is_id(identifier) for identifier in ids)
    assert all(len(short(identifier)) == 7 for identifier in ids)


@given(prefixes, st.sampled_from(["", ":best", ":latest", ":code"]))
def test_a_reference_is_a_prefix_and_a_selection(prefix, selection):
    assert parse_reference(prefix + selection) == Reference(prefix, selection.removeprefix(":"))


@given(prefixes, st.integers(0, 10**18 - 1))
def test_a_step_selects_a_checkpoint(prefix, step):
    assert parse_reference(f"{prefix}:step={step}") == Reference(prefix, "step", step)


def test_latest_is_the_newest_experiment():
    assert parse_reference("latest").is_latest
    assert parse_reference("latest:best") == Reference("", "best")


def test_case_and_surrounding_space_do_not_matter():
    assert parse_reference(" ABCD ") == Reference("abcd")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "xyz1",
        "../..",
        "a/b",
        "abcd:",
        "abcd:worst",
        "abcd:step=",
        "abcd:step=-1",
        "g" * 4,
        "a" * 65,
        "abc",
    ],
)
def test_anything_else_is_refused_naming_it(text):
    with pytest.raises(InvalidArgument) as caught:
        parse_reference(text)
    assert text.partition(":")[0] in str(caught.value)
    assert caught.value.hint


@given(st.text(max_size=80))
def test_any_text_is_a_reference_or_an_invalid_argument(text):
    try:
        parse_reference(text)
    except InvalidArgument:
        pass
