"""From the spool into a repository: what was captured is what a reader finds."""

import errno
import os
import resource
from pathlib import Path

import pytest

from replicate.errors import CaptureFailed
from replicate.ids import SnapshotId
from replicated.repository import Repository
from replicated.snapshot.capture import SMALL_FILE_BYTES, Capturer, CaptureRequest
from replicated.snapshot.ingest import ingest
from replicated.snapshot.spool import Spool
from replicated.tree import open_tree

SNAPSHOT = SnapshotId("b" * 64)


@pytest.fixture
def project(tmp_path):
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


@pytest.fixture
def spool(tmp_path, project):
    (tmp_path / "spool").mkdir()
    return Spool(tmp_path / "spool")


@pytest.fixture
def repository(tmp_path):
    opened = Repository.open(f"file://{tmp_path}/repository", cache=tmp_path / "cache", create=True)
    yield opened
    opened.close()


def capture(spool, project):
    Capturer(spool, ()).capture(CaptureRequest(SNAPSHOT, os.fsencode(project), (b".",)), None)
    return spool.path(SNAPSHOT)


def test_a_tree_goes_through_the_spool_unchanged(spool, project, repository):
    originals = {
        b"big": os.urandom(3 * SMALL_FILE_BYTES + 5),
        b"empty": b"",
        b"sub/\xff\n": b"odd name",
        b"sub/text": b"line\n" * 200_000,
        b"z": os.urandom(70_000),
    }
    for path, data in originals.items():
        file = os.fsencode(project) + b"/" + path
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "wb") as out:
            out.write(data)
    os.symlink(b"../\xfe", os.fsencode(project) + b"/link")
    reported = []
    repository.put_snapshot(ingest(repository, SNAPSHOT, capture(spool, project), reported.append))
    tree = open_tree(repository, SNAPSHOT)
    found = {path: tree.reader(node).pread(0, node.size) for path, node in tree.walk() if node.type == "file"}
    assert found == originals
    assert tree.find(b"link").target == b"../\xfe"
    assert reported == sorted(reported)
    assert reported[-1] == sum(map(len, originals.values()))


def test_ingesting_twice_stores_nothing_twice(spool, project, repository):
    (project / "data").write_bytes(os.urandom(2 << 20))
    directory = capture(spool, project)
    first = ingest(repository, SNAPSHOT, directory)
    stored = repository.total_stored_bytes()
    assert ingest(repository, SNAPSHOT, directory) == first
    assert repository.total_stored_bytes() == stored


def test_nothing_is_visible_before_the_snapshot_is_put(spool, project, repository):
    (project / "data").write_bytes(b"x")
    snapshot = ingest(repository, SNAPSHOT, capture(spool, project))
    assert not repository.has_snapshot(SNAPSHOT)
    repository.put_snapshot(snapshot)
    assert repository.has_snapshot(SNAPSHOT)


@pytest.mark.parametrize("name", ["entries", "packed", "large-0"])
@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_a_damaged_spool_is_refused(spool, project, repository, name, damage):
    (project / "small").write_bytes(os.urandom(1000))
    (project / "large").write_bytes(os.urandom(2 * SMALL_FILE_BYTES))
    file = capture(spool, project) / name
    if damage == "delete":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CaptureFailed, match="spool"):
        ingest(repository, SNAPSHOT, spool.path(SNAPSHOT))


def test_the_memory_of_a_mapped_file_is_given_back(spool, project, repository):
    with (project / "big").open("wb") as file:
        for _ in range(40):
            file.write(os.urandom(10 << 20))
    directory = capture(spool, project)
    mapped = []

    def measure(_):
        with open("/proc/self/smaps_rollup") as report:
            mapped.append(next(int(line.split()[1]) for line in report if line.startswith("Rss")) << 10)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    ingest(repository, SNAPSHOT, directory, measure)
    assert max(mapped) - before < 300 << 20


def test_a_lack_of_descriptors_is_not_taken_for_damage(spool, project, repository, monkeypatch):
    (project / "small").write_bytes(b"x")
    directory = capture(spool, project)

    def refuse(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        ingest(repository, SNAPSHOT, directory)
    monkeypatch.undo()
    assert ingest(repository, SNAPSHOT, directory).root.files == 1
