"""Finding the checkpoint before: by path and numbers, for two processes, and whatever is wrong is a miss."""

import logging
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from operator import ne
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from replicated.chunk.codec import DELTA, PLANES
from replicated.chunk.tensor import PIECE_BYTES, Layout, Region
from replicated.packer import Stored
from replicated.snapshot import keyframes as keyframes_module
from replicated.snapshot.keyframes import Keyframes, _Candidates, _File
from replicated.snapshot.series import Series

ID = "0123456789abcdef" * 2
GENERATION = -7

Open = Callable[..., Keyframes]


def layout(*sizes: int, kind: str = "safetensors") -> Layout:
    regions = []
    end = 1000
    for size in sizes:
        regions.append(Region(end, size, 4))
        end += size + 64
    return Layout(kind, end, tuple(regions))


MODEL = layout(100_000, 2 * PIECE_BYTES)


def chunk(file: str, piece: int = 0) -> bytes:
    return random.Random(f"{file} {piece}").randbytes(32)


def begin(
    keyframes: Keyframes,
    path: str,
    experiment: str = "e1",
    layout: Layout = MODEL,
    generation: int = GENERATION,
) -> Series:
    series = keyframes.series(experiment, path.encode(), layout, generation)
    assert series is not None
    return series


def store(
    keyframes: Keyframes,
    *paths: str,
    experiment: str = "e1",
    layout: Layout = MODEL,
    generation: int = GENERATION,
    save: bool = True,
) -> list[bytes]:
    """The bases of the first pieces of files that are stored with one snapshot."""
    bases = []
    for path in paths:
        series = begin(keyframes, path, experiment, layout, generation)
        bases.append(series.base_of(0))
        for number, piece in enumerate(layout.pieces):
            codec = DELTA if series.base_of(number) else PLANES
            series.note(number, chunk(path, number), Stored(codec, piece.size, piece.size // 2))
    if save:
        keyframes.save()
    return bases


def find(keyframes: Keyframes, path: str, experiment: str = "e1", generation: int = GENERATION) -> bytes:
    return begin(keyframes, path, experiment, generation=generation).base_of(0)


@pytest.fixture
def open_cache(tmp_path: Path) -> Iterator[Open]:
    """Opens the cache of one repository, or another one of it."""
    opened: list[Keyframes] = []

    def open_one(repository: str = ID, url: str = "file:///models") -> Keyframes:
        opened.append(Keyframes(tmp_path / "keyframes", repository, url))
        return opened[-1]

    yield open_one
    for cache in opened:
        cache.close()


def databases(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "keyframes").glob("*.db"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# Which checkpoint is the one before


def test_a_file_that_is_overwritten_is_found(open_cache: Open) -> None:
    keyframes = open_cache()
    assert store(keyframes, "last.pt") == [b""]
    series = begin(keyframes, "last.pt")
    assert [series.base_of(piece) for piece in range(3)] == [chunk("last.pt", piece) for piece in range(3)]
    assert find(open_cache(), "last.pt") == chunk("last.pt")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ckpt_9.pt", "ckpt_10.pt"),
        ("epoch=0-step=100-loss=2.31.ckpt", "epoch=0-step=200-loss=1.987.ckpt"),
        ("step_100/model.pt", "step_200/model.pt"),
        ("2024-05-01T10:11:12/model.pt", "2024-05-02T00:01:02/model.pt"),
    ],
)
def test_a_file_whose_path_differs_in_numbers_is_found(open_cache: Open, before: str, after: str) -> None:
    keyframes = open_cache()
    store(keyframes, before)
    assert store(keyframes, after) == [chunk(before)]


@pytest.mark.parametrize("path", ["ckpt.pt", "best_9.pt", "other/ckpt_9.pt", "ckpt_9.pt.bak"])
def test_another_path_is_not_found(open_cache: Open, path: str) -> None:
    keyframes = open_cache()
    store(keyframes, "ckpt_9.pt")
    assert find(keyframes, path) == b""


def test_the_last_one_is_found(open_cache: Open) -> None:
    keyframes = open_cache()
    for step in range(5):
        store(keyframes, f"ckpt_{step}.pt", generation=step)  # so that each is a keyframe
        store(keyframes, f"ckpt_{step}.pt", generation=99)
    assert find(keyframes, "ckpt_5.pt", generation=99) == chunk("ckpt_0.pt")
    store(keyframes, "ckpt_7.pt", experiment="e2")
    store(keyframes, "ckpt_3.pt", experiment="e2", generation=1)
    store(keyframes, "ckpt_3.pt", experiment="e2")
    assert find(keyframes, "ckpt_8.pt", experiment="e2") == chunk("ckpt_7.pt")


def test_experiments_have_series_of_their_own(open_cache: Open) -> None:
    keyframes = open_cache()
    store(keyframes, "last.pt")
    assert find(keyframes, "last.pt", experiment="e2") == b""
    assert find(keyframes, "1last.pt", experiment="e") == b""


class Training:
    """Files that resemble each other if all but the step is the same; each snapshot has some of them."""

    def __init__(self, keyframes: Keyframes, name: str) -> None:
        self.keyframes = keyframes
        self.name = name
        self.kinds: dict[bytes, int] = {b"": -1}

    def snapshot(self, step: int, *kinds: int) -> list[int]:
        """The kinds of the bases of files of these kinds; -1 where there is none."""
        bases = []
        for kind in kinds:
            path = self.name.format(step=step, kind=kind, loss=random.Random(step).randrange(10))
            series = begin(self.keyframes, path, layout=layout(5000))
            bases.append(self.kinds[series.base_of(0)])
            codec, taken = (DELTA, 2000) if bases[-1] == kind else (PLANES, 4000)
            self.kinds[chunk(path)] = kind
            series.note(0, chunk(path), Stored(codec, 5000, taken))
        self.keyframes.save()
        return bases


NAMES = ["step_{step}/shard_{kind}.pt", "rank_{kind}/ckpt_{step}.pt", "{kind}/{step}-0.{loss}-{loss}.pt"]


@pytest.mark.parametrize("name", NAMES)
def test_each_shard_is_found_by_its_number(open_cache: Open, name: str) -> None:
    training = Training(open_cache(), name)
    assert training.snapshot(100, 0, 1, 2, 3) == [-1, -1, -1, -1]
    for step in range(200, 2000, 100):
        assert training.snapshot(step, 0, 1, 2, 3) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", NAMES)
def test_shards_that_come_one_by_one_are_told_apart(open_cache: Open, name: str) -> None:
    training = Training(open_cache(), name)
    # Nothing says yet which number is the step, and they might be checkpoints of each other.
    assert [training.snapshot(100, shard) for shard in range(3)] == [[-1], [0], [1]]
    found = [training.snapshot(step, shard) for step in range(200, 2000, 100) for shard in range(3)]
    assert all(base in (-1, number % 3) for number, (base,) in enumerate(found))
    assert found[-15:] == [[0], [1], [2]] * 5


@pytest.mark.parametrize("name", NAMES)
def test_one_training_after_the_other_is_told_apart(open_cache: Open, name: str) -> None:
    training = Training(open_cache(), name)
    assert [training.snapshot(step, 0) for step in range(10)] == [[-1]] + [[0]] * 9
    assert [training.snapshot(step, 1) for step in range(10)] == [[0]] + [[1]] * 9
    (first, *others) = [training.snapshot(step, 2) for step in range(10)]
    assert first != [2]
    assert set(map(tuple, others)) <= {(2,), (-1,)}
    assert others[-1] == [2]


def test_overwritten_shards_are_found_by_their_paths(open_cache: Open) -> None:
    keyframes = open_cache()
    paths = [f"model-0000{shard}-of-00003.safetensors" for shard in (1, 2, 3)]
    store(keyframes, *paths)
    assert store(keyframes, *paths) == [chunk(path) for path in paths]


def test_files_of_one_snapshot_are_no_checkpoints_of_each_other(open_cache: Open) -> None:
    keyframes = open_cache()
    assert store(keyframes, "ckpt_1.pt", "ckpt_2.pt", "ckpt_2.pt") == [b"", b"", b""]


def test_a_file_of_the_same_tensors_comes_first(open_cache: Open) -> None:
    keyframes = open_cache()
    store(keyframes, "a_1/b_1.pt")
    store(keyframes, "a_2/b_2.pt", layout=layout(70_000))
    assert find(keyframes, "a_3/b_2.pt") == chunk("a_1/b_1.pt")
    # With none such, one of other tensors may be alike in some of them.
    series = begin(keyframes, "a_3/b_2.pt", layout=layout(60_000, 70_000))
    assert [series.base_of(0), series.base_of(1)] == [b"", chunk("a_2/b_2.pt")]


def test_another_generation_is_not_used(open_cache: Open) -> None:
    keyframes = open_cache()
    store(keyframes, "ckpt_1.pt", generation=1)
    assert find(keyframes, "ckpt_1.pt", generation=2) == b""
    assert find(keyframes, "ckpt_2.pt", generation=2) == b""
    assert find(keyframes, "ckpt_2.pt", generation=1) == chunk("ckpt_1.pt")


def test_a_copy_of_the_repository_has_a_cache_of_its_own(open_cache: Open) -> None:
    store(open_cache(), "last.pt")
    assert find(open_cache(url="file:///copy"), "last.pt") == b""
    assert find(open_cache(repository="f" * 32), "last.pt") == b""


names = st.binary(min_size=1, max_size=30).filter(lambda name: b"\0" not in name)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.text(max_size=20), names, st.integers(-(2**63), 2**63 - 1))
def test_any_path_is_found_again(open_cache: Open, experiment: str, path: bytes, generation: int) -> None:
    keyframes = open_cache()
    series = keyframes.series(experiment, path, layout(5000), generation)
    assert series is not None
    series.note(0, b"c" * 32, Stored(PLANES, 5000, 4000))
    keyframes.save()
    series = keyframes.series(experiment, path, layout(5000), generation)
    assert series is not None
    assert series.base_of(0) == b"c" * 32


