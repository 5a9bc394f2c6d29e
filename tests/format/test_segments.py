"""Long sequences become trees of nodes that change little when the sequence does."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from replicated.format.segments import MAX_ITEMS, MAX_SEGMENT_BYTES, MAX_UNSPLIT_ITEMS, MIN_ITEMS, NodeTree


class Item(NamedTuple):
    """An item, or a node of several: `values` is what lies below it."""

    values: tuple[int, ...]
    digest: bytes
    size_bytes: int = 40


class Recorder:
    """Keeps the nodes that were written."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[int, tuple[int, ...]], int] = {}

    def write(self, level: int, items: Sequence[Item]) -> Item:
        values = tuple(value for item in items for value in item.values)
        self.nodes[level, values] = len(items)
        return Item(values, items[-1].digest if items else bytes(32))


def build(items: Sequence[Item]) -> tuple[Item, Recorder]:
    recorder = Recorder()
    tree = NodeTree(recorder.write)
    for item in items:
        tree.add(item)
    return tree.finish(), recorder


def make(numbers: Sequence[int], size_bytes: int = 40) -> list[Item]:
    return [Item((n,), blake3(n.to_bytes(8, "big")).digest(), size_bytes) for n in numbers]


@given(st.integers(0, 6000), st.sampled_from([40, 3000]))
@settings(max_examples=30)
def test_root_holds_the_whole_sequence_in_order(count: int, size_bytes: int) -> None:
    root, recorder = build(make(range(count), size_bytes))
    assert root.values == tuple(range(count))
    for (level, _), length in recorder.nodes.items():
        assert length <= MAX_ITEMS
        assert level == 0 or length >= 1
    if count <= MAX_UNSPLIT_ITEMS and count * size_bytes <= MAX_SEGMENT_BYTES:
        assert len(recorder.nodes) == 1
    if size_bytes == 3000:
        assert all(
            length * size_bytes <= MAX_SEGMENT_BYTES + size_bytes for length in recorder.nodes.values()
        )


def test_one_item_more_makes_one_node_more_a_level_at_most() -> None:
    for count in (MAX_UNSPLIT_ITEMS, MAX_UNSPLIT_ITEMS + 1):
        _, recorder = build(make(range(count)))
        assert (len(recorder.nodes) == 1) is (count == MAX_UNSPLIT_ITEMS)


@pytest.mark.parametrize("change", ["insert", "remove", "replace"])
def test_one_change_in_a_long_sequence_writes_few_nodes(change: str) -> None:
    numbers = list(range(50_000))
    _, before = build(make(numbers))
    chosen = random.Random(3)
    for _ in range(2):
        position = chosen.randrange(len(numbers))
        changed = numbers.copy()
        if change == "insert":
            changed.insert(position, 10**9)
        elif change == "remove":
            del changed[position]
        else:
            changed[position] = 10**9
        _, after = build(make(changed))
        new = after.nodes.keys() - before.nodes.keys()
        assert 1 <= len(new) <= 5
        assert sum(after.nodes[node] for node in new) < 5000


def test_items_that_never_end_a_segment_are_split_all_the_same() -> None:
    never = Item((1,), b"\xff" * 32)
    root, recorder = build([never] * 20_000)
    assert len(root.values) == 20_000
    assert max(recorder.nodes.values()) == MAX_ITEMS


def test_items_that_always_end_a_segment_make_few_levels() -> None:
    always = Item((1,), bytes(32))
    root, recorder = build([always] * 20_000)
    assert len(root.values) == 20_000
    assert max(level for level, _ in recorder.nodes) <= 3
    assert MIN_ITEMS**4 > 20_000
