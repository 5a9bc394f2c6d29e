"""A training script that attacks its own files the instant `checkpoint` returns; run as a process.

    python -m rig.training PLAN CHRONICLE      (PLAN: a `Plan` as JSON; the working directory: the project)

Round by round it changes files, writes down what lies there, calls `checkpoint`, and lets three writers
loose: this thread, another thread and another process. It does not wait for anything to be stored, so that
many snapshots of the same paths are pending. Meanwhile it kills the daemon or troubles the store, as planned.
"""

import dataclasses
import json
import mmap
import multiprocessing
import os
import shutil
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from rig import writers
from rig.oracle import Chronicle, describe
from rig.troubles import Killer, Trouble

import replicate

#: (writer, path, seed): see `writers.BY_NAME`.
Attack = tuple[str, str, float]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training script is to do."""

    seed: int
    rounds: int
    #: `files`: a few files of telling sizes; `tree`: many small ones; `steps`: new ones that are left alone.
    workload: str = "files"
    sizes: tuple[int, ...] = (0, 1, 4096, 70_000, 1 << 20, (1 << 20) + 1, 5_000_000)
    tree_files: int = 300
    #: Taken in turn; empty: what the daemon chooses.
    rungs: tuple[str, ...] = ("",)
    #: Rungs that this file system does not have: each checkpoint on them must fail.
    impossible: tuple[str, ...] = ()
    #: What is killed and how, for example `daemon KILL`, and in how many of the rounds.
    kills: tuple[str, ...] = ()
    kill_chance: float = 0.3
    #: From the second round to the last but one: `repository away`, `store stopped` or `repository full`.
    trouble: str = ""


class Actors:
    """Another thread and another process that attack when they are let loose, while this thread does too."""

    def __init__(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=self._serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def arm(self, for_thread: list[Attack], for_process: list[Attack]) -> None:
        """Give each its part; nothing happens yet."""
        self._go = threading.Event()
        self._thread = threading.Thread(target=self._wait_and_attack, args=(for_thread,))
        self._thread.start()
        self._connection.send(for_process)
        self._connection.recv()

    def release(self) -> None:
        self._connection.send("go")
        self._go.set()

    def join(self) -> None:
        """Wait until both have done what they were to do."""
        self._thread.join()
        if trouble := self._connection.recv():
            raise RuntimeError(f"a writer failed: {trouble}")

    def close(self) -> None:
        self._connection.close()
        self._process.join()

    def _wait_and_attack(self, attacks: list[Attack]) -> None:
        self._go.wait()
        perform(attacks)

    def _serve(self, connection: Connection) -> None:
        self._connection.close()
        try:
            while True:
                attacks = connection.recv()
                connection.send("armed")
                connection.recv()
                connection.send(_trouble_of(attacks))
        except EOFError:
            return  # the script has ended


def perform(attacks: list[Attack]) -> None:
    for name, path, seed in attacks:
        writers.BY_NAME[name](Path(path), Random(seed))


def _trouble_of(attacks: list[Attack]) -> str:
    try:
        perform(attacks)
    except OSError as error:
        return repr(error)
    return ""


class Files:
    """A few files of telling sizes, beside one that is kept open and one that is kept mapped."""

    def __init__(self, plan: Plan) -> None:
        self._sizes = plan.sizes
        self._top, self._kept = Path("files"), Path("kept")
        self._top.mkdir()
        self._kept.mkdir()
        self._log = (self._kept / "log.txt").open("wb", buffering=0)
        with (self._kept / "mapped.bin").open("w+b") as file:
            file.truncate(3 << 20)
            self._mapped = mmap.mmap(file.fileno(), 0)

    def prepare(self, random: Random) -> None:
        """Change some files, leave others as the attacks have left them."""
        saved = {self._top / f"{number}-{size}": size for number, size in enumerate(self._sizes)}
        for path in sorted(self._top.iterdir()):
            is_as_saved = path in saved and path.is_file() and not path.is_symlink()
            if not is_as_saved and random.random() < 0.5:
                _remove(path)
        for path, size in saved.items():
            if random.random() < 0.5 and (path.is_file() or not os.path.lexists(path)):
                random.choice([_save, _save_by_renaming])(path, writers.content(random, size))
        sparse = self._top / "sparse"
        if not os.path.lexists(sparse):
            with sparse.open("wb") as file:
                file.truncate(8 << 20)
                file.seek(random.randrange(8 << 20))
                file.write(writers.content(random, 5000))

    def paths(self, random: Random, rung: str) -> list[str]:
        # A file that is open for writing cannot be leased.
        kept = [] if rung == "lease" else [str(self._kept)]
        if random.random() < 0.3 and (files := self._regular_files()):
            return sorted(random.sample(files, random.randrange(1, len(files) + 1))) + kept
        return [str(self._top), *kept]

    def attacks(self, random: Random) -> list[list[Attack]]:
        """At most one for each file, so that the three who attack do not meet."""
        attacks = [
            (random.choice(writers.FILE_WRITERS).__name__, path, random.random())
            for path in self._regular_files()
            if random.random() < 0.7
        ]
        random.shuffle(attacks)
        return [attacks[actor::3] for actor in range(3)]

    def attack_what_is_kept(self, random: Random) -> None:
        """Through a descriptor and a mapping that were there before the call."""
        self._log.write(writers.content(random, 300))
        self._mapped[random.randrange(len(self._mapped))] = random.randrange(256)

    def close(self) -> None:
        self._log.close()
        self._mapped.close()

    def _regular_files(self) -> list[str]:
        return [str(path) for path in sorted(self._top.iterdir()) if path.is_file() and not path.is_symlink()]


def _save(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _save_by_renaming(path: Path, data: bytes) -> None:
    path.with_name("saving").write_bytes(data)
    path.with_name("saving").replace(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


class Tree:
    """Many small files in directories; one actor a round: changes of names get in each other's way."""

    def __init__(self, plan: Plan) -> None:
        self._top = Path("tree")
        self._count = plan.tree_files
        random = Random(plan.seed)
        for number in range(plan.tree_files):
            directory = self._top / f"{number // 50:03d}" / f"{number // 10 % 5}"
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{number:05d}.py").write_bytes(writers.content(random, random.randrange(9000)))

    def prepare(self, random: Random) -> None:
        for _ in range(random.choice([0, 0, 1, 10])):
            random.choice(writers.TREE_WRITERS)(self._top, random)
        if len(writers.files_below(self._top)) < self._count // 2:
            for number in range(self._count // 2):
                (self._top / f"more-{random.random()}-{number}").write_bytes(writers.content(random, 500))

    def paths(self, random: Random, rung: str) -> list[str]:
        return [str(self._top)]

    def attacks(self, random: Random) -> list[list[Attack]]:
        attacks = [
            (random.choice(writers.TREE_WRITERS).__name__, str(self._top), random.random())
            for _ in range(random.choice([0, 1, 1, 5]))
        ]
        actor = random.randrange(3)
        return [attacks if number == actor else [] for number in range(3)]

    def attack_what_is_kept(self, random: Random) -> None:
        """Nothing is."""

    def close(self) -> None:
        """Nothing is open."""


class Steps:
    """What most scripts do: new files for each checkpoint, which nobody touches again."""

    def __init__(self, plan: Plan) -> None:
        self._sizes = plan.sizes
        self._top = Path("step")

    def prepare(self, random: Random) -> None:
        self._top = Path(f"step-{random.random()}")
        self._top.mkdir()
        for number, size in enumerate(self._sizes):
            (self._top / f"{number}").write_bytes(writers.content(random, size))

    def paths(self, random: Random, rung: str) -> list[str]:
        return [str(self._top)]

    def attacks(self, random: Random) -> list[list[Attack]]:
        return [[], [], []]

    def attack_what_is_kept(self, random: Random) -> None:
        """Nothing is."""

    def close(self) -> None:
        """Nothing is open."""


WORKLOADS = {"files": Files, "tree": Tree, "steps": Steps}


def train(plan: Plan, chronicle: Chronicle) -> None:
    actors = Actors()  # forked while this process has one thread
    home = Path(os.environ["REPLICATE_HOME"])
    killer = Killer(plan.kills, plan.kill_chance, home, chronicle)
    trouble = Trouble(plan.trouble, home, Path(os.environ["REPLICATE_REPOSITORY"].removeprefix("file://")))
    workload = WORKLOADS[plan.workload](plan)
    experiment = replicate.init(quiet=True)
    chronicle.write("begun", experiment=experiment.id, plan=dataclasses.asdict(plan))
    for step in range(plan.rounds):
        random = Random(f"{plan.seed}/{step}")
        rung = os.environ["REPLICATE_CAPTURE_RUNG"] = plan.rungs[step % len(plan.rungs)]
        workload.prepare(random)
        paths = workload.paths(random, rung)
        attacks = workload.attacks(random)
        expected = describe(Path(), paths)
        has_content = any(kind == "file" and size for kind, _, _, size, _ in expected.values())
        chronicle.write(
            "called",
            step=step,
            rung=rung,
            must_fail=f"there is no {rung} here" if rung in plan.impossible and has_content else "",
            paths=paths,
            attacks=attacks,
            expected=expected,
        )
        actors.arm(*attacks[:2])
        if step == 1:
            trouble.begin()
        killer.arm(random, step)
        checkpoint = experiment.checkpoint(path=paths, step=step, quiet=True)
        actors.release()
        workload.attack_what_is_kept(random)
        perform(attacks[2])
        chronicle.write(
            "returned", step=step, id=checkpoint.id, state=checkpoint.state, error=checkpoint.error
        )
        trouble.go_on()
        actors.join()
    killer.join()
    trouble.end()
    actors.close()
    workload.close()
    chronicle.write("finished")


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    train(Plan(**fields), Chronicle(Path(sys.argv[2])))
