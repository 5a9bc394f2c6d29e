"""Who publishes and who collects at the same moment: whatever comes in between, nothing is lost."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from collecting.conftest import Open, gc, pack_keys, remove
from repository.conftest import Save

from replicate.ids import CheckpointId, ExperimentId, new_id
from replicate.records import CheckpointRecord, ExperimentRecord, utc_now
from replicated.collecting.collector import Collection
from replicated.format.condemned import Condemned
from replicated.format.manifest import RootNode, TreeEntry
from replicated.format.metadata import Snapshot
from replicated.format.shards import Shard, encode_shard
from replicated.keys import INDEX_PREFIX, PACK_PREFIX, Announced, experiment_key
from replicated.publishing import Publication, publish_checkpoint, publish_experiment
from replicated.record_merging import merge_announced
from replicated.references import iter_chunks
from replicated.repository import Repository
from replicated.store.base import Buffer, Capabilities, ObjectInfo
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


class Bucket(Interrupted):
    """Where requests cost, records that are old enough are read once."""

    #: What is already there is so much older.
    aged_s = 0.0

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, has_costly_requests=True)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for info in super().list(prefix):
            yield replace(info, age_s=(info.age_s or 0.0) + self.aged_s)


def new_shard(experiment_id: str, checkpoint_id: str, root: RootNode) -> Publication:
    shard = Shard(ExperimentId(experiment_id), CheckpointId(checkpoint_id), 1, 2, ("f",), root, "", None)
    return Publication(Announced("shard", experiment_id, checkpoint_id, 1), encode_shard(shard))


@pytest.mark.parametrize("is_put", ["not yet", "announced", "wholly"])
@pytest.mark.parametrize("kind", ["shard", "experiment"])
@pytest.mark.parametrize("bucket", [Interrupted, Bucket])
def test_what_is_put_anew_under_the_same_key_is_read_again(
    tmp_path: Path, save: Save, bucket: type[Interrupted], kind: str, is_put: str
) -> None:
    """A job that was started again puts its shard under the key of that of its last start."""
    store = bucket()
    machines = [opened(store, tmp_path / name) for name in ("writer", "collector", "reader")]
    writer, collector, reader = map(next, machines)
    _, old = put_files(writer, {"f": b"1" * len(BIG)})
    remove(writer, save(writer, {"f": BIG}))
    identifier = ExperimentId(new_id())
    started = utc_now()
    writer.put_experiment(ExperimentRecord(ExperimentId(new_id()), started))

    def publication(root: RootNode) -> Publication:
        if kind == "shard":
            return new_shard(identifier, identifier, root)
        return publish_experiment(ExperimentRecord(identifier, started), root)

    writer.publisher.publish(publication(old))
    collection = Collection(collector)
    collection.plan()
    generation, root = put_files(writer, {"f": BIG})
    # It relies on what nothing else needs.
    anew = publication(root)
    if is_put != "not yet":
        writer.publisher.announce(anew)
        assert writer.publisher.settle(anew, generation)
    if is_put == "wholly":
        store.delete(anew.announced.record_key)
        writer.publisher.commit(anew)
    collection.execute()
    assert (collection.report.packs > 0) == (is_put == "not yet")
    if is_put == "announced":
        store.delete(anew.announced.record_key)
        writer.publisher.commit(anew)
    if is_put != "not yet":
        check_whole(reader, root)
    for machine in machines:
        machine.close()


def test_in_a_bucket_old_records_are_read_once(tmp_path: Path, save: Save) -> None:
    store = Bucket()
    store.aged_s = 3600.0
    machines = [opened(store, tmp_path / name) for name in ("writer", "collector")]
    writer, collector = map(next, machines)
    kept = save(writer, {"f": b"1"})
    remove(writer, save(writer, {"f": BIG}))
    collection = Collection(collector)
    collection.plan()
    read: list[str] = []
    get = store.get
    store.get = lambda key, *args: read.append(key) or get(key, *args)  # type: ignore[method-assign, func-returns-value, assignment]
    collection.execute()
    assert collection.report.packs > 0
    assert read and experiment_key(kept.id) not in read
    for machine in machines:
        machine.close()


def new_checkpoint(experiment_id: str, root: RootNode) -> Publication:
    return publish_checkpoint(
        CheckpointRecord(
            CheckpointId(new_id()),
            ExperimentId(experiment_id),
            utc_now(),
            step=1,
            paths=("w",),
            state="stored",
        ),
        root,
    )


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("removed", ["experiment", "checkpoint"])
def test_what_is_put_after_it_was_removed_keeps_nothing_and_stops_nobody(
    tmp_path: Path, removed: str, is_merged: bool
) -> None:
    """Removed by another machine while it was stored; nobody shows it."""
    store = Bucket()
    machines = [opened(store, tmp_path / name) for name in ("writer", "collector", "later")]
    writer, collector, later = map(next, machines)
    experiment_id = ExperimentId(new_id())
    writer.put_experiment(ExperimentRecord(experiment_id, utc_now()))
    _, root = put_files(writer, {"w": BIG})
    publication = new_checkpoint(experiment_id, root)
    writer.publisher.announce(publication)
    if removed == "experiment":
        collector.delete_experiment(experiment_id)
    else:
        collector.delete_checkpoint(experiment_id, CheckpointId(publication.announced.id))
    # As if it were frozen after it has made sure that all is there.
    writer.publisher.announce(publication)
    if is_merged:
        merge_announced(collector, collector.log.list())
        assert not any(item.kind == "removal" for item in collector.log.list().new)
    store.put(publication.announced.record_key, [publication.data])
    report = gc(collector)
    assert report.packs > 0 and report.announced == 0 and not pack_keys(store)
    assert gc(later).packs == 0
    for machine in machines:
        machine.close()


@pytest.mark.parametrize("is_old", [False, True])
def test_checkpoint_whose_experiment_is_gone_keeps_nothing_after_a_day(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_old: bool
) -> None:
    store = Bucket()
    machines = [opened(store, tmp_path / name) for name in ("writer", "collector", "later")]
    writer, collector, later = map(next, machines)
    _, root = put_files(writer, {"w": BIG})
    publication = new_checkpoint(new_id(), root)
    store.put(publication.announced.record_key, [publication.data])
    store.aged_s = 25 * 3600.0 if is_old else 0.0
    report = gc(collector)
    assert (report.packs > 0) == is_old
    assert (f"{publication.announced.record_key} in" in caplog.text) == is_old
    assert gc(later).packs == 0
    for machine in machines:
        machine.close()
