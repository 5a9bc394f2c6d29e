"""The reader that was written from docs/format.md sees what the project's own reader sees."""

import ast
import os
import random
import runpy
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3

from replicate.ids import CheckpointId, ExperimentId, SnapshotId, new_id
from replicate.records import CheckpointRecord, ExperimentRecord, utc_now
from replicated.chunk.codec import DELTA, PLANES, RAW, Encoded, encode, encode_delta, hash_chunk
from replicated.format.canonical import pack
from replicated.format.listing import build_index
from replicated.format.manifest import RootNode, TreeEntry
from replicated.format.metadata import Snapshot
from replicated.format.pack import DATA_PACK, TREE_PACK, PackBuilder, PackListing
from replicated.keys import INDEX_PREFIX, index_key, levelled_name, pack_key
from replicated.packer import Chunk, Packer, WriteStats
from replicated.repository import Repository
from replicated.tree import open_tree

READER = Path(__file__).parents[2] / "examples" / "standalone_reader.py"

Save = Callable[[Repository, dict[str, bytes]], Snapshot]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Isolated, from a directory of its own: what is imported is installed, not found by chance.
    command = [sys.executable, "-I", str(READER), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


def root_of(repository: Repository) -> str:
    return repository.url.removeprefix("file://")


def odd_tree(add: Callable[[bytes], object]) -> Iterator[TreeEntry]:
    big = random.Random(1).randbytes(1_500_000)
    time = 1_700_000_000_123_456_789
    yield TreeEntry(b"", "directory", 0o750, time)
    yield TreeEntry(b"-rf", "file", 0o400, -1, add(b"minus"))  # type: ignore[arg-type]
    yield TreeEntry(b"big", "file", 0o755, time, add(big))  # type: ignore[arg-type]
    yield TreeEntry(b"bigger", "file", 0o644, time, add(big * 20))  # type: ignore[arg-type]
    yield TreeEntry(b"dir", "directory", 0o500, time)
    yield TreeEntry(b"dir/empty", "directory", 0o700, 5)
    yield TreeEntry(b"dir/\xff new\nline", "file", 0o600, time, add(b"text " * 1000))  # type: ignore[arg-type]
    yield TreeEntry(b"link", "symlink", 0o777, time, target=b"/etc/passwd")
    yield TreeEntry(b"many", "directory", 0o755, time)
    for number in range(3000):
        yield TreeEntry(b"many/%04d" % number, "file", 0o644, number, add(b"%d" % number))  # type: ignore[arg-type]
    yield TreeEntry(b"zero", "file", 0o4644, 0, add(b""))  # type: ignore[arg-type]


def test_extracted_files_are_those_of_the_tree(repository: Repository, tmp_path: Path) -> None:
    with repository.writer() as writer:
        root = writer.add_tree(odd_tree(writer.add_file))
        writer.finish()
    snapshot = Snapshot(SnapshotId(new_id()), root)
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
    done = run(root_of(repository), "extract", snapshot.id, str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "")
    tree = open_tree(repository, snapshot.id)
    target = os.fsencode(tmp_path / "out")
    expected = {path for path, _ in tree.walk()}
    found = set()
    for parent, directories, files in os.walk(target):
        found |= {os.path.relpath(os.path.join(parent, name), target) for name in [*directories, *files]}
    assert found == expected
    for path, node in [(b".", tree.root), *tree.walk()]:
        info = os.lstat(os.path.join(target, path))
        assert info.st_mtime_ns == node.mtime_ns, path
        if node.type == "symlink":
            assert os.readlink(os.path.join(target, path)) == node.target
        else:
            assert stat.S_IMODE(info.st_mode) == node.mode & 0o777, path
        if node.type == "file":
            with open(os.path.join(target, path), "rb") as file:
                assert file.read() == tree.reader(node).pread(0, node.size)


def store_chunk(repository: Repository, plain: bytes, encoded: Encoded) -> None:
    """Store a chunk as it is encoded, whatever that holds, in a pack and an index object after all others."""
    builder = PackBuilder(DATA_PACK)
    builder.add(hash_chunk(plain), encoded.codec, encoded.stored, len(plain), encoded.base)
    parts = builder.seal()
    name = len(list(repository.store.list(INDEX_PREFIX))).to_bytes(32, "big")
    repository.store.put(pack_key(name), parts)
    listing = PackListing(name, DATA_PACK, sum(map(len, parts)), tuple(builder.records))
    repository.store.put(index_key(levelled_name(0, name.hex())), [build_index([listing])])


def read_chunk(repository: Repository, plain: bytes) -> bytes:
    """What the reader makes of a chunk."""
    reader = runpy.run_path(str(READER))
    try:
        chunk: bytes = reader["Repository"](root_of(repository)).read_chunk(hash_chunk(plain))
    except reader["Damaged"] as error:
        raise ValueError(error) from error
    return chunk


def floats(seed: int, width: int) -> bytes:
    numbers = random.Random(seed)
    kind = {2: "e", 4: "f", 8: "d"}[width]
    return struct.pack(f"<3000{kind}", *(numbers.gauss(0, 0.02) for _ in range(3000))) + b"ab"[: width // 4]


@pytest.mark.parametrize("width", [2, 4, 8])
def test_planes_and_differences_are_decoded(repository: Repository, width: int) -> None:
    base = floats(1, width)
    changed = bytes(byte ^ 1 if position % 7 == 0 else byte for position, byte in enumerate(base))
    planes = encode(base, width)
    assert planes.codec == PLANES
    store_chunk(repository, base, planes)
    difference = encode_delta(changed, hash_chunk(base), base)
    assert difference is not None
    store_chunk(repository, changed, difference)
    assert read_chunk(repository, base) == base
    assert read_chunk(repository, changed) == changed


#: Each is the other with its last byte changed.
TWINS = bytes(1000), bytes(999) + b"x"
CHANGE = zstandard.compress(bytes(999) + b"x")
CHANGE_AS_PLANES = b"\x01\x01" + len(CHANGE).to_bytes(4, "little") + CHANGE


def store_as_difference(repository: Repository, plain: bytes, base: bytes) -> None:
    base_id = hash_chunk(base)
    store_chunk(repository, plain, Encoded(DELTA, base_id + CHANGE_AS_PLANES, base_id))


@pytest.mark.parametrize("codecs", [(RAW, DELTA), (DELTA, RAW)])
def test_place_without_a_base_is_preferred(repository: Repository, codecs: tuple[int, int]) -> None:
    for plain, base in (TWINS, TWINS[::-1]):
        for codec in codecs:
            if codec == RAW:
                store_chunk(repository, plain, Encoded(RAW, plain))
            else:
                store_as_difference(repository, plain, base)
    for plain in TWINS:
        assert read_chunk(repository, plain) == plain


def test_base_with_a_base_is_refused(repository: Repository) -> None:
    for plain, base in (TWINS, TWINS[::-1]):
        store_as_difference(repository, plain, base)
    with pytest.raises(ValueError, match="has a base"):
        read_chunk(repository, TWINS[0])


def test_snapshots_are_listed_with_their_owners(repository: Repository, save: Save) -> None:
    snapshots = [save(repository, {"a": b"x" * size}) for size in (1, 20)]
    experiment = ExperimentRecord(ExperimentId(new_id()), utc_now(), name="run\x1b one")
    repository.put_experiment(experiment, snapshots[0].root)
    checkpoint = CheckpointRecord(CheckpointId(new_id()), experiment.id, utc_now(), 17, state="stored")
    repository.put_checkpoint(checkpoint, snapshots[1].root)
    done = run(root_of(repository), "list")
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    name = f"{experiment.id}/{checkpoint.id}"
    assert lines.keys() == {*(snapshot.id for snapshot in snapshots), experiment.id, name}
    assert "run\\x1b one" in lines[experiment.id]
    assert "step 17" in lines[name]
    assert "20 bytes" in lines[name]


def test_damage_is_found_and_named(repository: Repository, save: Save, tmp_path: Path) -> None:
    snapshot = save(repository, {"a": bytes(range(200))})
    for info in list(repository.store.list("")):
        good = repository.store.get(info.key)
        # Behind the first entry header of a pack, somewhere in the middle of all else.
        for position in (70, len(good) // 2):
            damaged = bytearray(good)
            damaged[position] ^= 0xFF
            repository.store.replace(info.key, bytes(damaged))
            target = tmp_path / f"{info.key.replace('/', '-')}-{position}"
            done = run(root_of(repository), "extract", snapshot.id, str(target))
            records_only = info.key.startswith("packs/") and position != 70
            assert done.returncode == 1 or records_only, info.key
            assert done.stderr.startswith("error: ") or records_only
            assert "Traceback" not in done.stderr
        repository.store.replace(info.key, good)


@pytest.mark.parametrize("name", [b"..", b"../escaped", b"/tmp/escaped", b"", b"a\0b", b"."])
def test_hostile_names_are_not_written(repository: Repository, tmp_path: Path, name: bytes) -> None:
    chunk = b"owned"
    chunk_id = blake3(chunk).digest()
    node = pack([1, 0, [[name, 0, 0o644, 0, 0, len(chunk), chunk_id, []]]])
    packer = Packer(repository.store, repository.index, WriteStats())
    packer.add([Chunk(chunk_id, chunk), Chunk(blake3(node).digest(), node)], TREE_PACK)
    packer.finish()
    snapshot = Snapshot(SnapshotId(new_id()), RootNode(blake3(node).digest(), 0o755, 0, files=5))
    repository.put_experiment(ExperimentRecord(ExperimentId(snapshot.id), utc_now()), snapshot.root)
    target = tmp_path / "below" / "out"
    target.parent.mkdir()
    done = run(root_of(repository), "extract", snapshot.id, str(target))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert list(target.parent.rglob("*")) == [target]
    assert not Path("/tmp/escaped").exists()


def test_existing_directory_and_wrong_usage_are_refused(
    repository: Repository, save: Save, tmp_path: Path
) -> None:
    snapshot = save(repository, {"a": b"1"})
    for arguments, status in (
        ((), 2),
        ((root_of(repository), "nonsense"), 2),
        ((root_of(repository), "extract", snapshot.id, str(tmp_path)), 1),
        ((root_of(repository), "extract", "../repository.json", str(tmp_path / "x")), 1),
        ((root_of(repository), "extract", "ab" * 32, str(tmp_path / "x")), 1),
        ((str(tmp_path / "nothing"), "list"), 1),
    ):
        done = run(*arguments)
        assert done.returncode == status
        assert done.stderr
        assert "Traceback" not in done.stderr


def test_reader_is_short_and_stands_alone() -> None:
    text = READER.read_text()
    assert len(text.splitlines()) < 360
    imported = {
        name.split(".")[0]
        for statement in ast.walk(ast.parse(text))
        for name in (
            [alias.name for alias in statement.names]
            if isinstance(statement, ast.Import)
            else [statement.module or ""]
            if isinstance(statement, ast.ImportFrom)
            else []
        )
    }
    assert imported - sys.stdlib_module_names == {"blake3", "msgpack", "zstandard"}
