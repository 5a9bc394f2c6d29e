"""Records and snapshots of a repository: written, listed, loaded, deleted."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from replicate.errors import (
    NotFound,
    NotStored,
    RepositoryDamaged,
    RepositoryIncompatible,
    RepositoryMissing,
)
from replicate.ids import CheckpointId, ExperimentId, SnapshotId, new_id
from replicate.records import CheckpointRecord, ExperimentRecord, utc_now
from replicated.chunk.codec import RAW, hash_chunk
from replicated.format.canonical import seal, unseal
from replicated.format.metadata import EndEdit, Heartbeat, LiveRun, ResumeEdit, Snapshot
from replicated.keys import snapshot_of
from replicated.references import iter_chunks
from replicated.repository import Repository
from replicated.store.memory import MemoryStore

TIME = datetime(2026, 11, 23, tzinfo=timezone.utc)

Save = Callable[[Repository, dict[str, bytes]], Snapshot]
Load = Callable[[Repository, SnapshotId], dict[str, bytes]]


def keys(repository: Repository) -> set[str]:
    return {info.key for info in repository.store.list("")}


def new_experiment() -> ExperimentRecord:
    return ExperimentRecord(ExperimentId(new_id()), TIME, params={"lr": 0.1})


def new_checkpoint(experiment: ExperimentRecord, step: int = 1) -> CheckpointRecord:
    return CheckpointRecord(CheckpointId(new_id()), experiment.id, TIME, step, state="stored")


# Opening


def test_repository_is_made_once_and_keeps_its_id(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/deep/er"
    with pytest.raises(RepositoryMissing):
        Repository.open(url, cache=tmp_path / "cache", create=False)
    made = Repository.open(url, cache=tmp_path / "cache", create=True)
    again = Repository.open(url, cache=tmp_path / "cache", create=True)
    opened = Repository.open(url, cache=tmp_path / "cache", create=False)
    assert made.id == again.id == opened.id
    assert made.url == url
    assert keys(made) == {"repository.json"}
    for repository in (made, again, opened):
        repository.close()
        repository.close()


def test_empty_directory_is_no_repository(tmp_path: Path) -> None:
    with pytest.raises(RepositoryMissing, match=r"no repository\.json"):
        Repository.open(f"file://{tmp_path}", cache=tmp_path / "cache", create=False)


def test_of_two_that_make_it_at_once_both_get_the_same(tmp_path: Path) -> None:
    class Racing(MemoryStore):
        """Another process makes the repository between our look and our write."""

        def put(self, key: str, parts: object, **how: bool) -> None:
            if not self.exists(key):
                super().put(key, [rival])
            super().put(key, parts, **how)  # type: ignore[arg-type]

    first = MemoryStore()
    other = Repository.open_on(first, cache=tmp_path, create=True)
    rival = first.get("repository.json")
    repository = Repository.open_on(Racing(), cache=tmp_path, create=True)
    assert repository.id == other.id
    repository.close()
    other.close()


def test_lost_settings_are_not_made_anew_over_existing_data(repository: Repository, tmp_path: Path) -> None:
    repository.put_experiment(new_experiment())
    repository.store.delete("repository.json")
    with pytest.raises(RepositoryDamaged, match=r"repository\.json is missing"):
        Repository.open(repository.url, cache=tmp_path / "cache", create=True)


@pytest.mark.parametrize("change", [{"format": 2}, {"features": ["future"]}])
def test_repository_of_a_later_version_is_left_alone(
    repository: Repository, tmp_path: Path, change: dict[str, object]
) -> None:
    members = unseal(repository.store.get("repository.json"))
    repository.store.replace("repository.json", seal({**members, **change}))
    with pytest.raises(RepositoryIncompatible, match="newer version") as caught:
        Repository.open(repository.url, cache=tmp_path / "cache", create=True)
    assert "upgrade" in caught.value.hint


def test_damaged_settings_are_named(repository: Repository, tmp_path: Path) -> None:
    repository.store.replace("repository.json", b"{}")
    with pytest.raises(RepositoryDamaged, match=r"repository\.json"):
        Repository.open(repository.url, cache=tmp_path / "cache", create=False)


# Records


def test_records_are_listed_and_loaded_as_they_were_put(repository: Repository) -> None:
    experiment, other = new_experiment(), new_experiment()
    checkpoints = [new_checkpoint(experiment, step) for step in (1, 2)]
    for _ in range(2):  # all of it may be repeated
        repository.put_experiment(experiment)
        repository.put_experiment(other)
        for checkpoint in checkpoints:
            repository.put_checkpoint(checkpoint)
    assert set(repository.list_experiment_ids()) == {experiment.id, other.id}
    assert set(repository.list_checkpoint_ids(experiment.id)) == {c.id for c in checkpoints}
    assert repository.list_checkpoint_ids(other.id) == []
    assert repository.load_experiment(experiment.id) == experiment
    assert repository.load_checkpoint(experiment.id, checkpoints[1].id) == checkpoints[1]


def test_edits_come_oldest_first_and_unknown_ones_are_passed_over(repository: Repository) -> None:
    experiment = new_experiment()
    ended, resumed = EndEdit("killed", TIME), ResumeEdit(TIME + timedelta(hours=1))
    ended_again = EndEdit("stopped", TIME + timedelta(hours=2))
    for edit in (ended_again, ended, resumed):
        repository.put_edit(experiment.id, new_id(), edit)
    unknown = new_id()
    repository.store.put(f"edits/{experiment.id}/{unknown}.json", [seal({"format": 1, "type": "later"})])
    assert repository.list_edits(experiment.id) == [ended, resumed, ended_again]
    assert unknown in repository.list_edit_ids(experiment.id)
    assert repository.load_edit(experiment.id, unknown) is None


def test_heartbeats_are_the_latest_of_each_daemon_that_can_be_read(repository: Repository) -> None:
    assert repository.list_heartbeats(60) == []
    runs = (LiveRun(new_experiment().id), LiveRun(new_experiment().id))
    first, second = new_id(), new_id()
    for number in range(3):
        heartbeat = Heartbeat(first, TIME + timedelta(seconds=number), "here", 10, runs)
        repository.put_heartbeat(heartbeat)
    repository.put_heartbeat(Heartbeat(second, TIME, "there", 60))
    found = {beat.daemon: beat for beat, _ in repository.list_heartbeats(60)}
    assert found == {first: heartbeat, second: Heartbeat(second, TIME, "there", 60)}
    repository.store.replace(f"heartbeats/{first}.json", b"half of")
    assert [beat.daemon for beat, _ in repository.list_heartbeats(60)] == [second]
    for daemon in (first, second, second):
        repository.delete_heartbeat(daemon)
    assert keys(repository) == {"repository.json"}


def test_what_is_absent_is_not_found(repository: Repository) -> None:
    experiment = new_experiment()
    with pytest.raises(NotFound, match=f"no experiment {experiment.id[:7]}"):
        repository.load_experiment(experiment.id)
    with pytest.raises(NotFound, match="no checkpoint"):
        repository.load_checkpoint(experiment.id, CheckpointId(new_id()))
    with pytest.raises(NotFound, match="no edit"):
        repository.load_edit(experiment.id, new_id())
    with pytest.raises(NotStored):
        repository.load_snapshot(SnapshotId(experiment.id))
    assert not repository.has_snapshot(SnapshotId(experiment.id))


def test_record_is_never_overwritten_by_another(repository: Repository) -> None:
    experiment = new_experiment()
    repository.put_experiment(experiment)
    with pytest.raises(RepositoryDamaged):
        repository.put_experiment(replace(experiment, name="other"))
    assert repository.load_experiment(experiment.id) == experiment


def test_record_under_the_key_of_another_is_damage(repository: Repository) -> None:
    experiment, other = new_experiment(), new_experiment()
    repository.put_experiment(experiment)
    data = repository.store.get(f"experiments/{experiment.id}.json")
    repository.store.put(f"experiments/{other.id}.json", [data])
    with pytest.raises(RepositoryDamaged, match="holds the record of"):
        repository.load_experiment(other.id)
    checkpoint = new_checkpoint(experiment)
    repository.put_checkpoint(checkpoint)
    data = repository.store.get(f"checkpoints/{experiment.id}/{checkpoint.id}.json")
    repository.store.put(f"checkpoints/{other.id}/{checkpoint.id}.json", [data])
    with pytest.raises(RepositoryDamaged):
        repository.load_checkpoint(other.id, checkpoint.id)


def test_foreign_files_among_the_records_are_passed_over(repository: Repository) -> None:
    repository.put_experiment(new_experiment())
    repository.store.put("experiments/notes.json", [b"mine"])
    repository.store.put("experiments/sub/" + "ab" * 32 + ".json", [b"mine"])
    assert len(repository.list_experiment_ids()) == 1


def test_objects_can_be_read_with_plain_tools(repository: Repository) -> None:
    experiment = new_experiment()
    repository.put_experiment(experiment)
    path = Path(repository.url.removeprefix("file://")) / "experiments" / f"{experiment.id}.json"
    assert json.loads(path.read_text("ascii"))["params"] == {"lr": 0.1}


# Snapshots


def test_snapshot_is_absent_until_it_is_put(repository: Repository, load: Load) -> None:
    snapshot_id = SnapshotId(new_id())
    with repository.writer() as writer:
        content = writer.add_file(b"data")
        root = writer.add_tree([])
        writer.finish()
    assert not repository.has_snapshot(snapshot_id)
    assert not any(key.startswith(("experiments/", "log/new/")) for key in keys(repository))
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot_id), utc_now()), root)
    assert repository.has_snapshot(snapshot_id)
    assert load(repository, snapshot_id) == {}
    assert content.size == 4


def test_deleted_checkpoint_and_experiment_leave_no_record(repository: Repository, save: Save) -> None:
    empty = keys(repository)
    snapshot = save(repository, {"a": b"1"})
    repository.delete_experiment(ExperimentId(snapshot.id))
    data = {key for key in keys(repository) if key.startswith(("packs/", "log/index/"))}
    experiment = new_experiment()
    repository.put_experiment(experiment, snapshot.root)
    checkpoints = [new_checkpoint(experiment) for _ in range(3)]
    for checkpoint in checkpoints:
        repository.put_checkpoint(checkpoint, snapshot.root)
    repository.put_edit(experiment.id, new_id(), EndEdit("stopped", TIME))
    for _ in range(2):
        repository.delete_checkpoint(experiment.id, checkpoints[0].id)
    assert set(repository.list_checkpoint_ids(experiment.id)) == {c.id for c in checkpoints[1:]}
    assert not repository.has_snapshot(snapshot_of(experiment.id, checkpoints[0].id))
    assert repository.has_snapshot(snapshot_of(experiment.id, checkpoints[1].id))
    assert repository.has_snapshot(snapshot_of(experiment.id))
    for _ in range(2):
        repository.delete_experiment(experiment.id)
    assert keys(repository) == empty | data


def test_every_chunk_of_a_snapshot_is_counted_once(repository: Repository, save: Save) -> None:
    files = {"a/one": b"same" * 100, "a/two": b"same" * 100, "b": bytes(range(256)) * 8000, "empty": b""}
    snapshot = save(repository, files)
    chunks = list(iter_chunks(repository, snapshot))
    assert len({chunk.id for chunk in chunks}) == len(chunks)
    for chunk in chunks:
        assert len(repository.read_chunk(chunk.id)) == chunk.plain_length >= chunk.stored_length
        assert (chunk.stored_length < chunk.plain_length) == (chunk.codec != RAW)
    nodes = [chunk.id for chunk in chunks if chunk.is_node]
    assert nodes[0] == snapshot.root.node
    assert len(nodes) == 2
    assert hash_chunk(files["a/one"]) in {chunk.id for chunk in chunks if not chunk.is_node}
    seen: set[bytes] = set()
    assert len(list(iter_chunks(repository, snapshot, seen))) == len(chunks)
    assert list(iter_chunks(repository, snapshot, seen)) == []
    more = save(repository, {**files, "c": b"new"})
    assert len(list(iter_chunks(repository, more, seen))) == 2
