"""The chunk index: incremental, shared, and worth nothing when it is damaged."""

import logging
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from blake3 import blake3

from replicate.errors import RepositoryDamaged, RepositoryIncompatible, RepositoryUnreachable
from replicate.ids import SnapshotId
from replicated import index
from replicated.chunk.codec import RAW
from replicated.format.listing import INDEX_HEADER, build_index
from replicated.format.metadata import Snapshot
from replicated.format.pack import DATA_PACK, PackListing, Record
from replicated.keys import pack_key
from replicated.repository import Repository
from replicated.store.memory import MemoryStore

Save = Callable[[Repository, dict[str, bytes]], Snapshot]
Load = Callable[[Repository, SnapshotId], dict[str, bytes]]
Open = Callable[..., Repository]


@pytest.fixture
def open_again(repository: Repository, tmp_path: Path) -> Iterator[Open]:
    """Opens the same repository again, with the same or another cache."""
    opened: list[Repository] = []

    def open_repository(cache: str = "cache", url: str = "") -> Repository:
        opened.append(Repository.open(url or repository.url, cache=tmp_path / cache, create=False))
        return opened[-1]

    yield open_repository
    for other in opened:
        other.close()


def databases(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "index").glob("*.db"))


@pytest.mark.parametrize("cache", ["cache", "cache of another machine"])
def test_what_one_has_stored_is_found_by_another_that_was_open(
    repository: Repository, open_again: Open, save: Save, load: Load, cache: str
) -> None:
    other = open_again(cache)
    for step in range(3):
        files = {"a": b"%d" % step, "b": random.Random(step).randbytes(300_000)}
        snapshot = save(repository, files)
        assert load(other, snapshot.id) == files


def test_what_another_has_stored_is_not_stored_again(
    repository: Repository, open_again: Open, save: Save
) -> None:
    other = open_again("elsewhere")
    files = {"a": random.Random(1).randbytes(1_000_000)}
    save(repository, files)
    before = {info.key for info in repository.store.list("packs/")}
    save(other, files)
    assert {info.key for info in repository.store.list("packs/")} == before


def test_the_packs_are_known_with_their_sizes_wherever_they_were_written(
    repository: Repository, open_again: Open, save: Save
) -> None:
    save(repository, {"a": random.Random(1).randbytes(300_000)})
    other = open_again("elsewhere")
    other.index.refresh()
    sizes = {info.key: info.size for info in repository.store.list("packs/")}
    for opened in (repository, other):
        assert {pack_key(pack.name): pack.size for pack in opened.index.list_packs()} == sizes


def test_index_objects_are_read_once(tmp_path: Path, save: Save) -> None:
    reads: list[str] = []

    class Counting(MemoryStore):
        def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
            reads.append(key)
            return super().get(key, offset, length)

    store = Counting()
    writing = Repository.open_on(store, cache=tmp_path / "one", create=True)
    for step in range(4):
        save(writing, {"a": b"%d" % step})
    assert not any(key.startswith("log/index/") for key in reads), "what one wrote itself it knows"
    for _ in range(2):
        reading = Repository.open_on(store, cache=tmp_path / "two", create=False)
        for _ in range(3):
            reading.index.refresh()
        reading.close()
    assert sum(key.startswith("log/index/") for key in reads) == 4
    writing.close()


