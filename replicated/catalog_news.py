"""Takes what the log of a repository tells into the tables of a catalog.

Used by `catalog`, one thread at a time. What was removed stays known, so that nothing of it comes back from
an older segment.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final

from replicated.catalog_rows import (
    EditRow,
    ExperimentRow,
    ReadCheckpoint,
    decode_checkpoint_row,
    decode_edit_row,
    decode_experiment_row,
)
from replicated.catalog_tables import Tables, batches
from replicated.keys import Announced
from replicated.record_log import News

#: Where records of each kind are kept.
_TABLES: Final = {
    "experiment": "experiments",
    "checkpoint": "checkpoints",
    "edit": "edits",
    "removal": "removed",
}


class KeptNews:
    """What was taken in so far; see `record_log.Known`."""

    def __init__(self, tables: Tables, url: str) -> None:
        self._tables = tables
        self._url = url

    def segments(self) -> set[str]:
        """See `record_log.Known`."""
        return {name for (name,) in self._tables.query("SELECT name FROM segments")}

    def is_listed(self) -> bool:
        """See `record_log.Known`."""
        return bool(self._tables.query("SELECT 1 FROM listed LIMIT 1"))

    def unknown(self, announced: Iterable[Announced]) -> list[Announced]:
        """See `record_log.Known`."""
        items = list(announced)
        ids = {key.id for key in items} | {key.experiment_id for key in items}
        removed = self._find("removed", ids)
        known = {kind: self._find(table, ids) for kind, table in _TABLES.items()}
        return [
            key
            for key in items
            if key.id not in removed
            and key.experiment_id not in removed
            and key.id not in known.get(key.kind, ())
        ]

    def _find(self, table: str, ids: Collection[str]) -> set[str]:
        """Those of the ids of which `table` has a row that is not suspect."""
        condition = " AND NOT is_suspect" if table in ("experiments", "checkpoints") else ""
        found: set[str] = set()
        for batch in batches(sorted(ids)):
            marks = ",".join("?" * len(batch))
            rows = self._tables.query(f"SELECT id FROM {table} WHERE id IN ({marks}){condition}", *batch)
            found.update(identifier for (identifier,) in rows)
        return found

    def take(self, news: News) -> None:
        """Put in what the log has told: all of it or nothing."""
        gone = {identifier for _, identifier in news.removed}
        named = {key.id for key in news.records} | {key.experiment_id for key in news.records}
        gone |= self._find("removed", named)
        experiments: dict[str, ExperimentRow | None] = {}
        checkpoints: dict[str, list[ReadCheckpoint]] = {}
        edits: list[EditRow] = []
        for key, data in news.records.items():
            if key.id in gone or key.experiment_id in gone:
                continue
            if key.kind == "experiment":
                experiments[key.id] = decode_experiment_row(self._url, key, data)
            elif key.kind == "checkpoint":
                read = decode_checkpoint_row(self._url, key, data)
                checkpoints.setdefault(key.experiment_id, []).append(read)
            elif (edit := decode_edit_row(self._url, key, data)) is not None:
                edits.append(edit)
        with self._tables.transaction():
            others = self._tables.have_checkpoints(sorted(checkpoints))
            self._tables.remember_edits(edits)
            self._tables.remember_checkpoints(read for found in checkpoints.values() for read in found)
            for batch in batches(sorted(experiments)):
                self._tables.put_experiments({identifier: experiments[identifier] for identifier in batch})
            self._tables.change(
                (
                    "INSERT OR IGNORE INTO removed VALUES (?)",
                    [(identifier,) for _, identifier in news.removed],
                )
            )
            removed_from = self._remove(news.removed)
            # An experiment may come after its checkpoints and edits, from another segment.
            changed = checkpoints.keys() | removed_from | experiments.keys() | {edit[1] for edit in edits}
            alone = checkpoints.keys() - others - removed_from
            self._tables.derive(sorted(changed), {one: checkpoints[one] for one in alone})
            if news.segment:
                self._tables.change(("INSERT OR IGNORE INTO segments VALUES (?)", [(news.segment,)]))
            if news.is_all:
                self._tables.change(("INSERT OR IGNORE INTO listed VALUES (?)", [(1,)]))

    def _remove(self, removed: Sequence[tuple[str, str]]) -> set[str]:
        """Remove experiments and checkpoints; the experiments that lost checkpoints."""
        self._tables.remove_experiments([one for experiment_id, one in removed if experiment_id == one])
        rows = [(one,) for experiment_id, one in removed if experiment_id != one]
        self._tables.change(("DELETE FROM checkpoints WHERE id = ?", rows))
        return {experiment_id for experiment_id, one in removed if experiment_id != one}
