from dataclasses import replace

from replicate.cli.render.details import render_checkpoint, render_experiment
from replicate.records import GitState, Gpu, System

LOSS = ("loss", "minimize")


def test_an_experiment_in_full(make_summary, make_checkpoint, view):
    checkpoints = [
        make_checkpoint("c1", 0, minutes_ago=9, metrics={"loss": 0.5, "acc": 1}, primary=LOSS),
        make_checkpoint("c2", 1, minutes_ago=8, metrics={"loss": 0.25, "late": 7}, primary=LOSS),
    ]
    summary = make_summary(
        "ee",
        checkpoints,
        minutes_ago=10,
        name="first",
        tags=("good", "v1"),
        host="gpu1",
        user="ann",
        command="python train.py",
        paths=("train.py", "data"),
        params={"lr": 0.1, "betas": [0.9, 0.99]},
        python_version="3.11.7",
        python_packages={"torch": "2.9", "numpy": "2.0"},
        system=System("Linux", "EPYC", 8, 64 << 30, (Gpu("H100", 80 << 30), Gpu("H100", 80 << 30)), "550"),
        git=GitState("abc123", "main", True, "-a\n+b\n"),
    )
    assert render_experiment(replace(summary, duration_s=131.0), checkpoints, view, everything=False) == (
        "Experiment ee00000000000000000000000000000000000000000000000000000000000000\n"
        "\n"
        "Name:     first\n"
        "Tags:     good, v1\n"
        "Created:  Mon, 23 Nov 2026 11:50:00 UTC\n"
        "Status:   stopped after 2m 11s\n"
        "Host:     gpu1\n"
        "User:     ann\n"
        "Command:  python train.py\n"
        "Path:     train.py, data\n"
        "Files:    stored\n"
        "\n"
        "Params\n"
        "betas:  [0.9, 0.99]\n"
        "lr:     0.1\n"
        "\n"
        "System\n"
        "Python:  3.11.7\n"
        "OS:      Linux\n"
        "CPU:     EPYC (8 cores)\n"
        "Memory:  64.0 GiB\n"
        "GPU:     2 × H100 (80.0 GiB)\n"
        "Driver:  550\n"
        "\n"
        "Git\n"
        "Commit:               abc123\n"
        "Branch:               main\n"
        "Uncommitted changes:  yes (a diff of 2 lines, `--all` shows it)\n"
        "\n"
        "Python packages\n"
        "numpy:  2.0\n"
        "torch:  2.9\n"
        "\n"
        "Checkpoints\n"
        "ID       STEP  CREATED        loss         acc  late\n"
        "c100000     0  9 minutes ago  0.5          1\n"
        "c200000     1  8 minutes ago  0.25 (best)       7\n"
        "\n"
        "For a checkpoint: `replicate show c200000`, `replicate files c200000`\n"
    )


def test_how_long_the_training_waited_is_shown_beside_how_long_it_took(make_summary, view):
    summary = replace(make_summary("ee", status="stopped"), duration_s=9 * 3600.0, stall_s=0.42)
    text = render_experiment(summary, [], view, everything=False)
    assert "Waited:   0.4s of 9h for calls of replicate\n" in text
    unknown = render_experiment(replace(summary, duration_s=None), [], view, everything=False)
    assert "Waited:   0.4s for calls of replicate\n" in unknown
    assert "Waited" not in render_experiment(replace(summary, stall_s=None), [], view, everything=False)


def test_an_experiment_with_nothing(make_summary, view):
    assert render_experiment(make_summary("ee", status="running"), [], view, everything=False) == (
        "Experiment ee00000000000000000000000000000000000000000000000000000000000000\n"
        "\n"
        "Created:  Mon, 23 Nov 2026 12:00:00 UTC\n"
        "Status:   running\n"
        "Files:    (none saved)\n"
        "\n"
        "Params\n"
        "(none)\n"
        "\n"
        "System\n"
        "(none)\n"
        "\n"
        "Python packages\n"
        "(none)\n"
        "\n"
        "Checkpoints\n"
        "(none)\n"
    )


def test_a_checkpoint_and_its_experiment(make_summary, make_checkpoint, view):
    checkpoint = make_checkpoint(
        "c1", 4, minutes_ago=2, metrics={"loss": 1 / 3, "acc": 0.5}, primary=LOSS, paths=("m.pt",)
    )
    text = render_checkpoint(checkpoint, make_summary("ee", [checkpoint]), view, everything=False)
    assert text.startswith(
        "Checkpoint c100000000000000000000000000000000000000000000000000000000000000 (best)\n"
        "\n"
        "Created:  Mon, 23 Nov 2026 11:58:00 UTC (2 minutes ago)\n"
        "Step:     4\n"
        "Path:     m.pt\n"
        "Files:    stored\n"
        "\n"
        "Metrics\n"
        "acc:   0.5\n"
        "loss:  0.3333333333333333 (primary, minimize)\n"
        "\n"
        "Experiment ee00000000000000000000000000000000000000000000000000000000000000\n"
        "\n"
        "Created:  "
    )
    assert "Checkpoints" not in text


def test_a_failed_checkpoint_says_why(make_summary, make_checkpoint, view):
    failed = make_checkpoint("c1", state="failed", error="No space left", paths=("m.pt",))
    summary = make_summary("ee", [failed])
    assert "Files:    failed: No space left\n" in render_checkpoint(failed, summary, view, everything=False)
    assert "failed: No space left" in render_experiment(summary, [failed], view, everything=False)


def test_many_packages_are_abbreviated_to_the_telling_ones(make_summary, view):
    packages = {"torch": "1", "PyTorch_Lightning": "2", **{f"p{i}": "0" for i in range(9)}}
    summary = make_summary("ee", python_packages=packages)
    text = render_experiment(summary, [], view, everything=False)
    assert "PyTorch_Lightning:  2\ntorch:              1\n… and 9 more; `--all` shows them\n" in text
    assert "p8:" in render_experiment(summary, [], view, everything=True)


def test_many_packages_without_a_telling_one_show_the_first_five(make_summary, view):
    summary = make_summary("ee", python_packages={f"p{i}": "0" for i in range(9)})
    text = render_experiment(summary, [], view, everything=False)
    assert "p4:  0\n… and 4 more" in text


def test_the_git_diff_is_shown_on_request_and_cannot_act_on_the_terminal(make_summary, view):
    summary = make_summary("ee", git=GitState("abc", "main", True, "+a\x1b[2J\n"))
    assert "Git diff\n+a\\x1b[2J\n" in render_experiment(summary, [], view, everything=True)


def test_a_terminal_gets_as_many_metrics_as_fit(make_summary, make_checkpoint, view):
    names = [f"metric_{i}" for i in range(20)]
    checkpoint = make_checkpoint("c1", metrics=dict.fromkeys(names, 0.5), primary=("metric_9", "maximize"))
    summary = make_summary("ee", [checkpoint])
    narrow = render_experiment(summary, [checkpoint], replace(view, width=60), everything=False)
    heading = next(line for line in narrow.splitlines() if line.startswith("ID"))
    assert heading.split() == ["ID", "STEP", "CREATED", "metric_9", "metric_0", "metric_1"]
    assert "… and 17 more metrics; `--all` shows them" in narrow
    assert "metric_8" in render_experiment(summary, [checkpoint], view, everything=False)
    assert "metric_8" in render_experiment(summary, [checkpoint], replace(view, width=60), everything=True)
