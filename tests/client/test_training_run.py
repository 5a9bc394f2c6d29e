"""Recording with the real daemon: what `init` and `checkpoint` take, refuse and keep."""

import math
import os
import threading
from datetime import timedelta, timezone

import numpy as np
import pytest

import replicate
from replicate import connection, errors
from replicate.records import PrimaryMetric, utc_now


@pytest.fixture
def begin(project):
    """Begin experiments that end with the test."""
    begun = []

    def init(*arguments, **options):
        begun.append(replicate.init(*arguments, **{"quiet": True, **options}))
        return begun[-1]

    yield init
    for experiment in begun:
        experiment.stop()


def write(project, name, data=b"data"):
    path = project / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_everything_that_was_handed_in_is_recorded(begin, project):
    write(project, "train.py")
    experiment = begin(
        "train.py",
        {"lr": np.float32(0.5), "layers": (1, 2), "nested": {"none": None}},
        name="First try",
        tags=["baseline", "small"],
    )
    read = replicate.experiments.get(experiment.id)
    for one in (experiment, read):
        assert one.params == {"lr": 0.5, "layers": [1, 2], "nested": {"none": None}}
        assert (one.name, one.tags, one.path) == ("First try", ("baseline", "small"), "train.py")
        assert one.status == "running"
        assert one.is_running()
        assert one.checkpoints == []
        assert one.best() is one.latest() is None
        assert one.created.tzinfo == timezone.utc
        assert utc_now() - one.created < timedelta(minutes=1)
        assert one.duration > 0
        assert one.python_packages["numpy"] == np.__version__
        assert one.host == os.uname().nodename
        assert one.system.cpu_count == len(os.sched_getaffinity(0))
    assert len(experiment.id) == 64
    assert experiment.short_id == experiment.id[:7]


