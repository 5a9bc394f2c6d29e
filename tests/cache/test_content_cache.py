"""What is kept comes back as it was, until others need the room; and nothing else ever does."""

import os
import random
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from blake3 import blake3

from replicated.cache import ContentCache

LIMIT_BYTES = 8 << 20


def halves(content):
    return [content[: len(content) // 2], memoryview(content)[len(content) // 2 :]]


def build(cache, content):
    return cache.build_plain(blake3(content).digest(), len(content), halves(content))


def read(cache, content):
    """The plain file of a content, read at once; None when it is not there."""
    plain = cache.open_plain(blake3(content).digest(), len(content))
    if plain is None:
        return None
    with plain:
        buffer = bytearray(plain.size)
        assert plain.read_into(memoryview(buffer), 0) == plain.size
        assert plain.is_intact()
        return bytes(buffer)


def test_chunks_come_back_also_to_another_process_later(cache, contents, reopen):
    chunks = contents(20) | contents(100, 100) | contents(1, 1)
    cache.remember(chunks)
    assert cache.recall(list(chunks)) == chunks
    cache.close()
    assert reopen().recall([*chunks, blake3(b"other").digest()]) == chunks


def test_what_was_never_kept_is_missing(cache):
    assert cache.recall([blake3(b"x").digest()]) == {}
    assert cache.open_plain(blake3(b"x").digest(), 1) is None
    assert not cache.has_plain(blake3(b"x").digest())


def test_empty_chunk_is_nobodys_loss(cache):
    cache.remember({blake3(b"").digest(): b""})
    assert cache.recall([blake3(b"").digest()]) == {}


def test_few_chunks_wait_for_others_and_are_found_meanwhile(cache, contents, reopen):
    few, many = contents(2), contents(64, 1000, seed=1)
    cache.remember(few)
    assert cache.recall(list(few)) == few
    assert reopen().recall(list(few)) == {}
    cache.remember(many)
    assert reopen().recall([*few, *many]) == few | many


@pytest.mark.parametrize("size", [1, 4096, 3 << 20])
def test_plain_file_comes_back_and_cannot_be_written(cache, reopen, size):
    content = os.urandom(size)
    assert build(cache, content)
    assert cache.has_plain(blake3(content).digest())
    assert read(cache, content) == content
    assert build(cache, content), "it is there already"
    cache.close()
    with reopen().open_plain(blake3(content).digest(), size) as plain:
        assert stat.S_IMODE(os.fstat(plain.descriptor).st_mode) == 0o444


def test_plain_file_of_many_small_parts_is_whole(cache):
    content = os.urandom(1 << 20)
    parts = [content[at : at + 1000] for at in range(0, len(content), 1000)]
    assert cache.build_plain(blake3(content).digest(), len(content), iter(parts))
    assert read(cache, content) == content


def test_plain_file_is_read_from_anywhere_and_not_past_its_end(cache):
    content = os.urandom(10_000)
    assert build(cache, content)
    with cache.open_plain(blake3(content).digest(), len(content)) as plain:
        buffer = bytearray(5000)
        assert plain.read_into(memoryview(buffer), 7000) == 3000
        assert buffer[:3000] == content[7000:]
        assert plain.read_into(memoryview(buffer), 10_000) == 0


def test_zeros_take_no_room(cache, directory, taken):
    content = bytes(1 << 20) + b"x" + bytes(2 << 20)
    before = taken(directory)
    assert cache.build_plain(blake3(content).digest(), len(content), [content])
    assert read(cache, content) == content
    assert taken(directory) - before < 512 << 10


@pytest.mark.parametrize("wrong", ["other", "less", "more", "nothing"])
def test_parts_that_are_not_what_was_saved_make_no_file(cache, directory, taken, wrong, caplog):
    content = os.urandom(1 << 20)
    parts = {
        "other": [content[:-1], bytes([content[-1] ^ 1])],
        "less": [content[:-1]],
        "more": [content, b"x"],
        "nothing": [],
    }[wrong]
    before = taken(directory)
    assert not cache.build_plain(blake3(content).digest(), len(content), parts)
    assert "is not what was saved" in caplog.text
    assert read(cache, content) is None
    assert taken(directory) - before < 256 << 10
    assert build(cache, content)


def test_failure_of_a_part_passes_and_leaves_nothing(cache):
    content = os.urandom(1 << 20)

    def parts():
        yield content[:1000]
        raise KeyError("the store")

    with pytest.raises(KeyError, match="the store"):
        cache.build_plain(blake3(content).digest(), len(content), parts())
    assert read(cache, content) is None
    assert build(cache, content)


def test_plain_file_of_another_size_is_not_given(cache):
    content = os.urandom(1000)
    assert build(cache, content)
    assert cache.open_plain(blake3(content).digest(), 999) is None
    assert read(cache, content) == content


def test_file_longer_than_half_of_the_limit_is_not_asked_for(cache):
    def parts():
        raise AssertionError("nobody wants it")
        yield b""

    assert not cache.build_plain(bytes(32), LIMIT_BYTES // 2 + 1, parts())


def test_file_that_somebody_is_making_is_left_to_him(cache, reopen):
    content = os.urandom(1 << 20)
    other = reopen()

    def parts():
        yield content[:1000]
        assert not build(other, content)
        yield content[1000:]

    assert cache.build_plain(blake3(content).digest(), len(content), parts())
    assert read(other, content) == content


def test_chunk_that_is_large_for_the_cache_is_not_kept(cache, contents):
    large, small = contents(1, LIMIT_BYTES // 4 + 1), contents(1, 1000)
    cache.remember(large | small)
    assert cache.recall([*large, *small]) == small


def test_chunk_larger_than_a_file_of_chunks_gets_one_of_its_own(cache, contents, reopen):
    chunks = contents(3, 300_000) | contents(30, 1000)
    cache.remember(chunks)
    cache.close()
    assert reopen().recall(list(chunks)) == chunks


def test_what_was_used_last_stays(cache, contents, directory, taken, reopen):
    kept = contents(4, 256 << 10)
    cache.remember(kept)
    cache.close()
    for seed in range(1, 60):
        again = reopen()
        assert again.recall(list(kept)) == kept, seed
        again.remember(contents(4, 256 << 10, seed=seed))
        again.close()
        assert taken(directory) <= LIMIT_BYTES


def test_plain_file_that_is_open_is_not_evicted_and_the_others_are(cache, directory, taken):
    first, second = os.urandom(2 << 20), os.urandom(2 << 20)
    assert build(cache, first)
    assert build(cache, second)
    with cache.open_plain(blake3(first).digest(), len(first)) as plain:
        for _ in range(8):
            assert build(cache, os.urandom(2 << 20))
            assert taken(directory) <= LIMIT_BYTES
        assert os.fstat(plain.descriptor).st_nlink == 1
        assert read(cache, first) == first
        assert read(cache, second) is None
    for _ in range(8):
        assert build(cache, os.urandom(2 << 20))
    assert read(cache, first) is None


def test_nothing_is_kept_while_all_is_in_use(cache, directory, taken, contents):
    made = [os.urandom(1 << 20) for _ in range(7)]
    opened = []
    for content in made:
        build(cache, content)
        opened.append(cache.open_plain(blake3(content).digest(), len(content)))
    chunks = contents(40, 64 << 10)
    cache.remember(chunks)
    assert not build(cache, os.urandom(3 << 20))
    assert taken(directory) <= LIMIT_BYTES
    for plain in filter(None, opened):
        assert plain.is_intact()
        plain.close()
    assert build(cache, os.urandom(3 << 20))


def test_chunks_do_not_pile_up_places_of_what_is_gone(directory, contents, reopen, taken):
    for seed in range(40):
        cache = reopen()
        cache.remember(contents(2000, 500, seed=seed))
        cache.close()
        assert taken(directory) <= LIMIT_BYTES
    databases = [path for path in directory.iterdir() if path.suffix == ".db"]
    # 80,000 chunks were kept one after the other, and some 14,000 have room.
    assert sum(path.stat().st_size for path in databases) < 1 << 20


def test_lower_limit_holds_from_the_start(cache, contents, directory, taken, reopen):
    for seed in range(10):
        cache.remember(contents(10, seed=seed))
    assert build(cache, os.urandom(2 << 20))
    cache.close()
    assert taken(directory) > 4 << 20
    reopen(2 << 20).close()
    assert taken(directory) <= 2 << 20


def test_limit_below_the_database_alone_begins_anew(directory, contents, taken, reopen):
    cache = reopen(64 << 20)
    for seed in range(20):
        cache.remember(contents(1000, 200, seed=seed))
    cache.close()
    assert taken(directory) > 4 << 20
    lower = reopen(1 << 20)
    assert taken(directory) <= 1 << 20
    chunks = contents(10, 1000, seed=99)
    lower.remember(chunks)
    lower.close()
    assert reopen(1 << 20).recall(list(chunks)) == chunks


def test_whoever_keeps_nothing_leaves_what_others_keep(cache, contents, reopen):
    chunks = contents(100)
    cache.remember(chunks)
    cache.close()
    none = reopen(0)
    none.remember(contents(100, seed=5))
    assert (none.recall(list(chunks)), build(none, b"content")) == ({}, False)
    none.close()
    again = reopen(1 << 30)
    assert again.recall(list(chunks)) == chunks
    assert again.recall(list(contents(100, seed=5))) == {}


@pytest.mark.parametrize("limit_bytes", [1, 100_000])
def test_limit_that_is_nothing_keeps_nothing(cache, contents, directory, taken, reopen, limit_bytes):
    chunks, content = contents(100), os.urandom(10_000)
    cache.remember(chunks)
    cache.close()
    none = reopen(limit_bytes)
    none.remember(chunks)
    assert not build(none, content)
    none.close()
    assert reopen(limit_bytes).recall(list(chunks)) == {}
    assert read(none, content) is None
    # A database without tables in use is all that there may be.
    assert taken(directory) < 300_000


def test_closed_cache_is_an_empty_one(cache, contents):
    chunks, content = contents(10), os.urandom(1000)
    cache.remember(chunks)
    assert build(cache, content)
    cache.close()
    cache.close()
    cache.remember(contents(10, seed=1))
    assert cache.recall(list(chunks)) == {}
    assert not cache.has_plain(blake3(content).digest())
    assert read(cache, content) is None
    assert not build(cache, os.urandom(10))


def test_plain_file_outlives_its_cache(cache):
    content = os.urandom(1000)
    assert build(cache, content)
    plain = cache.open_plain(blake3(content).digest(), len(content))
    cache.close()
    buffer = bytearray(1000)
    assert plain.read_into(memoryview(buffer), 0) == 1000
    assert plain.is_intact()
    plain.close()
    plain.close()


def test_directory_is_the_users_alone(cache, directory):
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_cache_in_a_place_that_cannot_be_is_an_empty_one(tmp_path, contents, caplog):
    (tmp_path / "file").write_bytes(b"")
    cache = ContentCache(tmp_path / "file" / "content", LIMIT_BYTES)
    cache.remember(contents(100))
    assert cache.recall(list(contents(1))) in ({}, contents(1))
    assert not build(cache, b"x")
    cache.close()
    assert "content cache" in caplog.text


def test_threads_share_one_cache(cache, contents, directory, taken):
    chunks = contents(200, 20_000)
    plain = [os.urandom(300_000) for _ in range(4)]
    ids = list(chunks)

    def use(number):
        source = random.Random(number)
        for _ in range(30):
            some = source.sample(ids, 10)
            cache.remember({chunk_id: chunks[chunk_id] for chunk_id in some})
            found = cache.recall(some)
            assert found.items() <= chunks.items()
            content = source.choice(plain)
            build(cache, content)
            assert read(cache, content) in (content, None)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(use, range(8))) == [None] * 8
    assert taken(directory) <= LIMIT_BYTES
    assert all(read(cache, content) == content for content in plain)
