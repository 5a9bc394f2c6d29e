"""Libraries for data read snapshots by URL, as their users write it."""

import importlib.metadata

import dask
import dask.dataframe
import fsspec
import fsspec.parquet
import numpy
import pandas
import pyarrow.csv
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet
import pytest


@pytest.fixture
def options(saved):
    return {"repository": saved.url}


@pytest.fixture
def table(saved):
    return pandas.read_csv(saved.project / "data/table.csv")


def test_an_installation_registers_the_protocol():
    (entry,) = importlib.metadata.entry_points(group="fsspec.specs", name="replicate")
    assert entry.load() is fsspec.get_filesystem_class("replicate")


def test_pandas(saved, options, table):
    url = f"replicate://{saved.experiment}:best/data"
    pandas.testing.assert_frame_equal(pandas.read_csv(f"{url}/table.csv", storage_options=options), table)
    pandas.testing.assert_frame_equal(
        pandas.read_parquet(f"{url}/parts/year=2024/1.parquet", storage_options=options).reset_index(
            drop=True
        ),
        table[20_000:40_000].reset_index(drop=True),
    )
    both = pandas.read_parquet(f"{url}/parts", storage_options=options, columns=["x"])
    assert sorted(both["x"]) == sorted([*range(60_000)] * 2)
    with pytest.raises(FileNotFoundError):
        pandas.read_csv(f"{url}/gone.csv", storage_options=options)
    with pytest.raises(OSError, match="read-only"):
        table.to_csv(f"{url}/new.csv", storage_options=options)


def test_pandas_with_the_repository_of_the_environment(saved, table, monkeypatch):
    monkeypatch.setenv("REPLICATE_REPOSITORY", saved.url)
    found = pandas.read_csv(f"replicate://{saved.checkpoints[1]}/data/table.csv")
    pandas.testing.assert_frame_equal(found, table)


def test_pyarrow(saved, fs, table):
    root = saved.path("data/parts")
    dataset = pyarrow.dataset.dataset(root, filesystem=fs, partitioning="hive")
    assert len(dataset.files) == 6 and dataset.count_rows() == 120_000
    found = dataset.to_table(filter=pyarrow.dataset.field("year") == 2025, columns=["x", "y"]).to_pandas()
    pandas.testing.assert_frame_equal(found.sort_values("x").reset_index(drop=True), table)
    wrapped = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    part = pyarrow.parquet.read_table(f"{root}/year=2024/2.parquet", filesystem=wrapped)
    assert part.column("x").to_pylist() == list(range(40_000, 60_000))
    infos = wrapped.get_file_info(pyarrow.fs.FileSelector(saved.path("data"), recursive=True))
    assert {info.type for info in infos} == {pyarrow.fs.FileType.File, pyarrow.fs.FileType.Directory}
    assert wrapped.get_file_info(saved.path("gone")).type == pyarrow.fs.FileType.NotFound
    with wrapped.open_input_stream(saved.path("data/table.csv")) as stream:
        assert pyarrow.csv.read_csv(stream).num_rows == 60_000
    with wrapped.open_input_file(saved.path("model.safetensors")) as file:
        expected = (saved.project / "model.safetensors").read_bytes()
        assert file.size() == len(expected)
        assert file.read_at(4000, 1_000_001) == expected[1_000_001:1_004_001]
    with pytest.raises(OSError, match="read-only"):
        pyarrow.parquet.write_table(part, f"{root}/new.parquet", filesystem=wrapped)


@pytest.mark.parametrize("scheduler", ["processes", "threads", "synchronous"])
def test_dask(saved, options, table, scheduler):
    url = f"replicate://{saved.experiment}:latest/data"
    with dask.config.set(scheduler=scheduler, num_workers=2):
        frame = dask.dataframe.read_csv(f"{url}/table.csv", blocksize=300_000, storage_options=options)
        assert frame.npartitions > 3
        assert frame["x"].sum().compute() == table["x"].sum()
        assert numpy.isclose(frame["y"].mean().compute(), table["y"].mean())
        parts = dask.dataframe.read_parquet(f"{url}/parts", storage_options=options)
        assert parts["x"].sum().compute() == 2 * table["x"].sum()
        some = dask.dataframe.read_parquet(f"{url}/parts/*/1.parquet", storage_options=options)
        assert len(some.compute()) == 40_000


def test_columns_of_parquet_files_are_fetched_ahead_by_fsspec(saved, fs, table):
    path = saved.path("data/parts/year=2024/0.parquet")
    with fsspec.parquet.open_parquet_file(path, fs=fs, columns=["y"], engine="pyarrow") as file:
        found = pyarrow.parquet.read_table(file, columns=["y"]).column("y").to_pylist()
    assert found == table["y"][:20_000].tolist()


def test_arrays_are_read_where_they_lie(saved, fs):
    expected = numpy.random.default_rng(3).normal(size=1_000_000).astype("f4")
    with fs.open(saved.path("model.safetensors")) as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        file.seek(8 + header_bytes + 4 * 500_000)
        assert (numpy.frombuffer(file.read(400), "f4") == expected[500_000:500_100]).all()


def test_other_file_systems_are_laid_over_it(saved, tmp_path):
    name = "data/table.csv"
    for over in ("simplecache", "filecache"):
        with fsspec.open(
            f"{over}::replicate://{saved.experiment}:code/{name}",
            replicate={"repository": saved.url},
            **{over: {"cache_storage": str(tmp_path / over)}},
        ) as file:
            assert file.read() == (saved.project / name).read_bytes()
    mapper = fsspec.get_mapper(f"replicate://{saved.experiment}:code/data/parts", repository=saved.url)
    assert len(mapper) == 6 and mapper["year=2024/0.parquet"][:4] == b"PAR1"
