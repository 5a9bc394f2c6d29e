"""What users give as `path`."""

import os
import socket
from pathlib import Path

import pytest

from replicate.project_paths import check_paths


@pytest.fixture
def directory(tmp_path):
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "model.pt").write_bytes(b"weights")
    (project / "data" / "with space\n").write_bytes(b"")
    (tmp_path / "outside").write_bytes(b"")
    return project


def test_nothing_is_no_paths(directory):
    assert check_paths(None, directory) == ()
    assert check_paths([], directory) == ()


@pytest.mark.parametrize(
    ("path", "relative"),
    [
        ("model.pt", "model.pt"),
        (Path("model.pt"), "model.pt"),
        ("./data/", "data"),
        (".", "."),
        ("data/..", "."),
        ("data/../model.pt", "model.pt"),
        ("data/with space\n", "data/with space\n"),
    ],
)
def test_paths_are_relative_to_the_project_directory(directory, monkeypatch, path, relative):
    monkeypatch.chdir("/")
    assert check_paths(path, directory) == (relative,)


def test_absolute_paths_inside_the_project_are_made_relative(directory):
    assert check_paths(str(directory / "model.pt"), directory) == ("model.pt",)
    assert check_paths(directory, directory) == (".",)


def test_lists_are_accepted_and_repetitions_left_out(directory):
    assert check_paths(["data", Path("model.pt"), "./data"], directory) == ("data", "model.pt")
    assert check_paths(("data",), directory) == ("data",)


def test_a_project_that_is_reached_through_a_link_is_the_same(directory, tmp_path):
    (tmp_path / "link").symlink_to(directory)
    assert check_paths(tmp_path / "link" / "model.pt", directory) == ("model.pt",)
    assert check_paths(directory / "model.pt", tmp_path / "link") == ("model.pt",)


def test_bytes_that_are_not_text_are_paths(directory):
    name = os.fsdecode(b"\xff\xfe")
    (directory / name).write_bytes(b"")
    assert check_paths(name, directory) == (name,)


@pytest.mark.parametrize("path", ["..", "../outside", "data/../../outside", "/", "/etc/passwd"])
def test_paths_outside_the_project_are_refused_naming_both(directory, path):
    with pytest.raises(ValueError, match="outside the project directory") as caught:
        check_paths(path, directory)
    assert repr(path) in str(caught.value)
    assert str(directory) in str(caught.value)


def test_a_directory_whose_name_only_begins_alike_is_outside(directory):
    (directory.parent / "project2").mkdir()
    with pytest.raises(ValueError, match="outside"):
        check_paths(directory.parent / "project2", directory)


@pytest.mark.parametrize("path", ["missing", "data/missing", "model.pt/below"])
def test_a_missing_path_is_a_file_not_found_error_with_the_path(directory, path):
    with pytest.raises(FileNotFoundError) as caught:
        check_paths(["data", path], directory)
    assert caught.value.filename == path


def test_links_are_saved_as_links_wherever_they_point(directory):
    (directory / "dangling").symlink_to("nowhere")
    (directory / "out").symlink_to("../outside")
    assert check_paths(["dangling", "out"], directory) == ("dangling", "out")


def test_pipes_and_sockets_are_refused_without_being_opened(directory):
    os.mkfifo(directory / "pipe")
    with socket.socket(socket.AF_UNIX) as unix, pytest.raises(ValueError, match="not a regular file"):
        unix.bind(str(directory / "socket"))
        check_paths("socket", directory)
    with pytest.raises(ValueError, match="not a regular file or directory: 'pipe'"):
        check_paths("pipe", directory)


@pytest.mark.parametrize("path", [5, b"bytes", [None], {"a": 1}, [["a"]]])
def test_other_types_are_a_type_error(directory, path):
    with pytest.raises(TypeError, match="path must be"):
        check_paths(path, directory)


@pytest.mark.parametrize("path", ["", [""], "a\0b"])
def test_paths_that_cannot_be_are_a_value_error(directory, path):
    with pytest.raises(ValueError, match=r"empty|null|NUL"):
        check_paths(path, directory)
