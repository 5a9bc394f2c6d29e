"""The main job, end to end, with the real command line: run by examples/demo.sh.

Trains a classifier twice, lists the runs, shows the best, compares the two, mounts the best one, loads
the model from the mount, checks that it scores what was recorded, unmounts, and says what was stored.
Everything happens in a temporary directory with the default configuration: local disk, no config file.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLE = Path(__file__).parent / "digits"
BIN = Path(sys.executable).parent


def run(*command: str) -> None:
    """Show a command as it would be typed, and run it."""
    line = f"$ {' '.join(command)}"
    print(f"\n\033[1m{line}\033[0m" if sys.stdout.isatty() else f"\n{line}", flush=True)
    subprocess.run(command, check=True)


def ask(*command: str):
    """What a command prints as JSON."""
    asked = subprocess.run(["replicate", *command, "--json"], check=True, stdout=subprocess.PIPE)
    return json.loads(asked.stdout)


def check_model(directory: Path, recorded: float) -> None:
    """Load the model from `directory` and compare its score on the test data, also from there."""
    sys.path.insert(0, str(EXAMPLE))
    import joblib
    from train import load_data

    _, test_x, _, test_y = load_data(directory / "data")
    accuracy = joblib.load(directory / "model.joblib").score(test_x, test_y)
    print(f"accuracy of the model in the mount: {accuracy:.4f}, recorded: {recorded:.4f}")
    if accuracy != recorded:
        sys.exit("error: the mounted model does not score what was recorded")


def main() -> None:
    """Run the steps; exits with the status of the first that fails."""
    work = Path(tempfile.mkdtemp(prefix="replicate-demo-"))
    project = work / "digits"
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("__pycache__"))
    os.chdir(project)
    # State of its own, so that the demo leaves no trace in yours.
    os.environ["REPLICATE_HOME"] = str(work / "home")
    # `python` and `replicate` are those of this environment, as in an activated one.
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    try:
        run("python", "train.py", "--learning-rate", "0.001")
        run("python", "train.py", "--learning-rate", "0.01")
        run("replicate", "flush")
        run("replicate", "ls")

        experiments = ask("ls")
        best = max(experiments, key=lambda e: e["best_checkpoint"]["metrics"]["accuracy"])
        other = next(e for e in experiments if e is not best)
        run("replicate", "show", best["id"][:7])
        run("replicate", "diff", other["id"][:7], best["id"][:7])

        mount = work / "mnt"
        run("replicate", "mount", f"{best['id'][:7]}:best", str(mount))
        try:
            run("ls", "-l", str(mount))
            check_model(mount, best["best_checkpoint"]["metrics"]["accuracy"])
        finally:
            run("replicate", "umount", str(mount))

        run("replicate", "du")
        usage = ask("du")
        print(
            f"\nsaved {usage['logical_bytes'] / 1e6:.1f} MB in {len(experiments)} experiments, "
            f"stored {usage['stored_bytes'] / 1e6:.1f} MB"
        )
    finally:
        run("replicate", "daemon", "stop")
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
