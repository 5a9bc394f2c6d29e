"""Streams of files, and the supply of chunks behind them."""

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate.errors import RepositoryDamaged, RepositoryUnreachable
from replicated.file_reader import Piece
from replicated.mount.reading.streams import MAX_PARTS, Stream
from replicated.mount.reading.supply import IDLE_S, ChunkSupply, Share

MIB = 1 << 20
DEADLINE_S = 20


def eventually(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


class File:
    """A file in chunks, that counts what is fetched of it, and can be made to wait or to fail."""

    def __init__(self, data, lengths, name=b"file"):
        self.data = data
        self.chunks = {}
        self.extents = []
        self.counts = Counter()
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)
        self.errors = {}
        self.lock = threading.Lock()
        start = 0
        for number, length in enumerate(lengths):
            chunk_id = name + number.to_bytes(4, "big")
            self.chunks[chunk_id] = data[start : start + length]
            self.extents.append((chunk_id, start, length))
            start += length
        assert start == len(data)

    def iter_pieces(self, offset, length):
        for chunk_id, start, size in self.extents:
            begin, end = max(offset, start), min(offset + length, start + size)
            if begin < end:
                yield Piece(chunk_id, size, begin - start, end - start)

    def fetch(self, chunks):
        self.begun.release()
        assert self.gate.wait(DEADLINE_S)
        with self.lock:
            self.counts.update(chunks.keys())
        for chunk_id, length in chunks.items():
            if chunk_id in self.errors:
                raise self.errors[chunk_id]
            assert len(self.chunks[chunk_id]) == length
        return {chunk_id: self.chunks[chunk_id] for chunk_id in chunks}

    def id_at(self, position):
        return self.extents[position][0]


def make_file(size, mean=256 << 10, seed=0, name=b"file"):
    rnd = random.Random(seed)
    lengths = []
    while sum(lengths) < size:
        lengths.append(min(rnd.randrange(1, 2 * mean), size - sum(lengths)))
    return File(rnd.randbytes(size), lengths, name)


@pytest.fixture
def supplies():
    made = []

    def make(limit_bytes=16 * MIB, **options):
        made.append(ChunkSupply(limit_bytes, is_near=True, **options))
        return made[-1]

    yield make
    for supply in made:
        supply.close()


@pytest.fixture
def supply(supplies):
    return supplies()


def read(stream, offset, length):
    return b"".join(stream.read(offset, length, stream.guess(offset, length)))


def stream_of(file, supply, *, is_near=True):
    return Stream(file, len(file.data), supply, is_near=is_near)


def held_bytes(supply):
    """What is in memory, or has a place there while it is on its way."""
    with supply._lock:
        return supply._kept_bytes + supply._ahead_bytes


def is_quiet(supply):
    """Whether nothing is on its way."""
    return not supply._coming and not supply._workers._waiting


@given(
    size=st.integers(1, 3 * MIB),
    mean=st.sampled_from([1000, 50_000, 400_000]),
    limit=st.sampled_from([0, 100_000, MIB, 16 * MIB]),
    reads=st.lists(st.tuples(st.floats(0, 1), st.integers(1, MIB)), max_size=20),
    are_in_order=st.booleans(),
)
@settings(max_examples=30)
def test_every_byte_that_is_asked_for_is_given(size, mean, limit, reads, are_in_order):
    file = make_file(size, mean)
    supply = ChunkSupply(limit, is_near=True)
    try:
        stream = stream_of(file, supply)
        position = 0
        for place, length in reads:
            offset = position % size if are_in_order else int(place * (size - 1))
            length = min(length, size - offset)
            assert read(stream, offset, length) == file.data[offset : offset + length]
            position = offset + length
    finally:
        supply.close()


@pytest.mark.parametrize("threads", [1, 4])
def test_file_that_is_read_in_order_is_fetched_once_and_ahead(supplies, threads):
    # A thread that is held up comes late: what it needs is still there.
    supply = supplies(64 * MIB)
    file = make_file(40 * MIB)
    stream = stream_of(file, supply)

    def read_one(offset):
        return read(stream, offset, 128 << 10) == file.data[offset : offset + (128 << 10)]

    with ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(read_one, range(0, 40 * MIB, 128 << 10)))
    eventually(lambda: is_quiet(supply))
    assert set(file.counts.values()) == {1}
    assert len(file.counts) == len(file.chunks)


