import errno
import json
import os
import stat
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from blake3 import blake3

from replicate.errors import RepositoryUnreachable
from replicate.ids import new_id
from replicate.records import CheckpointRecord, ExperimentRecord, PrimaryMetric
from replicated.catalog import Catalog
from replicated.format.metadata import EndEdit
from replicated.mount import numbering
from replicated.mount.engine.libfuse import check_device
from replicated.mount.errors import Refused
from replicated.mount.filesystem import Filesystem
from replicated.mount.repository_view import FRESH_S, RepositoryView

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
device = check_device()


class Recorder:
    """Records experiments and checkpoints as the daemon does."""

    def __init__(self, snapshots):
        self.snapshots = snapshots
        self.repository = snapshots.repository
        self._count = 0

    def experiment(self, files=None, **fields):
        record = ExperimentRecord(new_id(), self._now(), paths=("code",) if files else (), **fields)
        root = self.snapshots.store(files)[1] if files else None
        self.repository.put_experiment(record, root)
        return record.id

    def checkpoint(self, experiment_id, step, files=None, loss=None, state="stored"):
        record = CheckpointRecord(
            new_id(), experiment_id, self._now(), step, ("model",) if files else (), state=state
        )
        if loss is not None:
            record = replace(record, metrics={"loss": loss}, primary_metric=PrimaryMetric("loss", "minimize"))
        root = self.snapshots.store(files)[1] if files and state == "stored" else None
        self.repository.put_checkpoint(record, root)
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


def damage(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)


@pytest.fixture
def view(snapshots, home, clock):
    catalog = Catalog(snapshots.repository, home.cache / "catalogs")
    yield RepositoryView(snapshots.repository, catalog, clock)
    catalog.close()


@pytest.fixture
def filesystem(view):
    return Filesystem(view, changing=view.can_change, extended=view.extended)


@pytest.fixture
def names(filesystem):
    def names(path):
        entries = filesystem.readdir(filesystem.resolve(os.fsencode(path)))
        return {os.fsdecode(name) for name, _, _ in entries} - {".", ".."}

    return names


@pytest.fixture
def directories(filesystem):
    def directories(path):
        entries = filesystem.readdir(filesystem.resolve(os.fsencode(path)))
        return {os.fsdecode(name) for name, a, _ in entries if stat.S_ISDIR(a.mode)} - {".", ".."}

    return directories


@pytest.fixture
def attributes(filesystem):
    def attributes(path):
        inode = filesystem.resolve(os.fsencode(path))
        return {
            name.decode(): filesystem.getxattr(inode, name).decode() for name in filesystem.listxattr(inode)
        }

    return attributes


@pytest.fixture
def read(filesystem):
    def read(path):
        inode = filesystem.resolve(os.fsencode(path))
        if stat.S_ISLNK(filesystem.getattr(inode).mode):
            return os.fsdecode(filesystem.readlink(inode))
        handle = filesystem.open(inode)
        data = b"".join(filesystem.read(inode, handle, 0, 1 << 20))
        filesystem.release(handle)
        return data

    return read


def test_an_empty_repository_shows_its_directories(names):
    assert names("/") == {"experiments", "by-name", "by-tag"}
    assert names("/experiments") == names("/by-name") == names("/by-tag") == set()


@pytest.mark.proves("S-27")
def test_an_experiment_shows_its_code_checkpoints_and_metadata(recorder, names, read):
    experiment = recorder.experiment({b"train.py": b"code"}, params={"lr": 0.1})
    worse = recorder.checkpoint(experiment, 1, {b"model": b"1"}, loss=0.1)
    better = recorder.checkpoint(experiment, 2, {b"model": b"2"}, loss=0.05)
    last = recorder.checkpoint(experiment, 3, {b"model": b"3"}, loss=0.2)
    top = f"/experiments/{experiment}"
    assert names(top) == {"code", "best", "latest", "checkpoints", "metadata.json"}
    assert names(f"{top}/code") == {"train.py"}
    shown = {f"1-{worse}", f"2-{better}", f"3-{last}"}
    assert names(f"{top}/checkpoints") == shown | {f"{name}.json" for name in shown}
    assert names(f"{top}/checkpoints/2-{better}") == {"train.py", "model"}
    assert read(f"{top}/checkpoints/2-{better}/model") == b"2"
    assert read(f"{top}/code/train.py") == b"code"
    assert read(f"{top}/best") == f"checkpoints/2-{better}"
    assert read(f"{top}/latest") == f"checkpoints/3-{last}"
    metadata = json.loads(read(f"{top}/metadata.json"))
    assert metadata["id"] == experiment
    assert metadata["params"] == {"lr": 0.1}


