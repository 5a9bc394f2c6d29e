"""A person is warned of a snapshot that is larger than was meant."""

WARNED = """
import replicate
from pathlib import Path

Path("data").mkdir()
Path("data/big.bin").write_bytes(bytes(3 << 20))
for number in range(40):
    Path(f"data/{number}").write_bytes(bytes(30_000))
experiment = replicate.init("data")
for step in range(3):
    Path(f"model-{step}.pt").write_bytes(bytes([step]) * (3 << 20))
    experiment.checkpoint(f"model-{step}.pt")
"""


def warnings_of(done):
    assert done.status == 0, done.errors
    return [line for line in done.errors.splitlines() if "unusually" in line]


def test_a_script_is_warned_once_of_its_experiment_and_once_of_its_checkpoints(project, run_script):
    (project / "replicate.yaml").write_text("warn_above: 2MB\n")
    first, second = warnings_of(run_script(WARNED))
    assert first.startswith(
        "replicate: this experiment saves unusually much that is new, 4.1 MiB in 41 files,"
        " most of it in data/big.bin (3.0 MiB), data (1.1 MiB in 40 small files); "
    )
    for remedy in ("`ignore` in replicate.yaml", ".replicateignore", "`warn_above`", "`off`"):
        assert remedy in first
    assert "this checkpoint saves unusually much that is new, 3.0 MiB in 1 file, most of it" in second
    assert "model-0.pt (3.0 MiB)" in second


SMALL = "import replicate\nfrom pathlib import Path\nPath('data').write_bytes(bytes(3 << 20))\n"


def test_nobody_is_warned_of_what_is_usual_or_who_has_switched_it_off(project, run_script):
    assert warnings_of(run_script(SMALL + "replicate.init('data')")) == []
    (project / "replicate.yaml").write_text("warn_above: off\n")
    assert warnings_of(run_script(SMALL + "replicate.init('data')")) == []


def test_what_looks_like_a_mistake_is_told_to_those_who_want_it_quiet_too(project, run_script):
    (project / "replicate.yaml").write_text("warn_above: 1MB\n")
    # And nothing else: what is skipped by rule is no trouble.
    skipped = "import os\nos.mkfifo('pipe')\n"
    done = run_script(SMALL + skipped + "replicate.init('.', quiet=True).checkpoint('.').wait()")
    (line,) = warnings_of(done)
    assert done.errors == line + "\n"
    assert line.startswith("replicate: this experiment saves unusually much that is new, 3.0 MiB in ")
    assert done.output == ""
