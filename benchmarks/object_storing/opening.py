"""Opening one file of a large snapshot, and finding experiments: requests and times, nothing cached."""

import os
import subprocess
import sys
from pathlib import Path

from measuring.figures import COUNT, Figure, format_megabytes
from measuring.workspace import progress, timed

from object_storing import synthetic
from object_storing.machine import Machine
from object_storing.scale import Scale
from object_storing.storing import describe_kinds

#: What the issue demands.
OPEN_TARGET = 6
LIST_TARGET = 3
LIST_TARGET_S = 0.3


def measure_open(machine: Machine, scale: Scale) -> list[Figure]:
    """One file of 1 MB in a snapshot that claims to hold a hundred thousand times as much."""
    figures: list[Figure] = []
    claimed = format_megabytes(scale.claimed_bytes)
    for is_merged in (True, False):
        progress(f"a snapshot of {claimed}, index {'merged' if is_merged else 'as it is written'}")
        machine.bucket.empty("claimed")
        repository = synthetic.open_files(machine.bucket.directory / "claimed", machine.root / "made")
        experiment = synthetic.claim_files(repository, scale.claimed_bytes, is_merged=is_merged)
        repository.close()
        machine.bucket.look_again()
        url = machine.url("claimed")
        alone: list[float] = []
        times: list[float] = []
        shown: list[float] = []
        for _ in range(scale.rounds):
            program = Path(__file__).with_name("open_one.py")
            command = [sys.executable, program, url, experiment, os.fsdecode(synthetic.OPENED)]
            surroundings = {**os.environ, **machine.bucket.surroundings(is_counted=True)}
            with machine.bucket.counting() as counted:
                ran = subprocess.run(command, env=surroundings, stdout=subprocess.PIPE, text=True, check=True)
            times.append(float(ran.stdout))
            alone.append(counted.total)
            progress(f"{counted.total} requests: {describe_kinds(counted.by_kind)}")
            sizes = [f"{exchange.bytes_down:,}" for exchange in counted.of("GET", "packs")]
            progress(f"bytes of packs: {', '.join(sizes)}")
            machine.forget(is_counted=True)
            with machine.bucket.counting() as counted:
                machine.run(url, "cat", experiment, os.fsdecode(synthetic.OPENED))
            shown.append(counted.total)
            progress(f"{counted.total} requests of cat: {describe_kinds(counted.by_kind)}")
        case = f"open 1 MB of {claimed}, {'one index object' if is_merged else 'index as written'}"
        target = OPEN_TARGET if is_merged else None
        figures += [
            Figure(f"{case}, requests", alone, COUNT, target=target),
            Figure("… of `replicate cat` with a new daemon", shown, COUNT, target=target),
            Figure("… time", times),
        ]
        machine.bucket.empty("claimed")
    return figures


def measure_list(machine: Machine, scale: Scale) -> list[Figure]:
    """`replicate ls` of many experiments: the first on a machine, and another one at once."""
    progress(f"{scale.experiments:,} experiments with {scale.checkpoints} checkpoints each")
    machine.bucket.empty("runs")
    repository = synthetic.open_files(machine.bucket.directory / "runs", machine.root / "made")
    synthetic.record_runs(repository, scale.experiments, scale.checkpoints)
    repository.close()
    machine.bucket.look_again()
    url = machine.url("runs")
    machine.forget(is_counted=True)
    with machine.bucket.counting() as counted:
        first = timed(lambda: machine.run(url, "ls"))
    first_requests = counted.total
    progress(f"{counted.total} requests: {describe_kinds(counted.by_kind)}")
    requests: list[float] = []
    times: list[float] = []
    for _ in range(max(3, scale.rounds)):
        with machine.bucket.counting() as counted:
            times.append(timed(lambda: machine.run(url, "ls")))
        requests.append(counted.total)
    machine.bucket.empty("runs")
    case = f"ls of {scale.experiments:,} × {scale.checkpoints}"
    return [
        Figure(f"{case}, the first on a machine, requests", [first_requests], COUNT),
        Figure("… time", [first]),
        Figure(f"{case}, warm, requests", requests, COUNT, target=LIST_TARGET),
        Figure("… time", times, target=LIST_TARGET_S),
    ]