@pytest.mark.proves("S-28")
def test_what_was_saved_without_files_or_is_not_stored_has_no_directory(recorder, names, directories):
    experiment = recorder.experiment()
    recorder.checkpoint(experiment, 1)
    recorder.checkpoint(experiment, 2, {b"model": b"2"}, state="failed")
    stored = recorder.checkpoint(experiment, 3, {b"model": b"3"})
    assert names(f"/experiments/{experiment}") == {"latest", "checkpoints", "metadata.json"}
    assert directories(f"/experiments/{experiment}/checkpoints") == {f"3-{stored}"}


@pytest.mark.proves("S-27")
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


@pytest.mark.proves("S-25")
@pytest.mark.proves("S-25")
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
    assert names(f"/experiments/{first}/checkpoints") == {f"1-{checkpoint}", f"1-{checkpoint}.json"}


@pytest.mark.proves("S-25")
def test_what_is_removed_goes_after_a_moment(recorder, names, filesystem, clock):
    experiment = recorder.experiment({b"f": b"1"})
    inode = filesystem.resolve(f"/experiments/{experiment}".encode())
    recorder.repository.delete_experiment(experiment)
    clock.now += FRESH_S
    assert names("/experiments") == set()
    with pytest.raises(Refused) as raised:
        filesystem.getattr(inode)
    assert raised.value.errno == errno.ESTALE


@pytest.mark.proves("S-27")
def test_every_checkpoint_has_its_record_beside_it(recorder, names, read, directories):
    experiment = recorder.experiment({b"train.py": b"code"})
    stored = recorder.checkpoint(experiment, 5, {b"model": b"1"}, loss=0.5)
    failed = recorder.checkpoint(experiment, 6, {b"model": b"2"}, loss=0.4, state="failed")
    place = f"/experiments/{experiment}/checkpoints"
    assert names(place) == {f"5-{stored}", f"5-{stored}.json", f"6-{failed}.json"}
    assert json.loads(read(f"{place}/5-{stored}.json"))["metrics"] == {"loss": 0.5}
    assert json.loads(read(f"{place}/6-{failed}.json"))["state"] == "failed"


@pytest.mark.proves("S-27")
def test_records_are_what_is_stored_but_for_the_files(recorder, read, filesystem, snapshots):
    def without_files(record):
        members = json.loads(record)
        assert members.pop("snapshot")["files"] == 1
        del members["blake3"]
        return members

    experiment = recorder.experiment({b"f": b"1"}, params={"lr": 0.1}, tags=("a",))
    checkpoint = recorder.checkpoint(experiment, 1, {b"m": b"1"}, loss=float("inf"))
    stored = snapshots.directory / f"experiments/{experiment}.json"
    shown = json.loads(read(f"/experiments/{experiment}/metadata.json"))
    assert shown.pop("blake3")
    assert shown == without_files(stored.read_bytes())
    stored = snapshots.directory / f"checkpoints/{experiment}/{checkpoint}.json"
    shown = f"/experiments/{experiment}/checkpoints/1-{checkpoint}.json"
    members = json.loads(read(shown))
    assert members.pop("blake3")
    assert members == without_files(stored.read_bytes())
    hashed = filesystem.getxattr(filesystem.resolve(shown.encode()), b"user.replicate.hash")
    assert hashed.decode() == blake3(read(shown)).hexdigest()


def test_small_files_and_records_are_read_together(recorder, filesystem, view):
    experiment = recorder.experiment({b"f": b"code"})
    checkpoint = recorder.checkpoint(experiment, 1, {b"m": b"weights"})
    top = f"/experiments/{experiment}"
    paths = [f"{top}/metadata.json", f"{top}/code/f", f"{top}/checkpoints/1-{checkpoint}/m"]
    nodes = [filesystem._node(filesystem.resolve(path.encode())) for path in paths]
    metadata, code, weights = view.read_files(nodes)
    assert json.loads(metadata)["id"] == experiment
    assert (code, weights) == (b"code", b"weights")


