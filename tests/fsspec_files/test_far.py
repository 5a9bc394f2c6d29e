"""The same from a bucket: right bytes, and few requests."""

import errno
import pickle
import shutil

import dask
import dask.dataframe
import fsspec
import numpy
import pandas
import pyarrow.dataset
import pytest
from servers import faults

from replicated.fsspec_files import opening

# The server of the tests is slow to save to, and other tests may run at the same time.
pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def options(saved_in_bucket, bucket):
    return {"repository": saved_in_bucket.url}


@pytest.fixture
def far(options):
    return fsspec.filesystem("replicate", **options)


@pytest.fixture
def forget(far, reader_home):
    """Be another machine, one that knows nothing."""

    def forget_all():
        opening.close_all()
        shutil.rmtree(reader_home)

    return forget_all


def test_a_part_of_a_file_takes_few_requests_where_nothing_is_known(saved_in_bucket, bucket, far):
    expected = (saved_in_bucket.project / "big.bin").read_bytes()
    path = saved_in_bucket.path("big.bin")
    with bucket.counting() as counted:
        assert far.cat_file(path, 2_000_000, 2_500_000) == expected[2_000_000:2_500_000]
    kinds = counted.by_kind
    # What the index is in depends on whether it was merged.
    assert kinds.pop(("GET", "log/index")) <= 3
    # The directory, the list of the chunks of the file, and the chunks.
    assert kinds.pop(("GET", "packs")) <= 3
    assert kinds == {("GET", "repository.json"): 1, ("GET", "experiments"): 1, ("LIST", "log"): 1}
    assert counted.bytes_down < 2_500_000
    with bucket.counting() as counted:
        assert far.cat_file(path, 2_000_000, 2_500_000) == expected[2_000_000:2_500_000]
        assert far.info(path)["size"] == len(expected)
        assert len(far.ls(saved_in_bucket.path(""))) > 50
    assert counted.total == 0
    with bucket.counting() as counted:
        assert far.cat_file(saved_in_bucket.path("small.txt")) == b"small\n"
    assert counted.by_kind == {("GET", "packs"): 1}


def test_the_full_id_of_an_experiment_asks_for_its_own_records_only(saved_in_bucket, bucket, far):
    with bucket.counting() as counted:
        assert far.resolve(saved_in_bucket.experiment) == saved_in_bucket.checkpoints[0]
    assert counted.by_kind == {
        ("GET", "repository.json"): 1,
        ("GET", "experiments"): 1,
        ("LIST", "checkpoints"): 1,
        ("GET", "checkpoints"): 2,
    }


def test_files_and_ranges_that_are_read_together_share_requests(saved_in_bucket, bucket, far):
    names = [f"many-{number}.txt" for number in range(40)]
    far.ls(saved_in_bucket.path(""))
    with bucket.counting() as counted:
        contents = far.cat([saved_in_bucket.path(name) for name in names])
    assert contents == {
        saved_in_bucket.path(name): (saved_in_bucket.project / name).read_bytes() for name in names
    }
    assert counted.total <= 2
    expected = (saved_in_bucket.project / "model.safetensors").read_bytes()
    path = saved_in_bucket.path("model.safetensors")
    starts = list(range(0, len(expected), 100_000))
    with bucket.counting() as counted:
        ranges = far.cat_ranges([path] * len(starts), starts, [start + 1000 for start in starts])
    assert ranges == [expected[start : start + 1000] for start in starts]
    assert counted.total <= 5


def test_reading_on_takes_fewer_and_larger_requests(saved_in_bucket, bucket, far):
    expected = (saved_in_bucket.project / "big.bin").read_bytes()
    with far.open(saved_in_bucket.path("big.bin")) as file:
        read = [file.read(10_000)]
        with bucket.counting() as counted:
            while read[-1]:
                read.append(file.read(10_000))
    assert b"".join(read) == expected
    assert counted.total <= 12


