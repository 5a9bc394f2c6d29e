"""What lies at a path: ids in every form, lists, links, and what is not there."""

import errno
import os
import tempfile
from pathlib import Path

import fsspec
import pytest
from blake3 import blake3

from replicated.fsspec_files import ReplicateFileSystem, opening
from replicated.fsspec_files.naming import FRESH_S, Names


def below(fs, root, **options):
    return {name.removeprefix(root + "/") for name in fs.find(root, **options)}


def on_disk(project):
    return {
        os.path.relpath(os.path.join(directory, name), project)
        for directory, _, names in os.walk(project)
        for name in names
    }


@pytest.mark.parametrize("form", ["{}", "{:.7}", "{}:latest", "{}:best", "{}:step=1", "{}:step=2", "{}:code"])
def test_an_id_means_what_it_means_on_the_command_line(saved, fs, form):
    expected = {"{}:latest": 1, "{}:step=2": 1, "{}:code": None}.get(form, 0)
    reference = form.format(saved.experiment)
    content = b"small\n" if expected is None else f"step {expected + 1}\n".encode()
    assert fs.cat_file(f"replicate://{reference}/small.txt") == content
    fixed = f"{saved.experiment}:code" if expected is None else saved.checkpoints[expected]
    assert fs.resolve(f"{reference}/a/b") == f"{fixed}/a/b"


def test_a_checkpoint_is_laid_over_its_experiment(saved, fs):
    for number, checkpoint in enumerate(saved.checkpoints):
        for reference in (checkpoint, checkpoint[:9], checkpoint.upper()):
            assert fs.cat_file(f"{reference}/small.txt") == f"step {number + 1}\n".encode()
            assert fs.info(f"{reference}/weights.bin")["size"] == 300_000
            assert (
                fs.cat_file(f"{reference}/data/table.csv") == (saved.project / "data/table.csv").read_bytes()
            )
    assert not fs.exists(saved.path("weights.bin"))


def test_latest_is_the_newest_experiment_and_may_have_no_files(saved, fs):
    assert fs.resolve("latest") == f"{saved.bare}:code"
    assert fs.ls("latest") == []
    assert fs.isdir("latest")
    with pytest.raises(FileNotFoundError, match="no files were saved"):
        fs.open("latest/small.txt")


def test_the_top_lists_experiments_oldest_first(saved, fs):
    assert fs.ls("replicate://", detail=False) == [saved.experiment, saved.bare]
    assert all(info["type"] == "directory" and info["created"].tzinfo for info in fs.ls(""))
    assert fs.glob("*/small.txt") == [f"{saved.experiment}/small.txt"]
    assert f"{saved.experiment}/data/table.csv" in fs.find("")


def test_lists_show_what_was_saved(saved, fs):
    root = saved.path("")
    names = {info["name"].rpartition("/")[2]: info for info in fs.ls(root)}
    saved_names = set(os.listdir(saved.project)) - {"weights.bin", "before-1.bin", "before-2.bin"}
    assert names.keys() == saved_names
    for name, info in names.items():
        assert info == fs.info(f"{root}{name}")
        path = saved.project / name
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            assert (info["size"], info["mode"]) == (status.st_size, status.st_mode)
            assert name == "small.txt" or info["mtime_ns"] == status.st_mtime_ns
    assert fs.ls(saved.path("big.bin"), detail=False) == [saved.path("big.bin")]
    assert fs.ls(saved.path("empty")) == []
    assert fs.du(saved.path("data/parts")) == sum(
        path.stat().st_size for path in (saved.project / "data/parts").rglob("*.parquet")
    )


def test_walking_follows_links_but_never_in_a_circle(saved, fs):
    found = below(fs, f"{saved.experiment}:code")
    plain = {name for name in on_disk(saved.project) if not name.endswith(("weights.bin", "1.bin", "2.bin"))}
    # Links to directories are no files on disk.
    assert plain - {"data/up", "to-data"} <= found
    assert "to-data/table.csv" in found and "data/up" not in found
    assert not any("up/" in name for name in found)
    ways_down = dict.fromkeys(name for name, _, _ in fs.walk(saved.path("data"), topdown=False))
    assert list(ways_down)[-1] == saved.path("data")
    kept = []
    for directory, directories, _ in fs.walk(saved.path("")):
        kept.append(directory)
        directories[:] = [name for name in directories if name == "data"]
    assert all("/to-data" not in name and "/empty" not in name for name in kept)
    assert fs.find(saved.path("data/parts"), maxdepth=1) == []
    assert len(fs.glob(saved.path("data/**/*.parquet"))) == 6
    assert len(fs.glob(saved.path("to-data/parts/*/0.parquet"))) == 2


def test_links_are_followed_within_the_snapshot_only(saved, fs):
    assert fs.cat_file(saved.path("to-small")) == b"small\n"
    assert fs.cat_file(saved.path("data/chain")) == b"small\n"
    assert fs.cat_file(saved.path("data/../small.txt")) == b"small\n"
    assert fs.info(saved.path("to-small"))["islink"] and fs.info(saved.path("to-small"))["type"] == "file"
    assert fs.isdir(saved.path("to-data")) and fs.isfile(saved.path("to-data/table.csv"))
    for name in ("outside", "escape", "dead", "loop-a", "../x", "data/../../x"):
        with pytest.raises(OSError) as raised:
            fs.open(saved.path(name))
        assert raised.value.errno == (errno.ELOOP if name == "loop-a" else errno.ENOENT)
        assert raised.value.filename == saved.path(name)
        assert not fs.exists(saved.path(name)) and not fs.isfile(saved.path(name))
    assert fs.info(saved.path("outside"))["type"] == "link"