@pytest.mark.proves("S-15")
@pytest.mark.proves("S-15")
def test_directories_tell_in_attributes_what_they_are(recorder, attributes):
    experiment = recorder.experiment({b"f": b"1"})
    checkpoint = recorder.checkpoint(experiment, 7, {b"m": b"1"})
    top = f"/experiments/{experiment}"
    assert attributes(top) == {
        "user.replicate.id": experiment,
        "user.replicate.state": "stored",
        "user.replicate.status": "unknown",
    }
    assert attributes(f"{top}/code") == {
        "user.replicate.id": experiment,
        "user.replicate.experiment": experiment,
        "user.replicate.state": "stored",
    }
    assert attributes(f"{top}/checkpoints/7-{checkpoint}") == {
        "user.replicate.id": checkpoint,
        "user.replicate.experiment": experiment,
        "user.replicate.state": "stored",
        "user.replicate.step": "7",
    }
    assert attributes("/experiments") == attributes(f"{top}/checkpoints") == {}


def test_status_is_how_the_run_ended(recorder, attributes, clock):
    experiment = recorder.experiment({b"f": b"1"})
    top = f"/experiments/{experiment}"
    assert attributes(top)["user.replicate.status"] == "unknown"
    recorder.repository.put_edit(experiment, new_id(), EndEdit("failed", START))
    clock.now += FRESH_S
    assert attributes(top)["user.replicate.status"] == "failed"


@pytest.fixture
def asked(snapshots, monkeypatch):
    """The experiments whose details the repository is asked for, each time."""
    asked = []
    list_checkpoint_ids = snapshots.repository.list_checkpoint_ids
    monkeypatch.setattr(
        snapshots.repository,
        "list_checkpoint_ids",
        lambda experiment: asked.append(experiment) or list_checkpoint_ids(experiment),
    )
    return asked


def test_the_attributes_that_programs_look_for_everywhere_cost_nothing(recorder, filesystem, asked):
    experiment = recorder.experiment({b"f": b"1"})
    inode = filesystem.resolve(f"/experiments/{experiment}".encode())
    for name in (b"security.selinux", b"security.capability", b"system.posix_acl_access", b"user.other"):
        with pytest.raises(Refused) as raised:
            filesystem.getxattr(inode, name)
        assert raised.value.errno == errno.ENODATA
    assert set(filesystem.listxattr(inode)) == {
        b"user.replicate.id",
        b"user.replicate.state",
        b"user.replicate.status",
    }
    assert filesystem.getxattr(inode, b"user.replicate.id").decode() == experiment
    assert asked == []


def test_an_experiment_is_asked_about_no_more_often_than_it_is_shown(
    recorder, filesystem, names, asked, clock
):
    experiments = [recorder.experiment({b"f": b"1"}) for _ in range(2)]
    for _ in range(2):
        clock.now += FRESH_S
        asked.clear()
        for experiment in experiments * 3:
            inode = filesystem.resolve(f"/experiments/{experiment}".encode())
            assert filesystem.getxattr(inode, b"user.replicate.status") == b"unknown"
            names(f"/experiments/{experiment}/checkpoints")
        assert asked == experiments


def test_an_experiment_that_is_no_more_has_no_state(recorder, view, filesystem, clock):
    experiment = recorder.experiment({b"f": b"1"})
    node = filesystem.node_of(filesystem.resolve(f"/experiments/{experiment}".encode()))
    recorder.repository.delete_experiment(experiment)
    clock.now += FRESH_S
    assert view.extended(node)[b"user.replicate.state"]() is None


