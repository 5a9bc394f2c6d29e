"""Repositories that would take too long, or too much disk, to be stored: written straight into the bucket.

The objects are made by the code that makes them for users, on a store that keeps each as a file where the
server looks for it. It writes no file durably, and takes requests to be costly, so that it is written to as a
bucket is.
"""

import os
import random
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

from blake3 import blake3

from replicate.ids import CheckpointId, ExperimentId, new_id
from replicate.records import (
    CheckpointRecord,
    ExperimentRecord,
    GitState,
    Gpu,
    PrimaryMetric,
    ProcessIdentity,
    System,
)
from replicated.chunk.codec import RAW
from replicated.format.builders import ContentBuilder
from replicated.format.listing import build_index, parse_index
from replicated.format.manifest import TreeEntry
from replicated.format.metadata import EndEdit
from replicated.format.pack import DATA_PACK, ENTRY, HEADER, PackListing, Record
from replicated.format.segment import MAX_SEGMENT_PLAIN_BYTES, SegmentRecord, build_segment
from replicated.keys import INDEX_PREFIX, LETTERS, index_key, levelled_name, segment_key
from replicated.publishing import Publication, publish_checkpoint, publish_edit, publish_experiment
from replicated.repository import Repository
from replicated.store.base import Buffer, Capabilities, KeyMissing, ObjectInfo

# ruff: noqa: D102  (`Store` describes the methods)

_BEGINNING = datetime(2026, 1, 1, tzinfo=timezone.utc)
_CHUNK_BYTES = 256 << 10
_PACK_CHUNKS = 128
#: As many as `packer` lists in one index object.
_INDEX_CHUNKS = 1024
_FILE_BYTES = 100_000_000
#: As many distributions as a training script imports.
_PACKAGES = 60
OPENED = b"data/wanted.bin"
OPENED_BYTES = 1_000_000


