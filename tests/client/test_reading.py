"""Reading saved files through the objects of the library."""

import errno
import io
import json
import os
import zipfile
from functools import partial
from pathlib import Path

import pytest

import replicate
from replicate import errors, mounts, query, snapshot

BIG = os.urandom(3 << 20)


@pytest.fixture
def checkpoint(project):
    """A checkpoint whose files lie over those of its experiment."""
    (project / "code").mkdir()
    (project / "code" / "train.py").write_text("lr = 1\n")
    (project / "model.pt").write_bytes(b"before")
    with replicate.init(".", quiet=True) as experiment:
        (project / "model.pt").write_bytes(BIG)
        (project / "empty").write_bytes(b"")
        (project / "link").symlink_to("model.pt")
        made = experiment.checkpoint(["model.pt", "empty", "link"])
    made.experiment = experiment
    return made


def test_a_checkpoint_has_the_files_of_its_experiment_too(checkpoint):
    found = {entry.path: entry for entry in checkpoint.files()}
    assert list(found) == ["code", "code/train.py", "empty", "link", "model.pt"]
    assert (found["model.pt"].size, found["link"].target) == (len(BIG), "model.pt")
    assert [entry.path for entry in checkpoint.experiment.files()] == list(found)


def test_a_file_is_read_as_any_other(checkpoint):
    with checkpoint.open("model.pt") as file:
        assert isinstance(file, io.BufferedReader)
        assert file.read() == BIG
        assert file.read() == b""
        assert file.seek(-5, os.SEEK_END) == len(BIG) - 5
        assert file.read(100) == BIG[-5:]
        file.seek(1000)
        file.seek(5, os.SEEK_CUR)
        assert file.tell() == 1005
        assert file.read(3) == BIG[1005:1008]
        file.seek(len(BIG) + 10)
        assert file.read(1) == b""
        with pytest.raises(ValueError, match="negative"):
            file.seek(-1)
    assert file.closed


def test_a_file_is_read_in_pieces_of_any_size(checkpoint):
    for size in (1 << 10, 100_003, 1 << 20, 5 << 20):
        with checkpoint.open("model.pt") as file:
            assert b"".join(iter(partial(file.read, size), b"")) == BIG


def test_only_what_is_read_is_fetched(checkpoint, monkeypatch):
    fetched = []
    real = query.read_file

    def counting(*arguments):
        for piece in real(*arguments):
            fetched.append(len(piece))
            yield piece

    checkpoint.wait()
    monkeypatch.setattr(query, "read_file", counting)
    with checkpoint.open("model.pt") as file:
        file.read(10)
        file.seek(2 << 20)
        file.read(10)
    assert sum(fetched) == 2 * snapshot._FIRST_FETCH_BYTES


def test_an_empty_file_is_empty(checkpoint):
    with checkpoint.open("empty") as file:
        assert file.read() == b""


def test_paths_of_files_may_be_paths(checkpoint):
    with checkpoint.open(Path("code") / "train.py") as file:
        assert file.readlines() == [b"lr = 1\n"]
    with checkpoint.experiment.open("./code/../code/train.py") as file:
        assert file.read() == b"lr = 1\n"


def test_archives_can_be_read_without_fetching_all_of_them(project):
    with zipfile.ZipFile("model.zip", "w") as archive:
        archive.writestr("config.json", '{"a": 1}')
        archive.writestr("weights", BIG)
    with replicate.init(quiet=True) as experiment:
        made = experiment.checkpoint("model.zip")
    with made.open("model.zip") as file, zipfile.ZipFile(file) as archive:
        assert json.loads(archive.read("config.json")) == {"a": 1}


@pytest.mark.parametrize("path", ["missing", "code/missing", "model.pt/x"])
def test_a_file_that_was_not_saved_is_not_found(checkpoint, path):
    with pytest.raises(FileNotFoundError) as caught:
        checkpoint.open(path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, path)


@pytest.mark.parametrize("path", ["code", ".", "code/.."])
def test_a_directory_cannot_be_opened(checkpoint, path):
    with pytest.raises(IsADirectoryError):
        checkpoint.open(path)