def test_only_what_lies_in_a_snapshot_may_be_kept_for_ever(recorder, filesystem):
    experiment = recorder.experiment({b"d": {b"f": b"1"}})
    checkpoint = recorder.checkpoint(experiment, 1, {b"m": b"1"})
    top = f"/experiments/{experiment}"
    for path, is_lasting, has_lasting_entries in [
        ("/", False, False),
        ("/experiments", False, False),
        (top, False, False),
        (f"{top}/checkpoints", False, False),
        (f"{top}/code", False, True),
        (f"{top}/code/d", True, True),
        (f"{top}/checkpoints/1-{checkpoint}", False, True),
    ]:
        inode = filesystem.resolve(path.encode())
        assert filesystem.getattr(inode).is_lasting == is_lasting, path
        assert filesystem.is_lasting_directory(inode) == has_lasting_entries, path
        shown = {a.is_lasting for name, a, _ in filesystem.readdir(inode) if name not in (b".", b"..")}
        assert shown == {has_lasting_entries}, path


def test_nothing_is_asked_about_an_experiment_until_it_is_opened(recorder, names, asked):
    first, second = (recorder.experiment({b"f": b"1"}, name=name, tags=("t",)) for name in "ab")
    recorder.checkpoint(first, 1, {b"m": b"1"})
    assert names("/experiments") == names("/by-tag/t") == {first, second}
    assert names("/by-name") == {"a", "b"}
    assert asked == []
    names(f"/experiments/{first}/checkpoints")
    assert set(asked) == {first}


def test_what_did_not_change_is_not_read_again(recorder, names, snapshots, filesystem, clock, monkeypatch):
    experiments = {recorder.experiment({b"f": b"1"}) for _ in range(5)}
    # As long ago as it takes to be sure that nothing is added within the same tick.
    long_ago = time.time_ns() - 3600 * 10**9
    os.utime(snapshots.directory / "experiments", ns=(long_ago, long_ago))
    assert names("/experiments") == experiments
    listed = []
    list_experiment_ids = snapshots.repository.list_experiment_ids
    monkeypatch.setattr(
        snapshots.repository, "list_experiment_ids", lambda: listed.append(1) or list_experiment_ids()
    )
    for _ in range(3):
        clock.now += FRESH_S
        assert names("/experiments") == experiments
    assert listed == []
    experiments.add(recorder.experiment({b"f": b"2"}))
    clock.now += FRESH_S
    assert names("/experiments") == experiments
    assert listed == [1]


@pytest.mark.proves("S-29")
def test_a_damaged_record_hides_no_other(recorder, names, read, snapshots):
    good = recorder.experiment({b"f": b"1"}, name="good")
    bad = recorder.experiment({b"f": b"1"}, name="bad")
    kept = recorder.checkpoint(good, 1, {b"m": b"1"})
    lost = recorder.checkpoint(good, 2, {b"m": b"2"})
    below_bad = recorder.checkpoint(bad, 3, {b"m": b"3"})
    for key in (f"experiments/{bad}", f"checkpoints/{good}/{lost}"):
        damage(snapshots.directory / f"{key}.json")
    assert names("/experiments") == {good, bad}
    assert names("/by-name") == {"good"}
    assert names(f"/experiments/{good}/checkpoints") == {f"1-{kept}", f"1-{kept}.json"}
    assert names(f"/experiments/{bad}") == {"checkpoints", "latest"}
    assert read(f"/experiments/{bad}/checkpoints/3-{below_bad}/m") == b"3"


@pytest.mark.proves("S-29")
def test_a_damaged_record_shows_again_when_it_was_repaired(recorder, names, snapshots, clock):
    experiment = recorder.experiment({b"f": b"1"}, name="run")
    file = snapshots.directory / f"experiments/{experiment}.json"
    data = file.read_bytes()
    damage(file)
    assert names(f"/experiments/{experiment}") == {"checkpoints"}
    file.write_bytes(data)
    clock.now += FRESH_S
    assert names(f"/experiments/{experiment}") == {"code", "checkpoints", "metadata.json"}
    assert names("/by-name") == {"run"}


@pytest.mark.proves("S-29")
def test_a_record_that_cannot_be_read_hides_no_other(recorder, names, snapshots, monkeypatch):
    ids = [recorder.experiment({b"f": b"1"}, name=f"run-{n}") for n in range(6)]
    load_experiment = snapshots.repository.load_experiment_with_snapshot

    def load(identifier):
        if identifier == ids[2]:
            raise RepositoryUnreachable("cannot read it: Input/output error")
        return load_experiment(identifier)

    monkeypatch.setattr(snapshots.repository, "load_experiment_with_snapshot", load)
    assert names("/experiments") == set(ids)
    assert names("/by-name") == {f"run-{n}" for n in range(6) if n != 2}