class FileStore:
    """A directory of plain files as a store."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def url(self) -> str:
        return f"file://{self._root}"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(has_costly_requests=True)

    def put(self, key: str, parts: Sequence[Buffer], **_: bool) -> None:
        self.replace(key, b"".join(parts))

    def replace(self, key: str, data: bytes) -> None:
        path = self._root / key
        try:
            path.write_bytes(data)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        try:
            with (self._root / key).open("rb") as file:
                file.seek(offset)
                return file.read(-1 if length is None else length)
        except FileNotFoundError:
            raise KeyMissing(key) from None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for directory, _, names in os.walk(self._root / prefix.rpartition("/")[0]):
            for name in names:
                path = Path(directory, name)
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix):
                    yield ObjectInfo(key, path.stat().st_size)

    def delete(self, *keys: str) -> None:
        for key in keys:
            (self._root / key).unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        return (self._root / key).is_file()


def open_files(root: Path, cache: Path) -> Repository:
    """A new repository in a directory that a server shows as a bucket, or a part of one."""
    return Repository.open_on(FileStore(root), cache=cache, create=True)


def claim_files(repository: Repository, claimed_bytes: int, *, is_merged: bool) -> ExperimentId:
    """A snapshot of files of 100 MB that are not there, and of one of 1 MB that is.

    Its tree and its index are those of real files of so many random bytes, of which each chunk is another
    one; no pack holds their chunks. `is_merged`: one index object lists them, as after a compaction, not one
    for every so many of them, as a packer writes.
    """
    source = random.Random(claimed_bytes)
    entries = [TreeEntry(b"data", "directory", 0o755, 0)]
    records: list[Record] = []
    with repository.writer() as writer:
        wanted = writer.add_file(source.randbytes(OPENED_BYTES))
        for number in range(claimed_bytes // _FILE_BYTES):
            content = ContentBuilder(writer.store_node)
            for start in range(0, _FILE_BYTES, _CHUNK_BYTES):
                length = min(_CHUNK_BYTES, _FILE_BYTES - start)
                chunk_id = source.randbytes(32)
                content.add(chunk_id, length)
                records.append(Record(chunk_id, 0, length, length, RAW))
            entries.append(
                TreeEntry(b"data/%06d.bin" % number, "file", 0o644, 0, content.finish(source.randbytes(32)))
            )
        entries.append(TreeEntry(OPENED, "file", 0o644, 0, wanted))
        root = writer.add_tree(entries)
        writer.finish()
    store = repository.store
    step = len(records) if is_merged else _INDEX_CHUNKS
    for start in range(0, len(records), step):
        listings = list(_list_packs(records[start : start + step], source))
        if is_merged:
            # With those of the packs that are there.
            for info in list(store.list(INDEX_PREFIX)):
                listings += parse_index(store.get(info.key))
                store.delete(info.key)
        name = levelled_name(int(is_merged), source.randbytes(32).hex())
        store.put(index_key(name), [build_index(listings)])
    experiment = ExperimentId(new_id())
    record = ExperimentRecord(experiment, _BEGINNING, paths=("data",))
    _put(repository, publish_experiment(record, root))
    return experiment


def _list_packs(records: Sequence[Record], source: random.Random) -> Iterator[PackListing]:
    for start in range(0, len(records), _PACK_CHUNKS):
        placed = []
        offset = HEADER.size
        for record in records[start : start + _PACK_CHUNKS]:
            offset += ENTRY.size
            placed.append(record._replace(offset=offset))
            offset += record.stored_length
        yield PackListing(source.randbytes(32), DATA_PACK, offset + (64 << 10), tuple(placed))


def record_runs(repository: Repository, experiments: int, checkpoints: int) -> None:
    """So many experiments that have ended, with as many checkpoints each, none with files.

    All are merged into segments, as the writers of a bucket do it again and again, and stand nowhere else:
    objects of their own, a million for the largest case, would only take time to put.
    """
    part: list[SegmentRecord] = []
    size = 0
    for publication in _publish_runs(experiments, checkpoints):
        announced = publication.announced
        if size + len(publication.data) > MAX_SEGMENT_PLAIN_BYTES:
            _put_segment(repository, part)
            part, size = [], 0
        part.append(
            SegmentRecord(LETTERS[announced.kind], announced.experiment_id, announced.id, publication.data)
        )
        size += len(publication.data) + 160
    _put_segment(repository, part)


def _publish_runs(experiments: int, checkpoints: int) -> Iterator[Publication]:
    source = random.Random(experiments)
    packages = {f"package{number}": f"1.{number}.0" for number in range(_PACKAGES)}
    system = System("Linux 6.8", "some processor", 64, 512 << 30, (Gpu("some GPU", 80 << 30),) * 8, "550.54")
    primary = PrimaryMetric("loss", "minimize")
    for number in range(experiments):
        begun = _BEGINNING + timedelta(minutes=number)
        experiment = ExperimentId(source.randbytes(32).hex())
        params = {"lr": source.random(), "layers": source.randrange(100), "name": f"run {number}"}
        yield publish_experiment(
            ExperimentRecord(
                experiment,
                begun,
                name=f"run-{number}",
                tags=(f"sweep{number % 20}",),
                user="user",
                host=f"host{number % 50}",
                command=f"train.py --number {number}",
                params={**params, "optimizer": "adam", "batch_size": 256, "dropout": 0.1},
                python_version="3.11.9",
                python_packages=packages,
                system=system,
                git=GitState("0" * 40, "main", dirty=False),
                process=ProcessIdentity(number + 2, 1000 + number, "a boot of another machine"),
            )
        )
        for step in range(checkpoints):
            yield publish_checkpoint(
                CheckpointRecord(
                    id=CheckpointId(source.randbytes(32).hex()),
                    experiment_id=experiment,
                    created=begun + timedelta(seconds=step),
                    step=step,
                    metrics={"loss": source.random(), "accuracy": source.random()},
                    primary_metric=primary,
                    state="stored",
                )
            )
        ended = EndEdit("stopped", begun + timedelta(seconds=checkpoints))
        yield publish_edit(experiment, source.randbytes(32).hex(), ended)


def _put_segment(repository: Repository, records: Sequence[SegmentRecord]) -> None:
    data = build_segment(sorted(records))
    repository.store.put(segment_key(levelled_name(0, blake3(data).hexdigest())), [data])


def _put(repository: Repository, publication: Publication) -> None:
    """What a publisher leaves, without looking each time whether a collector is at work."""
    repository.store.replace(publication.announced.key, publication.data)
    repository.store.put(publication.announced.record_key, [publication.data])
