"""What live runs cost that only live: signs of life in the bucket, counted for a while."""

import time

from measuring.figures import COUNT, Figure
from measuring.workspace import progress

import replicate
from object_storing.machine import Machine
from object_storing.scale import Scale
from object_storing.storing import describe_kinds

_DAY_S = 86_400


def measure(machine: Machine, scale: Scale) -> list[Figure]:
    """Some runs on one machine that do nothing: their requests in so many seconds, as many a day."""
    machine.forget(is_counted=True)
    project = replicate.Project(repository=machine.url("beats"), directory=machine.project)
    runs = [project.experiments.create(quiet=True) for _ in range(scale.runs)]
    replicate.flush()
    progress(f"{scale.runs} runs live for {scale.beating_s:.0f} s")
    with machine.bucket.counting() as counted:
        time.sleep(scale.beating_s)
    progress(f"{counted.total} requests: {describe_kinds(counted.by_kind)}")
    for run in runs:
        run.stop()
    replicate.flush()
    machine.bucket.empty("beats")
    a_day = counted.total * _DAY_S / scale.beating_s
    return [Figure(f"{scale.runs} live runs on a machine, requests a day", [a_day], COUNT)]
