"""What is read in advance: what a pattern names, in the order of the tree, or what an earlier run read."""

import msgpack
import pytest
import zstandard

from replicate.errors import InvalidArgument
from replicated.mount.filesystem import Filesystem
from replicated.mount.reading.selecting import Pattern, Replay
from replicated.mount.reading.tracing import BLOCK_BYTES, Touch, Trace

LARGE = 10 * BLOCK_BYTES


@pytest.fixture
def filesystem(memory_tree):
    return Filesystem(
        memory_tree(
            {
                b"data": {
                    b"train": {b"a.jpg": b"1", b"b.json": b"22", b"link": "a.jpg"},
                    b"val": {b"c.jpg": b"333"},
                },
                b"model.safetensors": b"x" * LARGE,
                b"odd\xff.jpg": b"4",
                b"empty": {},
            }
        )
    )


def selected(selection, filesystem):
    return [wanted.path for wanted in selection.iter_wanted(filesystem)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (
            "**",
            [
                b"data/train/a.jpg",
                b"data/train/b.json",
                b"data/val/c.jpg",
                b"model.safetensors",
                b"odd\xff.jpg",
            ],
        ),
        ("*.safetensors", [b"model.safetensors"]),
        ("*.jpg", [b"data/train/a.jpg", b"data/val/c.jpg", b"odd\xff.jpg"]),
        ("train", [b"data/train/a.jpg", b"data/train/b.json"]),
        ("data/train/", [b"data/train/a.jpg", b"data/train/b.json"]),
        ("/data/val", [b"data/val/c.jpg"]),
        ("data/**/*.jpg", [b"data/train/a.jpg", b"data/val/c.jpg"]),
        ("data/train/a.jpg", [b"data/train/a.jpg"]),
        ("data/train/link", []),
        ("data/missing/*.jpg", []),
        ("model.safetensors/below", []),
        ("*.png", []),
    ],
)
def test_a_pattern_names_files_in_the_order_of_the_tree(filesystem, pattern, expected):
    assert selected(Pattern(pattern), filesystem) == expected


def test_only_the_directory_that_a_pattern_names_is_looked_into(filesystem):
    listed = []
    original = filesystem.readdir
    filesystem.readdir = lambda inode, offset: (
        listed.append(filesystem.path_of(inode)),
        original(inode, offset),
    )[1]
    assert selected(Pattern("data/train/*.jpg"), filesystem) == [b"data/train/a.jpg"]
    assert listed == [b"data/train"]


@pytest.mark.parametrize("text", ["", "#comment", "!data", "\\", "!"])
def test_what_names_no_files_is_refused(text):
    with pytest.raises(InvalidArgument):
        Pattern(text)


def replayed(filesystem, *touches):
    return [
        (wanted.path, wanted.offset, wanted.length, wanted.files)
        for wanted in Replay(Trace(1, _frames(touches))).iter_wanted(filesystem)
    ]


def _frames(touches):
    return [zstandard.compress(msgpack.packb([(t.path, t.first, t.count) for t in touches]))]


def test_files_are_replayed_in_the_order_in_which_they_were_read(filesystem):
    found = replayed(
        filesystem,
        Touch(b"data/val/c.jpg", 0, 0),
        Touch(b"gone", 0, 0),
        Touch(b"data/train/a.jpg/below", 0, 0),
        Touch(b"data", 0, 0),
        Touch(b"data/train/a.jpg", 0, 0),
    )
    assert found == [(b"data/val/c.jpg", 0, 3, 1), (b"data/train/a.jpg", 0, 1, 1)]


def test_of_a_large_file_the_ranges_are_replayed_that_were_read(filesystem):
    found = replayed(filesystem, Touch(b"model.safetensors", 9, 1), Touch(b"model.safetensors", 0, 2))
    assert found == [
        (b"model.safetensors", 9 * BLOCK_BYTES, BLOCK_BYTES, 1),
        (b"model.safetensors", 0, 2 * BLOCK_BYTES, 0),
    ]


def test_a_large_file_of_which_half_was_read_is_replayed_whole_and_once(filesystem):
    touches = [Touch(b"model.safetensors", 2 * number, 1) for number in range(5)]
    assert replayed(filesystem, *touches) == [(b"model.safetensors", 0, LARGE, 1)]
    assert replayed(filesystem, Touch(b"model.safetensors", 0, 0)) == [(b"model.safetensors", 0, LARGE, 1)]


def test_without_a_record_nothing_is_replayed(filesystem):
    assert selected(Replay(None), filesystem) == []