rows_of_numbers = st.lists(st.lists(st.sampled_from("12345"), min_size=4, max_size=4), max_size=12)


@hypothesis.given(rows_of_numbers, st.lists(st.sampled_from("12345"), min_size=4, max_size=4))
def test_with_none_of_the_same_numbers_the_one_with_the_most_of_them_is_chosen(
    files: list[list[str]], wanted: list[str]
) -> None:
    packed = [" ".join(numbers).encode() for numbers in files]
    candidates = _Candidates([_File(100 - n, numbers, numbers) for n, numbers in enumerate(packed)])
    differences = [sum(map(ne, numbers, wanted)) for numbers in files]
    expected = 100 - differences.index(min(differences)) if files else None
    assert candidates.choose(" ".join(wanted).encode()) == expected


# Data sets


def count_steps(keyframes: Keyframes) -> list[None]:
    """Grows by one for every 100 instructions that the database executes."""
    connection = keyframes._cache._connection
    assert connection is not None
    steps: list[None] = []
    connection.set_progress_handler(lambda: steps.append(None), 100)
    return steps


@pytest.mark.parametrize("name", ["{}.npy", "{}_x{}.npy", "{}_{kind}.npy"])
def test_samples_of_different_sizes_share_what_is_read_of_their_family(open_cache: Open, name: str) -> None:
    keyframes = open_cache()
    for snapshot in range(2):
        steps = count_steps(keyframes) if snapshot else []
        for number in range(600 * snapshot, 600 * (snapshot + 1)):
            path = name.format(number, number, kind="ab"[number % 2])
            store(keyframes, path, layout=layout(PIECE_BYTES + 4 * number), save=False)
        if not snapshot:
            keyframes.save()
    assert 0 < len(steps) < 600


