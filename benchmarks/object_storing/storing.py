"""Storing into a bucket: processor time beside a bare loop of boto3, requests beside rclone copy."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from measuring.figures import BYTES, COUNT, TIMES, Figure, format_count
from measuring.workspace import progress

from object_storing.bucket import BUCKET, find_rclone
from object_storing.machine import Machine
from object_storing.scale import Scale

_GB = 1e9
#: What the issue demands.
UPLOAD_TARGET = 1.3
FIRST_TARGET = 40
UNCHANGED_TARGET = 5


def measure_upload(machine: Machine, scale: Scale) -> list[Figure]:
    """New incompressible data in one file, beside a loop that puts as much out of memory."""
    ours: list[float] = []
    speeds: list[float] = []
    peaks: list[float] = []
    bare: dict[str, list[float]] = {"boto3, 64 MiB objects": [], "the same, leaner": []}
    path = machine.project / "big.bin"
    for number in range(scale.rounds):
        progress(f"upload, round {number + 1}")
        machine.write_file(path, scale.upload_bytes)
        machine.forget(is_counted=False)
        os.sync()
        label = f"upload {number}"
        before = machine.processor_seconds()
        machine.memory.label(label)
        began = time.perf_counter()
        run = machine.save(machine.url("upload"), path.name)
        elapsed = time.perf_counter() - began
        machine.memory.label("")
        used = machine.processor_seconds() - before
        ours.append(used / (scale.upload_bytes / _GB))
        machine.end(run)
        speeds.append(elapsed / (scale.upload_bytes / _GB))
        peaks.append(machine.memory.peaks[label])
        machine.bucket.empty("upload")
        path.unlink()
        for (name, values), more in zip(bare.items(), ([], ["lean"]), strict=True):
            seconds = run_bare(machine, "put", str(scale.upload_bytes), *more)
            values.append(seconds[1] / (scale.upload_bytes / _GB))
            machine.bucket.empty("bare")
            progress(f"{name}: {values[-1]:.2f} CPU s/GB; ours {ours[-1]:.2f}")
    first, lean = bare.items()
    return [
        Figure("upload of new data, CPU a GB", ours, TIMES, *first, target=UPLOAD_TARGET),
        Figure("… beside a loop that signs no payload", ours, TIMES, *lean),
        Figure("… time a GB (the server is the limit)", speeds),
        Figure("… memory of daemon and store process", peaks, BYTES),
    ]


def measure_requests(machine: Machine, scale: Scale) -> list[Figure]:
    """Requests of a first and of an unchanged snapshot of small files, beside `rclone copy`."""
    files = machine.project / "files"
    machine.make_tree(files, scale.small_files, scale.smallest, scale.largest)
    first: list[float] = []
    unchanged: list[float] = []
    data: list[float] = []
    ends: list[float] = []
    for number in range(scale.rounds):
        progress(f"requests, round {number + 1}")
        machine.forget(is_counted=True)
        url = machine.url("first")
        for values in (first, unchanged):
            with machine.bucket.counting() as counted:
                experiment = machine.save(url, files.name)
            values.append(counted.total)
            progress(f"{counted.total} requests: {describe_kinds(counted.by_kind)}")
            with machine.bucket.counting() as ended:
                machine.end(experiment)
            ends.append(ended.total)
            progress(f"the end of the run: {describe_kinds(ended.by_kind)}")
        data.append(sum(exchange.bytes_up for exchange in counted.exchanges if exchange.kind == "packs"))
        machine.bucket.empty("first")
    progress("rclone copy")
    with machine.bucket.counting() as counted:
        _rclone(machine, "copy", str(files), f":s3:{BUCKET}/copied")
    machine.bucket.empty("copied")
    peer = [float(counted.total)]
    return [
        Figure(
            f"first snapshot of {scale.small_files:,} files, requests",
            first,
            TIMES,
            "rclone copy",
            peer,
            unit=format_count,
        ),
        Figure("… by themselves", first, COUNT, target=FIRST_TARGET),
        Figure("second snapshot unchanged, requests", unchanged, COUNT, target=UNCHANGED_TARGET),
        Figure("… bytes of data", data, COUNT, target=0),
        Figure("the end of a run, requests", ends, COUNT),
    ]


def describe_kinds(by_kind: Mapping[tuple[str, str], int]) -> str:
    """Requests by what they ask for."""
    return ", ".join(f"{count} {operation} {kind}" for (operation, kind), count in sorted(by_kind.items()))


def run_bare(machine: Machine, *arguments: str) -> list[float]:
    """Seconds and processor seconds of a loop of boto3."""
    program = Path(__file__).with_name("bare.py")
    ran = subprocess.run(
        [sys.executable, program, *arguments],
        env={**os.environ, **machine.bucket.surroundings()},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: list[float] = json.loads(ran.stdout)
    return found


def _rclone(machine: Machine, *arguments: str) -> None:
    surroundings = {**os.environ, **machine.bucket.rclone_surroundings(is_counted=True)}
    subprocess.run([find_rclone(), "--transfers", "16", *arguments], env=surroundings, check=True)