def test_checkpoints_count_their_steps(begin):
    experiment = begin()
    steps = [experiment.checkpoint().step, experiment.checkpoint().step]
    steps += [
        experiment.checkpoint(step=10).step,
        experiment.checkpoint().step,
        experiment.checkpoint(step=3).step,
    ]
    steps.append(experiment.checkpoint(step=np.int64(7)).step)
    assert steps == [0, 1, 10, 11, 3, 7]
    assert experiment.checkpoints.step == steps
    experiment.refresh()
    assert experiment.checkpoints.step == steps


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"path": "missing"}, FileNotFoundError),
        ({"path": "../outside"}, ValueError),
        ({"path": 5}, TypeError),
        ({"metrics": {"m": object()}}, TypeError),
        ({"metrics": [1]}, TypeError),
        ({"step": -1}, ValueError),
        ({"step": math.nan}, TypeError),
        ({"metrics": {"a": 1}, "primary_metric": ("b", "minimize")}, ValueError),
        ({"metrics": {"a": 1}, "primary_metric": "a"}, TypeError),
    ],
)
def test_a_call_that_raises_records_nothing_and_takes_no_step(begin, arguments, error):
    experiment = begin()
    with pytest.raises(error):
        experiment.checkpoint(**arguments)
    assert experiment.checkpoint().step == 0
    assert len(replicate.experiments.get(experiment.id).checkpoints) == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"path": "missing"}, FileNotFoundError),
        ({"path": "/etc"}, ValueError),
        ({"params": {"p": object()}}, TypeError),
        ({"params": "text"}, TypeError),
        ({"name": 5}, TypeError),
        ({"tags": "word"}, TypeError),
        ({"tags": ["two words"]}, ValueError),
        ({"ignore": 5}, TypeError),
        ({"resume": 5}, TypeError),
        ({"resume": "not hexadecimal"}, ValueError),
        ({"resume": "abcdef"}, errors.NotFound),
    ],
)
def test_init_refuses_wrong_arguments_and_records_nothing(begin, project, arguments, error):
    before = begin()
    with pytest.raises(error):
        begin(**arguments)
    assert [one.id for one in replicate.experiments.list()] == [before.id]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: replicate.experiments.get(5), TypeError, "id must be a str, not int"),
        (lambda: replicate.experiments.get(None), TypeError, "id must be a str, not NoneType"),
        (lambda: replicate.experiments.get("\udcff"), ValueError, "id holds a lone surrogate"),
        (lambda: replicate.experiments.list(5), TypeError, "filter must be a str or a function"),
        (lambda: replicate.experiments.list("\udcff"), ValueError, "filter holds a lone surrogate"),
        (lambda: replicate.init(resume=5), TypeError, "resume must be a str, not int"),
        (lambda: replicate.init("a\0b"), ValueError, r"path holds a NUL character: 'a\\x00b'"),
        (lambda: replicate.flush("x"), TypeError, "timeout must be a number of seconds or None, not 'x'"),
        (lambda: replicate.flush(math.nan), ValueError, "timeout must not be NaN"),
    ],
)
def test_wrong_arguments_are_named(project, call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert connection.probe() is None


def test_an_experiment_for_which_a_filter_fails_is_left_out(begin, capsys):
    begin(params={"lr": 1})
    begin(params={"other": 1})
    begin(params={"another": 1})
    found = replicate.experiments.list(lambda experiment: experiment.params["lr"] == 1)
    assert [one.params for one in found] == [{"lr": 1}]
    assert isinstance(found, replicate.ExperimentList)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "replicate: the filter failed for 2 experiments, left out: KeyError: 'lr'"


def test_wrong_arguments_are_noticed_without_a_daemon(project):
    with pytest.raises(FileNotFoundError):
        replicate.init("missing")
    assert connection.probe() is None


def test_init_raises_what_is_wrong_with_the_repository(project, monkeypatch):
    write(project, "not-a-directory")
    monkeypatch.setenv("REPLICATE_REPOSITORY", "file://not-a-directory/repository")
    with pytest.raises(errors.RepositoryError):
        replicate.init(quiet=True)


def test_init_raises_what_is_wrong_with_the_configuration(project):
    (project / "replicate.yaml").write_text("repositry: x\n")
    with pytest.raises(errors.ConfigError, match=r"replicate\.yaml:1"):
        replicate.init(quiet=True)


def test_the_best_checkpoint_is_known_at_once(begin):
    experiment = begin()
    losses = [0.5, 0.1, math.nan, 0.3]
    for loss in losses:
        experiment.checkpoint(metrics={"loss": loss}, primary_metric=("loss", "minimize"))
    assert experiment.best().metrics == {"loss": 0.1}
    assert experiment.latest().metrics == {"loss": 0.3}
    assert experiment.best() is experiment.checkpoints[1]
    assert experiment.best().primary_metric == PrimaryMetric("loss", "minimize")
    assert experiment.primary_metric() == "loss"
    assert replicate.experiments.get(experiment.id).best().id == experiment.best().id


def test_lists_keep_their_type_and_give_columns(begin):
    experiment = begin()
    experiment.checkpoint(metrics={"loss": 1})
    experiment.checkpoint(metrics={"accuracy": 2})
    checkpoints = experiment.checkpoints
    assert type(checkpoints[:1]) is replicate.CheckpointList
    assert checkpoints[-1].metrics == {"accuracy": 2}
    assert checkpoints.metrics["loss"] == [1, None]
    assert checkpoints[1:].step == [1]
    assert dict(checkpoints.metrics) == {"loss": [1, None], "accuracy": [None, 2]}
    with pytest.raises(KeyError, match="lose"):
        checkpoints.metrics["lose"]
    with pytest.raises(ValueError, match="no checkpoint has a primary metric"):
        checkpoints.primary_metric()
    assert type(replicate.experiments.list()[:1]) is replicate.ExperimentList


def test_more_than_one_primary_metric_is_an_error(begin):
    experiment = begin()
    for name in ("a", "b"):
        experiment.checkpoint(metrics={name: 1}, primary_metric=(name, "maximize"))
    with pytest.raises(ValueError, match="more than one primary metric: a, b"):
        experiment.primary_metric()


def test_a_stopped_experiment_takes_no_checkpoints(begin):
    experiment = begin()
    experiment.stop()
    experiment.stop()
    assert experiment.status == "stopped"
    assert not experiment.is_running()
    duration = experiment.duration
    assert duration == experiment.duration
    with pytest.raises(RuntimeError, match="was stopped"):
        experiment.checkpoint()
    assert replicate.experiments.get(experiment.id).status == "stopped"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError, "failed"),
        (KeyboardInterrupt, "failed"),
        (SystemExit(1), "failed"),
        (SystemExit(0), "stopped"),
    ],
)
def test_leaving_the_block_by_an_exception_is_a_failure(begin, error, status):
    with pytest.raises(BaseException) as caught, begin() as experiment:
        raise error
    assert isinstance(caught.value, type(error) if isinstance(error, BaseException) else error)
    assert replicate.experiments.get(experiment.id).status == status