def test_of_more_families_than_can_be_remembered_the_last_files_are_found(
    open_cache: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyframes_module, "_MAX_REMEMBERED", 50)
    monkeypatch.setattr(keyframes_module, "_FEW_CANDIDATES", 1)
    keyframes = open_cache()
    names = [f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrst"]
    store(keyframes, *[f"{name}_{step}.pt" for step in (1, 2) for name in names])
    for name in names:
        # The one at the same path is found also where it is not the last.
        assert find(keyframes, f"{name}_1.pt") == chunk(f"{name}_1.pt")
        assert find(keyframes, f"{name}_3.pt") == chunk(f"{name}_2.pt")
    assert 0 < len(keyframes._families) <= 50


def test_of_very_many_small_files_only_the_first_are_followed(
    open_cache: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyframes_module, "_MAX_SMALL", 2)
    keyframes = open_cache()
    for _ in range(2):
        store(keyframes, "a.npy", "b.npy", layout=layout(300_000), save=False)
        assert keyframes.series("e1", b"c.npy", layout(300_000), GENERATION) is None
        store(keyframes, "c.npy", layout=layout(PIECE_BYTES), save=False)
        keyframes.save()


# Saving


def test_nothing_is_found_before_it_is_saved(open_cache: Open) -> None:
    keyframes = open_cache()
    store(keyframes, "last.pt", save=False)
    assert find(keyframes, "last.pt") == b""
    keyframes.save()
    assert find(keyframes, "last.pt") == chunk("last.pt")


def test_what_is_forgotten_is_not_saved(open_cache: Open) -> None:
    keyframes = open_cache()
    store(keyframes, "a.pt", save=False)
    series = begin(keyframes, "b.pt", layout=layout(5000))
    keyframes.forget()
    series.note(0, chunk("b.pt"), Stored(PLANES, 5000, 4000))
    keyframes.save()
    assert find(keyframes, "a.pt") == b""
    assert begin(keyframes, "b.pt", layout=layout(5000)).base_of(0) == b""


def test_a_file_that_was_not_stored_to_its_end_teaches_nothing(open_cache: Open) -> None:
    keyframes = open_cache()
    store(keyframes, "last.pt")
    series = begin(keyframes, "last.pt")
    series.note(0, chunk("changed.pt"), Stored(PLANES, 100_000, 80_000))
    keyframes.save()
    assert find(keyframes, "last.pt") == chunk("last.pt")


def test_an_ingest_of_very_many_files_is_not_kept_in_memory(
    open_cache: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyframes_module, "MAX_LEARNED_BYTES", 1000)
    keyframes = open_cache()
    store(keyframes, "a.pt", "b.pt", "c.pt", "d.pt")
    assert [find(keyframes, path) != b"" for path in ("a.pt", "b.pt", "c.pt", "d.pt")] == [
        True,
        True,
        False,
        False,
    ]


def test_after_it_was_closed_nothing_is_found_or_kept(open_cache: Open) -> None:
    keyframes = open_cache()
    store(keyframes, "a.pt")
    keyframes.close()
    keyframes.close()
    assert store(keyframes, "a.pt", "b.pt") == [b"", b""]
    keyframes.prune()
    assert find(open_cache(), "a.pt") == chunk("a.pt")
    assert find(open_cache(), "b.pt") == b""


# Pruning


def count(tmp_path: Path) -> int:
    (database,) = databases(tmp_path)
    connection = sqlite3.connect(database)
    (rows,) = connection.execute("SELECT count(*) FROM series").fetchone()
    connection.close()
    return int(rows)


def test_those_that_were_saved_last_are_kept(
    open_cache: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyframes = open_cache()
    store(keyframes, *[f"{name}.pt" for name in "abcdefgh"])
    store(keyframes, "c.pt")
    monkeypatch.setattr(keyframes_module, "KEPT_BYTES", 3 * 400)
    keyframes.prune()
    kept = [name for name in "abcdefgh" if find(keyframes, f"{name}.pt")]
    assert kept == ["c", "g", "h"]
    assert count(tmp_path) == 3


def test_what_is_not_too_much_is_kept(open_cache: Open, tmp_path: Path) -> None:
    keyframes = open_cache()
    store(keyframes, *[f"{name}.pt" for name in range(100)])
    keyframes.prune()
    assert count(tmp_path) == 100


def test_it_stays_small_without_being_pruned(
    open_cache: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyframes_module, "KEPT_BYTES", 10 * 400)
    monkeypatch.setattr(keyframes_module, "_PRUNED_AFTER_BYTES", 10 * 400)
    keyframes = open_cache()
    for step in range(100):
        store(keyframes, f"ckpt_{step}.pt")
    assert count(tmp_path) <= 2 * 4000 // 350
    assert find(keyframes, "ckpt_100.pt") == chunk("ckpt_0.pt")


# Two processes

_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_keyframes import ID, store
from replicated.snapshot.keyframes import Keyframes
keyframes = Keyframes(Path(sys.argv[1]), ID, "file:///models")
for step in range(int(sys.argv[2])):
    store(keyframes, *[f"{step}/model_{name}.pt" for name in "abcdef"])
    print(step, flush=True)
keyframes.close()
"""


def begin_writer(tmp_path: Path, steps: int) -> subprocess.Popen[str]:
    arguments = [str(tmp_path / "keyframes"), str(steps), str(Path(__file__).parent)]
    return subprocess.Popen([sys.executable, "-c", _WRITER, *arguments], stdout=subprocess.PIPE, text=True)


def test_two_processes_may_use_it_at_once(
    open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keyframes = open_cache()
    rounds = 0
    with begin_writer(tmp_path, 15) as writer:
        while writer.poll() is None:
            assert store(keyframes, f"{rounds}/own.pt") == [chunk("0/own.pt") if rounds else b""]
            assert find(keyframes, "x1/model_a.pt") == b""
            assert find(keyframes, "999/model_a.pt") in (b"", chunk("0/model_a.pt"))
            rounds += 1
        assert writer.returncode == 0
    assert rounds > 1
    assert find(keyframes, "999/model_f.pt") == chunk("0/model_f.pt")
    assert not warnings(caplog)


def test_a_process_that_is_killed_leaves_a_cache_that_can_be_used(
    open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with begin_writer(tmp_path, 100_000) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "0\n"
        writer.kill()
    keyframes = open_cache()
    assert store(keyframes, "999999/model_a.pt") == [chunk("0/model_a.pt")]
    assert not warnings(caplog)


# Trouble


def test_a_flipped_bit_is_a_miss_and_never_another_base(
    open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [f"{name}.pt" for name in "abcdefgh"]
    keyframes = open_cache()
    store(keyframes, *paths)
    keyframes.close()
    (database,) = databases(tmp_path)
    sound = database.read_bytes()
    missed = 0
    for position in range(0, len(sound), 197):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << position % 8
        for path in databases(tmp_path):
            path.unlink()
        database.write_bytes(damaged)
        keyframes = open_cache()
        for path in paths:
            found = find(keyframes, path)
            assert found in (b"", chunk(path))
            missed += found == b""
        store(keyframes, "1.pt")
        keyframes.prune()
        keyframes.close()
    assert missed
    assert warnings(caplog)


@pytest.mark.parametrize("damage", [b"", b"\0" * 8192, b"no database, but text that is long enough" * 200])
def test_a_file_that_is_no_database_is_replaced(open_cache: Open, tmp_path: Path, damage: bytes) -> None:
    keyframes = open_cache()
    store(keyframes, "a.pt")
    keyframes.close()
    (database,) = databases(tmp_path)
    database.write_bytes(damage)
    keyframes = open_cache()
    assert store(keyframes, "a.pt") == [b""]
    assert find(open_cache(), "a.pt") == chunk("a.pt")
    assert len(databases(tmp_path)) == 1


@pytest.mark.parametrize("state", [b"", b"\xff" * 100])
def test_a_state_that_is_none_is_a_miss(
    open_cache: Open, caplog: pytest.LogCaptureFixture, state: bytes
) -> None:
    keyframes = open_cache()
    store(keyframes, "a.pt", save=False)
    learned = keyframes._learned
    learned.rows = [row._replace(state=state) for row in learned.rows]
    keyframes.save()
    assert find(keyframes, "a.pt") == b""
    (text,) = warnings(caplog)
    assert "a series is damaged" in text


@pytest.mark.parametrize("version", [0, keyframes_module.SCHEMA_VERSION + 1])
def test_a_database_of_another_version_is_not_read(open_cache: Open, tmp_path: Path, version: int) -> None:
    keyframes = open_cache()
    store(keyframes, "a.pt")
    keyframes.close()
    (database,) = databases(tmp_path)
    with sqlite3.connect(database) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    keyframes = open_cache()
    assert store(keyframes, "a.pt") == [b""]
    assert find(keyframes, "a.pt") == chunk("a.pt")


def test_a_database_that_is_deleted_while_it_is_open_is_made_anew(open_cache: Open, tmp_path: Path) -> None:
    keyframes = open_cache()
    store(keyframes, "a.pt")
    shutil.rmtree(tmp_path / "keyframes")
    assert store(keyframes, "a.pt") == [b""]
    assert find(open_cache(), "a.pt") == chunk("a.pt")


def test_a_place_where_nothing_can_be_written_is_a_miss(
    open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "keyframes").write_text("in the way")
    keyframes = open_cache()
    assert store(keyframes, "a.pt", "b.pt") == [b"", b""]
    assert store(keyframes, "a.pt") == [b""]
    keyframes.prune()
    (text,) = warnings(caplog)
    assert text.startswith("cannot open the cache of keyframes in")


def test_a_full_disk_keeps_what_was_there(open_cache: Open, caplog: pytest.LogCaptureFixture) -> None:
    keyframes = open_cache()
    store(keyframes, "a.pt")
    connection = keyframes._cache._connection
    assert connection is not None
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    store(keyframes, "a.pt", layout=layout(500 * PIECE_BYTES), generation=2)
    (text,) = warnings(caplog)
    assert text.startswith("cannot write the cache of keyframes in")
    assert find(keyframes, "a.pt") == chunk("a.pt")
    store(keyframes, "b.pt", save=False)


def test_one_who_keeps_it_locked_costs_one_wait_and_not_one_for_each_file(
    open_cache: Open,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keyframes_module, "_BUSY_TIMEOUT_S", 0.001)
    keyframes = open_cache()
    store(keyframes, "a.pt")
    keyframes.close()
    (database,) = databases(tmp_path)
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    keyframes = open_cache()
    assert store(keyframes, *["a.pt"] * 100) == [b""] * 100
    assert len(warnings(caplog)) == 1
    other.execute("ROLLBACK")
    other.close()
    monkeypatch.setattr(time, "monotonic", lambda: float("inf"))
    assert find(keyframes, "a.pt") == chunk("a.pt")
