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
from collections.abc import Iterable, Sequence
from operator import ne
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

#: One that is saved later may still be found; so an ingest need not wait long.
_BUSY_TIMEOUT_S = 1.0
#: So many of a family are looked at, the ones saved last: more than there are files in a checkpoint.
_MAX_CANDIDATES = 512
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
        # A copy of a repository has its id but not its chunks, hence the URL.
        prefix = f"{repository_id[:16]}-{blake3(url.encode()).hexdigest()[:16]}-"
        files = CacheFiles(
            directory,
            prefix,
            application_id=APPLICATION_ID,
            user_version=SCHEMA_VERSION,
            schema=_SCHEMA,
            busy_timeout_s=_BUSY_TIMEOUT_S,
        )
        self._cache = Cache(files, "cache of keyframes")
        self._learned = _Learned()
        self._saved_bytes = 0
        #: Of the file before, for what they are for: samples of a data set come by the thousand.
        self._candidates: tuple[tuple[bytes, bytes, int], _Candidates] | None = None

    def series(self, experiment: str, path: bytes, layout: Layout, generation: int) -> Series:
        """What was learned from the checkpoints before the file at `path`; nothing if there are none.

        `generation` is that of the index: what was saved under another one does not count. What this file
        teaches is kept, once all its pieces were noted, until the next `save` or `forget`.
        """
        pattern = _NUMBER.sub(b"#", path)
        numbers = b" ".join(_NUMBER.findall(path))
        name = experiment.encode()
        family = blake3(b"%d:%b%b" % (len(name), name, pattern)).digest()
        key = _Key(family, layout.signature, numbers)
        found = self._cache.read(lambda connection: self._find(connection, key, generation))
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
        self._candidates = None

    def prune(self) -> None:
        """Forget all but the `KEPT_BYTES` that were saved last."""
        self._cache.write(_prune)
        self._saved_bytes = 0

    def close(self) -> None:
        """Close the file; may be called twice, and nothing is found or kept afterwards."""
        self._cache.close()

    def _find(self, connection: sqlite3.Connection, key: _Key, generation: int) -> _Found | None:
        """The file that is most likely the one before."""
        found = connection.execute(
            "SELECT id FROM series WHERE (family, signature, numbers) = (?, ?, ?) AND generation = ?",
            (*key, generation),
        ).fetchone()
        if found is None:
            purpose = (key.family, key.signature, generation)
            if self._candidates is None or self._candidates[0] != purpose:
                self._candidates = purpose, _read_candidates(connection, *purpose)
            found = (self._candidates[1].choose(key.numbers),)
        # They may have been read from a file that was replaced since.
        row = connection.execute(
            "SELECT family, signature, numbers, lineage, checksum, state FROM series"
            " WHERE id = ? AND family = ? AND generation = ?",
            (*found, key.family, generation),
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


class _Candidates:
    """Files of a family, one of which was most likely the checkpoint before.

    That is one with the same tensors, if there is any. Of those, one with the same numbers: the shard, or
    the fold. Numbers in which files differ that resemble each other do not matter: the step, or the loss.
    Of several the last one.
    """

    def __init__(self, files: Sequence[tuple[int, bytes, bytes]]) -> None:
        """Id, numbers and lineage of each, the one saved last first."""
        changing: set[int] = set()
        last: dict[bytes, list[bytes]] = {}
        for _, numbers, lineage in files:
            mine = numbers.split()
            others = last.setdefault(lineage, mine)
            changing |= {place for place, number in enumerate(mine) if others[place : place + 1] != [number]}
        self._changing = changing
        #: The last ones, by the numbers that matter.
        self._last: dict[tuple[bytes, ...], int] = {}
        for row, numbers, _ in files:
            self._last.setdefault(self._what_matters(numbers), row)

    def choose(self, numbers: bytes) -> int | None:
        """The id of the one before a file with these numbers in its path; None if there are none."""
        wanted = self._what_matters(numbers)
        best, fewest = self._last.get(wanted), 0
        if best is not None:
            return best
        for kept, row in self._last.items():
            different = sum(map(ne, wanted, kept))
            if best is None or different < fewest:
                best, fewest = row, different
            if fewest <= 1:
                break  # the last of the best that can be
        return best

    def _what_matters(self, numbers: bytes) -> tuple[bytes, ...]:
        return tuple(number for place, number in enumerate(numbers.split()) if place not in self._changing)


def _read_candidates(
    connection: sqlite3.Connection, family: bytes, signature: bytes, generation: int
) -> _Candidates:
    rows = connection.execute(
        "SELECT signature, id, numbers, lineage FROM series WHERE family = ? AND generation = ?"
        " ORDER BY id DESC LIMIT ?",
        (family, generation, _MAX_CANDIDATES),
    ).fetchall()
    same = [file for kept, *file in rows if kept == signature]
    return _Candidates(same or [file for _, *file in rows])


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
