"""Records as JSON objects and back."""

import json
from dataclasses import fields, replace
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate.ids import CheckpointId, ExperimentId, SnapshotId
from replicate.records import (
    CheckpointRecord,
    ExperimentRecord,
    GitState,
    Gpu,
    PrimaryMetric,
    ProcessIdentity,
    System,
)
from replicated.chunk.cdc import ChunkerParameters, ChunkSizes
from replicated.format.canonical import Malformed, NewerFormat, seal, unseal
from replicated.format.condemned import Condemned, decode_condemned, encode_condemned
from replicated.format.manifest import RootNode
from replicated.format.metadata import (
    EndEdit,
    Heartbeat,
    LiveRun,
    ResumeEdit,
    Snapshot,
    decode_checkpoint,
    decode_edit,
    decode_experiment,
    decode_heartbeat,
    decode_snapshot,
    encode_checkpoint,
    encode_edit,
    encode_experiment,
    encode_heartbeat,
    encode_root,
)
from replicated.format.settings import RepositorySettings, decode_settings, encode_settings
from replicated.format.shards import (
    RankEdit,
    Shard,
    decode_rank_edit,
    decode_shard,
    encode_rank_edit,
    encode_shard,
)

DAEMON_ID = "d" * 64
EXPERIMENT_ID = ExperimentId("ab" * 32)
CHECKPOINT_ID = CheckpointId("cd" * 32)
TIME = datetime(2026, 11, 23, 5, 30, 0, 123456, tzinfo=timezone.utc)
PROCESS = ProcessIdentity(4711, 123456789, "0f0f")

EXPERIMENT = ExperimentRecord(
    id=EXPERIMENT_ID,
    created=TIME,
    name="größe",
    tags=("a", "b"),
    user="me",
    host="here",
    command="python train.py --x '\udcff'",
    paths=("data/\udcfe\n", "."),
    params={"lr": 0.1, "layers": [1, 2, {"$float": "x"}], "nan": float("inf"), "none": None, "ok": True},
    python_version="3.11.7",
    python_packages={"numpy": "2.0"},
    system=System("Linux", "EPYC", 2, 1 << 40, (Gpu("H200", 1 << 37),), "550.1"),
    git=GitState("c" * 40, "main", True, "diff --git"),
    replicate_version="0.1.0",
    process=PROCESS,
)
CHECKPOINT = CheckpointRecord(
    id=CHECKPOINT_ID,
    experiment_id=EXPERIMENT_ID,
    created=TIME,
    step=2**63 - 1,
    paths=("model.pt",),
    metrics={"loss": 0.25, "scores": [1, 2.5]},
    primary_metric=PrimaryMetric("loss", "minimize"),
    world_size=4,
    state="stored",
)
ROOT = RootNode(bytes(32), 0o1755, -(10**9) - 1, 1, 2, 3, 2**62)

OBJECTS = {
    "experiment": (encode_experiment, decode_experiment, EXPERIMENT),
    "checkpoint": (encode_checkpoint, decode_checkpoint, CHECKPOINT),
    "end": (encode_edit, decode_edit, EndEdit("killed", TIME)),
    "end with a stall": (encode_edit, decode_edit, EndEdit("stopped", TIME, 2**62)),
    "resume": (encode_edit, decode_edit, ResumeEdit(TIME)),
    "snapshot of an experiment": (
        lambda snapshot: encode_experiment(EXPERIMENT, snapshot.root),
        lambda data: decode_experiment(data) and decode_snapshot(data),
        Snapshot(SnapshotId(EXPERIMENT_ID), ROOT),
    ),
    "snapshot of a checkpoint": (
        lambda snapshot: encode_checkpoint(CHECKPOINT, snapshot.root),
        lambda data: decode_checkpoint(data) and decode_snapshot(data),
        Snapshot(SnapshotId(f"{EXPERIMENT_ID}/{CHECKPOINT_ID}"), ROOT),
    ),
    "condemned packs": (
        lambda condemned: encode_condemned(condemned, TIME, "here"),
        decode_condemned,
        Condemned(frozenset({bytes(32), b"\xff" * 32}), is_final=True),
    ),
    "settings": (
        encode_settings,
        decode_settings,
        RepositorySettings("12" * 32, TIME, ChunkerParameters(1000, ChunkSizes(64, 256, 1024))),
    ),
}
OBJECTS |= {
    "shard of rank 0": (
        encode_shard,
        decode_shard,
        Shard(EXPERIMENT_ID, CHECKPOINT_ID, 0, 4, ("a",), ROOT, checkpoint=replace(CHECKPOINT, paths=())),
    ),
    "shard of another rank": (
        encode_shard,
        decode_shard,
        Shard(EXPERIMENT_ID, CHECKPOINT_ID, 3, 4, error="it is lost"),
    ),
    "edit of a rank": (
        encode_rank_edit,
        decode_rank_edit,
        RankEdit(DAEMON_ID, 3, 4, "SLURM_JOB_ID=7", "killed", TIME),
    ),
}
every_object = pytest.mark.parametrize("name", OBJECTS)


