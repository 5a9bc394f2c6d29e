"""Machines that save, remove, merge and collect the real way, stopped between any two requests."""

import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from collecting.stepping import Gate, Killed, SteppedStore, Task
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replicate.errors import RepositoryUnreachable
from replicate.ids import ExperimentId, SnapshotId
from replicate.records import ExperimentRecord, utc_now
from replicated.collecting import collect
from replicated.compaction import IndexChanged, merge
from replicated.format.manifest import TreeEntry
from replicated.publishing import publish_experiment
from replicated.repository import Repository
from replicated.store.base import Capabilities
from replicated.store.memory import MemoryStore
from replicated.tree import open_tree

MACHINES = 3
#: Few, so that what one removes is just what another one saves.
CONTENTS = [bytes([number]) * 100 for number in range(2)]
TRIES = 20


@dataclass
class Machine:
    repository: Repository
    gate: Gate
    task: Task | None = None


class Machines(RuleBasedStateMachine):
    @initialize(costly=st.booleans())
    def begin(self, costly: bool) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rpl-machines-"))
        self.store = MemoryStore()
        self.capabilities = Capabilities(is_near=True, has_costly_requests=costly, parallel_requests=1)
        self.saved: dict[str, frozenset[bytes]] = {}
        self.count = 0
        self.machines = [self.open(number) for number in range(MACHINES)]
        # All know packs with what they are going to save, and nothing needs these packs.
        for content in CONTENTS:
            self.save(0, {content})
            self.finish(0)
        for machine in self.machines:
            machine.repository.index.refresh()
        for identifier in self.committed():
            self.machines[0].repository.delete_experiment(ExperimentId(identifier))

    def open(self, number: int) -> Machine:
        gate = Gate()
        store = SteppedStore(self.store, gate, self.capabilities)
        cache = self.directory / str(number)
        return Machine(Repository.open_on(store, cache=cache, create=True, memory_bytes=0), gate)

    def idle(self, number: int) -> Machine | None:
        machine = self.machines[number]
        return machine if machine.task is None else None

    @rule(number=st.integers(0, MACHINES - 1), contents=st.sets(st.sampled_from(CONTENTS), min_size=1))
    def save(self, number: int, contents: set[bytes]) -> None:
        if (machine := self.idle(number)) is None:
            return
        self.count += 1
        identifier = f"{self.count:064x}"
        self.saved[identifier] = frozenset(contents)
        machine.task = Task(machine.gate, lambda: save(machine.repository, identifier, contents))

    @rule(number=st.integers(0, MACHINES - 1))
    def collect(self, number: int) -> None:
        if (machine := self.idle(number)) is not None:
            machine.task = Task(machine.gate, lambda: gc(machine.repository))

    @rule(number=st.integers(0, MACHINES - 1))
    def collect_at_once(self, number: int) -> None:
        if self.idle(number) is not None:
            self.collect(number)
            self.finish(number)

    @rule(number=st.integers(0, MACHINES - 1))
    def merge(self, number: int) -> None:
        if (machine := self.idle(number)) is not None:
            machine.task = Task(machine.gate, lambda: compact(machine.repository))

    @rule(number=st.integers(0, MACHINES - 1), calls=st.integers(1, 12))
    def go_on(self, number: int, calls: int) -> None:
        machine = self.machines[number]
        if machine.task is not None:
            for _ in range(calls):
                machine.task.step()
            self.settle(machine)

    @rule(number=st.integers(0, MACHINES - 1))
    def finish(self, number: int) -> None:
        machine = self.machines[number]
        if machine.task is not None:
            machine.task.finish()
            self.settle(machine)

    @rule(number=st.integers(0, MACHINES - 1))
    def kill(self, number: int) -> None:
        machine = self.machines[number]
        if machine.task is not None:
            machine.task.finish(killing=True)
            self.settle(machine)

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """By a machine of its own, in one go."""
        committed = self.committed()
        if committed:
            identifier = data.draw(st.sampled_from(committed))
            remover = self.open(MACHINES)
            remover.repository.delete_experiment(ExperimentId(identifier))
            remover.repository.close()

    def start(self, what: str, number: int) -> None:
        if what == "save":
            self.save(number, set(CONTENTS))
        elif what == "collect":
            self.collect(number)
        else:
            self.merge(number)

    def committed(self) -> list[str]:
        return sorted(name for name in self.saved if self.store.exists(f"experiments/{name}.json"))

    def settle(self, machine: Machine) -> None:
        if machine.task is not None and machine.task.is_over:
            machine.task.finish()
            error = machine.task.error
            machine.task = None
            if error is not None and not isinstance(error, (Killed, IndexChanged, RepositoryUnreachable)):
                raise error

    @invariant()
    def all_that_is_committed_can_be_read(self) -> None:
        if not hasattr(self, "machines"):
            return
        cold = self.directory / "cold"
        readers = [Repository.open_on(self.store, cache=cold, create=False, memory_bytes=0)]
        readers += [machine.repository for machine in self.machines if machine.task is None]
        for reader in readers:
            for identifier in self.committed():
                tree = open_tree(reader, SnapshotId(identifier))
                found = {
                    tree.reader(node).pread(0, node.size) for _, node in tree.walk() if node.type == "file"
                }
                assert found == self.saved[identifier]
        readers[0].close()
        shutil.rmtree(cold)

    def teardown(self) -> None:
        if not hasattr(self, "machines"):
            return
        for machine in self.machines:
            if machine.task is not None:
                machine.task.finish()
                self.settle(machine)
        self.all_that_is_committed_can_be_read()
        last = self.open(MACHINES + 1)
        report = collect(last.repository, unlisted_age_s=-1.0)
        assert report.kept_packs == len(list(self.store.list("packs/")))
        self.all_that_is_committed_can_be_read()
        for machine in [*self.machines, last]:
            machine.repository.close()
        shutil.rmtree(self.directory)


