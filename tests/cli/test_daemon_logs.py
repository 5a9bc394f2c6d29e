import os

import pytest

from replicate.cli.commands.daemon import follow_lines, last_lines


def test_the_last_lines(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"one\ntwo\n\xff three\n")
    assert last_lines(log, 2) == ["two", "\udcff three"]
    assert last_lines(log, 0) == []


def test_a_missing_log_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        last_lines(tmp_path / "log", 5)
    with pytest.raises(FileNotFoundError):
        next(follow_lines(tmp_path / "log", 5))


def test_following_goes_on_with_what_is_appended_and_after_rotation(tmp_path):
    log = tmp_path / "log"
    log.write_text("one\ntwo\n")
    lines = follow_lines(log, 1)
    assert next(lines) == "two"
    with log.open("a") as file:
        file.write("three\nfour\n")
    assert [next(lines), next(lines)] == ["three", "four"]
    os.rename(log, tmp_path / "log.1")
    log.write_text("five\n")
    assert next(lines) == "five"
    lines.close()