def test_reader_finds_what_it_reads_next_already_there(supply):
    file = make_file(8 * MIB)
    stream = stream_of(file, supply)
    read(stream, 0, MIB)
    read(stream, MIB, MIB)
    eventually(lambda: is_quiet(supply))
    before = file.counts.total()
    read(stream, 2 * MIB, MIB)
    assert set(file.counts.values()) == {1}
    fetched = {chunk_id for chunk_id, start, _ in file.extents if start < 3 * MIB}
    assert fetched <= file.counts.keys()
    assert before >= len(fetched)


def test_reads_at_random_fetch_the_chunks_they_need_and_no_other(supply):
    file = make_file(64 * MIB)
    stream = stream_of(file, supply)
    rnd = random.Random(2)
    needed = set()
    for _ in range(200):
        offset = rnd.randrange(0, 64 * MIB // 8192) * 8192
        needed.update(piece.chunk_id for piece in file.iter_pieces(offset, 4096))
        assert read(stream, offset, 4096) == file.data[offset : offset + 4096]
    eventually(lambda: is_quiet(supply))
    assert file.counts.keys() == needed


@given(seed=st.integers(0, 100), limit=st.sampled_from([MIB, 6 * MIB, 16 * MIB]))
@settings(max_examples=10)
def test_no_more_is_in_memory_than_allowed(seed, limit):
    rnd = random.Random(seed)
    supply = ChunkSupply(limit, is_near=True)
    files = [make_file(8 * MIB, 200_000, number, name=b"%d" % number) for number in range(3)]
    streams = [stream_of(file, supply) for file in files]
    positions = [0] * 3
    try:
        for _ in range(60):
            which = rnd.randrange(3)
            if rnd.random() < 0.1:
                positions[which] = rnd.randrange(0, 7 * MIB)
            length = min(rnd.choice([4096, 128 << 10, MIB]), 8 * MIB - positions[which])
            if length:
                offset = positions[which]
                assert read(streams[which], offset, length) == files[which].data[offset : offset + length]
                positions[which] += length
            assert held_bytes(supply) <= limit
        eventually(lambda: is_quiet(supply))
        assert held_bytes(supply) <= limit
        held = sum(map(len, supply._kept.values()))
        held += sum(len(chunk) for share in supply._shares for chunk in share.chunks.values())
        assert held == held_bytes(supply), "nothing is on its way"
        for stream in streams:
            stream.close()
        assert supply._ahead_bytes == 0
        assert not supply._shares
        assert not supply._holders
    finally:
        supply.close()


def test_chunk_that_several_wait_for_is_fetched_once(supply):
    file = make_file(MIB, mean=2 * MIB)
    file.gate.clear()
    streams = [stream_of(file, supply) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(read, stream, 4096 * n, 4096) for n, stream in enumerate(streams)]
        assert file.begun.acquire(timeout=DEADLINE_S)
        file.gate.set()
        assert [result.result() for result in results] == [
            file.data[4096 * n : 4096 * n + 4096] for n in range(8)
        ]
    assert file.counts.total() == len({piece.chunk_id for piece in file.iter_pieces(0, 8 * 4096)})


def test_damage_reaches_those_who_need_it_and_no_others(supply):
    file = File(bytes(6 * MIB), [256 << 10] * 24)
    stream = stream_of(file, supply)
    damaged = file.id_at(10)  # in what is read ahead together with its neighbours
    file.errors[damaged] = RepositoryDamaged("a chunk is damaged")
    read(stream, 0, MIB)
    read(stream, MIB, MIB)
    eventually(lambda: is_quiet(supply))
    assert file.counts[damaged] == 1
    for position in (8, 9, 11):
        assert read(stream, position * (256 << 10), 4096) == bytes(4096)
    with pytest.raises(RepositoryDamaged):
        read(stream, 10 * (256 << 10), 4096)
    file.errors.clear()
    assert read(stream, 10 * (256 << 10), 4096) == bytes(4096), "it is forgotten"


def test_reader_who_waits_for_a_batch_with_damage_gets_what_is_good_in_it(supply):
    file = File(bytes(6 * MIB), [256 << 10] * 24)
    file.errors[file.id_at(10)] = RepositoryDamaged("a chunk is damaged")
    share = Share()
    file.gate.clear()
    supply.begin(share, file, 9 * (256 << 10), 512 << 10)
    assert file.begun.acquire(timeout=DEADLINE_S)
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(supply.get, file, {file.id_at(9): 256 << 10})
        bad = pool.submit(supply.get, file, {file.id_at(10): 256 << 10})
        file.gate.set()
        assert list(good.result().values()) == [bytes(256 << 10)]
        with pytest.raises(RepositoryDamaged):
            bad.result()


def test_repository_out_of_reach_is_told_at_once_to_those_who_wait(supply):
    file = File(bytes(MIB), [256 << 10] * 4)
    file.errors[file.id_at(0)] = RepositoryUnreachable("no answer")
    file.gate.clear()
    supply.begin(Share(), file, 0, 256 << 10)
    assert file.begun.acquire(timeout=DEADLINE_S)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(supply.get, file, {file.id_at(0): 256 << 10})
        file.gate.set()
        with pytest.raises(RepositoryUnreachable):
            waiting.result()
    assert file.counts.total() <= 2


def test_reader_does_not_wait_for_threads_that_hang_elsewhere(supply):
    hanging = File(bytes(4 * MIB), [MIB] * 4, b"hanging")
    hanging.gate.clear()
    supply.begin(Share(), hanging, 0, 4 * MIB)
    for _ in range(2):
        assert hanging.begun.acquire(timeout=DEADLINE_S)
    file = make_file(8 * MIB)
    stream = stream_of(file, supply)
    try:
        for offset in range(0, 8 * MIB, MIB):
            assert read(stream, offset, MIB) == file.data[offset : offset + MIB]
    finally:
        hanging.gate.set()


def test_readers_who_stopped_make_room_for_others(supplies):
    now = [0.0]
    supply = supplies(8 * MIB, clock=lambda: now[0])
    stopped, share = make_file(16 * MIB, seed=1, name=b"stopped"), Share()
    supply.room(share)
    supply.begin(share, stopped, 0, 16 * MIB)
    eventually(lambda: is_quiet(supply) and share.size_bytes > 5 * MIB)
    held = share.size_bytes
    other, second = make_file(16 * MIB, seed=2, name=b"other"), Share()
    supply.room(second)
    supply.begin(second, other, 0, 2 * MIB)
    eventually(lambda: is_quiet(supply))
    assert share.size_bytes == held, "it was reading just now"
    now[0] += 2 * IDLE_S
    supply.room(second)
    supply.begin(second, other, 0, 2 * MIB)
    eventually(lambda: is_quiet(supply) and share.size_bytes == 0)
    assert second.size_bytes > 0


def test_thread_that_is_ended_leaves_nobody_waiting(supply):
    file = File(bytes(MIB), [MIB])
    file.errors[file.id_at(0)] = SystemExit()
    with pytest.raises(SystemExit):
        supply.get(file, {file.id_at(0): MIB})
    file.errors.clear()
    assert supply.get(file, {file.id_at(0): MIB}) == {file.id_at(0): bytes(MIB)}


def test_reader_who_jumps_about_is_read_ahead_of_all_the_same(supplies):
    """What was read ahead where he is no more does not take the room for ever."""
    supply = supplies(4 * MIB)
    file = make_file(64 * MIB)
    stream = stream_of(file, supply)
    for start in range(0, 64 * MIB, 8 * MIB):
        for offset in range(start, start + MIB, 64 << 10):
            read(stream, offset, 64 << 10)
        eventually(lambda: is_quiet(supply))
        ahead = {name for name, at, _ in file.extents if start + MIB <= at < start + 1.5 * MIB}
        assert ahead
        assert ahead <= file.counts.keys()


def test_ends_of_a_file_are_fetched_when_it_is_opened(supply):
    file = make_file(16 * MIB)
    stream_of(file, supply, is_near=False).begin_ends()
    eventually(lambda: is_quiet(supply) and file.counts.total() >= 2)
    assert {file.id_at(0), file.id_at(-1)} <= file.counts.keys()
    assert file.counts.total() <= 4


def test_file_that_does_not_have_what_it_says_is_damaged(supply):
    file = make_file(MIB)
    stream = Stream(file, 2 * MIB, supply, is_near=True)
    with pytest.raises(RepositoryDamaged):
        read(stream, MIB - 10, 4096)


def test_chunk_of_another_length_is_damage(supply):
    file = make_file(MIB)
    other = File(file.data[:100], [100])
    assert other.id_at(0) == file.id_at(0)
    read(stream_of(file, supply), 0, 4096)
    with pytest.raises(RepositoryDamaged):
        read(stream_of(other, supply), 0, 100)


def test_many_small_parts_are_given_as_one(supply):
    file = File(bytes(range(256)) * 40, [10] * 1024)
    parts = stream_of(file, supply).read(0, 10240, stream_of(file, supply).guess(0, 10240))
    assert len(parts) <= MAX_PARTS
    assert b"".join(parts) == file.data


class OpensGate:
    """What a batch is waited for with: from then on the file gives what it is asked for."""

    def __init__(self, done, gate):
        self._done, self._gate = done, gate
        self.release = done.release

    def __enter__(self):
        self._gate.set()
        return self._done.__enter__()

    def __exit__(self, *error):
        return self._done.__exit__(*error)


def test_chunks_that_another_reader_has_begun_to_fetch_are_waited_for(supply, monkeypatch):
    """As soon as they are announced another reader may find them, and be faster."""
    file = make_file(MIB, mean=2 * MIB)
    chunk_id, _, length = file.extents[0]
    look_up, reader, others = supply._look_up, threading.current_thread(), []
    file.gate.clear()

    def look_up_and_be_overtaken(*arguments):
        own, batches = look_up(*arguments)
        if threading.current_thread() is reader:
            own.done = OpensGate(own.done, file.gate)
            others.append(pool.submit(supply.get, file, {chunk_id: length}))
            assert file.begun.acquire(timeout=DEADLINE_S)
        return own, batches

    monkeypatch.setattr(supply, "_look_up", look_up_and_be_overtaken)
    with ThreadPoolExecutor(1) as pool:
        try:
            assert supply.get(file, {chunk_id: length}) == {chunk_id: file.chunks[chunk_id]}
            assert others[0].result() == {chunk_id: file.chunks[chunk_id]}
        finally:
            file.gate.set()
    assert file.counts == {chunk_id: 1}


def test_what_no_thread_can_be_started_for_leaves_its_place_and_is_fetched_by_its_reader(
    supply, monkeypatch, caplog
):
    file = make_file(MIB, mean=2 * MIB)
    chunk_id, _, length = file.extents[0]

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        share = Share()
        supply.begin(share, file, 0, MIB)
        assert (supply._ahead_bytes, share.size_bytes, supply._coming) == (0, 0, {})
        assert supply.get(file, {chunk_id: length}) == {chunk_id: file.chunks[chunk_id]}
    caplog.clear()


def test_file_of_chunks_of_a_byte_is_read_with_few_of_them_in_memory(supply):
    data = random.Random(4).randbytes(100_000)
    file = File(data, [1] * len(data))
    sizes = []
    fetch = file.fetch

    def count(chunks):
        sizes.append(len(chunks))
        return fetch(chunks)

    file.fetch = count
    file.iter_pieces = lambda offset, length: (
        Piece(chunk_id, 1, 0, 1) for chunk_id, _, _ in file.extents[offset : offset + length]
    )
    stream = stream_of(file, supply)
    parts = stream.read(0, len(data), stream.guess(0, len(data)))
    assert b"".join(parts) == data
    assert len(parts) <= MAX_PARTS
    assert max(sizes) <= MAX_PARTS


def test_no_more_of_a_list_without_end_is_looked_at_than_is_read_ahead(supply):
    def iter_pieces(offset, length):
        for number in range(length):
            assert number < 10_000, "it goes on and on"
            yield Piece(b"same", 1, 0, 1)

    file = File(b"", [])
    file.iter_pieces = iter_pieces
    file.chunks[b"same"] = b"x"
    supply.begin(Share(), file, 0, 1 << 40)
    eventually(lambda: is_quiet(supply))
    assert file.counts == {b"same": 1}


def test_what_is_fetched_together_grows_to_what_a_request_is_worth():
    data = bytes(64 * MIB)
    file = File(data, [MIB] * 64)
    together = []
    fetch = file.fetch
    file.fetch = lambda chunks: (together.append(sum(chunks.values())), fetch(chunks))[1]
    supply = ChunkSupply(48 * MIB, is_near=False, batch_bytes=8 * MIB)
    try:
        stream = Stream(file, len(data), supply, is_near=False)
        for offset in range(0, len(data), MIB):
            assert len(read(stream, offset, MIB)) == MIB
            supply._workers.wait_idle()
    finally:
        supply.close()
    assert max(together) == 8 * MIB
    assert len(together) <= 16
