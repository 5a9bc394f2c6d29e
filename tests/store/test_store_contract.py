"""What every store promises."""

import mmap
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate.errors import RepositoryDamaged
from replicated.store.base import KeyMissing, ObjectInfo, Store, check_prefix, is_key
from replicated.store.memory import MemoryStore

BAD_KEYS = [
    "", "/", "/a", "a/", "a//b", ".", "..", "a/..", "a/../b", "./a", "A", "a b", "a\n", "a\0", "é", "a\\b",
    "x" * 257,
]  # fmt: skip


def test_object_is_what_was_put(store: Store) -> None:
    store.put("packs/ab/x-1_2.bin", [b"one", bytearray(b""), memoryview(b"-two-"), b"three"])
    assert store.get("packs/ab/x-1_2.bin") == b"one-two-three"


def test_object_of_a_mapping_is_what_was_mapped(store: Store) -> None:
    with mmap.mmap(-1, 5) as mapping:
        mapping[:] = b"abcde"
        store.put("a", [mapping])
    assert store.get("a") == b"abcde"


def test_object_may_be_empty_and_without_parts(store: Store) -> None:
    store.put("a", [])
    store.put("b", [b""])
    assert store.get("a") == store.get("b") == b""
    assert sorted(info.key for info in store.list("")) == ["a", "b"]


def test_object_of_many_parts_is_whole(store: Store) -> None:
    parts = [bytes([number % 256]) * (number % 7) for number in range(5000)]
    store.put("a", parts)
    assert store.get("a") == b"".join(parts)


def test_putting_the_same_again_is_fine(store: Store) -> None:
    store.put("a", [b"xy"])
    store.put("a", [b"x", b"", b"y"])
    assert store.get("a") == b"xy"


@pytest.mark.parametrize("other", [b"", b"x", b"xz", b"xyz"])
def test_other_bytes_under_a_key_are_refused_and_the_old_ones_stay(store: Store, other: bytes) -> None:
    store.put("a/b", [b"xy"])
    with pytest.raises(RepositoryDamaged, match="a/b"):
        store.put("a/b", [other])
    assert store.get("a/b") == b"xy"


def test_range_ends_where_the_object_ends(store: Store) -> None:
    store.put("a", [b"0123456789"])
    assert store.get("a", 3) == b"3456789"
    assert store.get("a", 3, 4) == b"3456"
    assert store.get("a", 8, 100) == b"89"
    assert store.get("a", 10) == store.get("a", 99, 5) == store.get("a", 0, 0) == b""


def test_missing_object_is_named(store: Store) -> None:
    with pytest.raises(KeyMissing) as caught:
        store.get("no/such")
    assert caught.value.key == "no/such"
    assert not store.exists("no/such")


def test_replacing_overwrites(store: Store) -> None:
    store.replace("heartbeats/a.json", b"1")
    store.replace("heartbeats/a.json", b"")
    assert store.get("heartbeats/a.json") == b""
    store.replace("heartbeats/a.json", b"3")
    assert store.get("heartbeats/a.json") == b"3"


def test_list_gives_keys_with_the_prefix_and_their_sizes(store: Store) -> None:
    for key in ("a", "ab/c", "ab/d/e", "abc", "b"):
        store.put(key, [key.encode()])
    assert set(store.list("")) == {ObjectInfo(k, len(k)) for k in ("a", "ab/c", "ab/d/e", "abc", "b")}
    assert {info.key for info in store.list("ab")} == {"ab/c", "ab/d/e", "abc"}
    assert {info.key for info in store.list("ab/")} == {"ab/c", "ab/d/e"}
    assert {info.key for info in store.list("ab/d/")} == {"ab/d/e"}
    assert {info.key for info in store.list("ab/d/e")} == {"ab/d/e"}
    assert list(store.list("nothing/")) == []


def test_deleted_object_is_gone_and_may_be_deleted_again(store: Store) -> None:
    store.put("a/b", [b"x"])
    store.put("a/c", [b"y"])
    store.delete("a/b", "a/never")
    store.delete("a/b")
    store.delete()
    assert not store.exists("a/b")
    assert [info.key for info in store.list("")] == ["a/c"]
    store.put("a/b", [b"other"])
    assert store.get("a/b") == b"other"


@pytest.mark.parametrize("key", BAD_KEYS)
def test_impossible_key_is_refused_by_every_method(store: Store, key: str) -> None:
    for call in (
        lambda: store.put(key, [b""]),
        lambda: store.replace(key, b""),
        lambda: store.get(key),
        lambda: store.exists(key),
        lambda: store.delete(key),
    ):
        with pytest.raises(ValueError, match="key"):
            call()
    assert list(store.list("")) == []


@pytest.mark.parametrize("prefix", ["/", "/a", "../", "a/../b", "A", "a//b", " "])
def test_impossible_prefix_is_refused(store: Store, prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        list(store.list(prefix))


def test_of_many_writers_of_one_key_one_wins_and_the_rest_are_told(
    store: Store, request: pytest.FixtureRequest
) -> None:
    if request.node.callspec.params["store"] in ("s3-rclone", "gs-emulator"):
        pytest.skip("this server ignores conditions: of writers in the same moment, several may win")
    barrier = threading.Barrier(8)
    outcomes: list[bytes | None] = []

    def write(data: bytes) -> None:
        barrier.wait()
        try:
            store.put("repository.json", [data])
            outcomes.append(data)
        except RepositoryDamaged:
            outcomes.append(None)

    threads = [threading.Thread(target=write, args=(bytes([number]) * 10,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if outcome is not None]
    assert len(outcomes) == 8
    assert winners == [store.get("repository.json")]


@given(st.text(alphabet="ab/.-_A \0é", max_size=12))
def test_accepted_keys_are_safe_relative_paths(key: str) -> None:
    if is_key(key):
        parts = key.split("/")
        assert all(parts)
        assert ".." not in parts
        assert "." not in parts
        assert not key.startswith("/")
        assert check_prefix(key) == key
        memory = MemoryStore()
        memory.put(key, [b"x"])
        assert [info.key for info in memory.list("")] == [key]
