"""Going on with an experiment, and joining one of another process."""

import math

import pytest

import replicate
from replicate import errors
from replicate.ids import new_id

TRAIN = """
import sys
import replicate
experiment = replicate.init(params={"lr": 0.1}, quiet=True)
checkpoint = experiment.checkpoint()
print(experiment.id, checkpoint.step, experiment.status)
"""


def test_a_stopped_experiment_goes_on(project):
    with replicate.init(params={"lr": math.nan}, quiet=True) as first:
        first.checkpoint(step=7)
    with replicate.init(resume=first.short_id, params={"lr": math.nan}, quiet=True) as second:
        assert (second.id, second.status) == (first.id, "running")
        assert second.checkpoint().step == 8
        assert second.checkpoints.step == [7, 8]
    read = replicate.experiments.get(first.id)
    assert (read.status, read.checkpoints.step) == ("stopped", [7, 8])


def test_resuming_says_so(project, capsys):
    with replicate.init(quiet=True) as experiment:
        pass
    replicate.init(resume=experiment.id).stop()
    assert capsys.readouterr().err.endswith(" goes on\n")


def test_other_params_are_refused_before_anything_happens(project):
    with replicate.init(params={"lr": 1, "same": 2}, quiet=True) as experiment:
        pass
    with pytest.raises(ValueError, match=r"differ .*: lr, new"):
        replicate.init(resume=experiment.id, params={"lr": 1.0, "same": 2, "new": 3}, quiet=True)
    assert replicate.experiments.get(experiment.id).status == "stopped"


def test_what_does_not_exist_cannot_be_resumed(project):
    with pytest.raises(errors.RepositoryMissing):
        replicate.init(resume="abcdef", quiet=True)


def test_an_id_of_the_environment_is_used_for_a_new_experiment_and_resumes_it(run_script):
    identifier = new_id()
    environment = {"REPLICATE_EXPERIMENT_ID": identifier}
    for step in range(2):
        done = run_script(TRAIN, environment=environment)
        assert (done.output, done.errors) == (f"{identifier} {step} running\n", "")
        assert replicate.experiments.get(identifier).status == "stopped"


def test_another_rank_joins_a_running_experiment_and_leaves_its_end_alone(project, run_script):
    with replicate.init(params={"lr": 0.1}, quiet=True) as experiment:
        experiment.checkpoint()
        for how in ("", "experiment.stop()"):
            done = run_script(TRAIN + how, environment={"REPLICATE_EXPERIMENT_ID": experiment.id})
            assert (done.status, done.errors) == (0, "")
            assert done.output.startswith(experiment.id)
            if not how:
                assert experiment.is_running()
    assert len(replicate.experiments.get(experiment.id).checkpoints) == 3


def test_an_unfinished_id_of_the_environment_must_exist(project, monkeypatch):
    replicate.init(quiet=True).stop()
    monkeypatch.setenv("REPLICATE_EXPERIMENT_ID", "00000")
    with pytest.raises(errors.NotFound):
        replicate.init(quiet=True)
    monkeypatch.setenv("REPLICATE_EXPERIMENT_ID", "my run")
    with pytest.raises(errors.InvalidArgument):
        replicate.init(quiet=True)
