"""Bytes are those that were saved, however they are read, in whatever process."""

import errno
import itertools
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import threading

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicated.fsspec_files import opening
from replicated.fsspec_files.files import FIRST_WINDOW_BYTES, GrowingWindow

FILES = (
    "big.bin",
    "words.txt",
    "sparse.bin",
    "model.safetensors",
    "nothing.bin",
    "small.txt",
    "data/table.csv",
    "data/parts/year=2024/0.parquet",
)


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file(saved, fs, name, tmp_path):
    expected = (saved.project / name).read_bytes()
    path = saved.path(name)
    assert fs.cat_file(path) == expected
    assert fs.size(path) == len(expected)
    with fs.open(path) as file:
        assert file.seekable() and file.read() == expected and file.read() == b""
    fs.get_file(path, tmp_path / "below" / "copy")
    assert (tmp_path / "below" / "copy").read_bytes() == expected
    assert os.listdir(tmp_path / "below") == ["copy"]
    with tempfile.NamedTemporaryFile() as file:
        fs.get_file(path, file.name)
        assert file.read() == expected


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_range_by_any_way_is_what_the_file_has(saved, data):
    fs = fsspec.filesystem("replicate", repository=saved.url)
    name = data.draw(st.sampled_from(FILES))
    expected = (saved.project / name).read_bytes()
    path = saved.path(name)
    places = st.none() | st.integers(-len(expected) - 9, len(expected) + 9)
    ranges = data.draw(st.lists(st.tuples(places, places), min_size=1, max_size=6))
    starts, ends = map(list, zip(*ranges, strict=True))
    wanted = [expected[start:end] for start, end in ranges]
    assert [fs.cat_file(path, start, end) for start, end in ranges] == wanted
    assert fs.cat_ranges([path] * len(ranges), starts, ends) == wanted
    cache = data.draw(st.sampled_from(["replicate", "none", "readahead", "bytes", "all"]))
    with fs.open(
        path, cache_type=cache, block_size=data.draw(st.sampled_from([None, 1000, 1 << 20]))
    ) as file:
        for start, length in data.draw(
            st.lists(st.tuples(st.integers(0, len(expected) + 9), st.integers(0, 700_000)), max_size=8)
        ):
            file.seek(start)
            assert file.read(length) == expected[start : start + length]
            assert file.tell() == min(max(start, 0) + length, max(start, len(expected)))


@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 9000)), max_size=30), st.integers(1, 5000))
def test_a_window_gives_what_was_asked_for_and_fetches_nothing_twice_in_a_row(reads, block):
    content = random.Random(5).randbytes(9000)
    window = GrowingWindow(block, lambda start, end: content[start:end], len(content))
    for start, stop in reads:
        assert window._fetch(start, stop) == content[start:stop]


def test_who_reads_on_gets_more_and_more():
    fetched = []

    def fetch(start, end):
        fetched.append((start, end))
        return bytes(end - start)

    window = GrowingWindow(8 << 20, fetch, 1 << 30)
    position = 0
    while position < 64 << 20:
        position += len(window._fetch(position, position + 4096))
    assert fetched[0] == (0, FIRST_WINDOW_BYTES)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(fetched))
    assert max(end - start for start, end in fetched) == 8 << 20
    assert len(fetched) < 16
    window._fetch(900 << 20, (900 << 20) + 10)
    assert fetched[-1] == (900 << 20, (900 << 20) + FIRST_WINDOW_BYTES)


def test_many_files_at_once(saved, fs, tmp_path):
    paths = [saved.path(f"many-{number}.txt") for number in range(40)]
    contents = fs.cat(paths)
    assert contents == {path: (saved.project / path.rpartition("/")[2]).read_bytes() for path in paths}
    assert fs.cat(saved.path("many-1*.txt")).keys() == set(fs.glob(saved.path("many-1*.txt")))
    below = fs.cat(saved.path("data/parts"), recursive=True)
    assert len(below) == 6 and all(data[:4] == b"PAR1" for data in below.values())
    fs.get(saved.path("data/parts"), str(tmp_path / "parts"), recursive=True)
    assert sorted(path.name for path in (tmp_path / "parts").rglob("*.parquet")) == sorted(
        path.name for path in (saved.project / "data/parts").rglob("*.parquet")
    )


