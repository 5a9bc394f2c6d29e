import base64
import json
import math
import os
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given

from replicate.cli.json_output import (
    checkpoint_json,
    experiment_json,
    file_json,
    mtime_json,
    summary_json,
    to_json,
    value_json,
)
from replicate.records import FileEntry

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
)


def refuse_constant(name):
    raise AssertionError(f"not JSON: {name}")


@given(values)
def test_every_value_is_strict_json(value):
    json.loads(to_json(value_json(value)), parse_constant=refuse_constant)


def test_floats_that_json_has_not_are_strings():
    shown = value_json([math.nan, math.inf, -math.inf, 1.5])
    assert shown == ["NaN", "Infinity", "-Infinity", 1.5]


def test_summary_has_the_keys_of_the_contract(make_summary, make_checkpoint):
    checkpoint = make_checkpoint(
        "c1", 3, metrics={"loss": 0.5}, primary=("loss", "minimize"), paths=("model.pt",)
    )
    shown = summary_json(
        make_summary(
            "ee", [checkpoint], name="n", tags=("t",), params={"lr": 0.1}, command="c", user="u", host="h"
        )
    )
    assert shown["id"] == "ee" + "0" * 62
    assert shown["created"] == "2026-11-23T12:00:00.000000Z"
    assert shown["tags"] == ["t"]
    assert shown["params"] == {"lr": 0.1}
    assert (shown["name"], shown["command"], shown["user"], shown["host"]) == ("n", "c", "u", "h")
    assert shown["status"] == "stopped"
    assert shown["num_checkpoints"] == 1
    assert shown["path"] is None
    assert shown["best_checkpoint"] == shown["latest_checkpoint"] == checkpoint_json(checkpoint)
    assert shown["best_checkpoint"]["primary_metric"] == {"name": "loss", "goal": "minimize"}
    assert shown["best_checkpoint"]["path"] == "model.pt"
    assert {"id", "created", "step", "path", "metrics", "primary_metric", "state"} <= set(
        shown["best_checkpoint"]
    )


def test_seconds_of_waiting_are_given_or_null(make_summary):
    summary = make_summary("ee")
    assert summary_json(summary)["stall_seconds"] is None
    waited = replace(summary, stall_s=1.5)
    assert summary_json(waited)["stall_seconds"] == experiment_json(waited, None)["stall_seconds"] == 1.5


def test_an_experiment_without_checkpoints_has_nulls(make_summary):
    shown = experiment_json(make_summary("ee"), [])
    assert shown["best_checkpoint"] is shown["latest_checkpoint"] is None
    assert shown["checkpoints"] == []
    assert shown["git"] is None


def test_checkpoints_are_absent_unless_given(make_summary):
    assert "checkpoints" not in experiment_json(make_summary("ee"), None)


def test_several_paths_are_a_list(make_checkpoint):
    assert checkpoint_json(make_checkpoint("c1", paths=("a", "b")))["path"] == ["a", "b"]


@given(st.binary(min_size=1))
def test_a_path_of_any_bytes_survives_json(raw):
    entry = FileEntry(os.fsdecode(raw), "file", 0o644, 1, 0, "ab")
    shown = json.loads(to_json(file_json(entry)))
    assert os.fsencode(shown["path"]) == raw
    if "path_bytes" in shown:
        assert base64.b64decode(shown["path_bytes"]) == raw
    else:
        raw.decode()


def test_a_file_has_exact_times():
    shown = file_json(FileEntry("a", "file", 0o640, 7, 1_000_000_000_123_456_789, "ab"))
    assert shown == {
        "path": "a",
        "type": "file",
        "mode": 0o640,
        "size": 7,
        "mtime": "2001-09-09T01:46:40.123456Z",
        "mtime_ns": 1_000_000_000_123_456_789,
        "hash": "ab",
    }


def test_a_symlink_shows_its_target_and_a_directory_has_no_hash():
    assert file_json(FileEntry("l", "symlink", 0o777, 1, 0, "ab", "to"))["target"] == "to"
    assert file_json(FileEntry("d", "directory", 0o755, 0, 0, ""))["hash"] is None


def test_a_time_before_the_calendar_is_null():
    assert mtime_json(-(10**9) * 10**11) is None
    assert mtime_json(-1) == "1969-12-31T23:59:59.999999Z"
