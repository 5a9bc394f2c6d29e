"""Chunks that are stored as differences: read with their bases, whatever other packs hold, or refused."""

import os
import random
import secrets
import sqlite3
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import zstandard

from replicate.errors import RepositoryDamaged
from replicated import reader as reader_module
from replicated.chunk.codec import DELTA, HASH_BYTES, Plain, decode, encode, hash_chunk
from replicated.format.listing import build_index
from replicated.format.pack import DATA_PACK, PackBuilder, PackListing
from replicated.keys import pack_key
from replicated.reader import MIN_SHARED_BYTES, ChunkMemory, ChunkReader
from replicated.repository import Repository

#: A chunk, and what it is stored as a difference to.
Stored = tuple[bytes, bytes | None]

SIZE = 5000
ONE, OTHER, THIRD = (random.Random(0).randbytes(SIZE - 1) + bytes([n]) for n in range(3))


def make_delta(plain: bytes, base: bytes) -> bytes:
    """One plane of bytes, compressed."""
    signed = ((a - b + 128) % 256 - 128 for a, b in zip(plain, base, strict=False))
    difference = bytes(2 * d if d >= 0 else -2 * d - 1 for d in signed)
    frame = zstandard.compress(difference)
    return hash_chunk(base) + struct.pack("<BBI", 1, 1, len(frame)) + frame


def put_pack(repository: Repository, chunks: Sequence[Stored]) -> PackListing:
    """Write a pack, which no index object lists yet."""
    builder = PackBuilder(DATA_PACK)
    for plain, base in chunks:
        if base is None:
            codec, stored = encode(plain)[:2]
            builder.add(hash_chunk(plain), codec, stored, len(plain))
        else:
            builder.add(hash_chunk(plain), DELTA, make_delta(plain, base), len(plain), hash_chunk(base))
    name = secrets.token_bytes(32)
    parts = builder.seal()
    repository.store.put(pack_key(name), parts)
    return PackListing(name, DATA_PACK, sum(map(len, parts)), tuple(builder.records))


def put(repository: Repository, *packs: Sequence[Stored]) -> list[PackListing]:
    """Write packs and an index object that lists them, in this order."""
    listings = [put_pack(repository, chunks) for chunks in packs]
    repository.store.put(f"log/index/00-{secrets.token_hex(32)}", [build_index(listings)])
    return listings


@pytest.fixture
def open_again(repository: Repository, tmp_path: Path) -> Iterator[Callable[[], Repository]]:
    """Opens the repository with a cache that was never used."""
    opened: list[Repository] = []

    def open_repository() -> Repository:
        cache = tmp_path / f"cache {len(opened)}"
        opened.append(Repository.open(repository.url, cache=cache, create=False))
        return opened[-1]

    yield open_repository
    for other in opened:
        other.close()


def read(repository: Repository, *plains: bytes) -> bool:
    ids = [hash_chunk(plain) for plain in plains]
    return repository.read_chunks(ids, list(map(len, plains))) == dict(zip(ids, plains, strict=True))


def test_delta_is_read_with_its_base(repository: Repository) -> None:
    put(repository, [(ONE, None), (OTHER, ONE), (THIRD, ONE)])
    assert read(repository, OTHER)
    assert read(repository, THIRD, ONE, OTHER)


def test_bases_are_read_once_and_from_memory_if_they_are_there(repository: Repository) -> None:
    first, second = put(repository, [(ONE, None)], [(OTHER, ONE), (THIRD, ONE)])
    assert read(repository, ONE)
    repository.store.delete(pack_key(first.name))
    assert read(repository, OTHER, THIRD)
    repository.store.delete(pack_key(second.name))
    assert read(repository, THIRD, ONE)


@pytest.mark.parametrize("deltas_first", [False, True])
@pytest.mark.parametrize("one_index_object", [False, True])
def test_deltas_of_each_other_are_read_from_where_each_is_whole(
    open_again: Callable[[], Repository], repository: Repository, deltas_first: bool, one_index_object: bool
) -> None:
    deltas: list[list[Stored]] = [[(ONE, OTHER)], [(OTHER, ONE)]]
    whole: list[list[Stored]] = [[(ONE, None)], [(OTHER, None)]]
    packs = deltas + whole if deltas_first else whole + deltas
    if one_index_object:
        put(repository, *packs)
    else:
        for pack in packs:
            put(repository, pack)
            repository.index.refresh()
    for reader in (repository, open_again()):
        reader.index.refresh()
        places = reader.index.locate([hash_chunk(ONE), hash_chunk(OTHER)])
        assert [place.base for place in places.values()] == [b"", b""]
        assert read(reader, ONE, OTHER)


def test_one_of_two_deltas_of_each_other_that_is_whole_elsewhere_makes_both_readable(
    repository: Repository,
) -> None:
    put(repository, [(ONE, OTHER)], [(OTHER, ONE)], [(OTHER, None)])
    assert read(repository, ONE, OTHER)
    place = repository.index.locate([hash_chunk(ONE)])[hash_chunk(ONE)]
    assert place.base == hash_chunk(OTHER)


