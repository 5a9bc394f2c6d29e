"""Machines that write, read and collect in one repository, and what must be restorable at each moment.

A `Fleet` is a model of the repository and the machines that act on it. Contents are drawn from a small pool,
so that snapshots of different machines share chunks all the time, and what is removed by one is wanted by
another. A machine that was killed begins again as a daemon would: with its cache or without, and with the
checkpoint that it was about to save, or without.
"""

import dataclasses
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from random import Random
from typing import NamedTuple

from rig.turns import Killed

from replicate.errors import NotFound, NotStored, ReplicateError, RepositoryDamaged, RepositoryUnreachable
from replicate.ids import CheckpointId, ExperimentId, SnapshotId
from replicate.records import CheckpointRecord, ExperimentRecord, utc_now
from replicated.collecting import collect
from replicated.format.manifest import RootNode, TreeEntry
from replicated.keys import snapshot_of
from replicated.publishing import publish_checkpoint, publish_experiment
from replicated.repository import Repository
from replicated.store.base import Store
from replicated.tree import open_tree
from replicated.upkeep import keep_up

Files = Mapping[str, bytes]


class Wrong(Exception):
    """The repository is not what the model says."""


class Snapshot(NamedTuple):
    experiment: str
    #: Empty: of the experiment itself.
    checkpoint: str

    @property
    def id(self) -> SnapshotId:
        return snapshot_of(self.experiment, self.checkpoint)


@dataclasses.dataclass
class Model:
    """What was tried, done and undone, by whomever. Thread-safe."""

    #: Everything that anybody began to save.
    files: dict[Snapshot, Files] = dataclasses.field(default_factory=dict)
    #: What was said to be stored.
    stored: set[Snapshot] = dataclasses.field(default_factory=set)
    #: What somebody began to remove, and what was said to be removed.
    removing: set[Snapshot] = dataclasses.field(default_factory=set)
    removed: set[Snapshot] = dataclasses.field(default_factory=set)
    happened: Counter[str] = dataclasses.field(default_factory=Counter)
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)

    @property
    def restorable(self) -> list[Snapshot]:
        """What must be there now."""
        with self.lock:
            return sorted(self.stored - self.removing)


def save(repository: Repository, snapshot: Snapshot, record: object, files: Files) -> None:
    """Store files and publish the record, as the daemon does."""
    while True:
        generation = repository.index.generation
        root = _store_files(repository, files)
        if snapshot.checkpoint:
            publication = publish_checkpoint(record, root)
        else:
            publication = publish_experiment(record, root)
        repository.publisher.announce(publication)
        if repository.publisher.settle(publication, generation):
            break
    repository.publisher.commit(publication)


def _store_files(repository: Repository, files: Files) -> RootNode:
    with repository.writer() as writer:
        entries = [
            TreeEntry(path.encode(), "file", 0o644, 0, writer.add_file(data))
            for path, data in sorted(files.items())
        ]
        root = writer.add_tree(entries)
        writer.finish()
    return root


def load(repository: Repository, snapshot: Snapshot) -> Files:
    tree = open_tree(repository, snapshot.id)
    return {
        path.decode(): tree.reader(node).pread(0, node.size)
        for path, node in tree.walk()
        if node.type == "file"
    }


class Machine:
    """One of the fleet: what it does until it is told to stop; killed, it begins again."""

    def __init__(self, fleet: "Fleet", name: str, seed: str) -> None:
        self.fleet = fleet
        self.name = name
        self.random = Random(seed)
        self.lives = 0
        self._ids = (f"{self.random.getrandbits(256):064x}" for _ in itertools.count())

    def run(self) -> None:
        """Until the fleet rests, one life after the other."""
        while True:
            self.lives += 1
            try:
                with closing(self._open()) as repository:
                    while not self.fleet.is_resting:
                        self.act(repository)
                return
            except Killed:
                if self.fleet.is_stopped:
                    return
            except RepositoryUnreachable:
                if not self.fleet.has_faults:
                    raise

    def new_id(self) -> str:
        return next(self._ids)

    def act(self, repository: Repository) -> None:
        """Do one thing."""
        raise NotImplementedError

    def check(self, repository: Repository, snapshot: Snapshot) -> None:
        """Read a snapshot, which is right, or was removed."""
        model = self.fleet.model
        with model.lock:
            must = snapshot in model.stored and snapshot not in model.removing
            must_not = snapshot in model.removed
        try:
            files = load(repository, snapshot)
        except RepositoryUnreachable:
            if not self.fleet.has_faults:
                raise
            return
        except ReplicateError as error:
            if not isinstance(error, (NotFound, NotStored)) and snapshot not in model.removing:
                raise Wrong(f"{self.name}: {snapshot} cannot be read: {error}") from error
            if must and snapshot not in model.removing:
                raise Wrong(f"{self.name}: {snapshot} is lost: {error}") from error
            return
        if files != model.files[snapshot]:
            raise Wrong(f"{self.name}: {snapshot} has other files")
        if must_not:
            raise Wrong(f"{self.name}: {snapshot} is still there, though it was removed")
        model.happened["read"] += 1

    def _open(self) -> Repository:
        cache = self.fleet.directory / self.name
        if self.random.random() < 0.3:
            cache = cache.with_name(f"{self.name}-{self.lives}")
        store = self.fleet.make_store(self.name)
        return Repository.open_on(store, cache=cache, create=True)


