"""What capturing costs the script that calls it, beside the limit of the machine and other tools.

    python benchmarks/capture.py [--only PART,…] [--quick] [--json FILE] [--directory DIR] [--peers DIR]

Everything is measured in one run and by turns: machines are noisy, ratios less so. Prints medians with
their spread, the ratio in the middle of the rounds, and whether it meets the target; exits with 0 either way.
The full run takes a quarter of an hour, needs 30 GB of disk and writes 150 GB. See README.md beside it.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from capturing import checkpoints, training, trees
from capturing.scale import FULL, MIB, QUICK
from measuring.figures import BYTES, Figure, format_table
from measuring.machine import describe_machine
from measuring.peers import Peers
from measuring.workspace import Workspace

_MEMORY_BYTES = 400 * MIB


def memory_figures(workspace: Workspace) -> list[Figure]:
    """The daemon and its children, for all that was measured."""
    return [
        Figure(f"peak memory, {label}", [peak], BYTES, target=_MEMORY_BYTES)
        for label, peak in workspace.memory.peaks.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts: dict[str, Callable[[], list[Figure]]] = {
        "checkpoint": lambda: checkpoints.measure_files(workspace, scale),
        "peers": lambda: checkpoints.measure_peers(workspace, scale, peers),
        "records": lambda: checkpoints.measure_records(workspace, scale, peers),
        "trees": lambda: trees.measure_first(workspace, scale),
        "unchanged": lambda: trees.measure_unchanged(workspace, scale),
        "training": lambda: training.measure(workspace, scale),
    }
    parser.add_argument("--only", default=",".join(parts), help="parts to measure (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measured value to a file")
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
    parser.add_argument("--rounds", type=int, help="how often each part is measured (default: 3)")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - parts.keys():
        parser.error(f"unknown part: {', '.join(sorted(unknown))} (there are: {', '.join(parts)})")
    scale = QUICK if options.quick else FULL
    if options.rounds:
        scale = replace(scale, rounds=options.rounds)

    figures: dict[str, list[Figure]] = {}
    workspace = Workspace(options.directory)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            peers = Peers(
                (options.peers or Path(temporary)).absolute(),
                keepsake_python=options.keepsake_python,
                is_skipped=options.quick and options.peers is None,
            )
            machine = describe_machine(workspace.root)
            print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
            for part, measure in parts.items():
                if part in chosen:
                    figures[part] = measure()
                    print(format_table(figures[part], with_header=len(figures) == 1), flush=True)
        figures["memory"] = memory_figures(workspace)
        print(format_table(figures["memory"], with_header=False), flush=True)
    finally:
        workspace.close()
    if options.json:
        raw = {part: [figure.raw() for figure in measured] for part, measured in figures.items()}
        options.json.write_text(json.dumps({"machine": machine, "figures": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