@pytest.fixture
def linked(project):
    """A checkpoint with links of all kinds."""
    (project / "a" / "b").mkdir(parents=True)
    (project / "empty").mkdir()
    (project / "a" / "b" / "file").write_text("content")
    links = {
        "direct": "a/b/file",
        "directory": "a/b",
        "a/up": "../direct",
        "dangling": "nothing",
        "out": "../secret",
        "absolute": str(project / "a" / "b" / "file"),
        "loop": "loop",
        "to_empty": "empty",
    }
    for name, target in links.items():
        (project / name).symlink_to(target)
    with replicate.init(quiet=True) as experiment:
        return experiment.checkpoint(".").wait()


@pytest.mark.parametrize(
    "path", ["direct", "directory/file", "a/up", "directory/../up", "./a//b/file", "a/b/../b/file"]
)
def test_links_are_followed_within_the_snapshot(linked, path):
    with linked.open(path) as file:
        assert file.read() == b"content"


@pytest.mark.parametrize(
    "path", ["dangling", "out", "absolute", "loop", "../a/b/file", "missing/../direct", "", "/a/b/file"]
)
def test_a_path_that_leads_to_no_file_of_the_snapshot_is_not_found(linked, path):
    with pytest.raises(FileNotFoundError):
        linked.open(path)


def test_a_link_to_a_directory_is_a_directory(linked):
    with pytest.raises(IsADirectoryError):
        linked.open("to_empty")


def test_files_in_the_way_of_a_checkout_are_replaced_only_by_force(linked, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "direct").write_text("in the way")
    with pytest.raises(errors.CheckoutConflict) as caught:
        linked.checkout(tmp_path / "out")
    assert "force=True" in caught.value.hint and "--" not in str(caught.value)
    with pytest.raises(errors.CheckoutConflict) as caught:
        linked.checkout(tmp_path / "out" / "direct", force=True)
    assert caught.value.hint == "choose another directory"
    linked.checkout(tmp_path / "out", quiet=True, force=True)
    assert (tmp_path / "out" / "direct").read_text() == "content"


def test_the_query_functions_read_parts_of_files(checkpoint):
    repository = checkpoint._repository
    checkpoint.wait()

    def read(offset, length=None):
        return b"".join(query.read_file(repository, checkpoint.id, "model.pt", offset, length))

    assert read(len(BIG) - 3) == BIG[-3:]
    assert read(5, 10) == BIG[5:15]
    assert read(5, 0) == b""
    assert read(len(BIG) + 5) == b""
    with pytest.raises(errors.NotFound):
        list(query.read_file(repository, checkpoint.id, "missing", 0, 0))
    with pytest.raises(ValueError, match="negative"):
        read(-1)
    entry = query.stat_file(repository, checkpoint.id, "model.pt")
    assert (entry.path, entry.size) == ("model.pt", len(BIG))


def test_checking_out_writes_the_files(checkpoint, tmp_path, capsys):
    capsys.readouterr()
    checkpoint.checkout(tmp_path / "out")
    assert (tmp_path / "out" / "model.pt").read_bytes() == BIG
    assert (tmp_path / "out" / "code" / "train.py").read_text() == "lr = 1\n"
    assert os.readlink(tmp_path / "out" / "link") == "model.pt"
    assert capsys.readouterr().err == f"replicate: wrote 3 files (3.0 MiB) to {tmp_path / 'out'}\n"
    (tmp_path / "out" / "model.pt").write_text("mine")
    with pytest.raises(errors.CheckoutConflict):
        checkpoint.checkout(tmp_path / "out", quiet=True)
    checkpoint.checkout(tmp_path / "out", quiet=True, force=True)
    assert (tmp_path / "out" / "model.pt").read_bytes() == BIG
    checkpoint.checkout(tmp_path / "part", quiet=True, path="code")
    assert [path.name for path in (tmp_path / "part").rglob("*.py")] == ["train.py"]
    assert capsys.readouterr().err == ""