def test_what_was_read_is_kept_on_this_machine_unless_told_not_to(saved_in_bucket, bucket, options):
    expected = (saved_in_bucket.project / "words.txt").read_bytes()
    for cache_bytes in (0, 10**9):
        far = fsspec.filesystem("replicate", **options, cache_bytes=cache_bytes)
        assert far.cat_file(saved_in_bucket.path("words.txt")) == expected
        opening.close_all()
        with bucket.counting() as counted:
            assert far.cat_file(saved_in_bucket.path("words.txt")) == expected
        assert (counted.bytes_down < 100_000) == (cache_bytes > 0)
        opening.close_all()


def test_who_gets_a_file_system_need_not_look_up_what_ids_mean(saved_in_bucket, bucket, far, forget):
    path = f"{saved_in_bucket.experiment}:step=2/small.txt"
    assert far.cat_file(path) == b"step 2\n"
    sent = pickle.dumps(far)
    forget()
    with bucket.counting() as counted:
        assert pickle.loads(sent).cat_file(path) == b"step 2\n"
    # The two records whose snapshots are laid over each other.
    assert not counted.of("LIST", "checkpoints")
    assert len(counted.of("GET", "checkpoints")) == len(counted.of("GET", "experiments")) == 1


def test_libraries_read_from_the_bucket(saved_in_bucket, options, far):
    table = pandas.read_csv(saved_in_bucket.project / "data/table.csv")
    url = f"replicate://{saved_in_bucket.experiment[:8]}:best/data"
    pandas.testing.assert_frame_equal(pandas.read_csv(f"{url}/table.csv", storage_options=options), table)
    dataset = pyarrow.dataset.dataset(saved_in_bucket.path("data/parts"), filesystem=far)
    assert dataset.count_rows() == 120_000
    with dask.config.set(scheduler="processes", num_workers=2):
        parts = dask.dataframe.read_parquet(f"{url}/parts", storage_options=options)
        assert numpy.isclose(parts["y"].sum().compute(), 2 * table["y"].sum())


def test_credentials_can_come_with_the_options(saved_in_bucket, options, monkeypatch):
    given = {name: value for name, value in saved_in_bucket.environment.items() if name.startswith("AWS_")}
    for name in given:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fs = pickle.loads(pickle.dumps(fsspec.filesystem("replicate", **options, environment=given)))
    assert fs.cat_file(saved_in_bucket.path("small.txt")) == b"small\n"


def test_trouble_is_not_taken_for_absence(saved_in_bucket, bucket, options, monkeypatch):
    monkeypatch.setattr(opening, "PATIENCE_S", 0.5)
    path = saved_in_bucket.path("small.txt")
    bucket.add(faults.forbidden, "GET", "experiments/")
    fs = fsspec.filesystem("replicate", **options)
    with pytest.raises(PermissionError, match="bucket"):
        fs.exists(path)
    bucket.clear()
    bucket.add(faults.server_error, "GET", "packs/")
    with pytest.raises(OSError, match="s3://") as raised:
        fs.cat_file(path)
    assert raised.value.errno == errno.EHOSTUNREACH
    bucket.clear()
    assert fs.cat_file(path) == b"small\n"
    with pytest.raises(FileNotFoundError, match="no repository"):
        fsspec.filesystem("replicate", repository="s3://bucket/elsewhere").ls("")


def test_bytes_that_change_on_their_way_are_asked_for_again(saved_in_bucket, bucket, options):
    expected = (saved_in_bucket.project / "big.bin").read_bytes()
    fs = fsspec.filesystem("replicate", **options, cache_bytes=0)
    fs.info(saved_in_bucket.path("big.bin"))
    rules = [
        bucket.add(faults.flip, "GET", "packs/", times=1),
        bucket.add(faults.truncate, "GET", "packs/", times=1),
    ]
    assert fs.cat_file(saved_in_bucket.path("big.bin")) == expected
    assert [rule.hits for rule in rules] == [1, 1]