@pytest.mark.parametrize(
    ("packs", "reason"),
    [
        ([[(OTHER, ONE)]], "is in no index"),
        ([[(ONE, OTHER)], [(OTHER, ONE)]], "is a difference itself"),
        ([[(ONE, THIRD), (THIRD, None)], [(OTHER, ONE)]], "is a difference itself"),
        ([[(OTHER, OTHER)]], "is a difference itself"),
    ],
    ids=["missing", "each other", "chain", "itself"],
)
def test_delta_whose_base_is_missing_or_a_delta_is_refused(
    repository: Repository, packs: list[list[Stored]], reason: str
) -> None:
    put(repository, *packs)
    for _ in range(2):
        with pytest.raises(RepositoryDamaged, match=f"{hash_chunk(OTHER).hex()} .*{reason}") as caught:
            repository.read_chunk(hash_chunk(OTHER))
        assert caught.value.fields["chunk"] == hash_chunk(OTHER).hex()


def test_base_of_another_length_is_not_even_decoded(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be 16 MiB long where one byte is asked for."""
    put(repository, [(ONE, None), (OTHER, ONE)], [(ONE * 2, None), (THIRD, ONE * 2)])
    decoded: list[int] = []

    def watch(codec: int, stored: Plain, length: int, base: Plain | None) -> bytes:
        decoded.append(length)
        return decode(codec, stored, length, base)

    monkeypatch.setattr(reader_module, "decode", watch)
    with pytest.raises(RepositoryDamaged, match=f"{hash_chunk(THIRD).hex()} .*is of another length"):
        repository.read_chunks([hash_chunk(OTHER), hash_chunk(THIRD)], [len(OTHER), len(THIRD)])
    assert set(decoded) == {len(ONE)}


def test_refused_delta_does_not_keep_others_from_being_read(repository: Repository) -> None:
    put(repository, [(OTHER, ONE), (THIRD, None)])
    with pytest.raises(RepositoryDamaged):
        repository.read_chunks([hash_chunk(THIRD), hash_chunk(OTHER)], [len(THIRD), len(OTHER)])
    assert read(repository, THIRD)


def test_base_that_became_known_meanwhile_is_found(repository: Repository) -> None:
    put(repository, [(OTHER, ONE), (ONE, THIRD)])
    repository.index.refresh()
    put(repository, [(ONE, None)])
    assert read(repository, OTHER)


def test_every_byte_of_a_delta_and_of_its_base_matters(repository: Repository) -> None:
    base, delta = put(repository, [(ONE, None)], [(OTHER, ONE)])
    faults = {
        base.name: f"chunk {hash_chunk(ONE).hex()} is damaged",
        delta.name: f"chunk {hash_chunk(OTHER).hex()} is damaged",
    }
    for listing, step in ((base, 97), (delta, 1)):
        (record,) = listing.records
        key = pack_key(listing.name)
        good = repository.store.get(key)
        # Which base it is, the index says as well.
        first = record.offset + (HASH_BYTES if record.base else 0)
        for position in range(first, record.offset + record.stored_length, step):
            damaged = bytearray(good)
            damaged[position] ^= 0xFF
            repository.store.replace(key, bytes(damaged))
            reader = ChunkReader(repository.store, repository.index, ChunkMemory(0))
            with pytest.raises(RepositoryDamaged, match=hash_chunk(OTHER).hex()) as caught:
                reader.read(hash_chunk(OTHER))
            assert faults[listing.name] in caught.value.message
        repository.store.replace(key, good)


@pytest.mark.parametrize("damage", ["no base", "another base", "base of nothing"])
def test_wrong_base_in_the_cache_is_found_by_hash_and_mended(
    repository: Repository, tmp_path: Path, damage: str
) -> None:
    put(repository, [(ONE, None), (OTHER, ONE), (THIRD, None)])
    repository.index.refresh()
    (path,) = (tmp_path / "cache" / "index").glob("*.db")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            {
                "no base": "UPDATE chunks SET base = 0",
                "another base": "UPDATE bases SET id = (SELECT max(id) FROM chunks WHERE id != bases.id)",
                "base of nothing": "UPDATE bases SET id = zeroblob(32)",
            }[damage]
        )
    assert read(repository, OTHER)


def test_many_large_chunks_are_read_by_several_threads_as_by_one(repository: Repository) -> None:
    """Of any codec, in any order, and also when some are damaged."""
    generator = random.Random(1)
    chunks: list[Stored] = []
    for number in range(8):
        plain = bytes([number]) * (200 << 10) + generator.randbytes(100 << 10)
        chunks += [(plain, None), (plain[:-3] + b"abc", plain), (generator.randbytes(300 << 10), None)]
    packs = put(repository, chunks[:11], chunks[11:])
    assert sum(len(plain) for plain, _ in chunks) > 4 * MIN_SHARED_BYTES
    plains = [plain for plain, _ in chunks]
    generator.shuffle(plains)
    assert read(repository, *plains)
    repository.store.delete(pack_key(packs[0].name))
    reader = ChunkReader(repository.store, repository.index, ChunkMemory(0))
    with pytest.raises(RepositoryDamaged, match=r"damaged or missing in .*" + packs[0].name.hex()):
        reader.read_many([hash_chunk(plain) for plain in plains])


def test_child_of_a_fork_reads_with_threads_of_its_own(repository: Repository) -> None:
    plains = [random.Random(number).randbytes(1 << 20) for number in range(4)]
    put(repository, [(plain, None) for plain in plains])
    assert read(repository, *plains)
    child = os.fork()
    if child == 0:
        reader = ChunkReader(repository.store, repository.index, ChunkMemory(0))
        found = reader.read_many([hash_chunk(plain) for plain in plains])
        os._exit(0 if sorted(found.values()) == sorted(plains) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
