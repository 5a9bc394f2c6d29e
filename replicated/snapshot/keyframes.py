"""Finds what the tensors of a checkpoint may be stored as differences to: a cache, one SQLite file each.

A series is the same tensors in successive checkpoints of one experiment: the file at the same path or,
where each checkpoint has a name of its own (`step_100/shard_1.pt`), at a path that differs in its numbers
only. `ingest` asks here for the series of each file of tensors and, once everything is stored, lets be
saved what they have learned; when it fails, that is forgotten. `series` decides what is stored how. Nothing
depends on it: whatever is wrong with the file costs bytes and a line in the log, never an error.
Invariant: bases were in the repository when they were saved, under the same generation of its index.
"""

from __future__ import annotations

import re
import sqlite3
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

from blake3 import blake3

from replicated.cache_files import Cache, CacheFiles
from replicated.chunk.tensor import Layout
from replicated.snapshot.series import Series, State

#: "RPLK".
APPLICATION_ID: Final = 0x52504C4B
SCHEMA_VERSION: Final = 1

#: The series that were saved last are kept; a state takes 32 bytes for 1 MiB of tensors.
KEPT_BYTES: Final = 64 << 20
#: What one ingest may learn: the states of 1 TB of checkpoints, or of 100,000 small files.
MAX_LEARNED_BYTES: Final = 32 << 20

_SCHEMA = """
-- One file each, as it was saved last; in the order of saving.
CREATE TABLE series (
    id INTEGER PRIMARY KEY,
    -- Hash of the experiment and of the path without its numbers.
    family BLOB NOT NULL,
    -- As in Layout.
    signature BLOB NOT NULL,
    -- Those of the path, with a space between them.
    numbers BLOB NOT NULL,
    -- `Index.generation` at that time.
    generation INTEGER NOT NULL,
    -- `numbers` of the first file that the later ones, down to this, resemble.
    lineage BLOB NOT NULL,
    -- CRC-32 of all columns from `family` to `numbers` and of `state`.
    checksum INTEGER NOT NULL,
    -- As in Series.
    state BLOB NOT NULL,
    UNIQUE (family, signature, numbers)
);
-- Has all that choosing needs, so that no state is read for it.
CREATE INDEX series_by_family ON series (family, id, generation, signature, numbers, lineage);
"""

_SELECT: Final = "SELECT family, signature, numbers, lineage, checksum, state FROM series"

#: Of files shorter than this only the first of each ingest have a series. A model so small is a few files,
#: and its differences save 30 % of them as of any other; but a data set has 100,000 samples that resemble
#: nothing, and looking for that costs half as much again as storing one of 256 KiB.
_SMALL_BYTES: Final = 1 << 20
_MAX_SMALL: Final = 256
#: One that is saved later may still be found; so an ingest need not wait long.
_BUSY_TIMEOUT_S = 1.0
#: So many of a family are looked at, the ones saved last: more than there are files in a checkpoint.
_MAX_CANDIDATES = 512
#: So many are remembered during one ingest, some 700 bytes each. When there are more families than that
#: holds, only a few of each of the others are looked at.
_MAX_REMEMBERED = 1 << 15
_FEW_CANDIDATES = 8
#: What a row takes beside its state, and a key that waits for being saved.
_ROW_BYTES = 256
#: After so much was saved it is pruned without being asked.
_PRUNED_AFTER_BYTES = 16 << 20
#: With its decimals: the loss in a name is one number.
_NUMBER = re.compile(rb"\d+(?:\.\d+)*")


class _Key(NamedTuple):
    family: bytes
    signature: bytes
    numbers: bytes


class _Found(NamedTuple):
    lineage: bytes
    state: State


class _File(NamedTuple):
    id: int
    numbers: bytes
    lineage: bytes


class _Row(NamedTuple):
    key: _Key
    generation: int
    lineage: bytes
    state: bytes


class _Learned:
    """The states of files that were stored, until they may be saved."""

    def __init__(self) -> None:
        self.rows: list[_Row] = []
        self.size_bytes = 0

    def add(self, row: _Row) -> None:
        size_bytes = len(row.state) + _ROW_BYTES
        if self.size_bytes + size_bytes <= MAX_LEARNED_BYTES:
            self.rows.append(row)
            self.size_bytes += size_bytes