def members_of(name: str) -> dict[str, Any]:
    encode, _, record = OBJECTS[name]
    return unseal(encode(record))


@every_object
def test_decoded_is_what_was_encoded(name: str) -> None:
    encode, decode, record = OBJECTS[name]
    assert decode(encode(record)) == record


def test_record_with_nothing_but_its_identity_survives() -> None:
    experiment = ExperimentRecord(id=EXPERIMENT_ID, created=TIME)
    assert decode_experiment(encode_experiment(experiment)) == experiment
    failed = CheckpointRecord(CHECKPOINT_ID, EXPERIMENT_ID, TIME, 0, state="failed", error="no space")
    assert decode_checkpoint(encode_checkpoint(failed)) == failed


def test_every_field_of_a_record_is_written() -> None:
    """A field that is added to a record and forgotten here would be lost silently."""
    assert members_of("experiment").keys() - {"format"} == {field.name for field in fields(ExperimentRecord)}
    # Those of a checkpoint that is on its way are in no repository.
    written = {field.name for field in fields(CheckpointRecord)} - {"part", "waits_for"}
    assert members_of("checkpoint").keys() - {"format"} == written
    assert all(getattr(EXPERIMENT, field.name) for field in fields(ExperimentRecord))


def test_objects_are_json_for_everybody() -> None:
    data = encode_checkpoint(CHECKPOINT)
    assert json.loads(data)["metrics"] == {"loss": 0.25, "scores": [1, 2.5]}
    assert data.isascii()
    assert data.endswith(b"\n}\n")


def test_checkpoint_that_is_not_stored_yet_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="not stored yet"):
        encode_checkpoint(CheckpointRecord(CHECKPOINT_ID, EXPERIMENT_ID, TIME, 0))


@every_object
def test_unknown_members_are_ignored(name: str) -> None:
    _, decode, record = OBJECTS[name]
    assert decode(seal({**members_of(name), "later": {"x": [1]}})) == record


@every_object
def test_later_format_is_told_apart_from_damage(name: str) -> None:
    _, decode, _ = OBJECTS[name]
    with pytest.raises(NewerFormat):
        decode(seal({**members_of(name), "format": 2}))


@every_object
def test_members_of_another_type_are_refused(name: str) -> None:
    _, decode, _ = OBJECTS[name]
    members = members_of(name)
    for member in members:
        with pytest.raises((Malformed, NewerFormat)):
            decode(seal({**members, member: 12.5}))
            pytest.fail(f"{member}=12.5 was accepted")


@every_object
def test_what_makes_a_record_must_be_there(name: str) -> None:
    _, decode, _ = OBJECTS[name]
    members = members_of(name)
    for member in members.keys() & {
        "format",
        "id",
        "experiment_id",
        "created",
        "step",
        "state",
        "time",
        "root",
    }:
        with pytest.raises(Malformed):
            decode(seal({key: value for key, value in members.items() if key != member}))