def test_a_mount_lasts_for_its_block(checkpoint):
    with checkpoint.mount() as directory:
        assert (directory / "model.pt").read_bytes() == BIG
        assert [mount.directory for mount in mounts.list_mounts()] == [str(directory)]
    assert not directory.exists()
    assert mounts.list_mounts() == []


def test_what_a_block_raises_is_not_replaced(checkpoint, tmp_path, capsys):
    opened = []
    mount = checkpoint.mount(tmp_path / "mnt")
    with pytest.raises(KeyError), mount as directory:
        opened.append((directory / "model.pt").open("rb"))
        raise KeyError("of the user")
    assert "it stays mounted" in capsys.readouterr().err
    opened[0].close()
    mount.unmount()


@pytest.mark.parametrize("directory", ["", "a\0b", "\ud800"])
def test_a_name_that_no_directory_has_is_refused(checkpoint, directory):
    with pytest.raises(ValueError, match="directory"):
        checkpoint.mount(directory)
    with pytest.raises(TypeError, match="prefetch"):
        checkpoint.mount(prefetch=5)


def test_a_mount_can_be_kept_and_ended(checkpoint, tmp_path):
    mount = checkpoint.experiment.mount(tmp_path / "mnt")
    assert Path(mount) == mount.path == tmp_path / "mnt"
    assert (mount.path / "code" / "train.py").read_text() == "lr = 1\n"
    assert repr(mount) == f"<Mount {mount.path}>"
    mount.unmount()
    mount.unmount()
    assert "unmounted" in repr(mount)


def test_a_mount_in_use_says_so(checkpoint, tmp_path):
    mount = checkpoint.mount(tmp_path / "mnt")
    with (mount.path / "model.pt").open("rb"), pytest.raises(errors.MountFailed):
        mount.unmount()
    mount.unmount()


def test_a_mount_that_somebody_else_ended_is_no_error(checkpoint, tmp_path):
    with checkpoint.mount(tmp_path / "mnt") as directory:
        mounts.unmount(directory=directory)


def test_a_mount_in_a_place_of_its_own_ends_with_the_process(checkpoint, run_script):
    source = f"""
import replicate
print(replicate.experiments.get("{checkpoint.experiment_id}").mount().path)
"""
    done = run_script(source)
    assert (done.status, done.errors) == (0, "")
    assert done.output.strip()
    assert mounts.list_mounts() == []


def test_the_state_follows_the_storing(project):
    (project / "model.pt").write_bytes(BIG)
    with replicate.init(quiet=True) as experiment:
        made = experiment.checkpoint("model.pt")
        assert made.wait(60) is made
        assert made.state == "stored"
        again = experiment.checkpoint("model.pt")
        replicate.flush(60)
        assert again.state == "stored"


def test_an_experiment_without_files_has_none(project):
    with replicate.init(quiet=True) as experiment:
        with pytest.raises(errors.NotFound, match="no files were saved"):
            experiment.files()
        made = experiment.checkpoint(metrics={"a": 1})
    assert made.wait().state == "stored"
    with pytest.raises(errors.NotFound, match="no files were saved"):
        made.open("model.pt")


def test_a_mount_in_a_place_of_its_own_ends_with_a_process_that_is_killed(checkpoint, run_script, wait_until):
    done = run_script(
        f"""
import os, signal
import replicate
print(replicate.experiments.get("{checkpoint.experiment_id}").mount().path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    directory = Path(done.output.strip())
    assert done.status == -9 and directory.name
    wait_until(lambda: not directory.exists(), "unmounted and removed")
    assert mounts.list_mounts() == []


def test_a_mount_can_be_told_how(checkpoint, tmp_path):
    with checkpoint.mount(tmp_path / "mnt", engine="mfusepy", prefetch="**"):
        (info,) = mounts.list_mounts()
        assert info.engine == "mfusepy" and info.prefetch is not None
    with pytest.raises(errors.InvalidArgument, match="unknown engine: 'none'"):
        checkpoint.mount(engine="none")
