"""One suite for every engine: repositories, and mounts served by the engine that is asked for."""

import dataclasses
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from replicated.checkout import execute, plan
from replicated.mount.engine.choosing import describe
from replicated.mount.engine.libfuse import check_device
from replicated.mount.engine.native.passthrough import find_obstacle
from replicated.mount.life.mountinfo import find_mounted

SERVER = Path(__file__).parents[1] / "serve_engine.py"
DEADLINE_S = 30

#: Why no file can be passed through here; empty where it can.
OBSTACLE = find_obstacle()
#: The engines, and the ways in which the first of them opens files.
VARIANTS = {
    # Many small files would not be opened at all, were it left to the engine.
    "native": {"engine": "native", "passthrough": "auto" if OBSTACLE else "on"},
    "native-without-open": {"engine": "native", "passthrough": "off"},
    "native-passthrough": {"engine": "native", "passthrough": "on"},
    "mfusepy": {"engine": "mfusepy"},
    "fusepy": {"engine": "fusepy"},
}
#: For what has nothing to do with how files are opened.
ENGINES = ("native", "mfusepy", "fusepy")


@dataclasses.dataclass
class Served:
    """One mount, and the process that serves it."""

    process: subprocess.Popen
    directory: Path
    #: What the engine said about itself.
    report: dict
    #: What the process writes to standard error.
    messages: Path
    cache: Path
    control: Path
    log: Path

    def set_store(self, mode):
        """Let the store be `ok`, or `fail`, `hang`, `flip`, `cut` or `lose` what is asked of it."""
        temporary = self.control.with_suffix(".new")
        temporary.write_text(mode)
        temporary.replace(self.control)

    def requests(self, mode=""):
        """What the store was asked for while it was in a mode."""
        return [line for line in self.log.read_text().splitlines() if line.startswith(mode)]

    def unmount(self):
        """Unmount; the exit status of the process."""
        subprocess.run(["fusermount3", "-u", "--", self.directory], check=True)
        return self.process.wait(DEADLINE_S)


@pytest.fixture(scope="session", autouse=True)
def can_mount():
    device = check_device()
    if not device.ok:
        pytest.skip(f"cannot mount here: {device.detail}")


@pytest.fixture(scope="session")
def serve(can_mount):
    """Start a server, and end it with the session at the latest."""
    servers = []

    def serve(top, snapshots, *ids, variant="mfusepy", faulty=False, plain=False, cache=None, **options):
        plain = plain or variant == "native-passthrough"
        options = {**VARIANTS[variant], **options}
        if variant == "native" and options.get("cache_bytes") == 0:
            # Then there is nothing that could be passed through, and to demand it is an error.
            options["passthrough"] = "auto"
        _refuse_what_cannot_be_used(options)
        number = len(servers)
        directory = top / f"mnt{number}"
        directory.mkdir()
        control, log, messages = (top / f"{name}{number}" for name in ("control", "log", "messages"))
        cache = cache or top / f"cache{number}"
        control.write_text("ok")
        log.touch()
        asked = {
            "repository": str(snapshots.directory),
            "cache": str(cache),
            "snapshots": ids,
            "directory": str(directory),
            "options": options,
            "plain": plain,
            "control": str(control) if faulty else "",
            "log": str(log),
        }
        with open(messages, "wb") as errors:
            process = subprocess.Popen(
                [sys.executable, SERVER, json.dumps(asked)], stdout=subprocess.PIPE, stderr=errors
            )
        served = Served(process, directory, {}, messages, cache, control, log)
        servers.append(served)
        ready, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
        line = process.stdout.readline() if ready else b""
        assert line, messages.read_text()
        served.report.update(json.loads(line))
        return served

    yield serve
    for served in servers:
        end(served)