class Keyframes:
    """The series of one repository; see the module's text. For one thread; one ingest at a time."""

    def __init__(self, directory: Path, repository_id: str, url: str) -> None:
        files = CacheFiles(
            directory,
            repository_id,
            url,
            application_id=APPLICATION_ID,
            user_version=SCHEMA_VERSION,
            schema=_SCHEMA,
            busy_timeout_s=_BUSY_TIMEOUT_S,
        )
        self._cache = Cache(files, "cache of keyframes")
        self._learned = _Learned()
        self._saved_bytes = 0
        # Of this ingest. Families by generation too: what they hold is asked for thousands of times.
        self._families: dict[tuple[bytes, int], _Family] = {}
        self._remembered = 0
        self._small = 0

    def series(self, experiment: str, path: bytes, layout: Layout, generation: int) -> Series | None:
        """What was learned from the checkpoints before the file at `path`; None: it is not worth it.

        `generation` is that of the index: what was saved under another one does not count. What this file
        teaches is kept, once all its pieces were noted, until the next `save` or `forget`.
        """
        if layout.size < _SMALL_BYTES:
            self._small += 1
            if self._small > _MAX_SMALL:
                return None
        pattern = _NUMBER.sub(b"#", path)
        numbers = b" ".join(_NUMBER.findall(path))
        name = experiment.encode()
        family = blake3(b"%d:%b%b" % (len(name), name, pattern)).digest()
        key = _Key(family, layout.signature, numbers)
        found = self._cache.read(
            lambda connection: self._find(connection, key, generation), is_next=bool(self._families)
        )
        learned = self._learned

        def keep(state: bytes, is_alike: bool) -> None:
            lineage = found.lineage if found is not None and is_alike else numbers
            learned.add(_Row(key, generation, lineage, state))

        sizes = [region.size for region in layout.regions]
        return Series(sizes, found.state if found is not None else None, keep)

    def save(self) -> None:
        """Keep what all files have taught since the last `save` or `forget`: they are in the repository."""
        learned = self._learned
        self.forget()
        if learned.rows:
            self._cache.write(lambda connection: _insert(connection, learned.rows))
            self._saved_bytes += learned.size_bytes
        if self._saved_bytes >= _PRUNED_AFTER_BYTES:
            self.prune()

    def forget(self) -> None:
        """Drop it: the files may not be in the repository."""
        self._learned = _Learned()
        self._families = {}
        self._remembered = 0
        self._small = 0

    def prune(self) -> None:
        """Forget all but the `KEPT_BYTES` that were saved last."""
        self._cache.write(_prune)
        self._saved_bytes = 0

    def close(self) -> None:
        """Close the file; may be called twice, and nothing is found or kept afterwards."""
        self._cache.close()

    def _find(self, connection: sqlite3.Connection, key: _Key, generation: int) -> _Found | None:
        """The file that is most likely the one before."""
        family = self._family(connection, key.family, generation)
        known = family.find(key)
        row = None
        if known is None and not family.is_whole:
            row = connection.execute(
                f"{_SELECT} WHERE (family, signature, numbers) = (?, ?, ?) AND generation = ?",
                (*key, generation),
            ).fetchone()
        if known is None and row is None:
            known = family.choose(key)
        if known is not None:
            # It may have been read from a file that was replaced since.
            row = connection.execute(
                f"{_SELECT} WHERE id = ? AND family = ? AND generation = ?", (known, key.family, generation)
            ).fetchone()
        if row is None:
            return None  # there was none, or another process has removed it
        *fields, lineage, checksum, state = row
        if checksum != _checksum(_Key(*fields), state):
            raise sqlite3.DatabaseError("the row of a series is damaged")
        try:
            return _Found(lineage, State.unpack(state))
        except ValueError as error:
            raise sqlite3.DatabaseError(f"a series is damaged: {error}") from error

    def _family(self, connection: sqlite3.Connection, family: bytes, generation: int) -> _Family:
        """The files of a family; reading and remembering them is bounded for all families together."""
        known = self._families.get((family, generation))
        if known is not None:
            return known
        is_room = self._remembered < _MAX_REMEMBERED
        limit = _MAX_CANDIDATES if is_room else _FEW_CANDIDATES
        files = connection.execute(
            "SELECT signature, id, numbers, lineage FROM series WHERE family = ? AND generation = ?"
            " ORDER BY id DESC LIMIT ?",
            (family, generation, limit),
        ).fetchall()
        found = _Family(files, is_whole=len(files) < limit)
        if is_room:
            self._families[family, generation] = found
            self._remembered += 1 + len(files)
        return found


