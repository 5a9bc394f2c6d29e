import csv
import io
from dataclasses import replace

import pytest

from replicate.cli.render.experiments import render_csv, render_experiments

LOSS = ("loss", "minimize")


@pytest.fixture
def two_runs(make_summary, make_checkpoint):
    one = [
        make_checkpoint("1aaaaaaa", 0, minutes_ago=9, metrics={"loss": 0.25, "acc": 0.5}, primary=LOSS),
        make_checkpoint("1bbbbbbb", 1, minutes_ago=8, metrics={"loss": 1 / 3, "acc": 0.75}, primary=LOSS),
    ]
    return [
        make_summary("aaaaaaaa", one, minutes_ago=10, params={"lr": 0.01, "seed": 1, "opt": "adam"}),
        make_summary("bbbbbbbb", minutes_ago=3, params={"lr": 0.1, "seed": 1}, status="running"),
    ]


def test_the_table_shows_params_that_differ_and_primary_metrics(two_runs, view):
    assert render_experiments(two_runs, view, everything=False) == (
        "EXPERIMENT  STARTED         STATUS   PARAMS    BEST CHECKPOINT   LATEST CHECKPOINT\n"
        "aaaaaaa     10 minutes ago  stopped  lr=0.01   1aaaaaa (step 0)  1bbbbbb (step 1)\n"
        "                                     opt=adam  loss=0.25         loss=0.33333\n"
        "\n"
        "bbbbbbb     3 minutes ago   running  lr=0.1\n"
    )


def test_the_table_shows_everything_on_request(two_runs, view):
    two_runs[0] = replace(two_runs[0], record=replace(two_runs[0].record, user="ann", host="gpu1"))
    assert render_experiments(two_runs, view, everything=True) == (
        "EXPERIMENT  STARTED         STATUS   HOST  USER  PARAMS    BEST CHECKPOINT   LATEST CHECKPOINT\n"
        "aaaaaaa     10 minutes ago  stopped  gpu1  ann   lr=0.01   1aaaaaa (step 0)  1bbbbbb (step 1)\n"
        "                                                 opt=adam  acc=0.5           acc=0.75\n"
        "                                                 seed=1    loss=0.25         loss=0.33333\n"
        "\n"
        "bbbbbbb     3 minutes ago   running              lr=0.1\n"
        "                                                 seed=1\n"
    )


def test_a_single_experiment_shows_all_its_params(make_summary, view):
    table = render_experiments([make_summary("aa", params={"a": 1, "b": None})], view, everything=False)
    assert table == (
        "EXPERIMENT  STARTED   STATUS   PARAMS  LATEST CHECKPOINT\n"
        "aa00000     just now  stopped  a=1\n"
        "                               b=null\n"
    )


def test_equal_params_are_left_out_whatever_their_type(make_summary, view):
    runs = [
        make_summary("aa", params={"a": 1, "b": float("nan"), "c": [1], "d": True}),
        make_summary("bb", params={"a": 1.0, "b": float("nan"), "c": [1.0], "d": 1}),
    ]
    lines = render_experiments(runs, view, everything=False).splitlines()
    assert lines[1].split()[-1] == "d=true"
    assert lines[2].split()[-1] == "d=1"


def test_name_host_and_user_appear_when_they_say_something(make_summary, view):
    same = {"host": "gpu1", "user": "ann"}
    heading = render_experiments(
        [make_summary("aa", **same), make_summary("bb", **same)], view, everything=False
    )
    assert "HOST" not in heading and "USER" not in heading and "NAME" not in heading
    runs = [make_summary("aa", name="first", **same), make_summary("bb", host="gpu2", user="ann")]
    heading = render_experiments(runs, view, everything=False).splitlines()[0].split()
    assert heading[3:5] == ["NAME", "HOST"] and "USER" not in heading


def test_what_is_not_stored_is_marked(make_summary, make_checkpoint, view):
    runs = [
        make_summary("aa", [make_checkpoint("c1", state="captured")], state="captured"),
        make_summary("bb", state="failed", error="disk full"),
        make_summary("cc", [make_checkpoint("c2", state="failed", error="torn\x1b[0m")]),
    ]
    assert render_experiments(runs, view, everything=False) == (
        "EXPERIMENT  STARTED   STATUS                   PARAMS  LATEST CHECKPOINT\n"
        "aa00000     just now  stopped                          c100000 (step 0)\n"
        "                      storing…                         storing…\n"
        "\n"
        "bb00000     just now  stopped\n"
        "                      files failed: disk full\n"
        "\n"
        "cc00000     just now  stopped                          c200000 (step 0)\n"
        "                                                       failed: torn\\x1b[0m\n"
    )


def test_without_primary_metrics_the_first_few_are_shown(make_summary, make_checkpoint, view):
    checkpoint = make_checkpoint("c1", metrics={f"m{i}": i for i in range(9)})
    table = render_experiments([make_summary("aa", [checkpoint])], view, everything=False)
    assert "m4=4" in table and "m5=5" not in table and "BEST" not in table


def test_control_characters_cannot_forge_rows(make_summary, view):
    runs = [make_summary("aa", name="x\nFAKE", params={"k\x1b[1m": "v\r\n"}), make_summary("bb")]
    table = render_experiments(runs, view, everything=False)
    assert "x\\nFAKE" in table and "k\\x1b[1m=v\\r\\n" in table
    assert "\x1b" not in table and "\r" not in table


def test_a_terminal_cuts_what_is_too_wide(two_runs, view):
    long = replace(two_runs[0], record=replace(two_runs[0].record, params={"text": "y" * 60}))
    table = render_experiments([long, two_runs[1]], replace(view, width=80), everything=False)
    assert max(map(len, table.splitlines())) <= 80
    assert "10m ago" in table and "y…" in table
    assert "1aaaaaa (step 0)  1bbbbbb (step 1)" in table


def test_csv_has_full_values(two_runs):
    rows = list(csv.DictReader(io.StringIO(render_csv(two_runs))))
    assert [row["id"][:8] for row in rows] == ["aaaaaaaa", "bbbbbbbb"]
    assert rows[0]["params.lr"] == "0.01"
    assert rows[0]["latest.metrics.loss"] == repr(1 / 3)
    assert rows[0]["best.step"] == "0"
    assert rows[1]["params.opt"] == "" and rows[1]["best.id"] == ""
    assert rows[1]["status"] == "running"


def test_csv_of_nothing_is_a_heading():
    assert render_csv([]).startswith("id,created,name,")
