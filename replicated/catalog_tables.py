"""The tables of a catalog: rows put in, taken out and asked for, and what is derived from them.

Used by `catalog`, which knows what they mean, and `catalog_news`. One lock guards the database, held for a
query or a transaction.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from replicate import wire
from replicate._pb import daemon_pb2 as pb
from replicate.records import CheckpointRecord, best_checkpoint, latest_checkpoint
from replicated.catalog_file import open_catalog_file, remove_catalog_file
from replicated.catalog_rows import ExperimentRow

#: Rows in one statement.
BATCH: Final = 500


class Tables:
    """The database of one catalog. Thread-safe."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
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

    def change(self, *changes: tuple[str, Sequence[Sequence[object]]]) -> None:
        """Execute statements, each for rows of arguments: all of them or nothing."""
        with self._lock, self._database as database:
            for statement, rows in changes:
                database.executemany(statement, rows)

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

    def put_experiments(self, rows: Mapping[str, ExperimentRow | None]) -> None:
        """Put in what was read; what is not there any more goes, and what did not change is left alone."""
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
        if not changed:
            return
        self.change(
            *_removal([(identifier,) for identifier in changed]),
            (
                "INSERT OR REPLACE INTO experiments (id, created_ns, name, record, state, error, is_suspect) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(identifier, *row, row.state == "failed") for identifier, row in present.items()],
            ),
            (
                "INSERT OR IGNORE INTO tags VALUES (?, ?)",
                [(tag, identifier) for identifier, row in present.items() for tag in row.tags()],
            ),
        )
        for identifier in known.keys() & present.keys():
            self.derive([identifier])

    def checkpoints(self, experiment_id: str) -> list[CheckpointRecord]:
        """The checkpoints of an experiment, oldest first."""
        rows = self.query(
            "SELECT record FROM checkpoints WHERE experiment_id = ? ORDER BY created_ns, id", experiment_id
        )
        return [decode_checkpoint(record) for (record,) in rows]

    def derive(self, experiment_ids: Iterable[str]) -> None:
        """Bring what experiments say of their checkpoints up to date."""
        rows = []
        for experiment_id in experiment_ids:
            checkpoints = self.checkpoints(experiment_id)
            latest, best = latest_checkpoint(checkpoints), best_checkpoint(checkpoints)
            rows.append(
                (len(checkpoints), _encode_checkpoint(latest), _encode_checkpoint(best), experiment_id)
            )
        statement = "UPDATE experiments SET checkpoint_count = ?, latest = ?, best = ? WHERE id = ?"
        self.change((statement, rows))


def _removal(rows: Sequence[tuple[str]]) -> list[tuple[str, Sequence[tuple[str]]]]:
    """The changes that remove experiments, but not what they hold."""
    return [
        ("DELETE FROM tags WHERE experiment_id = ?", rows),
        ("DELETE FROM experiments WHERE id = ?", rows),
    ]


def batches(identifiers: Sequence[str]) -> Iterator[Sequence[str]]:
    """The ids, `BATCH` at a time."""
    for start in range(0, len(identifiers), BATCH):
        yield identifiers[start : start + BATCH]


def decode_checkpoint(record: bytes) -> CheckpointRecord:
    """A checkpoint as it stands in a row."""
    return wire.decode_checkpoint(pb.Checkpoint.FromString(record))


def _encode_checkpoint(record: CheckpointRecord | None) -> bytes | None:
    return None if record is None else wire.encode_checkpoint(record).SerializeToString()
