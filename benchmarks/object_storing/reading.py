"""Reading a large file out of a bucket in order: checkout and mount, beside bare ranged GETs and rclone.

Nothing is cached: each time the machine has never seen the repository. The object that the others read is the
file itself.
"""

import os
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable

from measuring.figures import COUNT, TIMES, Figure, format_megabytes
from measuring.workspace import progress

from object_storing.bucket import BUCKET, find_rclone
from object_storing.machine import Machine
from object_storing.scale import MIB, Scale
from object_storing.storing import run_bare

_FILE = "big.bin"
_OBJECT = "plain/big.bin"
_CHECKOUT, _MOUNT, _BARE, _RCLONE = "checkout", "mount", "boto3, ranges of 8 MiB", "rclone cat"
_THREADS = "4"
_GB = 1e9


def measure(machine: Machine, scale: Scale) -> list[Figure]:
    """Time and processor time a GB of each, and requests of ours."""
    progress("a file to read")
    path = machine.project / _FILE
    machine.write_file(path, scale.read_bytes)
    machine.forget(is_counted=False)
    url = machine.url("read")
    run = machine.save(url, _FILE)
    machine.end(run)
    experiment = run.id
    (machine.bucket.directory / "plain").mkdir()
    shutil.copyfile(path, machine.bucket.directory / _OBJECT)
    machine.bucket.look_again()
    seconds: dict[str, list[float]] = defaultdict(list)
    processor: dict[str, list[float]] = defaultdict(list)
    readers: dict[str, Callable[[], tuple[float, float]]] = {
        _CHECKOUT: lambda: _checkout(machine, url, experiment),
        _MOUNT: lambda: _mount(machine, url, experiment),
        _BARE: lambda: _bare(machine),
        _RCLONE: lambda: _rclone(machine),
    }
    for number in range(scale.rounds):
        names = list(readers) if number % 2 == 0 else list(reversed(readers))
        for name in names:
            machine.forget(is_counted=False)
            elapsed, used = readers[name]()
            seconds[name].append(elapsed / (scale.read_bytes / _GB))
            processor[name].append(used / (scale.read_bytes / _GB))
            progress(f"{name}: {seconds[name][-1]:.2f} s/GB, {processor[name][-1]:.2f} CPU s/GB")
    requests = {}
    for name in (_CHECKOUT, _MOUNT):
        machine.forget(is_counted=True)
        with machine.bucket.counting() as counted:
            readers[name]()
        requests[name] = counted.of("GET", "packs")
        sizes = [exchange.bytes_down for exchange in requests[name]]
        progress(f"{name}: {len(sizes)} requests for {sum(sizes):,} bytes of packs")
    machine.bucket.empty("read")
    machine.bucket.empty("plain")
    path.unlink()
    figures = []
    size = format_megabytes(scale.read_bytes)
    for name in (_CHECKOUT, _MOUNT):
        figures += [
            Figure(f"{name} of {size}, CPU a GB", processor[name], TIMES, _BARE, processor[_BARE]),
            Figure("…", processor[name], TIMES, _RCLONE, processor[_RCLONE]),
            Figure("… time a GB", seconds[name], TIMES, _BARE, seconds[_BARE]),
            Figure("…", seconds[name], TIMES, _RCLONE, seconds[_RCLONE]),
            Figure("… requests of packs", [float(len(requests[name]))], COUNT),
        ]
    return figures


def _checkout(machine: Machine, url: str, experiment: str) -> tuple[float, float]:
    """Into memory, so that the disk does not count."""
    output = f"/dev/shm/rpl-bench-{os.getpid()}"
    try:
        return _measured(machine, lambda: machine.run(url, "checkout", experiment, "-o", output))
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _mount(machine: Machine, url: str, experiment: str) -> tuple[float, float]:
    directory = machine.root / "mounted"
    machine.run(url, "mount", experiment, directory)
    try:
        return _measured(machine, lambda: _read(directory / _FILE))
    finally:
        machine.run(url, "umount", directory)


def _measured(machine: Machine, action: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and processor seconds of the daemon with its children, and of the commands."""
    before, began = machine.processor_seconds() + sum(os.times()[2:4]), time.perf_counter()
    action()
    elapsed = time.perf_counter() - began
    return elapsed, machine.processor_seconds() + sum(os.times()[2:4]) - before


def _read(path: "os.PathLike[str]") -> None:
    buffer = memoryview(bytearray(MIB))
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _bare(machine: Machine) -> tuple[float, float]:
    elapsed, used = run_bare(machine, "get", _OBJECT, _THREADS)
    return elapsed, used


def _rclone(machine: Machine) -> tuple[float, float]:
    surroundings = {**os.environ, **machine.bucket.rclone_surroundings()}
    began = time.perf_counter()
    process = subprocess.Popen(
        [find_rclone(), "cat", f":s3:{BUCKET}/{_OBJECT}"], env=surroundings, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: `rclone cat` has failed: {process.returncode}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime
