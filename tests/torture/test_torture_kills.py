"""Whoever is killed, and whenever: every snapshot is right, or reported failed; never wrong, never absent."""

import re
import shutil
import signal
from random import Random

import pytest
from rig import writers
from rig.sites import SEED, rounds

#: Why there are no files of a call that found no daemon, nor could start one that lived.
WAS_AWAY = re.compile("could not be captured when it was made|the daemon ended as it started").search
#: Dies the instant `checkpoint` returns.
DYING = """
import os, signal, sys
from pathlib import Path
import replicate
from rig.oracle import Chronicle, describe

chronicle = Chronicle(Path(sys.argv[1]))
experiment = replicate.init(quiet=True)
chronicle.write("begun", experiment=experiment.id)
paths = ["files"]
chronicle.write("called", step=0, paths=paths, must_fail="", expected=describe(Path(), paths))
experiment.checkpoint(paths, step=0, quiet=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_daemon_gets_nothing_wrong_and_is_silent_about_nothing(site):
    site.train(rounds=rounds(15), kills=("daemon KILL",))
    assert site.chronicle.read("killed")
    states = site.judge(may_fail=lambda reason: True)
    assert "stored" in states.values()
    reasons = {failure["id"]: failure["error"] for failure in site.show("status")["failures"]}
    for line in site.chronicle.read("returned"):
        if states[line["step"]] == "failed" and line["state"] != "failed":
            assert reasons[line["id"]]
            shown = site.show("show", line["id"])
            assert (shown["state"], shown["error"]) == ("failed", reasons[line["id"]])


def test_a_killed_daemon_loses_nothing_that_nobody_touches(site):
    site.train(rounds=rounds(10), workload="steps", kills=("daemon KILL",))
    assert site.chronicle.read("killed")
    assert "stored" in site.judge(may_fail=WAS_AWAY).values()


def test_a_killed_daemon_loses_nothing_with_capture_copy(site):
    (site.project / "replicate.yaml").write_text("capture: copy\n")
    site.train(rounds=rounds(8), kills=("daemon KILL",))
    assert site.chronicle.read("killed")
    assert "stored" in site.judge(may_fail=WAS_AWAY).values()


@pytest.mark.parametrize("kills", [("daemon TERM",), ("store KILL", "store TERM")], ids=" or ".join)
def test_nothing_is_lost_when_others_end(site, kills):
    """A daemon that is told to stop has time to save everything; the process that stores owns nothing."""
    site.train(rounds=rounds(12), kills=kills, kill_chance=0.5)
    assert site.chronicle.read("killed")
    assert "stored" in site.judge(may_fail=WAS_AWAY).values()


@pytest.mark.parametrize("rung", ["", "memory"])
def test_a_script_that_dies_as_checkpoint_returns_has_saved_everything(site, rung):
    random = Random(SEED)
    files = site.project / "files"
    for number, size in enumerate([0, 1, 9000, 9001, 1 << 20, 30_000_000]):
        (files / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        (files / f"{number % 2}" / f"{number}").write_bytes(writers.content(random, size))
    done = site.run("-c", DYING, str(site.chronicle.path), REPLICATE_CAPTURE_RUNG=rung)
    shutil.rmtree(files)
    assert done.returncode == -signal.SIGKILL
    assert set(site.judge().values()) == {"stored"}
