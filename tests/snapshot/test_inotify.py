"""What the kernel tells of directories, and how it is read."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from replicated.snapshot.inotify import Inotify


def test_a_directory_has_one_watch_under_all_its_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    inotify = Inotify()
    watch = inotify.add(os.fsencode(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert inotify.add(os.fsencode(tmp_path / "b")) == watch
    inotify.remove(watch)
    inotify.remove(watch)
    assert inotify.add(os.fsencode(tmp_path / "b")) != watch
    inotify.close()


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, errno.ENOENT),
        (lambda path: path.touch(), errno.ENOTDIR),
        (lambda path: path.symlink_to(path.parent), errno.ENOTDIR),
    ],
)
def test_what_is_no_directory_cannot_be_watched(
    tmp_path: Path, make: Callable[[Path], object], code: int
) -> None:
    make(tmp_path / "a")
    inotify = Inotify()
    with pytest.raises(OSError) as caught:
        inotify.add(os.fsencode(tmp_path / "a"))
    assert caught.value.errno == code
    inotify.close()


def test_everything_that_is_queued_is_read(tmp_path: Path) -> None:
    inotify = Inotify()
    assert list(inotify.read()) == []
    watch = inotify.add(os.fsencode(tmp_path))
    names = [f"{number:03}".encode() + b"n" * (number % 250) for number in range(1000)]
    for name in names:
        os.mkdir(os.path.join(os.fsencode(tmp_path), name))
    found = list(inotify.read())
    assert [name for _, _, name in found] == names
    assert {number for number, _, _ in found} == {watch}
    assert list(inotify.read()) == []
    inotify.close()
