"""A real job of torch.distributed (gloo) on machines of its own, as far as the network knows, and one bucket.

Each rank runs in a network namespace with a home and a directory of its own; the bucket is in another one.
Needs root and torch, which is not among the test dependencies: `.ci/distributed` installs it and runs this.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from servers import s3_servers

EXAMPLE = Path(__file__).parents[2] / "examples/distributed_training.py"
SIZE = 3
PORT = 8111
SERVER = "10.77.0.1"


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def namespaces():
    """A namespace with a bridge and the server's address, and one for each rank that reaches it."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed; `.ci/distributed` does that")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program `ip` (Debian: iproute2)")
    names = [f"rk{os.getpid()}-{word}" for word in ("hub", *map(str, range(SIZE)))]
    made = []
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        hub, *machines = names
        ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", hub, "addr", "add", f"{SERVER}/24", "dev", "bridge")
        ip("-n", hub, "link", "set", "bridge", "up")
        for number, name in enumerate(machines):
            port = f"port{number}"
            ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", hub, "link", "set", port, "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{number + 2}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)


@pytest.fixture
def bucket(namespaces, wait_until):
    """A server in the hub; the variables by which the machines reach it."""
    hub = namespaces[0]
    process = subprocess.Popen(
        [
            *("ip", "netns", "exec", hub, sys.executable),
            *("-W", "ignore", "-m", "moto.server", "-H", SERVER, "-p", str(PORT)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    probe = f"import socket; socket.create_connection(({SERVER!r}, {PORT}), 2)"

    def answers():
        command = ["ip", "netns", "exec", namespaces[1], sys.executable, "-c", probe]
        return subprocess.run(command, capture_output=True).returncode == 0

    wait_until(answers, "the bucket is reached from another machine")
    yield {**s3_servers.ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://{SERVER}:{PORT}"}
    process.kill()
    process.wait()


@pytest.mark.timeout(300)
def test_a_job_of_torch_on_several_machines_makes_checkpoints_of_all_ranks(namespaces, bucket, job):
    job.environment |= bucket | {"REPLICATE_REPOSITORY": "s3://lab/team", "GLOO_SOCKET_IFNAME": "eth0"}
    ranks = job.make(
        SIZE, REPLICATE_EXPERIMENT_ID=None, MASTER_ADDR="10.77.0.2", MASTER_PORT="29511", OMP_NUM_THREADS="1"
    )
    for rank, name in zip(ranks, namespaces[1:], strict=True):
        rank.prefix = ["ip", "netns", "exec", name]
        rank.start(EXAMPLE.read_text(), arguments=["--steps", "2", "--wait", "120"])
    done = [rank.end() for rank in ranks]
    assert [one.status for one in done] == [0] * SIZE, [one.errors for one in done]
    (experiment,) = {one.output.split()[-1] for one in done}
    found = ranks[1].stored(experiment, 2)
    assert [(one["step"], one["world_size"]) for one in found] == [(0, SIZE), (1, SIZE)]
    assert all(one["metrics"]["loss"] > 0 for one in found)
    slices = {f"model/slice-{rank}-of-{SIZE}.pt" for rank in range(SIZE)}
    for rank in ranks:
        assert rank.files(found[1]["id"]) - {"model"} == slices
        assert rank.json("show", experiment)["status"] == "stopped"
    assert ranks[0].json("show", experiment)["params"]["world_size"] == SIZE