class _Family:
    """The files of one family that were saved last."""

    def __init__(self, files: Sequence[tuple[bytes, int, bytes, bytes]], *, is_whole: bool) -> None:
        """Signature, id, numbers and lineage of each, the one saved last first."""
        #: There are no others.
        self.is_whole = is_whole
        self._ids = {(signature, numbers): row for signature, row, numbers, _ in files}
        self._all: list[_File] = []
        self._alike: defaultdict[bytes, list[_File]] = defaultdict(list)
        for signature, row, numbers, lineage in files:
            file = _File(row, numbers, lineage)
            self._all.append(file)
            self._alike[signature].append(file)
        #: By signature; b"" for all of them.
        self._candidates: dict[bytes, _Candidates] = {}

    def find(self, key: _Key) -> int | None:
        """The id of the one at the same path."""
        return self._ids.get((key.signature, key.numbers))

    def choose(self, key: _Key) -> int | None:
        """The id of the one most likely before a file at a new path; None if there are none.

        It has the same tensors if any has.
        """
        files = self._alike.get(key.signature)
        # Samples of a data set are of thousands of sizes: those that nothing has share what is made once.
        signature = b"" if files is None else key.signature
        candidates = self._candidates.get(signature)
        if candidates is None:
            candidates = self._candidates[signature] = _Candidates(files or self._all)
        return candidates.choose(key.numbers)


class _Candidates:
    """Files of a family, one of which was most likely the checkpoint before.

    That is one with the same numbers: the shard, or the fold. Numbers in which files differ that resemble
    each other do not matter: the step, or the loss. Of several the last one.
    """

    def __init__(self, files: Sequence[_File]) -> None:
        """The one saved last comes first."""
        changing: set[int] = set()
        last: dict[bytes, list[bytes]] = {}
        for file in files:
            mine = file.numbers.split()
            others = last.setdefault(file.lineage, mine)
            changing |= {place for place, number in enumerate(mine) if others[place : place + 1] != [number]}
        self._changing = changing
        #: The last ones, by the numbers that matter.
        self._last: dict[tuple[bytes, ...], int] = {}
        for file in files:
            self._last.setdefault(self._what_matters(file.numbers), file.id)
        #: Positions in `_last` of those that have a number at a place, unless all have it.
        self._having: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
        for position, kept in enumerate(self._last):
            for item in enumerate(kept):
                self._having[item].append(position)
        for item in [item for item, having in self._having.items() if len(having) == len(self._last)]:
            del self._having[item]
        self._ids = list(self._last.values())

    def choose(self, numbers: bytes) -> int | None:
        """The id of the one before a file with these numbers in its path; None if there are none."""
        wanted = self._what_matters(numbers)
        known = self._last.get(wanted)
        if known is not None or not self._ids:
            return known
        # The one that has the most of these numbers, which is nearly always one number.
        having = [self._having[item] for item in enumerate(wanted) if item in self._having]
        if len(having) < 2:
            return self._ids[having[0][0] if having else 0]
        counts = Counter(chain.from_iterable(having))
        most = max(counts.values())
        return self._ids[min(position for position, count in counts.items() if count == most)]

    def _what_matters(self, numbers: bytes) -> tuple[bytes, ...]:
        return tuple(number for place, number in enumerate(numbers.split()) if place not in self._changing)


def _insert(connection: sqlite3.Connection, rows: Iterable[_Row]) -> None:
    # Replacing gives a row the highest id, also where it was there already.
    connection.executemany(
        "INSERT OR REPLACE INTO series VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)",
        (
            (*key, generation, lineage, _checksum(key, state), state)
            for key, generation, lineage, state in rows
        ),
    )


def _prune(connection: sqlite3.Connection) -> None:
    kept = 0
    for row, size in connection.execute("SELECT id, length(state) FROM series ORDER BY id DESC"):
        kept += size + _ROW_BYTES
        if kept > KEPT_BYTES:
            connection.execute("DELETE FROM series WHERE id <= ?", (row,))
            return


def _checksum(key: _Key, state: bytes) -> int:
    checksum = 0
    for part in (*key, state):
        checksum = zlib.crc32(part, checksum)
    return checksum
