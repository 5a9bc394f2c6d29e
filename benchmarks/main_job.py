"""What the main job costs, beside plain copying of the same files in the same run.

    python benchmarks/main_job.py [--megabytes 512] [--rounds 3] [--directory DIR]

For one incompressible file and for a tree of small files: the call (`init`, which returns when the files are
captured), the time until they are stored, both again with nothing changed, a checkout, and reading
everything through a mount. Prints medians of seconds, and their ratio to `shutil.copytree` of the same
files, interleaved round by round: machines are noisy, ratios less so.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import replicate
from replicate import connection


def make_big(directory: Path, megabytes: int) -> None:
    with (directory / "weights.bin").open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(1 << 20))


def make_small(directory: Path, megabytes: int) -> None:
    for number in range(megabytes * 50):
        folder = directory / f"{number // 200:04d}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number:07d}.txt").write_bytes(os.urandom(5_000) + b"padding " * 1_900)


def timed(action) -> tuple[float, object]:
    begin = time.perf_counter()
    result = action()
    return time.perf_counter() - begin, result


def read_all(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    total += len(piece)
    return total


def one_round(work: Path, repository: Path) -> dict[str, float]:
    project = replicate.Project(repository=f"file://{repository}", directory=str(work))
    seconds = {}
    seconds["copytree"], _ = timed(lambda: shutil.copytree(work / "files", work.parent / "copy"))
    shutil.rmtree(work.parent / "copy")
    seconds["read"], size = timed(lambda: read_all(work / "files"))
    for name in ("first", "again"):
        seconds[f"call, {name}"], experiment = timed(
            lambda: project.experiments.create(path="files", quiet=True)
        )
        seconds[f"stored, {name}"], _ = timed(replicate.flush)
        seconds[f"stored, {name}"] += seconds[f"call, {name}"]
        experiment.stop()
    seconds["checkout"], _ = timed(lambda: experiment.checkout(str(work.parent / "out")))
    shutil.rmtree(work.parent / "out")
    seconds["mount"], mount = timed(experiment.mount)
    with mount as directory:
        seconds["read, mounted"], mounted_size = timed(lambda: read_all(directory / "files"))
        seconds["read, mounted, again"], _ = timed(lambda: read_all(directory / "files"))
    if size != mounted_size:
        sys.exit(f"error: {mounted_size} bytes in the mount, {size} were saved")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", help="where to work (default: the temporary directory)")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="rpl-bench-", dir=options.directory))
    os.environ["REPLICATE_HOME"] = str(root / "home")
    try:
        for title, make in (("one big file", make_big), ("small files of 20 kB", make_small)):
            rounds = []
            for number in range(options.rounds):
                work = root / "work"
                (work / "files").mkdir(parents=True)
                make(work / "files", options.megabytes)
                rounds.append(one_round(work, root / f"repository-{number}"))
                shutil.rmtree(work)
                shutil.rmtree(root / f"repository-{number}")
            print(f"\n{title}, {options.megabytes} MB, medians of {options.rounds}")
            floor = statistics.median(one["copytree"] for one in rounds)
            reading = statistics.median(one["read"] for one in rounds)
            for name in rounds[0]:
                median = statistics.median(one[name] for one in rounds)
                against = (
                    f"{median / reading:6.2f} × read"
                    if name.startswith("read")
                    else f"{median / floor:6.2f} × copy"
                )
                print(f"  {name:<22} {median:8.3f} s  {against}")
    finally:
        connection.stop_daemon()
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
