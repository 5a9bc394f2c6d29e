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


def test_nobody_is_warned_of_what_is_usual_or_known_or_who_wants_it_quiet(project, run_script):
    script = "import replicate\nfrom pathlib import Path\nPath('data').write_bytes(bytes(3 << 20))\n"
    assert warnings_of(run_script(script + "replicate.init('data')")) == []
    (project / "replicate.yaml").write_text("warn_above: 1MB\n")
    quiet = script + "e = replicate.init('data', quiet=True)\ne.checkpoint('data')\n"
    assert warnings_of(run_script(quiet)) == []
    (project / "replicate.yaml").write_text("warn_above: off\n")
    assert warnings_of(run_script(script + "replicate.init('data')")) == []
