"""Who publishes and who collects at the same moment: whatever comes in between, nothing is lost."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from collecting.conftest import Open, gc, remove
from repository.conftest import Save

from replicate.ids import ExperimentId, new_id
from replicate.records import ExperimentRecord, utc_now
from replicated.collecting.collector import Collection
from replicated.format.condemned import Condemned
from replicated.format.manifest import RootNode, TreeEntry
from replicated.format.metadata import Snapshot
from replicated.keys import INDEX_PREFIX, PACK_PREFIX
from replicated.publishing import Publication, publish_experiment
from replicated.references import iter_chunks
from replicated.repository import Repository
from replicated.store.base import Buffer
from replicated.store.memory import MemoryStore

BIG = b"".join(b"%d," % number for number in range(20_000))


class Interrupted(MemoryStore):
    """Does something once, right after an object below a prefix was put."""

    def __init__(self) -> None:
        super().__init__()
        self._prefix = ""
        self._action: Callable[[], None] | None = None

    def interrupt_after(self, prefix: str, action: Callable[[], None]) -> None:
        self._prefix, self._action = prefix, action

    def put(
        self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
    ) -> None:
        super().put(key, parts, is_unique=is_unique, is_checked=is_checked)
        if self._action is not None and key.startswith(self._prefix):
            action, self._action = self._action, None
            action()


class Held(Collection):
    """A collection that is frozen before it says which packs really go."""

    _is_held = True

    def go_on(self) -> None:
        self._is_held = False
        if self._final is not None:
            self._condemn(self._final)
            self._drop(self._final.packs)

    def __init__(self, repository: Repository) -> None:
        super().__init__(repository)
        self._final: Condemned | None = None

    def _condemn(self, condemned: Condemned) -> None:
        if condemned.is_final and self._is_held:
            self._final = condemned
        else:
            super()._condemn(condemned)

    def _drop(self, packs: object) -> None:
        if not self._is_held:
            super()._drop(packs)  # type: ignore[arg-type]


@pytest.fixture
def store() -> Interrupted:
    return Interrupted()


@pytest.fixture
def daemon(store: MemoryStore, tmp_path: Path) -> Iterator[Repository]:
    yield from opened(store, tmp_path / "home")


@pytest.fixture
def process(store: MemoryStore, tmp_path: Path, daemon: Repository) -> Iterator[Repository]:
    """Another process of the home in which the daemon is."""
    daemon.index.refresh()
    yield from opened(store, tmp_path / "home")


def opened(store: MemoryStore, cache: Path) -> Iterator[Repository]:
    repository = Repository.open_on(store, cache=cache, create=True)
    yield repository
    repository.close()


def put_files(repository: Repository, files: dict[str, bytes]) -> tuple[int, RootNode]:
    """Store files; the generation at the beginning, and the root."""
    with repository.writer() as writer:
        generation = repository.index.generation
        entries: dict[bytes, TreeEntry] = {}
        for path, content in files.items():
            directory = path.rpartition("/")[0].encode()
            if directory:
                entries[directory] = TreeEntry(directory, "directory", 0o755, 0)
            name = path.encode()
            entries[name] = TreeEntry(name, "file", 0o644, 0, writer.add_file(content))
        root = writer.add_tree(sorted(entries.values(), key=lambda entry: entry.path.split(b"/")))
        writer.finish()
    return generation, root


def new_publication(root: RootNode) -> Publication:
    return publish_experiment(ExperimentRecord(ExperimentId(new_id()), utc_now()), root)


def check_whole(repository: Repository, root: RootNode) -> None:
    repository.index.refresh()
    for chunk in iter_chunks(repository, Snapshot(new_id(), root)):  # type: ignore[arg-type]
        repository.read_chunk(chunk.id)


@pytest.mark.parametrize("is_final", [False, True])
@pytest.mark.parametrize("prefix", [PACK_PREFIX, INDEX_PREFIX])
def test_own_packs_that_are_condemned_before_they_are_known_here_are_stored_again(
    store: Interrupted,
    daemon: Repository,
    process: Repository,
    open_repository: Open,
    prefix: str,
    is_final: bool,
) -> None:
    """A machine that slept for a day in an upload; what it has put was collected meanwhile."""
    collector = open_repository()
    held = Held(collector)
    files = {"a/x": BIG, "b": b"hello" * 100}

    def collect_meanwhile() -> None:
        if is_final:
            assert gc(collector, unlisted_age_s=-1).packs > 0
        else:
            held._unlisted_age_s = -1
            held.plan()
            held.execute()
        # The daemon takes in that they are condemned before the process says that it has put them.
        daemon.index.refresh()

    store.interrupt_after(prefix, collect_meanwhile)
    generation, root = put_files(process, files)
    publication = new_publication(root)
    daemon.publisher.announce(publication)
    assert not daemon.publisher.settle(publication, generation)
    generation, again = put_files(process, files)
    assert again == root
    daemon.publisher.announce(publication)
    assert daemon.publisher.settle(publication, generation)
    daemon.publisher.commit(publication)
    if not is_final:
        held.go_on()
    for reader in (daemon, process, open_repository()):
        check_whole(reader, root)
    assert gc(collector).packs == 0


def test_what_an_announced_tree_lacked_at_first_is_looked_at_again(
    repository: Repository, open_repository: Open, save: Save
) -> None:
    """Its writer has stored it again between the two looks of a collector."""
    first, second = open_repository(), open_repository()
    kept = save(repository, {"other/y": BIG})
    gone = save(repository, {"d/x": BIG})
    remove(repository, gone)
    collection = Collection(first)
    collection.plan()
    files = {"d/x": BIG, "new": b"n" * 200}
    generation, root = put_files(repository, files)
    collection.execute()
    assert collection.report.packs == 1, "the node of d"
    remove(repository, kept)
    publication = new_publication(root)
    repository.publisher.announce(publication)
    collection = Collection(second)
    collection.plan()
    assert not repository.publisher.settle(publication, generation)
    generation, again = put_files(repository, files)
    assert again == root
    repository.publisher.announce(publication)
    assert repository.publisher.settle(publication, generation)
    collection.execute()
    repository.publisher.commit(publication)
    check_whole(open_repository(), root)
