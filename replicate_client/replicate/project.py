"""The entrances of the library: `init`, `flush`, projects and their experiments.

Finds the project and its repository, and hands the rest to `beginning` and `query`. Nothing is looked for
when this module is imported, only when something is asked of a project.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from replicate import beginning, ending, missed, notices, query, ranks
from replicate.config import ProjectConfig, find_project
from replicate.disabled import disabled_experiment, is_disabled, nothing_recorded
from replicate.errors import NotStored
from replicate.experiment import Experiment, ExperimentList
from replicate.ids import short
from replicate.phrases import plural
from replicate.records import ExperimentSummary, validate_text
from replicate.stall import StallClock


class Project:
    """A project directory with its repository; by default those of the working directory.

    `repository` is a URL and needs no configuration file; `directory` is not searched for in its parents.
    Nothing is checked before it is used: then `ConfigError` says what is wrong.
    """

    def __init__(
        self, repository: str | None = None, directory: str | os.PathLike[str] | None = None
    ) -> None:
        self._repository = repository
        self._directory = directory

    @property
    def experiments(self) -> ExperimentCollection:
        """The experiments in its repository."""
        return ExperimentCollection(self)

    def config(self) -> ProjectConfig:
        """Its directory and repository, found anew at every call."""
        return find_project(self._directory, self._repository)

    def __repr__(self) -> str:
        given = [
            f"{name}={value!r}"
            for name, value in (("repository", self._repository), ("directory", self._directory))
            if value is not None
        ]
        return f"Project({', '.join(given)})"


class ExperimentCollection:
    """The experiments of one project."""

    def __init__(self, project: Project) -> None:
        self._project = project

    def create(
        self,
        path: object = None,
        params: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        tags: Sequence[str] = (),
        resume: str | None = None,
        ignore: str | Sequence[str] = (),
        quiet: bool = False,
    ) -> Experiment:
        """Begin an experiment in this project; see `replicate.init`."""
        if is_disabled():
            return disabled_experiment(params, name, tags)
        stall = StallClock()
        with stall.running():
            if resume is not None:
                resume = validate_text(resume, "resume")
            config = self._project.config()
            joined, place = ranks.given_experiment(), ranks.detect()
            number = ranks.next_experiment() if place is not None else 0
            if place is not None and place.rank > 0:
                run, summary = beginning.join_as_rank(
                    config,
                    place,
                    number,
                    resumed=resume,
                    params=params,
                    name=name,
                    tags=tags,
                    ignore=ignore,
                    quiet=quiet,
                )
            elif resume is not None:
                run, summary = beginning.resume(config, resume, params=params, ignore=ignore, quiet=quiet)
            elif joined:
                run, summary = beginning.join(
                    config, joined, path=path, params=params, name=name, tags=tags, ignore=ignore, quiet=quiet
                )
            elif place is not None:
                run, summary = beginning.begin_as_first_rank(
                    config,
                    place,
                    number,
                    path=path,
                    params=params,
                    name=name,
                    tags=tags,
                    ignore=ignore,
                    quiet=quiet,
                )
            else:
                run, summary = beginning.begin(
                    config, path=path, params=params, name=name, tags=tags, ignore=ignore, quiet=quiet
                )
            if place is not None and place.rank == 0:
                ranks.share_experiment(number, summary.record.id)
                ranks.tell_children(summary.record.id)
        run.stall = stall
        return Experiment(config.repository, summary, run)

    def get(self, reference: str) -> Experiment:
        """The experiment with this id, a prefix of it (4 characters or more), or `latest`.

        The id of a checkpoint gives its experiment. Raises `NotFound` or `Ambiguous`.
        """
        reference = validate_text(reference, "id")
        if is_disabled():
            raise nothing_recorded()
        config = self._project.config()
        return _found(config, query.resolve(config.repository, reference).summary)

    def list(self, filter: str | Callable[[Experiment], object] | None = None) -> ExperimentList:
        """The experiments, oldest first; those for which `filter` holds.

        `filter` is an expression such as `"loss < 0.3 and status = stopped"`, or a function of an
        experiment; one for which it raises an exception is left out, with a warning.
        """
        if filter is not None and not isinstance(filter, str) and not callable(filter):
            raise TypeError(f"filter must be a str or a function of an experiment, not {filter!r}")
        filters = [validate_text(filter, "filter")] if isinstance(filter, str) else []
        if is_disabled():
            return ExperimentList()
        config = self._project.config()
        found = ExperimentList(
            _found(config, summary) for summary in query.list_experiments(config.repository, filters)
        )
        return _chosen(found, filter) if callable(filter) else found

    def __repr__(self) -> str:
        return f"<experiments of {self._project!r}>"


#: Those of the default project.
experiments = Project().experiments


def init(
    path: object = None,
    params: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    tags: Sequence[str] = (),
    resume: str | None = None,
    ignore: str | Sequence[str] = (),
    quiet: bool = False,
) -> Experiment:
    """Begin an experiment: a training run whose checkpoints are recorded. Returns when files are captured.

    `path` is a file or directory (or a list of them) to save, relative to the project directory: the
    code, usually "."; `params` a dict of what the run is made with; `ignore` patterns in gitignore
    syntax of what not to save. `resume` goes on with an experiment by its id; its files are not saved
    again, and params may be left out. Recorded too: command line, user, host, Python, packages, Git,
    machine. The experiment ends with `stop()`, or by itself when Python exits.

    Raises `TypeError`, `ValueError` and `FileNotFoundError` for wrong arguments, `ReplicateError` when
    the run cannot be recorded. With REPLICATE_DISABLED=1 nothing is recorded; REPLICATE_EXPERIMENT_ID
    joins the experiment of another process, or gives a new one its id.
    """
    return experiments.create(path, params, name=name, tags=tags, resume=resume, ignore=ignore, quiet=quiet)


def flush(timeout: float | None = None) -> None:
    """Wait until everything that this machine captured is stored.

    Tells the daemon first of the checkpoints that it could not be told of when they were made. Raises
    `TimeoutError` after `timeout` seconds, and `NotStored` naming what failed meanwhile or belongs to an
    experiment of this process.
    """
    if is_disabled():
        return
    query.check_timeout(timeout)
    deadline = None if timeout is None else time.monotonic() + timeout
    known = {failure.id for failure in query.status().failures}
    lost, because = missed.tell_now(deadline)
    left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
    try:
        status = query.wait_stored((), left_s)
    except TimeoutError:
        raise TimeoutError(f"not everything is stored after {timeout:g} s") from None
    failures = [
        failure
        for failure in status.failures
        # What failed earlier, elsewhere, is in `replicate status`, and not this script's affair.
        if failure.id not in known or failure.experiment_id in ending.own_experiments()
    ]
    if failures:
        first = failures[0]
        raise NotStored(
            f"{plural(len(failures), 'snapshot')} could not be stored, the first of them"
            f" {short(first.id)}: {first.error}",
            hint="`replicate status` shows all of them",
            fields={"ids": " ".join(failure.id for failure in failures)},
        )
    if lost:
        raise NotStored(
            f"{plural(lost, 'checkpoint')} could not be recorded, not even the metrics: {because}"
        )


def _chosen(experiments: ExperimentList, filter: Callable[[Experiment], object]) -> ExperimentList:
    chosen = ExperimentList()
    failures: Counter[str] = Counter()
    for experiment in experiments:
        try:
            if filter(experiment):
                chosen.append(experiment)
        except Exception as error:
            failures[f"{type(error).__name__}: {error}"] += 1
    for failure, count in failures.items():
        notices.warn_once(f"the filter failed for {plural(count, 'experiment')}, left out: {failure}")
    return chosen


def _found(config: ProjectConfig, summary: ExperimentSummary) -> Experiment:
    return Experiment(config.repository, summary, beginning.attach(config, summary))
