"""Which chunk lies where: a cache of all index objects of one repository, in SQLite.

Everything in it comes from the objects below `log/` and can be had again from them, so a damaged file
is given up and another one made. It only says where to look: `repository` verifies what it finds there.
Shared by the threads of a process, and by processes (a mount opens it as well): transactions are short.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from replicate.errors import RepositoryDamaged, RepositoryIncompatible, RepositoryUnreachable
from replicated.cache_files import CacheFiles
from replicated.format.canonical import Malformed, NewerFormat
from replicated.format.condemned import Condemned
from replicated.format.listing import parse_index
from replicated.format.pack import PackListing
from replicated.index_file import (
    APPLICATION_ID,
    INCOMING,
    MERGE,
    RELIABLE,
    SCHEMA,
    SCHEMA_VERSION,
    USABLE_BASES,
)
from replicated.keys import LogListing, condemned_key, index_key
from replicated.log import Log
from replicated.sqlite import DatabaseUnusable
from replicated.store.base import KeyMissing, Store

#: Rows that are merged at once: as many as may be, because with millions of chunks each merge writes most
#: pages of the table, but other processes must not wait for longer than `sqlite.BUSY_TIMEOUT_S`.
MAX_MERGED_ROWS: Final = 1 << 19
# As often it is listed again because objects were merged before they could be read.
_MOST_LISTINGS: Final = 5
#: The inner pages of ten million chunks take 6 MiB.
_CACHE_KIB = 16 << 10
#: What the write-ahead log may keep of the disk after a large merge.
_MAX_IDLE_LOG_BYTES = 32 << 20

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

    def __init__(self, directory: Path, repository_id: str, store: Store, log: Log | None = None) -> None:
        self._store = store
        self._log = log or Log(store)
        self._files = CacheFiles(
            directory,
            repository_id,
            store.url,
            application_id=APPLICATION_ID,
            user_version=SCHEMA_VERSION,
            schema=SCHEMA,
        )
        self._lock = threading.RLock()
        self._damaged: frozenset[str] = frozenset()
        # Whether an index object was gone when it was to be read.
        self._has_missed = False
        #: Of the file that is open.
        self._number = 0
        self._identity: tuple[int, int] | None = None
        self._connection = self._open()

    @property
    def damaged_objects(self) -> frozenset[str]:
        """Keys of the index objects that could not be read at the last refresh."""
        return self._damaged

    @property
    def generation(self) -> int:
        """A random number for as long as what was found here once is still there.

        There is another one once packs that are known here were condemned, or are listed no more, because
        garbage was collected, and when this database was damaged or lost: then everything has to be looked up
        again.
        """
        with self._lock:
            return self._attempt(self._follow_generation)

    def close(self) -> None:
        """Close the database; may be called twice."""
        with self._lock:
            self._connection.close()

    def refresh(self, max_age_s: float = 0.0) -> LogListing:
        """Take in the index objects that were written since the last time, here or elsewhere.

        With a `max_age_s`, as a listing showed them that is at most so old: what is newer is not known then.

        A damaged one is reported in `damaged_objects` and in the log, and passed over: what it lists is
        then missing here, which costs readers those chunks and writers only deduplication. Gives the listing
        that it has read.
        """
        with self._lock:
            if max_age_s and (listing := self._log.recent(max_age_s)) is not None:
                return self._attempt(lambda: self._load_recent(listing))
            return self._attempt(self._refresh)

    def refresh_until(self, is_there: Callable[[LogListing], bool]) -> LogListing | None:
        """As `refresh`, also for what was written here; None, and nothing done, unless `is_there`.

        What this machine has written and the listing does not show is not there: a store may have said that
        it has an object and lost it. So the listing must be known to show what was written before.
        """
        with self._lock:
            return self._attempt(lambda: self._refresh_until(is_there))

    def load_listed(self) -> bool:
        """Take in what the last listing shows, without another one; whether that was anything new."""
        listing = self._log.last
        if listing is None:
            return False
        with self._lock:
            return self._attempt(lambda: self._load_new(listing))

    def rebuild(self) -> None:
        """Throw the cache away and read all index objects again."""
        with self._lock:
            self._start_anew()
            self._attempt(self._refresh)

    def add(self, object_name: str, listings: Sequence[PackListing]) -> None:
        """Take in an index object that was just written."""
        with self._lock:
            # Where listings may lag behind, what they do not show yet has not vanished.
            is_listed = not self._store.capabilities.has_costly_requests
            self._attempt(lambda: self._insert([(object_name, listings)], is_listed=is_listed))

    def locate(self, chunk_ids: Iterable[bytes]) -> dict[bytes, Location]:
        """Where these chunks lie; those that are not known are left out."""
        wanted = list(chunk_ids)
        with self._lock:
            return self._attempt(lambda: self._locate(wanted))

    def find_missing(self, chunk_ids: Iterable[bytes]) -> set[bytes]:
        """Those of the chunks that are not known, or only as deltas to chunks that are not.

        Nor is what is in condemned packs only: it may still be read (`locate`), but not be relied on.
        """
        wanted = set(chunk_ids)
        with self._lock:
            return wanted.difference(self._attempt(lambda: self._select(RELIABLE, wanted)))

    def find_bases(self, chunk_ids: Iterable[bytes]) -> list[bytes]:
        """Those of the chunks that others may be stored as differences to."""
        wanted = set(chunk_ids)
        with self._lock:
            return self._attempt(lambda: self._select(USABLE_BASES, wanted))

    def list_gone(self) -> frozenset[bytes]:
        """The packs of which collectors have made sure that nothing needs them."""
        with self._lock:
            return self._attempt(self._list_gone)

    def list_packs(self) -> list[KnownPack]:
        """All packs that are known, in no order."""
        with self._lock:
            return self._attempt(self._list_packs)

    def _refresh(self) -> LogListing:
        self._follow()
        # The known ones first: an object that is written meanwhile must not look like a vanished one.
        known = self._known_objects("WHERE is_listed")
        return self._take(self._log.list(), known)

    def _load_recent(self, listing: LogListing) -> LogListing:
        self._follow()
        self._load_new(listing)
        return listing

    def _refresh_until(self, is_there: Callable[[LogListing], bool]) -> LogListing | None:
        self._follow()
        known = self._known_objects("")
        listing = self._log.list()
        return self._take(listing, known) if is_there(listing) else None

    def _follow(self) -> None:
        """Go on with the database that another process has made anew: all have to see one generation."""
        if not self._files.is_newest(self._number, self._identity):
            is_gone = self._files.identity(self._number) is None
            self._connection.close()
            # What nobody has made again gets another name; see `cache_files`.
            self._connection = self._open(self._number + 1 if is_gone else 0)

    def _known_objects(self, condition: str) -> set[str]:
        return {name for (name,) in self._connection.execute(f"SELECT name FROM objects {condition}")}

    def _take(self, listing: LogListing, known: set[str]) -> LogListing:
        """Take in what a listing shows, and give up what of `known` it does not show."""
        self._load_new(listing)
        for _ in range(_MOST_LISTINGS):
            if not self._has_missed:
                break
            # Merged with others since it was listed: another listing shows what they have become.
            listing = self._log.list()
            self._load_new(listing)
        vanished = known.difference(listing.index)
        if vanished:
            self._forget(vanished)
            if self._has_lost_packs():
                # A listing of many pages may have passed by what came up meanwhile.
                listing = self._log.list()
                self._load_new(listing)
            if self._has_lost_packs():
                # Somebody has collected garbage, or an older copy was put back: nothing can be trusted.
                self._start_anew()
                self._load_new(listing)
        return listing

    def _load_new(self, listing: LogListing) -> bool:
        """Take in the objects that are not known yet; whether there were any."""
        if self._take_condemned(listing):
            self._start_anew()
            self._take_condemned(listing)
        known = self._known_objects("")
        seen = [(name,) for name in known.intersection(listing.index)]
        with self._connection as connection:
            connection.executemany("UPDATE objects SET is_listed = 1 WHERE name = ? AND NOT is_listed", seen)
        damaged: set[str] = set()
        self._has_missed = False
        new = sorted(listing.index.keys() - known)
        self._insert(self._load_objects(new, damaged), is_listed=True)
        self._damaged = frozenset(damaged)
        return len(new) > len(damaged)

    def _take_condemned(self, listing: LogListing) -> bool:
        """Take in the lists of condemned packs that are new; whether a pack is known here that is gone."""
        known = {name for (name,) in self._connection.execute("SELECT name FROM condemned")}
        is_gone = False
        new = sorted(listing.condemned - known)
        if not new:
            return False
        # A machine that comes late has to read the lists of all collections.
        with ThreadPoolExecutor(self._store.capabilities.parallel_requests, "condemned") as threads:
            loaded = list(threads.map(self._load_condemned, new))
        for name, condemned in zip(new, loaded, strict=True):
            rows = [(pack, condemned.is_final) for pack in condemned.packs]
            self._connection.execute("BEGIN IMMEDIATE")
            with self._connection as connection:
                connection.executemany(
                    "INSERT INTO condemned_packs VALUES (?, ?) "
                    "ON CONFLICT (name) DO UPDATE SET is_final = max(is_final, excluded.is_final)",
                    rows,
                )
                connection.execute("INSERT OR IGNORE INTO condemned VALUES (?)", (name,))
                marked = connection.executemany(
                    "UPDATE packs SET is_condemned = 1 WHERE name = ? AND NOT is_condemned",
                    [(pack,) for pack, _ in rows],
                )
                if marked.rowcount > 0:
                    # What has relied on them is looked up again; who reads may go on.
                    connection.execute("UPDATE identity SET generation = random()")
            if condemned.is_final:
                packs = self._connection.execute("SELECT name FROM packs")
                is_gone = is_gone or any(pack in condemned.packs for (pack,) in packs)
        return is_gone

    def _load_condemned(self, name: str) -> Condemned:
        key = condemned_key(name)
        try:
            return self._log.load_condemned(name)
        except Malformed as error:
            # Nobody knows what not to rely on: better nothing new is stored than something that will go.
            raise RepositoryDamaged(
                f"{key} in {self._store.url} is damaged: {error}",
                hint="`replicate fsck` says how to mend it; what is stored can still be read",
                fields={"key": key},
            ) from error
        except NewerFormat as error:
            raise self._too_new(key, error) from error

    def _forget(self, vanished: Iterable[str]) -> None:
        """Forget index objects, but not yet what they list."""
        rows = [(name,) for name in vanished]
        with self._connection as connection:
            connection.executemany("DELETE FROM listings WHERE object = ?", rows)
            connection.executemany("DELETE FROM objects WHERE name = ?", rows)

    def _has_lost_packs(self) -> bool:
        """Whether a pack is known here that no index object lists any more."""
        lost = self._connection.execute(
            "SELECT 1 FROM packs WHERE NOT EXISTS (SELECT 1 FROM listings WHERE pack = number) LIMIT 1"
        )
        return lost.fetchone() is not None

    def _load_objects(
        self, names: Iterable[str], damaged: set[str]
    ) -> Iterator[tuple[str, list[PackListing]]]:
        """Index objects with their names; the keys of those that cannot be read are added to `damaged`."""
        for name in names:
            key = index_key(name)
            try:
                yield name, parse_index(self._store.get(key))
            except KeyMissing:
                self._has_missed = True
            except Malformed as error:
                damaged.add(key)
                _log.warning("index object %s in %s is damaged: %s", key, self._store.url, error)
            except NewerFormat as error:
                raise self._too_new(key, error) from error

    def _too_new(self, key: str, error: NewerFormat) -> RepositoryIncompatible:
        return RepositoryIncompatible(
            f"{key} in {self._store.url} was written by a newer version: {error}",
            hint="upgrade replicate-vcs; nothing was changed",
        )

    def _follow_generation(self) -> int:
        self._follow()
        found = self._connection.execute("SELECT generation FROM identity").fetchone()
        if found is None:
            raise sqlite3.DatabaseError("it has no generation")
        (generation,) = found
        return int(generation)

    def _insert(self, objects: Iterable[tuple[str, Sequence[PackListing]]], *, is_listed: bool) -> None:
        """Take in index objects, several at once."""
        names: list[str] = []
        row_count = 0
        for name, listings in objects:
            self._connection.execute("BEGIN IMMEDIATE")
            with self._connection as connection:
                if not names:
                    connection.execute("DELETE FROM incoming")  # what a failure has left
                for listing in listings:
                    self._stage(name, listing)
            names.append(name)
            row_count += sum(len(listing.records) for listing in listings)
            if row_count >= MAX_MERGED_ROWS:
                self._merge(names, is_listed=is_listed)
                names, row_count = [], 0
        if names:
            self._merge(names, is_listed=is_listed)

    def _stage(self, object_name: str, listing: PackListing) -> None:
        connection = self._connection
        condemned = connection.execute(
            "SELECT is_final FROM condemned_packs WHERE name = ?", (listing.name,)
        ).fetchone()
        if condemned is not None:
            # It may have been written here, and condemned before this was told: nobody was then.
            connection.execute("UPDATE identity SET generation = random()")
            if condemned[0]:
                return
        pack = _number(connection, "packs", "name", listing.name)
        is_known = connection.execute(
            "SELECT 1 FROM listings JOIN objects ON name = object WHERE pack = ? LIMIT 1", (pack,)
        ).fetchone()
        connection.execute("INSERT OR IGNORE INTO listings VALUES (?, ?)", (pack, object_name))
        if is_known:
            return  # an object that others were merged into
        bases = {record.base for record in listing.records} - {b""}
        base_numbers = {base: _number(connection, "bases", "id", base) for base in sorted(bases)}
        connection.execute(
            "UPDATE packs SET size = ?, base_count = ?, is_condemned = ? WHERE number = ?",
            (listing.size, len(bases), condemned is not None, pack),
        )
        connection.executemany(
            "INSERT INTO incoming VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (chunk_id, pack, *place, base_numbers.get(base, 0))
                for chunk_id, *place, base in listing.records
            ),
        )

    def _merge(self, names: Sequence[str], *, is_listed: bool) -> None:
        """Make what is staged known, and these index objects as taken in: both or nothing."""
        with self._connection as connection:
            connection.execute(MERGE)
            connection.execute("DELETE FROM incoming")
            connection.executemany(
                "INSERT OR IGNORE INTO objects VALUES (?, ?)", ((name, is_listed) for name in names)
            )

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

    def _select(self, query: str, wanted: Iterable[bytes]) -> list[bytes]:
        found: list[bytes] = []
        for batch in _batches(wanted):
            marks = ",".join("?" * len(batch))
            rows = self._connection.execute(query.format(marks=marks), batch)
            found.extend(chunk_id for (chunk_id,) in rows)
        return found

    def _list_gone(self) -> frozenset[bytes]:
        rows = self._connection.execute("SELECT name FROM condemned_packs WHERE is_final")
        return frozenset(name for (name,) in rows)

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
            self._number, connection = self._files.open(at_least)
            self._identity = self._files.identity(self._number)
        except DatabaseUnusable as error:
            raise self._unusable(error.reason) from error
        except OSError as error:
            raise self._unusable(error.strerror or str(error)) from error
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        connection.execute(f"PRAGMA journal_size_limit = {_MAX_IDLE_LOG_BYTES}")
        connection.execute(INCOMING)
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
