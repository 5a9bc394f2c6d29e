"""What was read last is kept, of all repositories together within one bound, and never given to another."""

from replicated.reader import ChunkMemory

ONE, OTHER = object(), object()


def test_what_one_has_read_is_not_given_to_another() -> None:
    memory = ChunkMemory(100)
    memory.remember(ONE, {b"a": b"from one"})
    assert memory.recall(ONE, [b"a", b"b"]) == {b"a": b"from one"}
    assert memory.recall(OTHER, [b"a"]) == {}


def test_all_share_one_bound_and_what_was_used_last_stays() -> None:
    memory = ChunkMemory(30)
    memory.remember(ONE, {b"a": bytes(10), b"b": bytes(10)})
    memory.remember(OTHER, {b"c": bytes(10)})
    memory.recall(ONE, [b"a"])
    memory.remember(OTHER, {b"d": bytes(10)})
    assert set(memory.recall(ONE, [b"a", b"b"])) == {b"a"}
    assert set(memory.recall(OTHER, [b"c", b"d"])) == {b"c", b"d"}


def test_what_is_forgotten_makes_room() -> None:
    memory = ChunkMemory(20)
    memory.remember(ONE, {b"a": bytes(10), b"b": bytes(10)})
    memory.forget(ONE)
    memory.remember(OTHER, {b"c": bytes(10), b"d": bytes(10)})
    assert memory.recall(ONE, [b"a", b"b"]) == {}
    assert set(memory.recall(OTHER, [b"c", b"d"])) == {b"c", b"d"}