def test_leaving_the_block_stops_the_experiment(begin):
    with begin() as experiment:
        assert experiment.status == "running"
    assert replicate.experiments.get(experiment.id).status == "stopped"


def test_an_experiment_that_was_read_goes_on_after_its_last_checkpoint(begin):
    experiment = begin()
    experiment.checkpoint(step=41)
    again = replicate.experiments.get(experiment.short_id)
    assert again.checkpoint(metrics={"x": 1}).step == 42
    experiment.refresh()
    assert experiment.checkpoints.step == [41, 42]


def test_refreshing_keeps_the_objects(begin):
    experiment = begin()
    checkpoint = experiment.checkpoint()
    experiment.refresh()
    assert experiment.checkpoints[0] is checkpoint


def test_experiments_are_found_by_filters(begin):
    fast, slow = begin(params={"lr": 1}), begin(params={"lr": 0.1}, name="slow")
    listed = replicate.experiments.list
    assert [one.id for one in listed()] == [fast.id, slow.id]
    assert [one.id for one in listed("lr < 0.5")] == [slow.id]
    assert [one.id for one in listed(lambda one: one.name == "")] == [fast.id]
    assert replicate.experiments.get("latest").id == slow.id
    with pytest.raises(errors.InvalidArgument):
        listed("lr <")


def test_the_id_of_a_checkpoint_gives_its_experiment(begin):
    experiment = begin()
    checkpoint = experiment.checkpoint()
    assert replicate.experiments.get(checkpoint.short_id).id == experiment.id


def test_projects_need_no_configuration(begin, project, tmp_path):
    other = replicate.Project(repository=f"file://{tmp_path}/other")
    experiment = other.experiments.create(params={"a": 1}, quiet=True)
    experiment.stop()
    assert [one.id for one in other.experiments.list()] == [experiment.id]
    assert begin().id not in [one.id for one in other.experiments.list()]
    assert "other" in repr(other)


def test_a_project_is_not_looked_for_before_it_is_used(project):
    made = replicate.Project(directory=project / "nowhere")
    with pytest.raises(errors.ConfigError, match="nowhere"):
        made.experiments.list()


def test_deleted_experiments_and_checkpoints_are_gone(begin):
    kept, gone = begin(), begin()
    checkpoints = [kept.checkpoint(), kept.checkpoint(), kept.checkpoint()]
    gone.delete()
    assert [one.id for one in replicate.experiments.list()] == [kept.id]
    with pytest.raises(errors.NotFound):
        gone.refresh()
    kept.checkpoints[:2].delete()
    kept.refresh()
    assert [one.id for one in kept.checkpoints] == [checkpoints[2].id]


