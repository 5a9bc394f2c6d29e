import json
import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from replicate.cli.comparison import (
    ABSENT,
    Compared,
    Difference,
    compare,
    compare_mappings,
    same_value,
)
from replicate.cli.json_output import to_json
from replicate.cli.render.differences import comparison_json, render_comparison
from replicate.records import FileChange, FileEntry, GitState, System

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
)


@given(values)
def test_every_value_is_the_same_as_itself(value):
    assert same_value(value, value)
    assert same_value([value], [value])


@given(values, values)
def test_sameness_is_symmetric(left, right):
    assert same_value(left, right) == same_value(right, left)


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (1, 1.0, True),
        (math.nan, math.nan, True),
        (math.inf, math.inf, True),
        ([1, {"a": 2}], [1.0, {"a": 2.0}], True),
        (True, 1, False),
        (0, False, False),
        ("1", 1, False),
        (None, "null", False),
        (None, 0, False),
        ([1], [1, 2], False),
        ({"a": 1}, {"b": 1}, False),
        (10**20, 10**20 + 1, False),
    ],
)
def test_values_are_compared_as_values(left, right, same):
    assert same_value(left, right) is same


def test_null_is_not_absent():
    assert compare_mappings({"a": None}, {}) == [Difference("a", None, ABSENT)]
    assert compare_mappings({}, {"a": None}) == [Difference("a", ABSENT, None)]
    assert compare_mappings({"a": None}, {"a": None}) == []


@pytest.fixture
def left(make_summary, make_checkpoint):
    checkpoint = make_checkpoint(
        "c1", 1, metrics={"loss": 0.5, "acc": 1}, primary=("loss", "minimize"), paths=("model.pt",)
    )
    return Compared(
        make_summary(
            "aa",
            [checkpoint],
            params={"lr": 0.1, "layers": 3},
            command="python train.py",
            python_packages={"torch": "2.9", "numpy": "2.0"},
            git=GitState("abc", "main", True, "+x\n"),
            system=System("Linux", memory_bytes=1 << 30),
        ),
        checkpoint,
    )


@pytest.fixture
def right(make_summary, make_checkpoint):
    checkpoint = make_checkpoint("c2", 2, metrics={"loss": 0.25, "acc": 1.0}, paths=("model.pt",))
    return Compared(
        make_summary(
            "bb",
            [checkpoint],
            params={"lr": 0.01, "layers": 3, "new": None},
            command="python train.py",
            python_packages={"torch": "2.9", "numpy": "2.1"},
            git=GitState("abd", "main", False),
        ),
        checkpoint,
    )


def entry(path, **fields):
    return FileEntry(
        path,
        fields.get("type", "file"),
        fields.get("mode", 0o644),
        fields.get("size", 1),
        0,
        fields.get("hash", ""),
    )


def test_differences_in_all_sections(left, right, view):
    changes = [
        FileChange("a.py", None, entry("a.py", size=2048)),
        FileChange("b\n", entry("b\n", size=10), None),
        FileChange("m", entry("m", hash="aa", size=1024), entry("m", hash="bb", size=2048, mode=0o755)),
        FileChange("x", entry("x", mode=0o600), entry("x", mode=0o644)),
    ]
    assert render_comparison(compare(left, right, changes), view) == (
        "Experiment\n"
        "ID:                   aa00000          bb00000\n"
        "OS:                   Linux            (not set)\n"
        "Memory:               1.0 GiB          (not set)\n"
        "\n"
        "Params\n"
        "lr:                   0.1              0.01\n"
        "new:                  (not set)        null\n"
        "\n"
        "Python packages\n"
        "numpy:                2.0              2.1\n"
        "\n"
        "Git\n"
        "Commit:               abc              abd\n"
        "Uncommitted changes:  yes              no\n"
        "Diff:                 1 line           (not set)\n"
        "\n"
        "Checkpoint\n"
        "ID:                   c100000          c200000\n"
        "Step:                 1                2\n"
        "Primary metric:       loss (minimize)  (not set)\n"
        "\n"
        "Metrics\n"
        "loss:                 0.5              0.25\n"
        "\n"
        "Files\n"
        "+ a.py  2.0 KiB\n"
        "- b\\n  10 B\n"
        "~ m  1.0 KiB → 2.0 KiB, mode 0644 → 0755\n"
        "~ x  mode 0600 → 0644\n"
        "(4 files: 1 added, 1 removed, 2 changed)\n"
    )


def test_the_same_twice_has_no_difference(left, view):
    text = render_comparison(compare(left, left, []), view)
    assert text == (
        "Experiment\n"
        "ID:  aa00000  aa00000\n"
        "\n"
        "Params\n"
        "(no difference)\n"
        "\n"
        "Python packages\n"
        "(no difference)\n"
        "\n"
        "Git\n"
        "(no difference)\n"
        "\n"
        "Checkpoint\n"
        "ID:  c100000  c100000\n"
        "\n"
        "Metrics\n"
        "(no difference)\n"
        "\n"
        "Files\n"
        "(no difference)\n"
    )
    data = comparison_json(compare(left, left, []))
    assert not any(data[part] for part in data.keys() - {"left", "right"})


def test_files_that_could_not_be_compared_are_not_called_equal(left, right, view):
    comparison = compare(left, right, None)
    assert render_comparison(comparison, view).endswith("Files\n(not compared)\n")
    assert comparison_json(comparison)["files"] is None


def test_experiments_without_checkpoints_can_be_compared(left, right, view):
    text = render_comparison(
        compare(replace(left, checkpoint=None), replace(right, checkpoint=None), []), view
    )
    assert "Checkpoint" not in text and "Metrics" not in text and "lr:" in text
    text = render_comparison(compare(left, replace(right, checkpoint=None), []), view)
    assert "ID:                   c100000" in text and "(none)" in text


def test_json_leaves_out_a_side_that_is_absent(left, right):
    data = json.loads(to_json(comparison_json(compare(left, right, []))))
    assert data["left"] == {"experiment": "aa" + "0" * 62, "checkpoint": "c1" + "0" * 62}
    assert data["params"] == {"lr": {"left": 0.1, "right": 0.01}, "new": {"right": None}}
    assert data["metrics"] == {"loss": {"left": 0.5, "right": 0.25}}
    assert data["git"]["dirty"] == {"left": True, "right": False}


def test_json_of_files(left, right):
    changes = [FileChange("a", None, entry("a")), FileChange("b", entry("b"), entry("b", hash="cc"))]
    files = comparison_json(compare(left, right, changes))["files"]
    assert [(file["path"], file["change"]) for file in files] == [("a", "added"), ("b", "changed")]
    assert files[0]["left"] is None and files[1]["right"]["hash"] == "cc"


def test_a_terminal_cuts_long_values_on_both_sides(left, right, view):
    left = replace(
        left, summary=replace(left.summary, record=replace(left.summary.record, command="l" * 200))
    )
    right = replace(
        right, summary=replace(right.summary, record=replace(right.summary.record, command="r" * 200))
    )
    text = render_comparison(compare(left, right, []), replace(view, width=80))
    assert max(map(len, text.splitlines())) <= 80
    assert "ll…" in text and "rr…" in text
    assert "r" * 200 in render_comparison(compare(left, right, []), view)
