"""What repositories in buckets cost: requests, bytes and processor time, beside bare loops and rclone.

    python benchmarks/object_storage.py [--only CASE,…] [--scale FACTOR] [--rounds N] [--json FILE]

Everything is measured in one run, on a server on the loopback interface: what counts are requests, and the
processor time of the client beside that of others on the same server. Prints medians with their spread,
ratios and whether they meet the targets; exits with 0 either way. See README.md beside it.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from measuring.figures import Figure, format_table
from measuring.machine import describe_machine
from object_storing import beating, opening, reading, storing
from object_storing.bucket import find_rclone, serve
from object_storing.machine import Machine
from object_storing.scale import scaled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cases: dict[str, Callable[[], list[Figure]]] = {
        "upload": lambda: storing.measure_upload(machine, scale),
        "requests": lambda: storing.measure_requests(machine, scale),
        "ls": lambda: opening.measure_list(machine, scale),
        "open": lambda: opening.measure_open(machine, scale),
        "read": lambda: reading.measure(machine, scale),
        "heartbeats": lambda: beating.measure(machine, scale),
    }
    parser.add_argument("--only", default=",".join(cases), help="cases to measure (default: %(default)s)")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="FACTOR", help="of all sizes, to try it (default: 1)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    parser.add_argument(
        "--beating",
        type=float,
        default=150.0,
        metavar="SECONDS",
        help="how long signs of life are counted (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measured value to a file")
    parser.add_argument("--directory", help="where to work (default: the temporary directory)")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - cases.keys():
        parser.error(f"unknown case: {', '.join(sorted(unknown))} (there are: {', '.join(cases)})")
    if not find_rclone().exists():
        parser.error(f"there is no {find_rclone()}: install the extra `test`, which has rclone")
    scale = scaled(options.scale, options.rounds, options.beating)

    # Ended by a signal, it leaves neither servers nor files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))
    figures: dict[str, list[Figure]] = {}
    place = Path(tempfile.mkdtemp(prefix="rpl-bucket-", dir=options.directory))
    try:
        with serve(place) as bucket:
            machine = Machine(options.directory, bucket)
            try:
                about = describe_machine(machine.root) | {"scale": options.scale}
                print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
                for case, measure in cases.items():
                    if case in chosen:
                        figures[case] = measure()
                        print(format_table(figures[case], with_header=len(figures) == 1), flush=True)
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                machine.close()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    missed = [figure for measured in figures.values() for figure in measured if figure.verdict == "misses"]
    print(f"{len(missed)} targets missed" if missed else "all targets met")
    if options.json:
        raw = {case: [figure.raw() for figure in measured] for case, measured in figures.items()}
        options.json.write_text(json.dumps({"machine": about, "figures": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
