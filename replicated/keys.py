"""The keys of a repository: made and parsed here and nowhere else. What lies under them: docs/format.md.

The keys below `log/` are chosen so that a listing in their order is safe to read while others write: what is
merged into an object goes only once that object, whose key sorts later, is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, get_args

from blake3 import blake3

from replicate.ids import CheckpointId, ExperimentId, SnapshotId, is_id
from replicated.store.base import ObjectInfo

SETTINGS_KEY: Final = "repository.json"
EXPERIMENT_PREFIX: Final = "experiments/"
CHECKPOINT_PREFIX: Final = "checkpoints/"
EDIT_PREFIX: Final = "edits/"
SHARD_PREFIX: Final = "shards/"
HEARTBEAT_PREFIX: Final = "heartbeats/"
PACK_PREFIX: Final = "packs/"
LOG_PREFIX: Final = "log/"
CONDEMNED_PREFIX: Final = "log/condemned/"
INDEX_PREFIX: Final = "log/index/"
NEW_PREFIX: Final = "log/new/"
SEGMENT_PREFIX: Final = "log/records/"
#: There when every record is announced, or in a segment.
COMPLETE_KEY: Final = "log/records/complete"

#: What can be announced: records, and that something was removed.
Kind = Literal["experiment", "checkpoint", "edit", "shard", "removal"]

MAX_LEVEL: Final = 0xFF

LETTERS: Final[dict[Kind, str]] = {
    "experiment": "e",
    "checkpoint": "c",
    "edit": "d",
    "shard": "s",
    "removal": "x",
}
KINDS: Final[dict[str, Kind]] = {letter: kind for kind, letter in LETTERS.items()}
assert LETTERS.keys() == set(get_args(Kind))

_NEW_KEY = re.compile(
    NEW_PREFIX + r"([a-z])-([0-9a-f]{64})-([0-9a-f]{64})(?:-([0-9]{1,9}))?(?:-[0-9a-f]{16})?"
)
_LEVELLED_NAME = re.compile(r"[0-9a-f]{2}-[0-9a-f]{64}")
_CONDEMNED_KEY = re.compile(CONDEMNED_PREFIX + r"([0-9a-f]{64})")
_RECORD_NAME = re.compile(r"([0-9a-f]{64})\.json")


class Announced(NamedTuple):
    """What an object below `log/new/` announces."""

    kind: Kind
    experiment_id: str
    #: Of the experiment, checkpoint or edit; of a removal, of what was removed; of a shard, its checkpoint's.
    id: str
    #: Of a shard.
    rank: int | None = None

    @property
    def key(self) -> str:
        """The key of the announcement, or what it begins with: see `key_of`."""
        rank = "" if self.rank is None else f"-{self.rank}"
        return f"{NEW_PREFIX}{LETTERS[self.kind]}-{self.experiment_id}-{self.id}{rank}"

    def key_of(self, data: bytes, writer: str = "") -> str:
        """The key under which one of several writers announces these bytes.

        So nobody replaces, or takes back, what another has announced for the same record (two processes that
        settle one checkpoint). A removal says nothing that could differ.
        """
        if self.kind == "removal":
            return self.key
        return f"{self.key}-{blake3(writer.encode() + data).hexdigest()[:16]}"

    @property
    def record_key(self) -> str:
        """The key of the record that is announced; that of a removal is the announcement itself."""
        if self.kind == "experiment":
            return experiment_key(self.experiment_id)
        if self.kind == "checkpoint":
            return checkpoint_key(self.experiment_id, self.id)
        if self.kind == "edit":
            return edit_key(self.experiment_id, self.id)
        if self.kind == "shard":
            return shard_key(self.experiment_id, self.id, self.rank or 0)
        return self.key


@dataclass(frozen=True, slots=True)
class LogListing:
    """What lies below `log/`: everything that is new since records and index objects were merged."""

    #: Names without their prefix.
    condemned: frozenset[str] = frozenset()
    #: Index objects and segments, by name.
    index: dict[str, ObjectInfo] = field(default_factory=dict)
    #: A record may be announced several times, with different bytes.
    new: dict[Announced, tuple[ObjectInfo, ...]] = field(default_factory=dict)
    segments: dict[str, ObjectInfo] = field(default_factory=dict)
    #: Whether there is no record that is neither announced nor in a segment.
    is_complete: bool = False
    #: Keys of what this version does not know: others may rely on it.
    unknown: frozenset[str] = frozenset()


def read_listing(objects: Iterable[ObjectInfo]) -> LogListing:
    """The objects of a listing of `log/`."""
    condemned: set[str] = set()
    unknown: set[str] = set()
    index: dict[str, ObjectInfo] = {}
    new: dict[Announced, tuple[ObjectInfo, ...]] = {}
    segments: dict[str, ObjectInfo] = {}
    is_complete = False
    for info in objects:
        key = info.key
        if key.startswith(NEW_PREFIX):
            announced = parse_announced(key)
            if announced is not None:
                new[announced] = (*new.get(announced, ()), info)
            else:
                unknown.add(key)
        elif key.startswith(INDEX_PREFIX) and _LEVELLED_NAME.fullmatch(key, len(INDEX_PREFIX)):
            index[key.removeprefix(INDEX_PREFIX)] = info
        elif key.startswith(SEGMENT_PREFIX) and _LEVELLED_NAME.fullmatch(key, len(SEGMENT_PREFIX)):
            segments[key.removeprefix(SEGMENT_PREFIX)] = info
        elif key == COMPLETE_KEY:
            is_complete = True
        elif found := _CONDEMNED_KEY.fullmatch(key):
            condemned.add(found.group(1))
        else:
            unknown.add(key)
    return LogListing(frozenset(condemned), index, new, segments, is_complete, frozenset(unknown))


def parse_announced(key: str) -> Announced | None:
    """What the object under this key announces; None when it is of no kind that this version knows."""
    found = _NEW_KEY.fullmatch(key)
    if found is None or (kind := KINDS.get(found.group(1))) is None:
        return None
    rank = found.group(4)
    if (rank is not None) != (kind == "shard"):
        return None
    return Announced(kind, found.group(2), found.group(3), None if rank is None else int(rank))


def experiment_key(experiment_id: str) -> str:
    """The key of what `init` recorded."""
    return f"{EXPERIMENT_PREFIX}{experiment_id}.json"


def checkpoint_key(experiment_id: str, checkpoint_id: str) -> str:
    """The key of a checkpoint's record."""
    return f"{CHECKPOINT_PREFIX}{experiment_id}/{checkpoint_id}.json"