def end(served):
    """End a server and its mount, whatever state they are in."""
    if served.process.returncode is None:
        served.set_store("ok")
        served.process.send_signal(signal.SIGTERM)
    try:
        served.process.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        served.process.kill()
        served.process.wait()
    served.process.stdout.close()
    if find_mounted(os.fsencode(served.directory)) is not None:
        subprocess.run(["fusermount3", "-u", "-z", "--", served.directory], check=False)


@pytest.fixture(scope="session")
def ending():
    return end


def _refuse_what_cannot_be_used(options):
    """Skip what this kernel or user cannot do. A library that is not installed is no reason to skip."""
    state = {state.name: state for state in describe()}[options["engine"]]
    if options.get("passthrough") == "on" and OBSTACLE:
        pytest.skip(f"files cannot be passed through here: {OBSTACLE}")
    if not state.is_usable:
        pytest.fail(f"{state.name} cannot be used: {state.detail}; {state.hint}")


@pytest.fixture(scope="session")
def checkout():
    """Write the files of a tree into a directory."""
    return lambda tree, output: execute(plan(tree, os.fsencode(output)), tree)


@pytest.fixture(scope="session", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="session", params=ENGINES)
def engine(request):
    return request.param


BIG = random.Random(1).randbytes(5_000_003)
#: One tree with everything in it that a mount can show.
TREE = (
    {
        b"with space": b"1",
        b"new\nline": b"2",
        b"back\\slash": b"3",
        b"\xff\xfe": (b"4", 0o444, 1),
        b"case": b"lower",
        b"CASE": b"upper",
        "é".encode(): b"one code point",
        "e\u0301".encode(): b"two code points",
        b"n" * 255: b"longest",
        b"special": (b"#!/bin/sh\n", 0o6755, 10**18 + 2),
        b"before1970": (b"old", 0o644, -1_234_567_891),
        b"empty": b"",
        b"void": {},
        b"big": (BIG, 0o644, 10**18 + 7),
        b"zeros": bytes(3_000_000),
        b"private": (b"secret", 0o600, 10**18),
        b"sub": (
            {
                b"run.sh": (b"#!/bin/sh\necho ran\n", 0o755, 10**18 + 1),
                b"needle.txt": (b"a needle in a haystack\n", 0o644, 10**18 + 6),
                b"closed": ({b"in": (b"x", 0o644, -5)}, 0o700, 10**18 + 3),
            },
            0o751,
            10**18 + 4,
        ),
        b"links": {
            b"absolute": "/etc/hostname",
            b"dangling": "nowhere",
            b"inside": "../with space",
            b"directory": "../sub",
            b"loop": "loop",
            b"long": "x" * 4095,
        },
        b"many": {b"%05d" % number: b"%d" % number for number in range(3000)},
        # As long as names get: fewer fit into one answer.
        b"wide": {b"%03d" % number + b"w" * 252: b"" for number in range(300)},
    },
    0o755,
    10**18 + 5,
)


@pytest.fixture(scope="session")
def big():
    return BIG


@pytest.fixture(scope="session")
def stored(tmp_path_factory, make_snapshots, memory_tree):
    """A repository that holds the tree, where to put mounts, the id and the tree."""
    # Other users must be able to get there.
    top = Path(tempfile.mkdtemp(prefix="contract."))
    top.chmod(0o755)
    snapshots = make_snapshots(top / "repository", top / "cache", memory_tree)
    identifier, tree = snapshots.add(TREE)
    snapshots.close()
    yield top, snapshots, identifier, tree
    shutil.rmtree(top)


@pytest.fixture(scope="session")
def shown(serve, stored, variant):
    """The tree, mounted in one of the ways in which it can be."""
    top, snapshots, identifier, _ = stored
    served = serve(top, snapshots, identifier, variant=variant)
    yield served
    end(served)


@pytest.fixture(scope="session")
def shown_by(serve, stored, engine):
    """The same, for what has nothing to do with how files are opened."""
    top, snapshots, identifier, _ = stored
    served = serve(top, snapshots, identifier, variant=engine)
    yield served
    end(served)
