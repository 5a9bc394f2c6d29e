"""The README's first command does what it says."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_trains_records_mounts_and_reads_back():
    # The caller's own state must not matter.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REPLICATE_")}
    done = subprocess.run(
        [sys.executable, ROOT / "examples/demo.py"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0
    assert "accuracy of the model in the mount: 0.9463, recorded: 0.9463" in done.stdout
    assert "Deduplication saved" in done.stdout
