"""A repository that a training script has filled, and file systems that read it without the daemon."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
from servers import s3_servers
from servers.fault_proxy import FaultProxy

from replicated.fsspec_files import ReplicateFileSystem, opening

#: Saves a project of every kind of file, then two checkpoints that lay a few more over it.
TRAIN = """
import json, pathlib, random, struct, sys
import numpy, pandas, replicate

random.seed(7)
root = pathlib.Path(".")
(root / "data/parts/year=2024").mkdir(parents=True)
(root / "data/parts/year=2025").mkdir(parents=True)
(root / "empty").mkdir()
(root / "nothing.bin").write_bytes(b"")
(root / "small.txt").write_text("small\\n")
(root / "big.bin").write_bytes(random.randbytes(5_000_000))
(root / "words.txt").write_text("\\n".join(str(random.random()) for _ in range(200_000)))
with open("sparse.bin", "wb") as file:
    file.write(random.randbytes(4096))
    file.seek(3 << 20)
    file.write(random.randbytes(70_000))
    file.truncate(9 << 20)
tensor = numpy.random.default_rng(3).normal(size=1_000_000).astype("f4").tobytes()
header = json.dumps({"w": {"dtype": "F4", "shape": [1000000], "data_offsets": [0, len(tensor)]}}).encode()
header = header.replace(b'"F4"', b'"F32"')
(root / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + tensor)
frame = pandas.DataFrame({"x": range(60_000), "y": numpy.random.default_rng(5).normal(size=60_000)})
frame.to_csv("data/table.csv", index=False)
for year in (2024, 2025):
    for part in range(3):
        frame[part * 20_000:(part + 1) * 20_000].to_parquet(f"data/parts/year={year}/{part}.parquet")
for name, target in {
    "data/up": "..", "to-small": "small.txt", "to-data": "data", "outside": "/etc/passwd",
    "escape": "../../etc/passwd", "loop-a": "loop-b", "loop-b": "loop-a", "dead": "gone",
    "data/chain": "../to-data/../to-small",
}.items():
    (root / name).symlink_to(target)
for number in range(40):
    (root / f"many-{number}.txt").write_text(f"number {number}\\n" * 50)

experiment = replicate.init(path=".", params={"rate": 0.1}, quiet=True)
checkpoints = []
for step, loss in ((1, 0.5), (2, 0.9)):
    (root / "weights.bin").write_bytes(random.randbytes(300_000))
    (root / "small.txt").write_text(f"step {step}\\n")
    (root / f"before-{step}.bin").write_bytes((root / "weights.bin").read_bytes())
    checkpoints.append(
        experiment.checkpoint(
            path=["weights.bin", "small.txt"], step=step, metrics={"loss": loss},
            primary_metric=("loss", "minimize"), quiet=True,
        )
    )
(root / "small.txt").write_text("small\\n")
experiment.stop()
bare = replicate.init(params={"files": "none"}, quiet=True)
bare.stop()
replicate.flush()
print(json.dumps([experiment.id, [checkpoint.id for checkpoint in checkpoints], bare.id]))
"""

STOP = "import sys; from replicate.cli.main import main; sys.argv[1:] = ['daemon', 'stop']; main()"


@dataclass(frozen=True)
class Saved:
    """What was saved, and where."""

    #: As it is in the snapshot of `init`.
    project: Path
    url: str
    experiment: str
    checkpoints: list[str]
    bare: str
    #: What reaches it.
    environment: dict[str, str]

    def path(self, name: str) -> str:
        return f"{self.experiment}:code/{name}"


def run(script: str, directory: Path, environment: dict[str, str]) -> str:
    """What a script prints that runs as one of a user."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=directory,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout


def train(directory: Path, url: str, environment: dict[str, str]) -> Saved:
    """Run the script with a daemon of its own, which has ended when this returns."""
    project = directory / "project"
    project.mkdir(parents=True)
    environment = {**environment, "REPLICATE_REPOSITORY": url, "REPLICATE_HOME": str(directory / "home")}
    try:
        experiment, checkpoints, bare = json.loads(run(TRAIN, project, environment))
    finally:
        run(STOP, directory, environment)
    return Saved(project, url, experiment, checkpoints, bare, environment)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    directory = tmp_path_factory.mktemp("saved")
    return train(directory, f"file://{directory}/repository", {})


@pytest.fixture(autouse=True)
def reader_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The home of a machine that has nothing yet, and the extra registered as an installation does."""
    monkeypatch.setenv("REPLICATE_HOME", str(tmp_path / "reader-home"))
    fsspec.register_implementation("replicate", ReplicateFileSystem, clobber=True)
    yield tmp_path / "reader-home"
    ReplicateFileSystem.clear_instance_cache()
    opening.close_all()


@pytest.fixture
def fs(saved: Saved) -> ReplicateFileSystem:
    return fsspec.filesystem("replicate", repository=saved.url)


@pytest.fixture(scope="session")
def bucket_proxy() -> Iterator[FaultProxy]:
    with s3_servers.moto() as server, FaultProxy(server.url) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def saved_in_bucket(tmp_path_factory: pytest.TempPathFactory, bucket_proxy: FaultProxy) -> Saved:
    """The same in a bucket."""
    environment = {**s3_servers.ENVIRONMENT, "AWS_ENDPOINT_URL": bucket_proxy.url}
    return train(tmp_path_factory.mktemp("saved-in-bucket"), "s3://bucket/of/ours", environment)


@pytest.fixture
def bucket(
    saved_in_bucket: Saved, bucket_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """What counts and breaks requests to the bucket, which this process can reach."""
    for name, value in saved_in_bucket.environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    yield bucket_proxy
    bucket_proxy.clear()
