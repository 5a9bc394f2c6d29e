"""What is read first is recorded in order, compactly, and found again by whoever mounts the same data."""

import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicated.catalog import Catalog
from replicated.mount.reading import tracing
from replicated.mount.reading.tracing import BLOCK_BYTES, Recorder, Touch, Trace, Traces, trace_key
from replicated.mount.repository_view import RepositoryView
from replicated.tree import open_tree

KEY = "0123456789abcdef"


@pytest.fixture
def traces(tmp_path):
    return Traces(tmp_path / "traces")


@pytest.fixture
def record(traces, memory_tree):
    """Records what a function does with a recorder of files: inode → (name, size)."""
    pattern = memory_tree({b"file": b""}).find(b"file")

    def record(act, files, *, is_whole=lambda node: False, key=KEY):
        def path_of(inode):
            return files[inode][0]

        recorder = Recorder(path_of, is_whole, lambda trace: traces.save(key, trace))

        def read(inode, offset=0, length=4096):
            name, size = files[inode]
            recorder.on_read(inode, pattern._replace(name=name, size=size), offset, length, True)

        def open_file(inode):
            name, size = files[inode]
            recorder.on_open(inode, pattern._replace(name=name, size=size))

        act(read, open_file)
        recorder.close()
        trace = traces.load(key)
        return None if trace is None else list(trace)

    return record


def whole(*names):
    return [Touch(name, 0, 0) for name in names]


def test_files_are_recorded_in_the_order_of_their_first_read(record):
    files = {2: (b"a", 100), 3: (b"b/c", 200), 4: (b"d", 0)}

    def act(read, open_file):
        for inode in (3, 2, 3, 4, 2):
            read(inode)

    assert record(act, files) == whole(b"b/c", b"a", b"d")


def test_of_a_large_file_the_blocks_are_recorded(record):
    files = {2: (b"large", 20 * BLOCK_BYTES + 5), 3: (b"small", 10)}

    def act(read, open_file):
        for offset in range(0, 3 * BLOCK_BYTES, 128 << 10):
            read(2, offset, 128 << 10)
        read(3)
        read(2, 20 * BLOCK_BYTES, 128 << 10)
        read(2, 10 * BLOCK_BYTES - 1, 2)
        read(2, 0)

    assert record(act, files) == [
        Touch(b"large", 0, 3),
        Touch(b"small", 0, 0),
        Touch(b"large", 20, 1),
        Touch(b"large", 9, 2),
    ]


def test_a_file_that_the_kernel_reads_by_itself_is_recorded_when_it_is_opened(record):
    files = {2: (b"plain", 5 * BLOCK_BYTES), 3: (b"chunks", 5 * BLOCK_BYTES)}

    def act(read, open_file):
        open_file(2)
        open_file(3)
        read(3, BLOCK_BYTES)
        open_file(2)

    found = record(act, files, is_whole=lambda node: node.name == b"plain")
    assert found == [Touch(b"plain", 0, 0), Touch(b"chunks", 1, 1)]


def test_nothing_read_records_nothing(record, tmp_path):
    assert record(lambda read, open_file: None, {}) is None
    assert not (tmp_path / "traces").exists()