class Writer(Machine):
    """Saves, removes, and reads what anybody saved."""

    def __init__(self, fleet: "Fleet", name: str, seed: str) -> None:
        super().__init__(fleet, name, seed)
        self._experiment = ""
        #: What a death has left undone.
        self._pending: Callable[[Repository], None] | None = None

    def act(self, repository: Repository) -> None:
        pending, chance = self._pending, self.random.random()
        if pending is not None and chance < 0.9:
            pending(repository)
        elif not self._experiment or chance < 0.03:
            self._save(repository, is_experiment=True)
        elif chance < 0.7:
            self._save(repository, is_experiment=False)
        elif chance < 0.9:
            self._remove(repository)
        elif found := self.fleet.model.restorable:
            self.check(repository, self.random.choice(found))
        self._pending = None

    def _save(self, repository: Repository, *, is_experiment: bool) -> None:
        model = self.fleet.model
        if is_experiment:
            snapshot = Snapshot(self.new_id(), "")
            record = ExperimentRecord(ExperimentId(snapshot.experiment), utc_now())
        else:
            snapshot = Snapshot(self._experiment, self.new_id())
            record = CheckpointRecord(
                CheckpointId(snapshot.checkpoint),
                ExperimentId(self._experiment),
                utc_now(),
                0,
                state="stored",
            )
        files = self.fleet.draw_files(self.random)
        with model.lock:
            model.files[snapshot] = files

        def finish(repository: Repository) -> None:
            if snapshot in model.removed:
                return
            save(repository, snapshot, record, files)
            with model.lock:
                model.stored.add(snapshot)
                model.happened["saved"] += 1
            # As the journal has it: from here on nobody stores it again, whatever happens.
            self._pending = None
            if is_experiment:
                self._experiment = snapshot.experiment
            keep_up(repository)

        self._pending = finish
        finish(repository)

    def _remove(self, repository: Repository) -> None:
        model = self.fleet.model
        with model.lock:
            found = [one for one in model.restorable if one.checkpoint]
            if not found:
                return
            snapshot = self.random.choice(found)
            model.removing.add(snapshot)

        def finish(repository: Repository) -> None:
            repository.delete_checkpoint(ExperimentId(snapshot.experiment), CheckpointId(snapshot.checkpoint))
            with model.lock:
                model.removed.add(snapshot)
                model.happened["removed"] += 1

        self._pending = finish
        finish(repository)


class Reader(Machine):
    """Reads what must be there, and what it finds."""

    def act(self, repository: Repository) -> None:
        model = self.fleet.model
        must = model.restorable
        if must and self.random.random() < 0.7:
            self.check(repository, self.random.choice(must))
            return
        found = repository.list_snapshot_ids()
        known = {snapshot.id: snapshot for snapshot in list(model.files)}
        if not found:
            return
        chosen = self.random.choice(sorted(found))
        if chosen not in known:
            raise Wrong(f"{self.name}: nobody saved {chosen}")
        self.check(repository, known[chosen])


class Collector(Machine):
    """Frees what nothing references, again and again, also what may belong to an upload."""

    def act(self, repository: Repository) -> None:
        try:
            report = collect(repository, unlisted_age_s=self.random.choice([0, 1e9]))
        except RepositoryDamaged:
            # It had listed what was removed meanwhile, and the other collector was faster. Whether anything
            # is damaged, readers find out.
            self.fleet.model.happened["collections given up"] += 1
            return
        with self.fleet.model.lock:
            self.fleet.model.happened["collections"] += 1
            self.fleet.model.happened["packs collected"] += report.packs


class Fleet:
    """The machines, their surroundings and what must be restorable."""

    def __init__(
        self,
        directory: Path,
        seed: int,
        make_store: Callable[[str], Store],
        *,
        has_faults: bool,
    ) -> None:
        self.directory = directory
        self.make_store = make_store
        self.has_faults = has_faults
        self.model = Model()
        #: Whoever has finished what it does begins nothing more.
        self.is_resting = False
        #: Whoever waits for a turn is dead.
        self.is_stopped = False
        random = Random(f"{seed} pool")
        self._pool = [random.randbytes(random.choice([10, 3000, 40_000])) for _ in range(24)]
        names = [(Writer, f"writer-{number}") for number in range(3)]
        names += [(Reader, f"reader-{number}") for number in range(2)]
        names += [(Collector, f"collector-{number}") for number in range(2)]
        self.machines = [kind(self, name, f"{seed} {name}") for kind, name in names]
        self.failures: list[BaseException] = []

    def draw_files(self, random: Random) -> Files:
        return {f"f{number}": random.choice(self._pool) for number in range(random.randint(1, 5))}

    def start(self, join: Callable[[str], None], leave: Callable[[str], None]) -> list[threading.Thread]:
        """Let every machine act in a thread of its own; `join` and `leave` are told of each."""

        def work(machine: Machine) -> None:
            try:
                machine.run()
            except BaseException as error:
                self.failures.append(error)
            finally:
                leave(machine.name)

        threads = [threading.Thread(target=work, args=(machine,)) for machine in self.machines]
        for machine in self.machines:
            join(machine.name)
        for thread in threads:
            thread.start()
        return threads

    def judge(self, store: Store) -> None:
        """Hold the repository against the model, for somebody who has never seen it."""
        if self.failures:
            raise self.failures[0]
        with closing(Repository.open_on(store, cache=self.directory / "judge", create=False)) as repository:
            found = set(repository.list_snapshot_ids())
            model = self.model
            lost = [one for one in model.restorable if one.id not in found]
            if lost:
                raise Wrong(f"not listed, though they were stored: {lost}")
            risen = [one for one in model.removed if one.id in found]
            if risen:
                raise Wrong(f"listed, though they were removed: {risen}")
            known = {snapshot.id: snapshot for snapshot in model.files}
            for identifier in sorted(found):
                if load(repository, known[identifier]) != model.files[known[identifier]]:
                    raise Wrong(f"{identifier} has other files")
