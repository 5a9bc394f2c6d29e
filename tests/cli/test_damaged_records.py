"""What is shown of an experiment or a checkpoint whose record cannot be read."""

from dataclasses import replace
from datetime import datetime, timezone

import pytest

from replicate.cli.comparison import Compared, compare
from replicate.cli.json_output import summary_json
from replicate.cli.render.details import render_checkpoint, render_experiment
from replicate.cli.render.differences import comparison_json, render_comparison
from replicate.cli.render.experiments import render_csv, render_experiments
from replicate.cli.render.resolutions import explain_damage
from replicate.cli.view import MAX_REASON
from replicate.query import Resolution

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
REASON = "experiments/dd" + "0" * 62 + ".json in file:///data/runs is damaged: it does not end with its hash"


@pytest.fixture
def damaged(make_summary, now):
    """As the daemon lists it: nothing is known but that it ended."""
    summary = make_summary("dd", state="failed", error=REASON)
    return replace(
        summary, record=replace(summary.record, created=EPOCH), ended=now, duration_s=now.timestamp()
    )


@pytest.fixture
def damaged_checkpoint(make_checkpoint):
    return replace(make_checkpoint("c9", state="failed", error=REASON), created=EPOCH)


def test_show_says_that_an_experiment_is_damaged_and_nothing_that_is_not_known(damaged, view):
    assert render_experiment(damaged, [], view, everything=False) == (
        f"Experiment {damaged.record.id}\n"
        "\n"
        "Record:  damaged, so that what it says is not known\n"
        f"Reason:  {REASON}\n"
        "Ended:   Mon, 23 Nov 2026 12:00:00 UTC\n"
        "\n"
        "Checkpoints\n"
        "(none)\n"
    )


def test_show_says_that_a_checkpoint_is_damaged(damaged_checkpoint, make_checkpoint, make_summary, view):
    summary = make_summary("ee", [damaged_checkpoint], name="first")
    text = render_checkpoint(damaged_checkpoint, summary, view, everything=False)
    about, experiment = text.split("\nExperiment ")
    assert about == (
        f"Checkpoint {damaged_checkpoint.id}\n"
        "\n"
        "Record:  damaged, so that what it says is not known\n"
        f"Reason:  {REASON}\n"
    )
    assert "Name:     first\n" in experiment
    table = render_experiment(summary, [damaged_checkpoint, make_checkpoint("c1")], view, everything=False)
    assert (
        "ID       STEP  CREATED   NOTE\nc900000        unknown   damaged\nc100000     0  just now\n" in table
    )


def test_a_damaged_experiment_changes_no_other_row_of_the_list(damaged, make_summary, view):
    run = {"params": {"lr": 0.1, "opt": "adam"}, "host": "gpu1", "user": "ann"}
    others = [make_summary("aa", **run), make_summary("bb", **run)]
    alone = render_experiments(others, view, everything=False)
    together = render_experiments([*others, damaged], view, everything=False)
    assert together == alone + "dd00000     unknown   damaged\n"


def test_a_damaged_checkpoint_is_named_without_a_step(damaged_checkpoint, make_summary, view):
    table = render_experiments([make_summary("aa", [damaged_checkpoint])], view, everything=False)
    assert "c900000\n" in table and "damaged\n" in table and "step" not in table


def test_a_long_reason_widens_no_table_and_show_has_it_whole(make_summary, make_checkpoint, view):
    failed = make_checkpoint("c1", state="failed", error="because " * 40, paths=("m.pt",))
    summary = make_summary("aa", [failed], state="failed", error="because " * 40, paths=("train.py",))
    table = render_experiments([summary], view, everything=False)
    assert f"files failed: {'because ' * 4}" in table
    assert max(map(len, table.splitlines())) < 60 + 2 * MAX_REASON
    assert "because " * 10 in render_experiment(summary, [failed], view, everything=False)
    assert "because " * 10 in render_checkpoint(failed, summary, view, everything=False)


def test_no_duration_is_made_up(damaged):
    assert summary_json(damaged)["duration_s"] is None
    assert str(damaged.duration_s) not in render_csv([damaged])


def test_diff_does_not_compare_what_is_not_known(damaged, damaged_checkpoint, make_summary, view):
    whole = make_summary("aa", params={"lr": 0.1}, host="gpu1")
    comparison = compare(Compared(whole, None), Compared(damaged, None), [])
    assert render_comparison(comparison, view) == (
        "Experiment\n"
        "ID:  aa00000  dd00000\n"
        "(not compared)\n"
        "\n"
        "Params\n(not compared)\n"
        "\n"
        "Python packages\n(not compared)\n"
        "\n"
        "Git\n(not compared)\n"
        "\n"
        "Files\n(no difference)\n"
    )
    assert comparison_json(comparison)["params"] is None
    comparison = compare(Compared(whole, damaged_checkpoint), Compared(whole, None), [])
    assert comparison_json(comparison)["metrics"] is comparison_json(comparison)["checkpoint"] is None
    assert comparison_json(comparison)["params"] == {}


def test_commands_that_use_files_warn(damaged, damaged_checkpoint, make_summary):
    def explain(summary, checkpoint):
        meant = Resolution(summary=summary, checkpoint=checkpoint, named_experiment=True, chosen="latest")
        return explain_damage(meant)

    whole = make_summary("aa")
    assert explain(whole, None) == ""
    assert explain(damaged, None).startswith("the record of experiment dd00000 is damaged")
    assert explain(whole, damaged_checkpoint).startswith("the record of checkpoint c900000 is damaged")