def test_what_was_shown_stays_while_the_repository_is_out_of_reach(recorder, names, snapshots, clock):
    experiment = recorder.experiment({b"f": b"1"}, name="run")
    checkpoint = recorder.checkpoint(experiment, 1, {b"m": b"1"})
    shown = names(f"/experiments/{experiment}/checkpoints")
    assert f"1-{checkpoint}" in shown
    elsewhere = snapshots.directory.with_name("elsewhere")
    snapshots.directory.rename(elsewhere)
    snapshots.directory.mkdir()
    for _ in range(2):
        clock.now += FRESH_S
        assert names("/experiments") == {experiment}
        assert names("/by-name") == {"run"}
    snapshots.directory.rmdir()
    elsewhere.rename(snapshots.directory)
    clock.now += FRESH_S
    assert names(f"/experiments/{experiment}/checkpoints") == shown


@pytest.mark.proves("S-26")
@pytest.mark.proves("S-26")
def test_a_new_checkpoint_leaves_the_others_their_numbers(recorder, filesystem, clock):
    experiment = recorder.experiment({b"f": b"1"})
    for step in range(3):
        recorder.checkpoint(experiment, step, {b"m": b"%d" % step}, loss=1.0)
    place = f"/experiments/{experiment}/checkpoints".encode()
    before = {name: a.inode for name, a, _ in filesystem.readdir(filesystem.resolve(place))}
    new = recorder.checkpoint(experiment, 9, {b"m": b"9"}, loss=0.1)
    clock.now += FRESH_S
    after = {name: a.inode for name, a, _ in filesystem.readdir(filesystem.resolve(place))}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {f"9-{new}".encode(), f"9-{new}.json".encode()}
    assert len(set(after.values())) == len(after)


@pytest.mark.proves("S-12")
@pytest.mark.parametrize("at_hand", [1, 100])
def test_a_checkpoint_that_shows_more_later_takes_no_numbers_of_others(
    recorder, filesystem, snapshots, clock, monkeypatch, at_hand
):
    monkeypatch.setattr(numbering, "_RECENT_DIRECTORIES", at_hand)
    experiment = recorder.experiment({b"code": {b"%d" % n: b"1" for n in range(9)}, b"train.py": b"1"})
    for step in range(3):
        recorder.checkpoint(experiment, step, {b"model": b"%d" % step})
    file = snapshots.directory / f"experiments/{experiment}.json"
    data = file.read_bytes()
    damage(file)
    top = f"/experiments/{experiment}/checkpoints".encode()

    def numbers():
        found, waiting = {}, [filesystem.resolve(top)]
        while waiting:
            for name, a, _ in filesystem.readdir(waiting.pop()):
                if name not in (b".", b".."):
                    path = filesystem.path_of(a.inode)
                    assert path.endswith(name)
                    assert found.setdefault(a.inode, path) == path
                    assert filesystem.resolve(path) == a.inode
                    if stat.S_ISDIR(a.mode):
                        waiting.append(a.inode)
        return found

    assert len(numbers()) == 3 * 3
    file.write_bytes(data)
    clock.now += FRESH_S
    # Three times a record, a directory and what it shows.
    assert len(numbers()) == 3 * (2 + 3 + 9)


def test_catalogs_of_two_processes_share_a_file(recorder, names, snapshots, home, clock):
    first = recorder.experiment({b"f": b"1"})
    other = Catalog(snapshots.repository, home.cache / "catalogs")
    assert names("/experiments") == {first}
    second = recorder.experiment({b"f": b"2"})
    other.refresh_experiments()
    clock.now += FRESH_S
    assert names("/experiments") == {first, second}
    recorder.checkpoint(first, 1, {b"m": b"1"})
    other.refresh()
    assert len(names(f"/experiments/{first}/checkpoints")) == 2
    other.close()


@pytest.mark.skipif(not device.ok, reason=f"cannot mount here: {device.detail}")
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
