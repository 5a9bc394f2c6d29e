"""Which chunk lies where: a cache of all index objects of one repository, in SQLite.

Everything in it comes from the objects below `index/` and can be had again from them, so a damaged file
is given up and another one made. It only says where to look: `repository` verifies what it finds there.
Shared by the threads of a process, and by processes (a mount opens it as well): transactions are short.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from replicate.errors import RepositoryIncompatible, RepositoryUnreachable
from replicated.cache_files import CacheFiles
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.listing import parse_index
from replicated.format.pack import PackListing
from replicated.sqlite import DatabaseUnusable
from replicated.store.base import KeyMissing, Store

INDEX_PREFIX: Final = "index/"
#: "RPLX".
APPLICATION_ID: Final = 0x52504C58
SCHEMA_VERSION: Final = 5

_SCHEMA = """
CREATE TABLE packs (
    number INTEGER PRIMARY KEY,
    name BLOB NOT NULL UNIQUE,
    -- As in KnownPack.
    size INTEGER NOT NULL DEFAULT 0,
    base_count INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE bases (
    number INTEGER PRIMARY KEY,
    id BLOB NOT NULL UNIQUE
);
CREATE TABLE chunks (
    id BLOB PRIMARY KEY,
    pack INTEGER NOT NULL,
    -- As in format.pack.Record.
    offset INTEGER NOT NULL,
    stored_length INTEGER NOT NULL,
    plain_length INTEGER NOT NULL,
    codec INTEGER NOT NULL,
    -- A number in `bases`; 0: the chunk stands on its own.
    base INTEGER NOT NULL
) WITHOUT ROWID;
-- The index objects whose records are all in `chunks`.
CREATE TABLE objects (
    name BLOB PRIMARY KEY
) WITHOUT ROWID;
-- One row, as in Index.generation.
CREATE TABLE identity (
    generation INTEGER NOT NULL
);
INSERT INTO identity VALUES (random());
"""

# Rows for `chunks`, in any order, of index objects that are being taken in.
_INCOMING = """
CREATE TEMP TABLE incoming (
    id BLOB NOT NULL,
    pack INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    stored_length INTEGER NOT NULL,
    plain_length INTEGER NOT NULL,
    codec INTEGER NOT NULL,
    base INTEGER NOT NULL
)
"""
# In the order of the table, so that each of its pages is written once. Of two places the one without a base
# is kept: it can be read alone, and so two deltas of each other, in two packs, never wait for one another.
# (`WHERE true` tells the parser that ON begins no join.)
_MERGE = """
INSERT INTO chunks SELECT * FROM incoming WHERE true ORDER BY id
ON CONFLICT (id) DO UPDATE SET
    pack = excluded.pack,
    offset = excluded.offset,
    stored_length = excluded.stored_length,
    plain_length = excluded.plain_length,
    codec = excluded.codec,
    base = 0
WHERE base != 0 AND excluded.base = 0
"""
# A delta is worth nothing without its base.
_READABLE = """
SELECT id FROM chunks WHERE id IN ({marks}) AND (base = 0 OR EXISTS (
    SELECT 1 FROM bases JOIN chunks AS other ON other.id = bases.id
    WHERE bases.number = chunks.base AND other.base = 0
))
"""
#: Rows that are merged at once: as many as may be, because with millions of chunks each merge writes most
#: pages of the table, but other processes must not wait for longer than `sqlite.BUSY_TIMEOUT_S`.
MAX_MERGED_ROWS: Final = 1 << 19
#: The inner pages of ten million chunks take 6 MiB.
_CACHE_KIB = 16 << 10
#: What the write-ahead log may keep of the disk after a large merge.
_MAX_IDLE_LOG_BYTES = 32 << 20

_OBJECT_KEY = re.compile(INDEX_PREFIX + r"([0-9a-f]{64})")
#: Ids in one query; SQLite allows some thousand variables.
_BATCH = 500

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Location(NamedTuple):
    """Where a chunk lies."""

    pack: bytes
    offset: int
    stored_length: int
    plain_length: int
    codec: int
    #: As in format.pack.Record.
    base: bytes


class KnownPack(NamedTuple):
    """What index objects say of a pack."""

    name: bytes
    #: Of the whole object.
    size: int
    #: How long its list of bases is.
    base_count: int


class Index:
    """The index of one repository; see the module's text. One connection behind one lock."""

    def __init__(self, directory: Path, repository_id: str, store: Store) -> None:
        self._store = store
        self._files = CacheFiles(
            directory,
            repository_id,
            store.url,
            application_id=APPLICATION_ID,
            user_version=SCHEMA_VERSION,
            schema=_SCHEMA,
        )
        self._lock = threading.RLock()
        self._damaged: frozenset[str] = frozenset()
        try:
            self._connection = self._open()
        except OSError as error:
            raise self._unusable(error.strerror or str(error)) from error

    @property
    def damaged_objects(self) -> frozenset[str]:
        """Keys of the index objects that could not be read at the last refresh."""
        return self._damaged

    @property
    def generation(self) -> int:
        """A random number for as long as what was found here once is still there.

        There is another one once an index object has vanished from the store, because garbage was
        collected, and when this database was damaged or lost: then everything has to be looked up again.
        """
        with self._lock:
            return self._attempt(self._load_generation)

    def close(self) -> None:
        """Close the database; may be called twice."""
        with self._lock:
            self._connection.close()

    def refresh(self) -> None:
        """Take in the index objects that were written since the last time, here or elsewhere.

        A damaged one is reported in `damaged_objects` and in the log, and passed over: what it lists is
        then missing here, which costs readers those chunks and writers only deduplication.
        """
        with self._lock:
            self._attempt(self._refresh)

    def rebuild(self) -> None:
        """Throw the cache away and read all index objects again."""
        with self._lock:
            self._start_anew()
            self._attempt(self._refresh)

    def add(self, object_name: str, listings: Sequence[PackListing]) -> None:
        """Take in an index object that was just written."""
        with self._lock:
            self._attempt(lambda: self._insert([(bytes.fromhex(object_name), listings)]))

    def locate(self, chunk_ids: Iterable[bytes]) -> dict[bytes, Location]:
        """Where these chunks lie; those that are not known are left out."""
        wanted = list(chunk_ids)
        with self._lock:
            return self._attempt(lambda: self._locate(wanted))

    def find_missing(self, chunk_ids: Iterable[bytes]) -> set[bytes]:
        """Those of the chunks that are not known, or only as deltas to chunks that are not."""
        wanted = set(chunk_ids)
        with self._lock:
            return wanted.difference(self._attempt(lambda: self._known(wanted)))

    def list_packs(self) -> list[KnownPack]:
        """All packs that are known, in no order."""
        with self._lock:
            return self._attempt(self._list_packs)

    def _refresh(self) -> None:
        # The known ones first: an object that is written meanwhile must not look like a vanished one.
        known = {name for (name,) in self._connection.execute("SELECT name FROM objects")}
        new = []
        for info in self._store.list(INDEX_PREFIX):
            if match := _OBJECT_KEY.fullmatch(info.key):
                name = bytes.fromhex(match.group(1))
                if name in known:
                    known.remove(name)
                else:
                    new.append(name)
        if known:
            # Somebody has collected garbage, or an older copy was put back: nothing can be trusted.
            self._start_anew()
            self._refresh()
            return
        damaged: set[str] = set()
        self._insert(self._load_objects(sorted(new), damaged))
        self._damaged = frozenset(damaged)

    def _load_objects(
        self, names: Iterable[bytes], damaged: set[str]
    ) -> Iterator[tuple[bytes, list[PackListing]]]:
        """Index objects with their names; the keys of those that cannot be read are added to `damaged`."""
        for name in names:
            key = INDEX_PREFIX + name.hex()
            try:
                yield name, parse_index(self._store.get(key))
            except KeyMissing:
                continue
            except Malformed as error:
                damaged.add(key)
                _log.warning("index object %s in %s is damaged: %s", key, self._store.url, error)
            except NewerFormat as error:
                raise RepositoryIncompatible(
                    f"{key} in {self._store.url} was written by a newer version: {error}",
                    hint="upgrade replicate-vcs; nothing was changed",
                ) from error

    def _load_generation(self) -> int:
        found = self._connection.execute("SELECT generation FROM identity").fetchone()
        if found is None:
            raise sqlite3.DatabaseError("it has no generation")
        (generation,) = found
        return int(generation)

    def _insert(self, objects: Iterable[tuple[bytes, Sequence[PackListing]]]) -> None:
        """Take in index objects, several at once."""
        names: list[bytes] = []
        row_count = 0
        for name, listings in objects:
            self._connection.execute("BEGIN IMMEDIATE")
            with self._connection as connection:
                if not names:
                    connection.execute("DELETE FROM incoming")  # what a failure has left
                for listing in listings:
                    self._stage(listing)
            names.append(name)
            row_count += sum(len(listing.records) for listing in listings)
            if row_count >= MAX_MERGED_ROWS:
                self._merge(names)
                names, row_count = [], 0
        if names:
            self._merge(names)

    def _stage(self, listing: PackListing) -> None:
        connection = self._connection
        pack = _number(connection, "packs", "name", listing.name)
        bases = {record.base for record in listing.records} - {b""}
        base_numbers = {base: _number(connection, "bases", "id", base) for base in sorted(bases)}
        connection.execute(
            "UPDATE packs SET size = ?, base_count = ? WHERE number = ?", (listing.size, len(bases), pack)
        )
        connection.executemany(
            "INSERT INTO incoming VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (chunk_id, pack, *place, base_numbers.get(base, 0))
                for chunk_id, *place, base in listing.records
            ),
        )

    def _merge(self, names: Sequence[bytes]) -> None:
        """Make what is staged known, and these index objects as taken in: both or nothing."""
        with self._connection as connection:
            connection.execute(_MERGE)
            connection.execute("DELETE FROM incoming")
            connection.executemany("INSERT OR IGNORE INTO objects VALUES (?)", ((name,) for name in names))

    def _locate(self, wanted: Sequence[bytes]) -> dict[bytes, Location]:
        found: dict[bytes, Location] = {}
        for batch in _batches(wanted):
            marks = ",".join("?" * len(batch))
            rows = self._connection.execute(
                "SELECT chunks.id, name, offset, stored_length, plain_length, codec, coalesce(bases.id, x'') "
                "FROM chunks JOIN packs ON packs.number = pack LEFT JOIN bases ON bases.number = base "
                f"WHERE chunks.id IN ({marks})",
                batch,
            )
            found.update((row[0], Location._make(row[1:])) for row in rows)
        return found

    def _known(self, wanted: Iterable[bytes]) -> list[bytes]:
        found: list[bytes] = []
        for batch in _batches(wanted):
            marks = ",".join("?" * len(batch))
            rows = self._connection.execute(_READABLE.format(marks=marks), batch)
            found.extend(chunk_id for (chunk_id,) in rows)
        return found

    def _list_packs(self) -> list[KnownPack]:
        rows = self._connection.execute("SELECT name, size, base_count FROM packs")
        return [KnownPack._make(row) for row in rows]

    def _attempt(self, action: Callable[[], T]) -> T:
        """Do `action`; when the database turns out to be damaged, again with a new one."""
        try:
            try:
                return action()
            except sqlite3.DatabaseError as error:
                # Subclasses say that something else is wrong (locked, disk full): the file is good.
                if type(error) is not sqlite3.DatabaseError:
                    raise
                _log.warning(
                    "the index cache in %s is damaged and made anew: %s", self._files.directory, error
                )
                self._start_anew()
                self._refresh()
                return action()
        except sqlite3.Error as error:
            raise self._unusable(str(error)) from error

    def _start_anew(self) -> None:
        """Give up what there is, also what another process has made meanwhile."""
        self._connection.close()
        self._connection = self._open(self._files.newest() + 1)

    def _open(self, at_least: int = 0) -> sqlite3.Connection:
        try:
            connection = self._files.open(at_least)[1]
        except DatabaseUnusable as error:
            raise self._unusable(error.reason) from error
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        connection.execute(f"PRAGMA journal_size_limit = {_MAX_IDLE_LOG_BYTES}")
        connection.execute(_INCOMING)
        return connection

    def _unusable(self, reason: str) -> RepositoryUnreachable:
        return RepositoryUnreachable(
            f"cannot use the index cache in {self._files.directory}: {reason}",
            hint="check that there is space and that you may write there",
        )


def _number(connection: sqlite3.Connection, table: str, column: str, value: bytes) -> int:
    """The number of a row of `packs` or `bases`, which is made when there is none."""
    found = connection.execute(f"SELECT number FROM {table} WHERE {column} = ?", (value,)).fetchone()
    if found is not None:
        return int(found[0])
    number = connection.execute(f"INSERT INTO {table} ({column}) VALUES (?)", (value,)).lastrowid
    assert number is not None
    return number


def _batches(items: Iterable[bytes]) -> Iterator[list[bytes]]:
    iterator = iter(items)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