def test_a_hundred_thousand_files_are_recorded_in_little(record, tmp_path):
    names = {inode: (b"train/n%04d/image-%07d.jpg" % (inode // 100, inode), 1000) for inode in range(100_000)}
    order = [inode * 7919 % 100_000 for inode in range(100_000)]
    found = record(lambda read, open_file: [read(inode) for inode in order], names)
    # What waits to be packed is bounded, and whoever reads faster than that is recorded up to there.
    assert found == whole(*(names[inode][0] for inode in order[: len(found)]))
    assert len(found) > 60_000
    assert sum(file.stat().st_size for file in (tmp_path / "traces").iterdir()) < 12 * len(found)


def test_recording_ends_where_a_record_is_long_enough(record, monkeypatch):
    monkeypatch.setattr(tracing, "MAX_TRACE_BYTES", 100_000)
    names = {inode: (os.urandom(8).hex().encode(), 1) for inode in range(20_000)}
    found = record(lambda read, open_file: [read(inode) for inode in names], names)
    assert 0 < len(found) < 20_000


def test_many_threads_record_each_file_once(record):
    files = {inode: (b"%d" % inode, 100) for inode in range(2000)}

    def act(read, open_file):
        readers = [threading.Thread(target=lambda: [read(inode) for inode in range(2000)]) for _ in range(6)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()

    found = record(act, files)
    assert sorted(touch.path for touch in found) == sorted(name for name, _ in files.values())


def test_a_look_into_few_files_leaves_the_record_of_many(record):
    files = {inode: (b"%d" % inode, 100) for inode in range(100)}
    everything = record(lambda read, open_file: [read(inode) for inode in files], files)
    assert record(lambda read, open_file: read(50), files) == everything
    half = record(lambda read, open_file: [read(inode) for inode in range(50)], files)
    assert half == everything[:50]


def test_a_file_whose_path_is_not_known_any_more_is_left_out(record):
    files = {2: (b"a", 1), 4: (b"c", 1)}

    def act(read, open_file):
        read(2)
        files[3] = (b"b", 1)
        read(3)
        del files[3]
        read(4)

    assert record(act, files) == whole(b"a", b"c")


def test_it_is_written_while_files_are_read(traces, memory_tree, monkeypatch, wait_until):
    monkeypatch.setattr(tracing, "SAVE_INTERVAL_S", 0.01)
    node = memory_tree({b"file": b"x"}).find(b"file")
    recorder = Recorder(lambda inode: b"file", lambda node: False, lambda trace: traces.save(KEY, trace))
    recorder.on_read(2, node, 0, 1, True)
    wait_until(lambda: traces.load(KEY))
    recorder.close()
    recorder.close()


def test_a_record_that_cannot_be_written_is_a_line_in_the_log(memory_tree, caplog):
    def save(trace):
        raise OSError(28, "No space left on device")

    node = memory_tree({b"file": b"x"}).find(b"file")
    recorder = Recorder(lambda inode: b"file", lambda node: False, save)
    recorder.on_read(2, node, 0, 1, True)
    recorder.close()
    (line,) = caplog.records
    assert "No space left on device" in line.getMessage()
    caplog.clear()


@given(flip=st.integers(0), cut=st.booleans())
def test_a_damaged_record_is_no_record(tmp_path_factory, flip, cut):
    directory = tmp_path_factory.mktemp("traces")
    traces = Traces(directory)
    frame = Recorder(None, None, None)
    frame._path_of = lambda inode: b"%d" % inode
    frame._pack([[inode, 0, 0] for inode in range(50)])
    traces.save(KEY, Trace(50, frame._frames))
    (file,) = directory.iterdir()
    data = bytearray(file.read_bytes())
    if cut:
        del data[flip % len(data) :]
    else:
        data[flip // 8 % len(data)] ^= 1 << flip % 8
    file.write_bytes(data)
    assert traces.load(KEY) is None
    assert not file.exists()


def test_old_records_make_room_for_new_ones(traces, tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "MAX_TRACES", 3)
    for number in range(6):
        traces.save(f"{number:016x}", Trace(1, [b"frame"]))
        file = tmp_path / "traces" / f"{number:016x}.trace"
        os.utime(file, (1000 + number, 1000 + number))
    traces.save("f" * 16, Trace(1, [b"frame"]))
    assert sorted(file.stem for file in (tmp_path / "traces").iterdir()) == [
        f"{4:016x}", f"{5:016x}", "f" * 16,
    ]  # fmt: skip


def test_the_same_data_has_the_same_key(snapshots, memory_tree):
    repository = snapshots.repository
    from_one, _ = snapshots.add({b"data": {b"x": b"1"}})
    from_other, _ = snapshots.add({b"data": {b"x": b"1"}})
    different, _ = snapshots.add({b"data": {b"x": b"2"}})
    keys = [
        trace_key(open_tree(repository, *identifiers).root)
        for identifiers in ([from_one], [from_other], [different], [from_one, different])
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_a_view_that_can_change_has_no_key(snapshots, home):
    catalog = Catalog(snapshots.repository, home.cache / "catalogs")
    assert trace_key(RepositoryView(snapshots.repository, catalog).root) is None
    catalog.close()


@pytest.fixture
def pattern(memory_tree):
    return memory_tree({b"file": b""}).find(b"file")


def test_the_end_does_not_wait_for_a_path_that_hangs_in_a_store(pattern, monkeypatch):
    monkeypatch.setattr(tracing, "END_TIMEOUT_S", 0.01)
    gate, begun = threading.Event(), threading.Event()

    def path_of(inode):
        begun.set()
        gate.wait()
        return b"file"

    recorder = Recorder(path_of, lambda node: False, lambda trace: None)
    recorder.on_read(2, pattern, 0, 1, True)
    closer = threading.Thread(target=recorder.close, daemon=True)
    closer.start()
    assert begun.wait(20)
    closer.join(20)
    assert not closer.is_alive()
    gate.set()
    recorder._thread.join(20)


def test_what_no_thread_could_be_started_for_is_recorded_with_the_next_touch(pattern, traces, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    recorder = Recorder(
        lambda inode: b"%d" % inode, lambda node: False, lambda trace: traces.save(KEY, trace)
    )
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        recorder.on_read(2, pattern, 0, 1, True)
    recorder.on_read(3, pattern._replace(size=100), 0, 1, True)
    recorder.close()
    assert list(traces.load(KEY)) == whole(b"2", b"3")