@pytest.mark.parametrize("damage", ["garbage", "empty", "zeros in the middle", "other application", "gone"])
def test_damaged_cache_is_made_anew(
    repository: Repository, open_again: Open, save: Save, load: Load, tmp_path: Path, damage: str
) -> None:
    files = {f"{n}": random.Random(n).randbytes(300) for n in range(2000)}
    snapshot = save(repository, files)
    repository.close()
    (path,) = databases(tmp_path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = path.read_bytes()
    if damage == "garbage":
        path.write_bytes(b"x" * len(data))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "zeros in the middle":
        path.write_bytes(data[:4096] + bytes(len(data) - 4096))
    elif damage == "other application":
        path.write_bytes(data[:68] + b"othr" + data[72:])
    else:
        path.unlink()
    assert load(open_again(), snapshot.id) == files
    assert len(databases(tmp_path)) == 1


def test_wrong_place_in_the_cache_is_found_by_hash_and_mended(
    repository: Repository, open_again: Open, save: Save, load: Load, tmp_path: Path
) -> None:
    files = {"a": b"one" * 10, "b": b"two" * 20}
    snapshot = save(repository, files)
    repository.close()
    (path,) = databases(tmp_path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE chunks SET offset = offset + 1")
    assert load(open_again(), snapshot.id) == files


def test_cache_survives_that_somebody_else_makes_it_anew(
    repository: Repository, open_again: Open, save: Save, load: Load, tmp_path: Path
) -> None:
    other = open_again()
    first = save(repository, {"a": b"1"})
    other.index.rebuild()
    second = save(repository, {"a": b"2"})
    third = save(other, {"a": b"3"})
    for reader in (repository, other, open_again()):
        assert [load(reader, s.id)["a"] for s in (first, second, third)] == [b"1", b"2", b"3"]


def test_vanished_index_object_makes_its_chunks_unknown(
    repository: Repository, save: Save, load: Load
) -> None:
    """As when an older copy of the repository is put back: what is gone must be stored again."""
    kept = save(repository, {"a": b"kept"})
    before = {info.key for info in repository.store.list("")}
    files = {"a": random.Random(1).randbytes(400_000)}
    lost = save(repository, files)
    repository.store.delete(*({info.key for info in repository.store.list("")} - before))
    again = save(repository, files)
    assert again.root == lost.root
    assert load(repository, again.id) == files
    assert load(repository, kept.id) == {"a": b"kept"}


def test_generation_is_kept_while_nothing_is_lost(
    repository: Repository, open_again: Open, save: Save
) -> None:
    generation = repository.index.generation
    save(repository, {"a": b"1"})
    other = open_again()
    save(other, {"a": b"2"})
    repository.index.refresh()
    repository.close()
    assert open_again().index.generation == other.index.generation == generation


@pytest.mark.parametrize("loss", ["vanished", "rebuilt", "cache removed", "cache damaged"])
def test_generation_changes_when_something_may_be_lost(
    repository: Repository, open_again: Open, save: Save, tmp_path: Path, loss: str
) -> None:
    generation = repository.index.generation
    save(repository, {"a": b"1"})
    if loss == "vanished":
        repository.store.delete(next(repository.store.list("log/index/")).key)
        repository.index.refresh()
    elif loss == "rebuilt":
        repository.index.rebuild()
    else:
        repository.close()
        (path,) = databases(tmp_path)
        if loss == "cache removed":
            shutil.rmtree(path.parent)
        else:
            path.write_bytes(b"x" * 10_000)
        repository = open_again()
    assert repository.index.generation != generation
    assert open_again().index.generation == repository.index.generation


def test_copy_of_a_repository_has_an_index_of_its_own(
    repository: Repository, open_again: Open, save: Save, load: Load, tmp_path: Path
) -> None:
    shutil.copytree(tmp_path / "repository", tmp_path / "copy")
    copy = open_again(url=f"file://{tmp_path}/copy")
    assert copy.id == repository.id
    files = {"a": random.Random(1).randbytes(400_000)}
    save(repository, files)
    assert load(copy, save(copy, files).id) == files


def test_damaged_index_object_costs_only_what_it_lists(
    repository: Repository, open_again: Open, save: Save, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    lost = save(repository, {"a": b"lost"})
    (key,) = (info.key for info in repository.store.list("log/index/"))
    kept = save(repository, {"a": b"kept"})
    repository.store.replace(key, b"damaged")
    other = open_again("fresh")
    with caplog.at_level(logging.ERROR):
        assert load(other, kept.id) == {"a": b"kept"}
        with pytest.raises(RepositoryDamaged, match="is in no index") as caught:
            load(other, lost.id)
    assert key in caught.value.hint
    assert load(other, save(other, {"a": b"lost"}).id) == {"a": b"lost"}
    assert load(other, lost.id) == {"a": b"lost"}


def test_index_object_of_a_later_version_stops_everything(
    repository: Repository, open_again: Open, save: Save, load: Load
) -> None:
    snapshot = save(repository, {"a": b"x"})
    body = INDEX_HEADER.pack(b"REPLINDX", 2, b"", 0)
    repository.store.put("log/index/00-" + "ab" * 32, [body, blake3(body).digest()])
    with pytest.raises(RepositoryIncompatible, match="newer version"):
        load(open_again("fresh"), snapshot.id)


def put_object(repository: Repository, name: str, chunk_id: bytes, version: int = 1) -> None:
    """An index object of one chunk, in a pack that is not there."""
    listing = PackListing(chunk_id[::-1], DATA_PACK, 1000, (Record(chunk_id, 64, 5, 5, RAW),))
    data = bytearray(build_index([listing])[:-32])
    data[8] = version
    repository.store.put(f"log/index/00-{name}", [bytes(data), blake3(data).digest()])


@pytest.mark.parametrize("merged_at_once", [1, 3, 100])
def test_index_objects_are_taken_in_several_at_once(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, merged_at_once: int
) -> None:
    monkeypatch.setattr(index, "MAX_MERGED_ROWS", merged_at_once)
    chunk_ids = [bytes([number]) * 32 for number in range(10)]
    for chunk_id in chunk_ids:
        put_object(repository, chunk_id.hex(), chunk_id)
    repository.index.refresh()
    places = repository.index.locate(chunk_ids)
    assert {chunk_id: place.pack for chunk_id, place in places.items()} == {c: c[::-1] for c in chunk_ids}


def test_what_an_interrupted_refresh_has_read_is_not_known_later(repository: Repository) -> None:
    """The index object that was read may be gone by then."""
    gone, kept = b"g" * 32, b"k" * 32
    put_object(repository, "00" * 32, gone)
    put_object(repository, "ff" * 32, b"x" * 32, version=2)
    with pytest.raises(RepositoryIncompatible):
        repository.index.refresh()
    repository.store.delete("log/index/00-" + "00" * 32, "log/index/00-" + "ff" * 32)
    put_object(repository, "11" * 32, kept)
    repository.index.refresh()
    assert repository.index.find_missing([gone, kept]) == {gone}


def test_foreign_files_among_the_index_objects_are_passed_over(
    repository: Repository, open_again: Open, save: Save, load: Load
) -> None:
    snapshot = save(repository, {"a": b"x"})
    repository.store.put("log/index/readme", [b"not an index"])
    assert load(open_again("fresh"), snapshot.id) == {"a": b"x"}


def test_unusable_cache_directory_is_named(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RepositoryUnreachable, match=r"index cache in .*/file/index"):
        Repository.open(repository.url, cache=tmp_path / "file", create=False)


def test_processes_share_one_cache(repository: Repository, save: Save, load: Load, tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from replicated.keys import pack_key
from replicated.repository import Repository
repository = Repository.open(sys.argv[1], cache=Path(sys.argv[2]), create=False)
for step in range(30):
    with repository.writer() as writer:
        writer.add_file(b"%s %d" % (sys.argv[3].encode(), step))
        writer.finish()
"""
    command = [sys.executable, "-c", script, repository.url, str(tmp_path / "cache")]
    others = [subprocess.Popen([*command, name]) for name in ("one", "two")]
    for step in range(30):
        files = {"a": b"three %d" % step}
        assert load(repository, save(repository, files).id) == files
    assert [other.wait(timeout=60) for other in others] == [0, 0]
    with repository.writer() as writer:
        for name in (b"one", b"two", b"three"):
            for step in range(30):
                writer.add_file(b"%s %d" % (name, step))
        assert writer.stats.new_chunks == 0


@pytest.mark.parametrize("deleted", ["the directory", "the file", "the file of one that does not go on"])
def test_processes_agree_after_somebody_has_deleted_the_cache(
    repository: Repository, open_again: Open, save: Save, load: Load, tmp_path: Path, deleted: str
) -> None:
    """The daemon compares what its store process has seen with what it sees itself."""
    files = {"a": b"1" * 1000}
    snapshot = save(repository, files)
    before = repository.index.generation
    if deleted == "the directory":
        shutil.rmtree(tmp_path / "cache")
    else:
        for path in databases(tmp_path):
            path.unlink()
    if deleted == "the file of one that does not go on":
        assert repository.index.generation != before
        repository.index.refresh()
        assert load(repository, snapshot.id) == files
    process = open_again()
    for first, second in ((process, repository), (repository, process)):
        first.index.refresh()
        assert first.index.generation == second.index.generation != before
        second.index.refresh()
        assert first.index.generation == second.index.generation
    assert load(repository, snapshot.id) == load(process, snapshot.id) == files
    again = save(process, files | {"b": b"2" * 1000})
    assert load(repository, again.id) == load(process, again.id)