def save(repository: Repository, identifier: str, contents: set[bytes]) -> None:
    """As a worker does it: store, announce, look, and again as long as something is going."""
    record = ExperimentRecord(ExperimentId(identifier), utc_now())
    for _ in range(TRIES):
        with repository.writer() as writer:
            generation = repository.index.generation
            entries = [
                TreeEntry(b"%d" % content[0], "file", 0o644, 0, writer.add_file(content))
                for content in sorted(contents)
            ]
            root = writer.add_tree(entries)
            writer.finish()
        publication = publish_experiment(record, root)
        repository.publisher.announce(publication)
        if repository.publisher.settle(publication, generation):
            repository.publisher.commit(publication)
            return
    raise AssertionError("never settled")


def gc(repository: Repository) -> None:
    collect(repository, unlisted_age_s=-1.0)


def compact(repository: Repository) -> None:
    names = sorted(repository.log.list().index)
    if len(names) > 1:
        with suppress(IndexChanged):
            merge(repository.store, repository.log, names, repository.index.list_gone())


TestMachines = Machines.TestCase
TestMachines.settings = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("costly", [False, True], ids=["local", "bucket"])
@pytest.mark.parametrize(
    ("interrupted", "other"),
    [
        ("save", "collect"),
        ("collect", "save"),
        ("collect", "collect"),
        ("merge", "collect"),
        ("collect", "merge"),
    ],
)
def test_one_thing_in_the_middle_of_another_at_every_request(
    interrupted: str, other: str, costly: bool
) -> None:
    """What a machine does is interrupted after each of its requests by all of what another one does."""
    calls = 0
    while True:
        world = Machines()
        world.begin(costly)
        world.save(2, {CONTENTS[0]})
        world.finish(2)
        world.start(interrupted, 0)
        world.go_on(0, calls)
        is_over = world.machines[0].task is None
        world.start(other, 1)
        world.finish(1)
        world.all_that_is_committed_can_be_read()
        # A third one sees what is left of both.
        world.collect_at_once(2)
        world.finish(0)
        world.teardown()
        if is_over:
            return
        calls += 1
