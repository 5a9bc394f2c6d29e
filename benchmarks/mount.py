"""What reading through a mount costs, beside reading the files themselves and beside other tools' mounts.

    python benchmarks/mount.py [--only CASE,…] [--scale FACTOR] [--rounds N] [--json FILE] [--no-peers]

Everything is measured in one run and by turns: machines are noisy, ratios less so. Prints medians with
their spread, the ratio in the middle of the rounds, and whether it meets the target; exits with 0 either way.
The full run takes about an hour and needs 15 GB of disk. See README.md beside it.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from measuring.figures import Figure, format_table
from measuring.machine import describe_machine
from measuring.peers import Peers
from measuring.workspace import Workspace, progress
from mounting import epochs, far, files, starting, trees
from mounting.scale import scaled
from mounting.servers import Saved, find_variants, unmount_all

_ENGINES = ("native", "mfusepy", "fusepy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cases: dict[str, Callable[[], list[Figure]]] = {
        "file": lambda: measure_file(),
        "tree": lambda: measure_tree(),
        "start": lambda: measure_start(),
        "epoch": lambda: measure_epoch(),
        "far": lambda: measure_far(),
    }
    parser.add_argument("--only", default=",".join(cases), help="cases to measure (default: %(default)s)")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="FACTOR", help="of all sizes, to try it (default: 1)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    parser.add_argument(
        "--engines",
        default="native",
        metavar="ENGINE,…",
        help=f"engines to measure apart, of {', '.join(_ENGINES)} (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measured value to a file")
    parser.add_argument("--directory", help="where to work (default: the temporary directory)")
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="DIR",
        help="where `torch/bin/python` is, a Python with PyTorch for `epoch` (default: none)",
    )
    parser.add_argument("--no-peers", action="store_true", help="measure nothing but this project")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - cases.keys():
        parser.error(f"unknown case: {', '.join(sorted(unknown))} (there are: {', '.join(cases)})")
    engines = options.engines.split(",")
    if unknown := set(engines) - set(_ENGINES):
        parser.error(f"unknown engine: {', '.join(sorted(unknown))} (there are: {', '.join(_ENGINES)})")
    scale = scaled(options.scale, options.rounds)

    @contextmanager
    def saved(which: Peers) -> Iterator[Saved]:
        """What `data` holds now, saved with each of the tools; all of it is removed afterwards."""
        progress("saving it with each of the tools")
        servers = Saved(workspace, which)
        try:
            yield servers
        finally:
            servers.close()
            workspace.empty_project()

    def measure_file() -> list[Figure]:
        files.make(workspace, scale)
        with saved(peers) as servers:
            return [
                *files.measure_chunks(scale, servers),
                *files.measure_cached(scale, servers, variants),
            ]

    def measure_tree() -> list[Figure]:
        trees.make(workspace, scale)
        with saved(peers) as servers:
            return trees.measure(scale, servers, variants)

    def measure_start() -> list[Figure]:
        starting.make(workspace, scale.few_files)
        with saved(peers) as servers:
            figures, times = starting.measure_few(scale, servers)
        starting.make(workspace, scale.many_files)
        with saved(nobody) as servers:
            return figures + starting.measure_many(scale, servers, times)

    def measure_epoch() -> list[Figure]:
        epochs.make(workspace, scale)
        with saved(peers) as servers:
            return epochs.measure(scale, servers, variants, loader)

    def measure_far() -> list[Figure]:
        far.make(workspace, scale)
        with saved(nobody) as servers:
            return far.measure(workspace, scale, servers, peers, loader)

    # Ended by a signal, it leaves neither mounts nor files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))
    figures: dict[str, list[Figure]] = {}
    workspace = Workspace(options.directory)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            place = (options.peers or Path(temporary)).absolute()
            peers = Peers(place, keepsake_python=None, is_skipped=options.no_peers)
            nobody = Peers(place, keepsake_python=None, is_skipped=True, is_silent=True)
            loader = epochs.Loader(place)
            variants = find_variants(engines)
            machine = describe_machine(workspace.root) | {"scale": options.scale}
            print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
            for case, measure in cases.items():
                if case in chosen:
                    figures[case] = measure()
                    print(format_table(figures[case], with_header=len(figures) == 1), flush=True)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        unmount_all(workspace)
        workspace.close()
    missed = [figure for measured in figures.values() for figure in measured if figure.verdict == "misses"]
    print(f"{len(missed)} targets missed" if missed else "all targets met")
    if options.json:
        raw = {case: [figure.raw() for figure in measured] for case, measured in figures.items()}
        options.json.write_text(json.dumps({"machine": machine, "figures": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
