import errno
import json
import os
import stat
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from replicate.ids import new_id
from replicate.records import CheckpointRecord, ExperimentRecord, PrimaryMetric
from replicated.catalog import Catalog
from replicated.mount.filesystem import Filesystem, Refused
from replicated.mount.libfuse import check_fuse
from replicated.mount.repository_view import FRESH_S, RepositoryView

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
missing = "; ".join(finding.detail for finding in check_fuse() if not finding.ok)


class Recorder:
    """Records experiments and checkpoints as the daemon does."""

    def __init__(self, snapshots):
        self.snapshots = snapshots
        self.repository = snapshots.repository
        self._count = 0

    def experiment(self, files=None, **fields):
        record = ExperimentRecord(new_id(), self._now(), paths=("code",) if files else (), **fields)
        if files:
            self.snapshots.add(files, record.id)
        self.repository.put_experiment(record)
        return record.id

    def checkpoint(self, experiment_id, step, files=None, loss=None, state="stored"):
        record = CheckpointRecord(
            new_id(), experiment_id, self._now(), step, ("model",) if files else (), state=state
        )
        if loss is not None:
            record = replace(record, metrics={"loss": loss}, primary_metric=PrimaryMetric("loss", "minimize"))
        if files and state == "stored":
            self.snapshots.add(files, record.id)
        self.repository.put_checkpoint(record)
        return record.id

    def _now(self):
        self._count += 1
        return START + timedelta(seconds=self._count)


@pytest.fixture
def recorder(snapshots):
    return Recorder(snapshots)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def filesystem(snapshots, home, clock):
    catalog = Catalog(snapshots.repository, home.cache / "catalogs")
    view = RepositoryView(snapshots.repository, catalog, clock)
    yield Filesystem(view, changing=view.can_change)
    catalog.close()


@pytest.fixture
def names(filesystem):
    def names(path):
        entries = filesystem.readdir(filesystem.resolve(os.fsencode(path)))
        return {os.fsdecode(name) for name, _, _ in entries} - {".", ".."}

    return names


@pytest.fixture
def read(filesystem):
    def read(path):
        inode = filesystem.resolve(os.fsencode(path))
        if stat.S_ISLNK(filesystem.getattr(inode).mode):
            return os.fsdecode(filesystem.readlink(inode))
        handle = filesystem.open(inode)
        data = filesystem.read(handle, 0, 1 << 20)
        filesystem.release(handle)
        return data

    return read


def test_an_empty_repository_shows_its_directories(names):
    assert names("/") == {"experiments", "by-name", "by-tag"}
    assert names("/experiments") == names("/by-name") == names("/by-tag") == set()


def test_an_experiment_shows_its_code_checkpoints_and_metadata(recorder, names, read):
    experiment = recorder.experiment({b"train.py": b"code"}, params={"lr": 0.1})
    worse = recorder.checkpoint(experiment, 1, {b"model": b"1"}, loss=0.1)
    better = recorder.checkpoint(experiment, 2, {b"model": b"2"}, loss=0.05)
    last = recorder.checkpoint(experiment, 3, {b"model": b"3"}, loss=0.2)
    top = f"/experiments/{experiment}"
    assert names(top) == {"code", "best", "latest", "checkpoints", "metadata.json"}
    assert names(f"{top}/code") == {"train.py"}
    assert names(f"{top}/checkpoints") == {f"1-{worse}", f"2-{better}", f"3-{last}"}
    assert names(f"{top}/checkpoints/2-{better}") == {"train.py", "model"}
    assert read(f"{top}/checkpoints/2-{better}/model") == b"2"
    assert read(f"{top}/code/train.py") == b"code"
    assert read(f"{top}/best") == f"checkpoints/2-{better}"
    assert read(f"{top}/latest") == f"checkpoints/3-{last}"
    metadata = json.loads(read(f"{top}/metadata.json"))
    assert metadata["id"] == experiment
    assert metadata["params"] == {"lr": 0.1}


def test_what_was_saved_without_files_or_is_not_stored_has_no_directory(recorder, names):
    experiment = recorder.experiment()
    recorder.checkpoint(experiment, 1)
    recorder.checkpoint(experiment, 2, {b"model": b"2"}, state="failed")
    stored = recorder.checkpoint(experiment, 3, {b"model": b"3"})
    assert names(f"/experiments/{experiment}") == {"latest", "checkpoints", "metadata.json"}
    assert names(f"/experiments/{experiment}/checkpoints") == {f"3-{stored}"}


def test_links_lead_to_experiments_by_name_and_tag(recorder, names, read):
    recorder.experiment(name="same")
    second = recorder.experiment(name="same", tags=("a", "b/c"))
    third = recorder.experiment(name="..", tags=("a",))
    assert names("/by-name") == {"same"}
    assert read("/by-name/same") == f"../experiments/{second}"
    assert names("/by-tag") == {"a", "b%2Fc"}
    assert names("/by-tag/a") == {second, third}
    assert read(f"/by-tag/a/{third}") == f"../../experiments/{third}"
    assert read("/latest") == f"experiments/{third}"


def test_what_is_new_shows_after_a_moment(recorder, names, read, clock):
    first = recorder.experiment({b"f": b"1"})
    assert names("/experiments") == {first}
    assert read("/latest") == f"experiments/{first}"
    second = recorder.experiment({b"f": b"2"})
    assert names("/experiments") == {first}
    clock.now += FRESH_S
    assert names("/experiments") == {first, second}
    assert read("/latest") == f"experiments/{second}"
    checkpoint = recorder.checkpoint(first, 1, {b"m": b"1"})
    clock.now += FRESH_S
    assert names(f"/experiments/{first}/checkpoints") == {f"1-{checkpoint}"}


def test_what_is_removed_goes_after_a_moment(recorder, names, filesystem, clock):
    experiment = recorder.experiment({b"f": b"1"})
    inode = filesystem.resolve(f"/experiments/{experiment}".encode())
    recorder.repository.delete_experiment(experiment)
    clock.now += FRESH_S
    assert names("/experiments") == set()
    with pytest.raises(Refused) as raised:
        filesystem.getattr(inode)
    assert raised.value.errno == errno.ESTALE


@pytest.mark.skipif(bool(missing), reason=f"cannot mount here: {missing}")
def test_a_whole_repository_can_be_mounted(recorder, table, snapshots, tmp_path):
    experiment = recorder.experiment({b"train.py": b"code"}, name="run")
    checkpoint = recorder.checkpoint(experiment, 7, {b"model": b"weights"}, loss=1.0)
    info = table.mount(snapshots.url, "", "", [], tmp_path / "mnt")
    top = tmp_path / "mnt/by-name/run"
    assert (top / "best/model").read_bytes() == b"weights"
    assert (top / "best/train.py").read_bytes() == b"code"
    assert os.path.realpath(top / "best") == os.path.realpath(top / f"checkpoints/7-{checkpoint}")
    assert json.loads((tmp_path / "mnt/latest/metadata.json").read_bytes())["name"] == "run"
    with pytest.raises(OSError) as raised:
        (top / "new").write_bytes(b"")
    assert raised.value.errno == errno.EROFS
    assert table.list() == [info]
    assert info.id == ""
    assert table.unmount(directory=tmp_path / "mnt") == [info]
