"""What a repository needs: bytes, time, processors and memory, side by side with other tools.

    python benchmarks/store.py [--only CASE,…] [--scale FACTOR] [--json FILE] [--directory DIR] [--peers DIR]

Everything is measured in one run and by turns: machines are noisy, ratios less so. Prints medians with
their spread, the ratio in the middle of the rounds, and whether it meets the target; exits with 0 either way.
The full run takes about an hour and needs 25 GB of disk. See README.md beside it.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from measuring.figures import Figure, format_table
from measuring.machine import describe_machine
from measuring.peers import Peers
from measuring.workspace import Workspace
from storing import checkpoints, datasets, memory
from storing.plot import draw_growth
from storing.scale import scaled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cases: dict[str, Callable[[], list[Figure]]] = {
        "tail": lambda: checkpoints.measure_tail(workspace, scale, peers),
        "tensors": lambda: checkpoints.measure_tensors(workspace, scale, peers),
        "adam": lambda: checkpoints.measure_adam(workspace, scale, peers, options.trained),
        "dataset": lambda: datasets.measure_dataset(workspace, scale, peers),
        "rows": lambda: datasets.measure_rows(workspace, scale, peers),
        "small": lambda: datasets.measure_small(workspace, scale, peers),
        "growth": lambda: measure_growth(),
        "memory": lambda: memory.measure(workspace, scale, peers),
    }
    parser.add_argument("--only", default=",".join(cases), help="cases to measure (default: %(default)s)")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="FACTOR", help="of all sizes, to try it (default: 1)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often times are measured (default: 3)")
    parser.add_argument(
        "--trained",
        type=Path,
        metavar="DIR",
        help="what storing/train_model.py has written, for `adam` (default: the first steps of a training)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measured value to a file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the growth as SVG")
    parser.add_argument("--directory", help="where to work (default: the temporary directory)")
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="DIR",
        help="virtual environments of the peers, made when missing and kept (default: made and removed)",
    )
    parser.add_argument(
        "--keepsake-python", metavar="PYTHON", help="an old Python for Keepsake (3.7 to 3.10)"
    )
    parser.add_argument("--no-peers", action="store_true", help="measure nothing but this project")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - cases.keys():
        parser.error(f"unknown case: {', '.join(sorted(unknown))} (there are: {', '.join(cases)})")
    scale = scaled(options.scale, options.rounds)

    def measure_growth() -> list[Figure]:
        measured, lines = datasets.measure_growth(workspace, scale, peers)
        if options.plot:
            options.plot.write_text(draw_growth(lines, "Saving small files for the first time"))
        return measured

    figures: dict[str, list[Figure]] = {}
    workspace = Workspace(options.directory)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            peers = Peers(
                (options.peers or Path(temporary)).absolute(),
                keepsake_python=options.keepsake_python,
                is_skipped=options.no_peers,
            )
            machine = describe_machine(workspace.root) | {"scale": options.scale}
            print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
            for case, measure in cases.items():
                if case in chosen:
                    figures[case] = measure()
                    print(format_table(figures[case], with_header=len(figures) == 1), flush=True)
                    workspace.empty_project()
    finally:
        workspace.close()
    missed = [figure for measured in figures.values() for figure in measured if figure.verdict == "misses"]
    print(f"{len(missed)} targets missed" if missed else "all targets met")
    if options.json:
        raw = {case: [figure.raw() for figure in measured] for case, measured in figures.items()}
        options.json.write_text(json.dumps({"machine": machine, "figures": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
