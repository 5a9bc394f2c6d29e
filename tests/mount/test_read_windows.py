"""What is guessed from the reads of a file."""

import random

from hypothesis import given
from hypothesis import strategies as st

from replicated.mount.reading.windows import FIRST_WINDOW_BYTES, MAX_CURSORS, ReadPattern

MIB = 1 << 20
MOST = 8 * MIB
ROOM = 12 * MIB


def follow_all(reads, size, most=MOST, room=ROOM):
    """The ranges that are given out, and the reads that were taken for sequential."""
    pattern = ReadPattern(size, most)
    guesses = [pattern.follow(offset, length, room) for offset, length in reads]
    return [(guess.start, guess.end) for guess in guesses if guess.end > guess.start], [
        guess.is_sequential for guess in guesses
    ]


def in_order(size, length, start=0):
    return [(offset, length) for offset in range(start, size, length)]


def shuffled_nearby(reads, distance, seed):
    """The reads in an order as of several threads that take one each."""
    rnd = random.Random(seed)
    places = sorted((position + rnd.uniform(0, distance), read) for position, read in enumerate(reads))
    return [read for _, read in places]


def test_file_that_is_read_in_order_is_read_ahead_with_growing_windows():
    ranges, are_sequential = follow_all(in_order(64 * MIB, MIB), 64 * MIB)
    assert are_sequential == [False] + [True] * 63
    sizes = [end - start for start, end in ranges]
    assert sizes[0] == FIRST_WINDOW_BYTES
    assert max(sizes) <= MOST
    assert len(ranges) < 20, "few large requests"
    assert ranges[-1][1] == 64 * MIB


@given(
    length=st.sampled_from([4096, 65536, 131072, MIB]),
    distance=st.floats(0, 4),
    seed=st.integers(0, 1000),
    size=st.integers(0, 48 * MIB),
)
def test_nothing_is_given_out_again_while_it_is_still_to_be_read(length, distance, seed, size):
    size = min(size, 400 * length)
    pattern = ReadPattern(size, MOST)
    for offset, count in shuffled_nearby(in_order(size, length), distance, seed):
        outstanding = [(cursor.position, cursor.ahead) for cursor in pattern._cursors]
        guess = pattern.follow(offset, count, ROOM)
        assert 0 <= guess.start <= guess.end <= size
        if guess.start < guess.end:
            assert all(guess.end <= start or end <= guess.start for start, end in outstanding if start < end)


@given(length=st.sampled_from([4096, 65536, 131072, MIB]), size=st.integers(0, 48 * MIB))
def test_all_but_the_first_two_reads_are_given_out_once(length, size):
    size = min(size, 400 * length)
    ranges, _ = follow_all(in_order(size, length), size)
    covered = [offset for start, end in ranges for offset in (start, end)]
    assert covered == sorted(covered)
    if size > 2 * length:
        assert covered[0] == 2 * length
        assert covered[-1] == size
        assert covered[1:-1:2] == covered[2::2], "without gaps"


@given(
    reads=st.lists(
        st.tuples(st.integers(0, 64 * MIB), st.sampled_from([4096, 131072, MIB])), min_size=1, max_size=40
    ),
    runs=st.lists(st.tuples(st.integers(0, 40 * MIB), st.integers(1, 20)), max_size=12),
    room=st.integers(0, 16 * MIB),
    seed=st.integers(0, 1000),
)
def test_no_more_is_outstanding_than_there_is_room_for(reads, runs, room, seed):
    reads = [*reads, *((start + n * MIB, MIB) for start, count in runs for n in range(count))]
    random.Random(seed).shuffle(reads)
    for start, count in runs:
        reads.extend((start + n * MIB, MIB) for n in range(count))
    pattern = ReadPattern(64 * MIB, MOST)
    for offset, length in reads:
        guess = pattern.follow(offset, length, room)
        assert guess.end - guess.start <= min(room, MOST)
        assert sum(cursor.outstanding for cursor in pattern._cursors) <= room
        assert len(pattern._cursors) <= MAX_CURSORS


@given(st.lists(st.integers(0, 10_000), unique=True, max_size=300))
def test_reads_at_random_make_nothing_be_read_ahead(pages):
    # None begins where another ends, however near they lie.
    reads = [(page * 8192, 4096) for page in pages]
    ranges, are_sequential = follow_all(reads, 10_001 * 8192)
    assert ranges == []
    assert not any(are_sequential)


def test_little_room_makes_few_requests_as_well():
    ranges, _ = follow_all(in_order(64 * MIB, 128 << 10), 64 * MIB, most=32 * MIB, room=4 * MIB)
    assert all(end - start >= MIB for start, end in ranges[:-1])
    assert ranges[-1][1] == 64 * MIB


def test_several_readers_of_one_file_are_followed_each():
    starts = [0, 100 * MIB, 200 * MIB, 300 * MIB]
    reads = [(start + n * MIB, MIB) for n in range(30) for start in starts]
    ranges, _ = follow_all(reads, 400 * MIB, room=40 * MIB)
    for start in starts:
        mine = [pair for pair in ranges if start <= pair[0] < start + 100 * MIB]
        assert max(end for _, end in mine) >= start + 30 * MIB


def test_reader_who_jumps_about_has_room_where_he_is():
    reads = [(start + n * 65536, 65536) for start in range(0, 512 * MIB, 64 * MIB) for n in range(16)]
    ranges, _ = follow_all(reads, 512 * MIB, room=2 * MIB)
    assert {start // (64 * MIB) for start, _ in ranges} == set(range(8))


def test_reader_who_skips_a_little_is_still_followed():
    reads = [(0, MIB), (MIB, MIB)] + [(3 * MIB + n * 2 * MIB, MIB) for n in range(20)]
    _, are_sequential = follow_all(reads, 100 * MIB)
    assert all(are_sequential[1:])


def test_look_at_the_end_of_a_file_does_not_stop_its_reader():
    reads = [(0, MIB), (MIB, MIB), (90 * MIB, 4096), (2 * MIB, MIB), (3 * MIB, MIB)]
    _, are_sequential = follow_all(reads, 100 * MIB)
    assert are_sequential == [False, True, False, True, True]


def test_without_room_nothing_is_read_ahead_but_the_reader_is_followed():
    ranges, are_sequential = follow_all(in_order(16 * MIB, MIB), 16 * MIB, room=0)
    assert ranges == []
    assert all(are_sequential[1:])
