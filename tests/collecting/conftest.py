"""A repository in memory, and collectors of it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from repository.conftest import load, save

from replicate.ids import CheckpointId, ExperimentId, new_id
from replicated.collecting import CollectReport, collect
from replicated.format.metadata import Snapshot
from replicated.keys import PACK_PREFIX
from replicated.repository import Repository
from replicated.store.memory import MemoryStore

__all__ = ["load", "save"]

Open = Callable[[], Repository]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def open_repository(store: MemoryStore, tmp_path: Path) -> Iterator[Open]:
    """Opens the repository as another machine each time."""
    opened: list[Repository] = []

    def open_one() -> Repository:
        cache = tmp_path / f"cache{len(opened)}"
        opened.append(Repository.open_on(store, cache=cache, create=True))
        return opened[-1]

    yield open_one
    for repository in opened:
        repository.close()


@pytest.fixture
def repository(open_repository: Open) -> Repository:
    return open_repository()


def remove(repository: Repository, snapshot: Snapshot) -> None:
    repository.delete_experiment(ExperimentId(snapshot.id))


def pack_keys(store: MemoryStore) -> set[str]:
    return {info.key for info in store.list(PACK_PREFIX)}


def all_objects(store: MemoryStore) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list("")}


def gc(repository: Repository, **options: object) -> CollectReport:
    return collect(repository, **options)  # type: ignore[arg-type]


def new_checkpoint_id() -> CheckpointId:
    return CheckpointId(new_id())