def test_what_is_not_there_is_said_in_the_errors_of_files(saved, fs):
    for path in ("gone.txt", "data/gone/x", ""):
        wanted = FileNotFoundError if path else IsADirectoryError
        with pytest.raises(wanted):
            fs.open(saved.path(path))
    with pytest.raises(IsADirectoryError):
        fs.cat_file(saved.path("data"))
    with pytest.raises(NotADirectoryError):
        fs.open(saved.path("small.txt/x"))
    for reference in (
        "0000",
        "feed" * 16,
        "no-id",
        "abc",
        f"{saved.experiment}:step=9",
        f"{saved.bare}:best",
    ):
        with pytest.raises(FileNotFoundError):
            fs.open(f"{reference}/small.txt")
        assert not fs.exists(f"{reference}/small.txt")
    with pytest.raises(FileNotFoundError):
        fs.open(f"{saved.checkpoints[0]}:best/small.txt")


def test_what_cannot_be_known_is_not_said_to_be_missing(saved, tmp_path):
    somewhere = tmp_path / "closed"
    somewhere.mkdir()
    fs = fsspec.filesystem("replicate", repository=f"file://{somewhere}")
    assert not fs.exists("latest/x")
    with pytest.raises(FileNotFoundError, match="no repository"):
        fs.ls("")
    (somewhere / "repository.json").write_text("{")
    for ask in (fs.exists, fs.isdir, fs.isfile, fs.info, fs.find):
        with pytest.raises(OSError, match="damaged") as raised:
            ask("latest/x")
        assert raised.value.errno == errno.EIO


def test_urls_are_taken_apart_as_fsspec_does_it(saved, fs):
    url = f"replicate://{saved.experiment}:step=1/data/table.csv"
    found, path = fsspec.core.url_to_fs(url, repository=saved.url)
    assert found == fs and path == url.removeprefix("replicate://")
    assert found.unstrip_protocol(path) == url
    assert ReplicateFileSystem._strip_protocol(["replicate://a/", "b"]) == ["a", "b"]
    assert ReplicateFileSystem._strip_protocol("replicate://") == ""
    assert fs._parent(path) == path.rpartition("/")[0] and fs._parent("latest") == ""
    with fsspec.open(f"simplecache::{url}", replicate={"repository": saved.url}) as file:
        assert file.read() == (saved.project / "data/table.csv").read_bytes()
    with fsspec.open(url, "rt", repository=saved.url) as file:
        assert file.readline() == "x,y\n"


def test_nothing_can_be_written(saved, fs, tmp_path):
    path = saved.path("small.txt")
    local = tmp_path / "local"
    local.write_text("x")
    for write in (
        lambda: fs.open(path, "wb"),
        lambda: fs.open(path, "a"),
        lambda: fs.rm(path),
        lambda: fs.rm_file(path),
        lambda: fs.mkdir(path),
        lambda: fs.makedirs(path, exist_ok=True),
        lambda: fs.rmdir(path),
        lambda: fs.mv(path, path + "2"),
        lambda: fs.copy(path, path + "2"),
        lambda: fs.put(str(local), path),
        lambda: fs.put_file(str(local), path),
        lambda: fs.pipe({path: b"x"}),
        lambda: fs.pipe_file(path, b"x"),
        lambda: fs.write_text(path, "x"),
        lambda: fs.write_bytes(path, b"x"),
        lambda: fs.touch(path),
    ):
        with pytest.raises(OSError, match="read-only") as raised:
            write()
        assert raised.value.errno == errno.EROFS
    assert fs.cat_file(path) == b"small\n"


def test_times_and_hashes_tell_contents_apart(saved, fs):
    first, second = (f"{checkpoint}/small.txt" for checkpoint in saved.checkpoints)
    assert fs.ukey(first) != fs.ukey(second) and fs.checksum(first) != fs.checksum(second)
    assert fs.ukey(saved.path("small.txt")) == fs.ukey(saved.path("to-small"))
    assert fs.info(first)["ETag"] == fs.ukey(first) == blake3(fs.cat_file(first)).hexdigest()
    assert fs.ukey(saved.path("data")) == fs.ukey(saved.path("data"))
    assert fs.created(first) < fs.created(second)
    assert fs.created(saved.experiment + ":code") < fs.created(first)
    assert fs.modified(first) < fs.created(first)


def test_a_name_that_moves_is_looked_up_again_after_a_while(saved):
    now = [0.0]
    repository = opening.opened(opening.Source(saved.url, 0)).repository
    with tempfile.TemporaryDirectory() as catalogs:
        names = Names(repository, Path(catalogs), repository.load_snapshot, clock=lambda: now[0])
        asked = []
        ask = names._ask

        def count(text):
            asked.append(text)
            return ask(text)

        names._ask = count
        for text in ("latest", saved.experiment, saved.checkpoints[0], f"{saved.experiment}:code"):
            names.find(text)
            now[0] += FRESH_S / 2
            names.find(text)
        assert len(asked) == 4
        now[0] += FRESH_S
        for text in ("latest", saved.experiment, saved.checkpoints[0], f"{saved.experiment}:code"):
            names.find(text)
        # What a checkpoint shows, and what `init` saved, is for ever.
        assert asked[4:] == ["latest", saved.experiment]
        names.find("latest", max_age_s=1e9)
        assert len(asked) == 6
        names.forget()
        names.find("latest", max_age_s=1e9)
        assert len(asked) == 7
        names.close()