def test_threads_can_record_at_once(begin, project):
    write(project, "model.pt")
    experiment = begin()

    def train():
        for _ in range(5):
            experiment.checkpoint("model.pt", {"thread": threading.get_ident()})

    threads = [threading.Thread(target=train) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    replicate.flush()
    experiment.refresh()
    assert sorted(experiment.checkpoints.step) == list(range(80))
    assert {checkpoint.state for checkpoint in experiment.checkpoints} == {"stored"}


def test_patterns_of_the_call_and_of_the_file_are_ignored(begin, project):
    (project / "replicate.yaml").write_text("ignore: ['*.log']\n")
    for name in ("train.py", "a.log", "b.tmp"):
        write(project, name)
    experiment = begin(".", ignore=["*.tmp"])
    checkpoint = experiment.checkpoint(".")
    expected = ["replicate.yaml", "train.py"]
    assert [entry.path for entry in experiment.files()] == expected
    assert [entry.path for entry in checkpoint.files()] == expected


def test_trouble_does_not_stop_the_training(begin, project, capsys):
    experiment = begin()
    (project / "file").write_text("in the way")
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setenv("REPLICATE_HOME", str(project / "file"))
        checkpoints = [experiment.checkpoint(metrics={"loss": 1}) for _ in range(3)]
    assert {checkpoint.state for checkpoint in checkpoints} == {"failed"}
    assert "REPLICATE_HOME" in checkpoints[0].error or "file" in checkpoints[0].error
    assert capsys.readouterr().err.count("replicate: a checkpoint was not saved") == 1
    with pytest.raises(errors.NotStored, match="was not stored"):
        checkpoints[0].wait()
    with pytest.raises(errors.NotStored):
        checkpoints[0].open("model.pt")
    assert experiment.checkpoints.step == [0, 1, 2]


def test_things_that_cannot_be_saved_are_told_once(begin, project, capsys):
    os.mkfifo(project / "pipe")
    experiment = begin(quiet=False)
    experiment.checkpoint(".")
    experiment.checkpoint(".")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert told[0].startswith(f"replicate: experiment {experiment.short_id}")
    assert "pipe" in told[1]


def test_quiet_is_quiet(begin, project, capsys):
    os.mkfifo(project / "pipe")
    begin(".").checkpoint(".")
    assert capsys.readouterr() == ("", "")


def test_objects_introduce_themselves(begin):
    experiment = begin(name="First")
    checkpoint = experiment.checkpoint(metrics={"loss": 0.123456, "model": {"a": 1}})
    assert repr(experiment) == f"<Experiment {experiment.short_id} 'First' running, 1 checkpoint>"
    checkpoint.wait()
    assert repr(checkpoint) == f"<Checkpoint {checkpoint.short_id} step 0 loss=0.1235>"


def test_a_project_whose_directory_is_no_text_works_with_a_repository_elsewhere(
    project, tmp_path, monkeypatch
):
    odd = project / os.fsdecode(b"n\xff\n")
    odd.mkdir()
    (odd / "train.py").write_text("x = 1\n")
    monkeypatch.chdir(odd)
    for call in (lambda: replicate.init("."), replicate.experiments.list):
        with pytest.raises(errors.ConfigError, match=r"not UTF-8: .*n\\xff\\n/.replicate"):
            call()
    monkeypatch.setenv("REPLICATE_REPOSITORY", f"file://{tmp_path}/elsewhere")
    with replicate.init(".") as experiment:
        checkpoint = experiment.checkpoint("train.py").wait()
    with checkpoint.open("train.py") as file:
        assert file.read() == b"x = 1\n"
    checkpoint.checkout("out")
    assert (odd / "out" / "train.py").read_text() == "x = 1\n"
    with checkpoint.mount("mounted") as mounted:
        assert (mounted / "train.py").read_text() == "x = 1\n"


def test_a_working_directory_that_was_deleted_is_named(begin, project, tmp_path, monkeypatch):
    write(project, "model.pt")
    checkpoint = begin().checkpoint("model.pt").wait()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for call in (replicate.init, replicate.experiments.list, lambda: checkpoint.checkout("out")):
        with pytest.raises(errors.ConfigError, match="the working directory does not exist any more"):
            call()
    checkpoint.checkout(tmp_path / "out")
    assert (tmp_path / "out" / "model.pt").read_bytes() == b"data"