@pytest.mark.parametrize(
    ("name", "member", "wrong"),
    [
        ("experiment", "id", "AB" * 32),
        ("experiment", "id", "../../etc/passwd"),
        ("experiment", "created", "yesterday"),
        ("experiment", "tags", [1]),
        ("experiment", "python_packages", {"numpy": 2}),
        ("experiment", "params", {"$new": 1}),
        ("experiment", "params", {"$float": "NaN"}),
        ("experiment", "system", {"gpus": [1]}),
        ("experiment", "system", {"cpu_count": True}),
        ("checkpoint", "state", "captured"),
        ("checkpoint", "step", 2**63),
        ("checkpoint", "step", True),
        ("checkpoint", "primary_metric", {"name": "loss", "goal": "middle"}),
        ("end", "status", "running"),
        (
            "snapshot of a checkpoint",
            "snapshot",
            {"root": {"node": "00" * 32, "mode": 0o10000, "mtime": [0, 0]}},
        ),
        ("snapshot of a checkpoint", "snapshot", {"root": {"node": "00" * 31, "mode": 0, "mtime": [0, 0]}}),
        ("snapshot of a checkpoint", "snapshot", {"root": {"node": "0 " * 32, "mode": 0, "mtime": [0, 0]}}),
        (
            "snapshot of a checkpoint",
            "snapshot",
            {"root": {"node": "00" * 32, "mode": 0, "mtime": [0, 10**9]}},
        ),
        ("snapshot of a checkpoint", "snapshot", {"root": {"node": "00" * 32, "mode": 0, "mtime": [0]}}),
        ("snapshot of an experiment", "snapshot", {**encode_root(ROOT), "files": -1}),
        ("condemned packs", "packs", ["00" * 31]),
        ("settings", "chunker", {}),
    ],
)
def test_impossible_members_are_refused(name: str, member: str, wrong: object) -> None:
    _, decode, _ = OBJECTS[name]
    with pytest.raises(Malformed):
        decode(seal({**members_of(name), member: wrong}))


def test_unknown_edit_is_passed_over() -> None:
    assert decode_edit(seal({"format": 1, "type": "tag", "add": ["x"]})) is None


def test_heartbeat_survives_and_has_no_seal() -> None:
    runs = (LiveRun(EXPERIMENT_ID, PROCESS), LiveRun(EXPERIMENT_ID))
    for heartbeat in (Heartbeat(DAEMON_ID, TIME, "here", 60, runs), Heartbeat(DAEMON_ID, TIME, "", 10)):
        data = encode_heartbeat(heartbeat)
        assert decode_heartbeat(data) == heartbeat
        assert "blake3" not in json.loads(data)
    members = json.loads(data)
    nameless = json.dumps({**members, "experiments": [{}]}).encode()
    timeless = json.dumps({**members, "period_s": -1}).encode()
    for damaged in (b"", b"{}", b"[]", data[:-5], nameless, timeless):
        with pytest.raises(Malformed):
            decode_heartbeat(damaged)


def test_repository_with_unknown_needs_is_not_for_this_version() -> None:
    members = members_of("settings")
    other_chunker = {**members["chunker"], "algorithm": "tensor"}
    for change in ({"features": ["encryption"]}, {"chunker": other_chunker}):
        with pytest.raises(NewerFormat):
            decode_settings(seal({**members, **change}))


def test_repository_with_impossible_chunk_sizes_is_damaged() -> None:
    members = members_of("settings")
    sizes = {"minimum": 1, "average": 2, "maximum": 3}
    for change in ({"text": sizes}, {"binary": sizes}, {"whole_below": 0}, {"whole_below": 1 << 30}):
        with pytest.raises(Malformed):
            decode_settings(seal({**members, "chunker": {**members["chunker"], **change}}))


nonsense = st.none() | st.integers(0, 2) | st.text(max_size=3) | st.lists(st.integers(), max_size=2)


@given(st.dictionaries(st.sampled_from(["format", "id", "step", "root", "created"]), nonsense, min_size=1))
def test_sealed_nonsense_is_refused(members: dict[str, object]) -> None:
    for _, decode, _ in OBJECTS.values():
        with pytest.raises((Malformed, NewerFormat)):
            decode(seal(members))
