"""What a snapshot must hold: what lay there at the call, written down before the call by those who call.

`describe` puts a tree into a form that can be compared and sent as JSON. A `Chronicle` is a file in which a
training script writes what it does, each line before or after the deed; it survives the script. `judge` holds
all of it against what the daemon says and what the repository gives to somebody who never saw the originals.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import replicate
from replicate.errors import NotStored

#: Path → (type, permission bits, mtime in ns, size, hash or target); JSON makes the tuples lists.
Description = dict[str, list]


def describe(project: Path, paths: list[str]) -> Description:
    """What lies at some paths of a project, and below them."""
    described = {}
    for path in paths:
        described[path] = describe_one(project / path)
        for directory, directories, files in os.walk(project / path):
            for name in directories + files:
                found = Path(directory, name)
                described[str(found.relative_to(project))] = describe_one(found)
    return described


def describe_one(path: Path) -> list:
    info = path.lstat()
    if stat.S_ISLNK(info.st_mode):
        return ["symlink", None, info.st_mtime_ns, None, os.readlink(path)]
    mode = stat.S_IMODE(info.st_mode)
    if stat.S_ISDIR(info.st_mode):
        return ["directory", mode, info.st_mtime_ns, None, None]
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return ["file", mode, info.st_mtime_ns, info.st_size, digest.hexdigest()]


class Chronicle:
    """What a script did, one JSON object a line, in a file that outlives it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **fields: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, **fields}) + "\n")

    def read(self, event: str) -> list[dict]:
        return [line for line in self.lines() if line["event"] == event]

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def judge(
    chronicle: Chronicle,
    repository: str,
    home: Path,
    reader_home: Path,
    may_fail: Callable[[str], bool],
) -> dict[int, str]:
    """Hold every checkpoint of a script against what it wrote down; the state in which each step ended.

    `home` is where the script's daemon lives, `reader_home` another one: it knows the repository only.
    `may_fail` says whether a checkpoint may fail for some reason. An AssertionError tells all that is wrong.
    """
    called = {line["step"]: line for line in chronicle.read("called")}
    returned = {line["step"]: line for line in chronicle.read("returned")}
    identifier = chronicle.read("begun")[0]["experiment"]
    project = replicate.Project(repository=repository, directory=str(home))
    with using(home):
        with suppress(NotStored):
            replicate.flush(timeout=300)
        listed = {one.step: one for one in project.experiments.get(identifier).checkpoints}
        states = {step: one.state for step, one in listed.items()}
        reasons = {step: one.error for step, one in listed.items() if states[step] == "failed"}
    stored = {step for step, state in states.items() if state == "stored"}
    complaints = [f"step {step} was never asked for" for step in states.keys() - called.keys()]
    for step in called.keys() & (states.keys() | returned.keys()):
        told = returned.get(step, {"state": "", "error": ""})
        if told["state"] == "failed":
            # The daemon need not know of what it could not be told of; the script was.
            reasons.setdefault(step, told["error"])
            states.setdefault(step, "failed")
        if step not in states:
            complaints.append(f"step {step} was acknowledged as {told['state']} and is not listed")
        elif states[step] not in ("failed", "stored"):
            complaints.append(f"step {step} is still {states[step]}")
        elif called[step]["must_fail"] and step in stored:
            complaints.append(f"step {step} is stored, though {called[step]['must_fail']}")
        elif step in reasons and not reasons[step]:
            complaints.append(f"step {step} failed and no reason is given")
        elif step in reasons and not called[step]["must_fail"] and not may_fail(reasons[step]):
            complaints.append(f"step {step} failed: {reasons[step]}")
        if step in listed and step in returned and listed[step].id != told["id"]:
            complaints.append(f"step {step} is listed with another id")
    with using(reader_home):
        found = project.experiments.get(identifier).checkpoints
        readable = {one.step: one for one in found if one.state == "stored"}
        if readable.keys() != stored:
            complaints.append(f"stored are {sorted(stored)}, the repository has {sorted(readable)}")
        for step in sorted(readable.keys() & called.keys()):
            expected, paths = called[step]["expected"], called[step]["paths"]
            for difference in differences(expected, readable[step], paths):
                complaints.append(f"step {step}: {difference}")
    assert not complaints, "\n".join([*complaints, *account_of(chronicle, complaints)])
    return states


def differences(expected: Description, checkpoint: replicate.Checkpoint, paths: list[str]) -> Iterator[str]:
    """How a stored checkpoint differs from what was there: checked out, opened, and some of them mounted."""
    with TemporaryDirectory(prefix="rpl-out-") as out:
        checkpoint.checkout(out, quiet=True)
        yield from compare(expected, Path(out), paths, "checked out")
    random = Random(checkpoint.step)
    files = sorted(path for path, (kind, *_) in expected.items() if kind == "file")
    for path in random.sample(files, min(2, len(files))):
        with checkpoint.open(path) as file:
            digest = hashlib.blake2b(file.read(), digest_size=16).hexdigest()
        if digest != expected[path][-1]:
            yield f"{path}: opened, it has other bytes"
    if checkpoint.step % 16 == 1:
        with checkpoint.mount() as mounted:
            yield from compare(expected, mounted, paths, "mounted")


def compare(expected: Description, top: Path, paths: list[str], how: str) -> Iterator[str]:
    actual = describe(top, os.listdir(top))
    for path in paths:
        for parent in set(map(str, Path(path).parents)) - expected.keys():
            actual.pop(parent, None)  # made because something below it was saved
    if how == "mounted":
        # A read-only file system shows nobody's right to write.
        expected, actual = (
            {path: [kind, None, *rest] for path, (kind, _, *rest) in one.items()}
            for one in (expected, actual)
        )
    for path in sorted(expected.keys() | actual.keys()):
        if expected.get(path) != actual.get(path):
            yield f"{path}: {how} {actual.get(path)}, at the call {expected.get(path)}"


def account_of(chronicle: Chronicle, complaints: list[str]) -> Iterator[str]:
    """What the script did around the steps that are complained of."""
    steps = {int(number) for text in complaints for number in re.findall(r"^step (\d+)", text)}
    for line in chronicle.lines():
        if line.get("step") in steps or line["event"] in ("begun", "killed"):
            line.pop("expected", None)
            yield json.dumps(line)


@contextmanager
def using(home: Path, **others: str) -> Iterator[None]:
    """Speak to the daemon of a home meanwhile, with other variables of the environment."""
    variables = {"REPLICATE_HOME": str(home), **others}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
