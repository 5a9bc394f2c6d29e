"""How a process comes by a run: it begins an experiment, goes on with one, or adds to one.

Checks everything that the user hands in before anything is sent. Called by `project`, which wraps what it
gets in what users hold. Unlike a `Run` it raises whatever is wrong, because nothing has been trained yet.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from replicate import connection, ending, notices, query, ranks
from replicate._version import __version__
from replicate.capturing import chosen_rung, decode_state, encode_capture, error_for_users, tell_reply
from replicate.config import ProjectConfig
from replicate.delivery import deliver
from replicate.environment import collect, identify_process
from replicate.errors import (
    CaptureFailed,
    InvalidArgument,
    NotFound,
    PathMissing,
    ReplicateError,
    RepositoryMissing,
)
from replicate.ids import ExperimentId, is_id, new_id, short
from replicate.lazy import LazyModule
from replicate.phrases import format_size, plural
from replicate.project_paths import check_paths
from replicate.records import (
    ExperimentRecord,
    ExperimentSummary,
    Value,
    utc_now,
    validate_mapping,
    validate_tags,
    validate_text,
)
from replicate.run import Run

if TYPE_CHECKING:
    from replicate import wire
    from replicate._pb import daemon_pb2 as pb
else:
    wire = LazyModule("replicate.wire")
    pb = LazyModule("replicate._pb.daemon_pb2")


def begin(
    project: ProjectConfig,
    *,
    path: object = None,
    params: object = None,
    name: object = None,
    tags: object = (),
    ignore: object = (),
    quiet: bool = False,
) -> tuple[Run, ExperimentSummary]:
    """Begin an experiment; returns when its files are captured.

    Raises `TypeError`, `ValueError` and `FileNotFoundError` for wrong arguments, `ReplicateError` for
    anything else; nothing is recorded then.
    """
    chosen_rung()
    patterns = _check_patterns(ignore)
    summary = _create(project, path, params, name, tags, patterns, quiet, ExperimentId(new_id()))
    return _make_run(project, summary, patterns, ends_with_process=True, quiet=quiet), summary


def resume(
    project: ProjectConfig, reference: str, *, params: object = None, ignore: object = (), quiet: bool = False
) -> tuple[Run, ExperimentSummary]:
    """Go on with an experiment in this process; its steps continue after its last checkpoint.

    Files are not saved again. Raises `NotFound`, and `ValueError` when params are given that differ.
    """
    chosen_rung()
    found = _find(project, reference)
    _check_same_params(found, params)
    request = pb.ResumeExperimentRequest(
        target=pb.Target(repository=project.repository, id=found.record.id),
        process=wire.encode_process(identify_process()),
        at_ns=wire.encode_time(utc_now()),
    )
    reply = deliver("ResumeExperiment", request, pb.ExperimentSummary, urgency="vital")
    summary = wire.decode_summary(reply)
    if not quiet:
        notices.say(f"experiment {short(found.record.id)} in {project.repository} goes on")
    return attach(project, summary, ignore=ignore, ends_with_process=True, quiet=quiet), summary


def join(
    project: ProjectConfig,
    reference: str,
    *,
    path: object = None,
    params: object = None,
    name: object = None,
    tags: object = (),
    ignore: object = (),
    quiet: bool = False,
) -> tuple[Run, ExperimentSummary]:
    """The experiment named by REPLICATE_EXPERIMENT_ID: begun, joined or resumed, whichever it takes.

    A complete id that does not exist is begun under that id. One that runs belongs to the process that
    began it: this one adds checkpoints and leaves its end alone. One that has ended is resumed.
    """
    chosen_rung()
    try:
        summary = _find(project, reference)
    except (NotFound, RepositoryMissing):
        if not is_id(reference):
            raise
        patterns = _check_patterns(ignore)
        mine = _create(project, path, params, name, tags, patterns, quiet, ExperimentId(reference))
        # Another rank may have been faster: the record that was written first counts.
        summary = _find(project, reference)
        is_mine = summary.record.process == mine.record.process
        return _make_run(project, mine, patterns, ends_with_process=is_mine, quiet=quiet), summary
    if summary.status != "running":
        return resume(project, summary.record.id, params=params, ignore=ignore, quiet=quiet)
    _check_same_params(summary, params)
    return attach(project, summary, ignore=ignore, quiet=quiet), summary


def join_as_rank(
    project: ProjectConfig,
    place: ranks.Place,
    number: int,
    *,
    resumed: str | None = None,
    params: object = None,
    name: object = None,
    tags: object = (),
    ignore: object = (),
    quiet: bool = False,
) -> tuple[Run, ExperimentSummary]:
    """Take part, as another rank than 0, in the experiment of rank 0, which need not exist yet.

    It is the experiment of that `number` in its process. Nothing is recorded of what is handed in: that is up
    to rank 0. Raises `ValueError` when there is no way to find out which experiment it is.
    """
    chosen_rung()
    patterns = _check_patterns(ignore)
    values = validate_mapping(params, "params")
    experiment_id = _find_experiment_of_job(project, place, number, resumed or ranks.given_experiment())
    process, now = identify_process(), utc_now()
    member_id = new_id()
    request = pb.JoinExperimentRequest(
        repository=project.repository,
        experiment_id=experiment_id,
        member_id=member_id,
        rank=place.rank,
        world_size=place.world_size,
        attempt=ranks.attempt_of(),
        process=wire.encode_process(process),
        at_ns=wire.encode_time(now),
    )
    deliver("JoinExperiment", request, pb.JoinExperimentReply, urgency="vital")
    record = ExperimentRecord(
        id=experiment_id,
        created=now,
        name="" if name is None else validate_text(name, "name"),
        tags=validate_tags(tags),
        params=values,
        process=process,
    )
    run = Run(
        project,
        experiment_id,
        ignore=patterns,
        ends_with_process=True,
        quiet=quiet,
        member_id=member_id,
        recorded_before=_count_recorded(project, experiment_id),
    )
    ending.remember(run)
    return run, ExperimentSummary(record, status="running", state="captured")


def begin_as_first_rank(
    project: ProjectConfig,
    place: ranks.Place,
    number: int,
    *,
    path: object = None,
    params: object = None,
    name: object = None,
    tags: object = (),
    ignore: object = (),
    quiet: bool = False,
) -> tuple[Run, ExperimentSummary]:
    """Begin the experiment of a distributed job as its rank 0, under an id that the other ranks can find."""
    chosen_rung()
    patterns = _check_patterns(ignore)
    identifier = ranks.derived_experiment(place, number)
    if identifier is not None and _exists(project, identifier):
        # Told by a launcher that repeats itself. It must not be added to what an earlier job has recorded.
        notices.warn_once(
            f"an earlier job has recorded experiment {short(identifier)} and was started like this one, which"
            " gets another id; for the other ranks to join, give all of them a new one in"
            f" {ranks.EXPERIMENT_VARIABLE}"
        )
        identifier = None
    identifier = identifier or ExperimentId(new_id())
    summary = _create(project, path, params, name, tags, patterns, quiet, identifier)
    return _make_run(project, summary, patterns, ends_with_process=True, quiet=quiet), summary


def _find_experiment_of_job(
    project: ProjectConfig, place: ranks.Place, number: int, given: str
) -> ExperimentId:
    """The experiment that rank 0 begins, or has begun, as another rank finds it."""
    if given:
        return ExperimentId(given) if is_id(given) else _find(project, given).record.id
    found = ranks.shared_experiment(number) or ranks.derived_experiment(place, number)
    if found is None:
        raise ValueError(
            f"this is rank {place.rank} of {place.world_size}, and nothing says which experiment it belongs"
            f" to: set {ranks.EXPERIMENT_VARIABLE} to the same 64 hexadecimal characters for all ranks, call"
            " replicate.init() after torch.distributed.init_process_group() in all of them, or call it in"
            " rank 0 only"
        )
    return found


def _count_recorded(project: ProjectConfig, experiment_id: ExperimentId) -> Counter[int | None] | None:
    """How many checkpoints an experiment has, by step and in all, where a new start of a job must know that.

    Only where neither the launcher nor torch's store tells starts of a job from each other.
    """
    place = ranks.detect()
    if place is None or not ranks.is_start_unknown():
        return None
    try:
        found = query.list_checkpoints(project.repository, experiment_id)
    except ReplicateError:
        return None  # there is none yet, as far as this machine knows
    shared = [one for one in found if one.paths or one.world_size > 1]
    return Counter([*(one.step for one in shared), *[None] * len(shared)])


def _exists(project: ProjectConfig, experiment_id: ExperimentId) -> bool:
    try:
        _find(project, experiment_id)
    except (NotFound, RepositoryMissing):
        return False
    return True


def attach(
    project: ProjectConfig,
    summary: ExperimentSummary,
    *,
    ignore: object = (),
    ends_with_process: bool = False,
    quiet: bool = False,
) -> Run:
    """A run that adds to an experiment which exists."""
    patterns = _check_patterns(ignore)
    return _make_run(project, summary, patterns, ends_with_process=ends_with_process, quiet=quiet)


def _make_run(
    project: ProjectConfig,
    summary: ExperimentSummary,
    ignore: tuple[str, ...],
    *,
    ends_with_process: bool,
    quiet: bool,
) -> Run:
    run = Run(
        project,
        summary.record.id,
        next_step=summary.latest.step + 1 if summary.latest else 0,
        ignore=ignore,
        ends_with_process=ends_with_process,
        quiet=quiet,
        # One that has just begun has no checkpoints.
        recorded_before=_count_recorded(project, summary.record.id) if summary.checkpoint_count else None,
    )
    if ends_with_process:
        ending.remember(run)
    return run


def _check_patterns(ignore: object) -> tuple[str, ...]:
    if isinstance(ignore, str):
        return (validate_text(ignore, "ignore"),)
    if not isinstance(ignore, Sequence):
        raise TypeError(f"ignore must be a list of patterns, not {ignore!r}")
    return tuple(validate_text(pattern, f"ignore[{number}]") for number, pattern in enumerate(ignore))


def _check_same_params(summary: ExperimentSummary, params: object) -> None:
    if params is None:
        return
    given, recorded = validate_mapping(params, "params"), dict(summary.record.params)
    names = [name for name in (*recorded, *given) if _written(recorded, name) != _written(given, name)]
    if names:
        raise ValueError(
            f"params differ from those of experiment {short(summary.record.id)}: "
            + ", ".join(dict.fromkeys(names))
        )


def _written(values: dict[str, Value], name: str) -> str:
    """A value as text, so that NaN equals NaN and 1 does not equal True; empty when it is absent."""
    return json.dumps(values[name], sort_keys=True) if name in values else ""


def _create(
    project: ProjectConfig,
    path: object,
    params: object,
    name: object,
    tags: object,
    ignore: tuple[str, ...],
    quiet: bool,
    experiment_id: ExperimentId,
) -> ExperimentSummary:
    paths = check_paths(path, project.directory)
    values = validate_mapping(params, "params")
    checked_name = "" if name is None else validate_text(name, "name")
    checked_tags = validate_tags(tags)
    created = utc_now()
    environment = collect(project.directory)
    record = ExperimentRecord(
        id=experiment_id,
        created=created,
        name=checked_name,
        tags=checked_tags,
        user=environment.user,
        host=environment.host,
        command=environment.command,
        paths=paths,
        params=values,
        python_version=environment.python_version,
        python_packages=environment.python_packages,
        system=environment.system,
        git=environment.git,
        replicate_version=__version__,
        process=environment.process,
    )
    request = pb.CreateExperimentRequest(
        repository=project.repository,
        experiment=wire.encode_experiment(record),
        capture=encode_capture(project, paths, ignore),
    )
    try:
        reply = deliver("CreateExperiment", request, pb.CaptureReply, urgency="vital")
    except (PathMissing, InvalidArgument, CaptureFailed) as error:
        raise error_for_users(error) from None
    if not quiet:
        label = f"experiment {short(record.id)}" + (f" ({record.name})" if record.name else "")
        files = f"{plural(reply.file_count, 'file')}, {format_size(reply.size_bytes)}"
        notices.say(f"{label} in {project.repository}" + (f": {files}" if paths else ""))
    tell_reply(reply, "experiment", quiet=quiet)
    return ExperimentSummary(record, status="running", state=decode_state(reply.state))


def _find(project: ProjectConfig, reference: str) -> ExperimentSummary:
    target = pb.Target(repository=project.repository, id=reference)
    return wire.decode_summary(connection.call("Resolve", target, pb.Resolution).summary)