def edit_key(experiment_id: str, edit_id: str) -> str:
    """The key of an edit."""
    return f"{EDIT_PREFIX}{experiment_id}/{edit_id}.json"


def shard_key(experiment_id: str, checkpoint_id: str, rank: int) -> str:
    """The key of what one of several processes has added to a checkpoint."""
    return f"{SHARD_PREFIX}{experiment_id}/{checkpoint_id}/{rank}.json"


def heartbeat_key(name: str) -> str:
    """The key of a sign of life."""
    return f"{HEARTBEAT_PREFIX}{name}.json"


def pack_key(name: bytes) -> str:
    """The key of a pack."""
    text = name.hex()
    return f"{PACK_PREFIX}{text[:2]}/{text}"


def index_key(name: str) -> str:
    """The key of an index object."""
    return INDEX_PREFIX + name


def segment_key(name: str) -> str:
    """The key of an object that holds many records."""
    return SEGMENT_PREFIX + name


def condemned_key(name: str) -> str:
    """The key of a list of packs that are not to be relied on."""
    return CONDEMNED_PREFIX + name


def levelled_name(level: int, digits: str) -> str:
    """The name of an index object or a segment; what is merged from others has a higher level than they."""
    return f"{min(level, MAX_LEVEL):02x}-{digits}"


def level_of(name: str) -> int:
    """The level of an index object or a segment."""
    return int(name[:2], 16)


def id_of_record(name: str) -> str | None:
    """The id in a name like `<id>.json`; None for other names."""
    found = _RECORD_NAME.fullmatch(name)
    return found.group(1) if found else None


def snapshot_of(experiment_id: str, checkpoint_id: str = "") -> SnapshotId:
    """The name of the snapshot of an experiment, or of one of its checkpoints."""
    return SnapshotId(f"{experiment_id}/{checkpoint_id}" if checkpoint_id else experiment_id)


def parse_snapshot_id(snapshot_id: str) -> tuple[ExperimentId, CheckpointId | None]:
    """Whose files a snapshot holds; raises `ValueError`."""
    experiment_id, _, checkpoint_id = snapshot_id.partition("/")
    if not is_id(experiment_id) or (snapshot_id != experiment_id and not is_id(checkpoint_id)):
        raise ValueError(f"not the name of a snapshot: {snapshot_id!r}")
    return ExperimentId(experiment_id), CheckpointId(checkpoint_id) if checkpoint_id else None
