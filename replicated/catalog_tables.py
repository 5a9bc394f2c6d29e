"""The tables of a catalog: rows put in, taken out and asked for, and what is derived from them.

Used by `catalog`, which knows what they mean, and `catalog_news`. One lock guards the database, held for a
query or a transaction.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from replicate import wire
from replicate._pb import daemon_pb2 as pb
from replicate.records import CheckpointRecord
from replicated.catalog_file import open_catalog_file, remove_catalog_file
from replicated.catalog_rows import CheckpointRow, EditRow, ExperimentRow, ReadCheckpoint, summary_row

#: Rows in one statement.
BATCH: Final = 500

_NONE: Final[Mapping[str, Sequence[ReadCheckpoint]]] = {}


class Tables:
    """The database of one catalog. Thread-safe."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.RLock()
        self._database = open_catalog_file(file)

    @property
    def file(self) -> Path:
        """Where the database lies."""
        return self._file

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._database.close()

    def start_anew(self) -> None:
        """Give up what there is, because it is damaged."""
        with self._lock:
            self._database.close()
            remove_catalog_file(self._file)
            self._database = open_catalog_file(self._file)

    @property
    def version(self) -> tuple[int, int]:
        """Another one once anything was changed, by this process or another."""
        with self._lock:
            (others,) = self._database.execute("PRAGMA data_version").fetchone()
            return others, self._database.total_changes

    def query(self, statement: str, *arguments: object) -> list[Any]:
        """All rows that a statement gives."""
        with self._lock:
            return self._database.execute(statement, arguments).fetchall()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes made within, or nothing; nobody else is answered meanwhile. May be nested."""
        with self._lock:
            if self._database.in_transaction:
                yield
                return
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                yield

    def change(self, *changes: tuple[str, Sequence[Sequence[object]]]) -> None:
        """Execute statements, each for rows of arguments: all of them or nothing."""
        with self.transaction():
            for statement, rows in changes:
                self._database.executemany(statement, rows)

    def remember_edits(self, edits: Sequence[EditRow]) -> None:
        """Put in edits; what is derived from them is for the caller to ask for."""
        self.change(("INSERT OR REPLACE INTO edits VALUES (?, ?, ?, ?, ?)", edits))

    def remember_checkpoints(self, checkpoints: Iterable[ReadCheckpoint]) -> None:
        """Put in checkpoints, as `remember_edits`."""
        rows = [
            (read.record.id, read.record.experiment_id, *read.row)
            for read in sorted(checkpoints, key=lambda read: (read.record.experiment_id, read.row.created_ns))
        ]
        self.change(("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?)", rows))

    def remove_experiments(self, gone: Collection[str]) -> None:
        """Remove experiments with all that they hold."""
        rows = [(identifier,) for identifier in gone]
        if rows:
            self.change(
                *(
                    (f"DELETE FROM {table} WHERE experiment_id = ?", rows)
                    for table in ("checkpoints", "edits")
                ),
                *_removal(rows),
            )

    def put_experiments(self, rows: Mapping[str, ExperimentRow | None]) -> Collection[str]:
        """Put in what was read; what is not there any more goes, and what did not change is left alone.

        Gives those that were put in; what is derived of them is for the caller to ask for.
        """
        marks = ",".join("?" * len(rows))
        known = {
            row[0]: ExperimentRow(*row[1:])
            for row in self.query(
                f"SELECT id, created_ns, name, record, state, error FROM experiments WHERE id IN ({marks})",
                *rows,
            )
        }
        changed = {identifier: row for identifier, row in rows.items() if known.get(identifier) != row}
        present = {identifier: row for identifier, row in changed.items() if row is not None}
        if changed:
            self.change(
                *_removal([(identifier,) for identifier in changed]),
                (
                    "INSERT OR REPLACE INTO experiments VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [(identifier, *row, row.state == "failed") for identifier, row in present.items()],
                ),
                (
                    "INSERT OR IGNORE INTO tags VALUES (?, ?)",
                    [(tag, identifier) for identifier, row in present.items() for tag in row.tags()],
                ),
            )
        return present

    def checkpoints(self, experiment_id: str) -> list[ReadCheckpoint]:
        """The checkpoints of an experiment, oldest first."""
        rows = self.query(
            "SELECT created_ns, record, is_suspect FROM checkpoints "
            "WHERE experiment_id = ? ORDER BY created_ns, id",
            experiment_id,
        )
        return [ReadCheckpoint(decode_checkpoint(row[1]), CheckpointRow(*row)) for row in rows]

    def have_checkpoints(self, experiment_ids: Sequence[str]) -> set[str]:
        """Those of the experiments of which a checkpoint is known."""
        found: set[str] = set()
        for batch in batches(experiment_ids):
            marks = ",".join("?" * len(batch))
            rows = self.query(
                f"SELECT DISTINCT experiment_id FROM checkpoints WHERE experiment_id IN ({marks})", *batch
            )
            found.update(identifier for (identifier,) in rows)
        return found

    def derive(
        self, experiment_ids: Iterable[str], all_checkpoints: Mapping[str, Sequence[ReadCheckpoint]] = _NONE
    ) -> None:
        """Bring what lists show of experiments up to date.

        `all_checkpoints` are those of experiments of which there are no others: they are not read again.
        """
        rows = []
        with self.transaction():
            for experiment_id in experiment_ids:
                experiments = self.query(
                    "SELECT created_ns, name, record, state, error FROM experiments WHERE id = ?",
                    experiment_id,
                )
                if not experiments:
                    continue  # it comes later, from another segment
                known = all_checkpoints.get(experiment_id)
                checkpoints = (
                    self.checkpoints(experiment_id)
                    if known is None
                    else sorted(known, key=lambda read: (read.row.created_ns, read.record.id))
                )
                edits = self.query(
                    "SELECT id, experiment_id, time_ns, status, stall_ns FROM edits "
                    "WHERE experiment_id = ? ORDER BY time_ns",
                    experiment_id,
                )
                rows.append(summary_row(experiment_id, ExperimentRow(*experiments[0]), checkpoints, edits))
            self.change(
                ("DELETE FROM summaries WHERE id = ?", [(row.id,) for row in rows]),
                ("INSERT INTO summaries VALUES (?, ?, ?, ?, ?, ?)", rows),
            )


def _removal(rows: Sequence[tuple[str]]) -> list[tuple[str, Sequence[tuple[str]]]]:
    """The changes that remove experiments, but not what they hold."""
    return [
        ("DELETE FROM tags WHERE experiment_id = ?", rows),
        ("DELETE FROM experiments WHERE id = ?", rows),
        ("DELETE FROM summaries WHERE id = ?", rows),
    ]


def batches(identifiers: Sequence[str]) -> Iterator[Sequence[str]]:
    """The ids, `BATCH` at a time."""
    for start in range(0, len(identifiers), BATCH):
        yield identifiers[start : start + BATCH]


def decode_checkpoint(record: bytes) -> CheckpointRecord:
    """A checkpoint as it stands in a row."""
    return wire.decode_checkpoint(pb.Checkpoint.FromString(record))