def test_a_range_that_fails_is_told_in_its_place(saved, fs):
    paths = [saved.path("small.txt"), saved.path("gone"), saved.path("big.bin")]
    first, second, third = fs.cat_ranges(paths, 0, [3, 3, 3])
    assert first == b"sma" and len(third) == 3 and isinstance(second, FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges(paths, 0, 3, on_error="raise")
    assert fs.cat(paths[:2], on_error="omit") == {paths[0]: b"small\n"}


def test_damage_is_an_error_that_names_it_and_never_other_bytes(saved, tmp_path):
    repository = tmp_path / "damaged"
    shutil.copytree(saved.url.removeprefix("file://"), repository)
    expected = (saved.project / "big.bin").read_bytes()
    whole = fsspec.filesystem("replicate", repository=f"file://{repository}")
    assert whole.cat_file(saved.path("big.bin")) == expected
    info = whole.info(saved.path("big.bin"))
    opening.close_all()
    # Random bytes are stored as they are, so that they can be found.
    (pack,) = [
        path
        for path in (repository / "packs").rglob("*")
        if path.is_file() and expected[:99] in path.read_bytes()
    ]
    data = bytearray(pack.read_bytes())
    data[data.index(expected[2_500_000:2_500_099])] ^= 0xFF
    pack.chmod(0o644)
    pack.write_bytes(data)
    fs = fsspec.filesystem("replicate", repository=f"file://{repository}", cache_bytes=0)
    assert fs.info(saved.path("big.bin")) == info
    with pytest.raises(OSError, match="damaged") as raised:
        fs.cat_file(saved.path("big.bin"))
    assert raised.value.errno == errno.EIO and raised.value.filename == saved.path("big.bin")
    with fs.open(saved.path("big.bin")) as file:
        assert file.read(1000) == expected[:1000]
        with pytest.raises(OSError, match="damaged"):
            file.read()
    damaged, sound = fs.cat_ranges([saved.path("big.bin"), saved.path("small.txt")], None, None)
    assert isinstance(damaged, OSError) and sound == b"small\n"
    with pytest.raises(OSError, match="damaged"):
        fs.get_file(saved.path("big.bin"), str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists() and not list(tmp_path.glob(".replicate-*"))
    (tmp_path / "copy").write_text("something older")
    with pytest.raises(OSError, match="damaged"):
        fs.get_file(saved.path("big.bin"), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == b""


def test_a_record_that_cannot_be_read_is_damage_and_shows_nothing_else(saved, tmp_path):
    repository = tmp_path / "damaged"
    shutil.copytree(saved.url.removeprefix("file://"), repository)
    record = repository / "checkpoints" / saved.experiment / f"{saved.checkpoints[1]}.json"
    record.chmod(0o644)
    record.write_bytes(record.read_bytes()[:-40])
    fs = fsspec.filesystem("replicate", repository=f"file://{repository}")
    for ask in (fs.cat_file, fs.exists, fs.info):
        with pytest.raises(OSError, match="damaged") as raised:
            ask(f"{saved.checkpoints[1]}/small.txt")
        assert raised.value.errno == errno.EIO
    assert fs.cat_file(f"{saved.checkpoints[0]}/small.txt") == b"step 1\n"
    assert fs.cat_file(f"{saved.experiment}:best/small.txt") == b"step 1\n"


def test_a_process_may_fork_while_its_threads_read(saved, fs):
    expected = (saved.project / "big.bin").read_bytes()
    path = saved.path("big.bin")
    is_over = threading.Event()

    def read():
        while not is_over.is_set():
            fs.cat_ranges([path] * 4, [0, 10**6, 2 * 10**6, 3 * 10**6], [9, 10**6 + 9, 3 * 10**6, 4 * 10**6])

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        for _ in range(8):
            child = context.Process(target=lambda: queue.put(fs.cat_file(path) == expected))
            child.start()
            assert queue.get(timeout=60)
            child.join()
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def test_threads_share_one_open_repository(saved):
    wrong = []

    def read(number):
        fs = fsspec.filesystem("replicate", repository=saved.url)
        for name in FILES[number % 3 :]:
            if fs.cat_file(saved.path(name)) != (saved.project / name).read_bytes():
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(opening._opened) == 1


def _read_there(fs, file, path, queue):
    queue.put((fs.cat_file(path), file.read(), fs.resolve("latest")))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_another_process_reads_what_this_one_has_open(saved, fs, method):
    path = saved.path("model.safetensors")
    expected = (saved.project / "model.safetensors").read_bytes()
    fs.resolve("latest")
    with fs.open(path) as file:
        file.read(1000)
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=_read_there, args=(fs, file, path, queue))
        process.start()
        whole, rest, latest = queue.get(timeout=60)
        process.join()
        assert process.exitcode == 0
        assert (whole, rest, latest) == (expected, expected[1000:], f"{saved.bare}:code")
        # The parent goes on with what it had.
        assert file.read() == expected[1000:]


def test_what_ids_mean_goes_with_a_file_system(saved, fs, monkeypatch):
    reference = f"{saved.experiment}/x"
    assert fs.resolve(reference) == f"{saved.checkpoints[0]}/x"
    sent = pickle.loads(pickle.dumps(fs))
    assert sent == fs and hash(sent) == hash(fs)
    # Meanwhile there is a better checkpoint.
    better = fs._used[saved.experiment]._replace(checkpoint_id=saved.checkpoints[1])
    monkeypatch.setattr(fs._repository().names, "find", lambda text, max_age_s: better)
    assert fs.resolve(reference) == f"{saved.checkpoints[1]}/x"
    assert sent.resolve(reference) == pickle.loads(pickle.dumps(sent)).resolve(reference)
    assert sent.resolve(reference) == f"{saved.checkpoints[0]}/x"
    assert fsspec.filesystem("replicate", repository=saved.url) is fs


def test_options_travel_and_instances_are_shared(saved, fs, monkeypatch, tmp_path):
    assert fsspec.filesystem("replicate", repository=saved.url) is fs
    monkeypatch.setenv("REPLICATE_REPOSITORY", saved.url)
    by_environment = fsspec.filesystem("replicate")
    assert by_environment == fs
    monkeypatch.delenv("REPLICATE_REPOSITORY")
    # What was meant here is meant there, whatever is configured there.
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(pickle.dumps(by_environment)).cat_file(saved.path("small.txt")) == b"small\n"
    relative = os.path.relpath(saved.url.removeprefix("file://"))
    for url in (f"file://{relative}", f"{saved.url}/"):
        for options in ({}, {"cache_bytes": fs.source.cache_bytes}):
            assert fsspec.filesystem("replicate", repository=url, **options) == fs
    (tmp_path / "replicate.yaml").write_text(f"repository: {saved.url}\ncache_size: off\n")
    by_file = fsspec.filesystem("replicate")
    assert by_file.source == (saved.url, 0, ()) and by_file != fs
    assert by_file.cat_file(saved.path("small.txt")) == b"small\n"
    assert fsspec.AbstractFileSystem.from_json(fs.to_json()) == fs
    assert by_file.fsid == fs.fsid


def test_without_a_place_for_caches_a_temporary_one_is_taken(
    saved, fs, reader_home, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    reader_home.write_text("a file where the home should be")
    assert fs.cat_file(f"{saved.experiment}/small.txt") == b"step 1\n"
    assert "nothing that was read is kept" in caplog.text
    assert len(list(tmp_path.glob("replicate-*"))) == 1
    opening.close_all()
    assert not list(tmp_path.glob("replicate-*"))


def test_reading_asks_no_daemon_and_loads_no_grpc(saved, tmp_path):
    script = f"""
import sys, fsspec
from replicated.fsspec_files import ReplicateFileSystem
fsspec.register_implementation("replicate", ReplicateFileSystem, clobber=True)
fs = fsspec.filesystem("replicate")
assert fs.cat_file("{saved.experiment}/small.txt") == b"step 1\\n"
print(sorted({{name.partition(".")[0] for name in sys.modules}} & {{"grpc", "boto3", "google", "numpy"}}))
"""
    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "REPLICATE_REPOSITORY": saved.url, "REPLICATE_HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert "grpc" not in done.stdout and "boto3" not in done.stdout
    # No daemon has been there.
    assert os.listdir(home) == ["cache"]
